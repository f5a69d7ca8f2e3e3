"""Self-Tuning Networks, MacKay et al. (2019), arXiv:1903.03088."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.methods.base import Method, Rates


@dataclass(frozen=True)
class STN(Method):
    """Base weights and response learn together, on the training loss at perturbed hyperparameters.

    MacKay et al. (2019), arXiv:1903.03088, Algorithm 1. The response is counted from zero: `W(h) = W + diag(V h) R`.
    """

    name = "stn"
    centred = False
    # The smallest is the paper's rate for its convolutional networks, section 4.2.
    rates = Rates(travel=30.0, smallest=3e-3, largest=1e-1, unknown=1e-2)

    def objective(
        self, root: nn.Module, hyperparameters: HyperparameterSet, loss: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the training loss once; see `Method.objective`."""
        value = loss()
        return value, value
