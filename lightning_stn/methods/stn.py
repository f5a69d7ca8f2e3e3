"""Self-Tuning Networks, MacKay et al. (2019), arXiv:1903.03088."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.methods.base import Method, Rates


@dataclass(frozen=True)
class STN(Method):
    """Base weights and response learn together, on the training loss at perturbed hyperparameters.

    MacKay et al. (2019), arXiv:1903.03088, Algorithm 1.

    Args:
        centred: whether the response is counted from the current hyperparameters, `W(h) = W + diag(V (h - lambda)) R`.
            When `lambda` steps by `d`, the base weights move along, `W += diag(V d) R`, so that `w(h)` stays the same
            function: these are other coordinates of the same model, in which the gates learn from the perturbation
            alone. False counts from zero, `W(h) = W + diag(V h) R`, as in the paper: there the gates learn mostly
            `V lambda`, which acts as a second learning rate of `W`, and hypergradients of different hyperparameters
            are nearly the same.

    Raises:
        ValueError: `centred` is not a bool.
    """

    centred: bool = True

    name = "stn"
    rates = Rates(travel=9.0, smallest=1e-3, largest=1e-1, unknown=1e-2)

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.centred, bool):
            raise ValueError(f"STN: expected centred to be True or False, got {self.centred!r}.")

    def objective(
        self, root: nn.Module, hyperparameters: HyperparameterSet, loss: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the training loss once; see `Method.objective`."""
        value = loss()
        return value, value

    @property
    def moves_base(self) -> bool:
        """Whether the response is centred."""
        return self.centred
