"""Self-Tuning Networks, MacKay et al. (2019), arXiv:1903.03088."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
        gate_scale: `s` in `W(h) = W + diag(V s (h - lambda)) R`. It does not limit what the response can be, but under
            Adam its gates move at `s` times the learning rate of the weights, under SGD at its square times it.
            None for 0.5 where the response is centred, and for 1.0, the paper's, where it is not.

    Raises:
        ValueError: `centred` is not a bool, or `gate_scale` is not a positive number.
    """

    centred: bool = True
    gate_scale: float | None = None

    name = "stn"
    rates = Rates(travel=9.0, smallest=1e-3, largest=1e-1, unknown=1e-2)

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.centred, bool):
            raise ValueError(f"STN: expected centred to be True or False, got {self.centred!r}.")
        scale: Any = self.gate_scale
        number = isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale < math.inf
        if not number and scale is not None:
            raise ValueError(f"STN: expected gate_scale to be a positive number, got {scale!r}; give one, or None.")

    def objective(
        self, root: nn.Module, hyperparameters: HyperparameterSet, loss: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the training loss once; see `Method.objective`."""
        value = loss()
        return value, value

    @property
    def resolved_gate_scale(self) -> float:
        """`gate_scale`, or its default."""
        if self.gate_scale is None:
            return 0.5 if self.centred else 1.0
        return self.gate_scale

    @property
    def moves_base(self) -> bool:
        """Whether the response is centred."""
        return self.centred
