"""One row of a schedule."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_stn.specifications import Value


@dataclass(frozen=True)
class Row:
    """The hyperparameters at one step.

    Args:
        step: number of finished training batches.
        epoch: zero-based epoch.
        values: natural units, or the choice, by name.
        scales: perturbation scales in unconstrained units, by the schedule's `scale_names`.
        train_loss: mean training loss since the last record, of the first process; None where there was none, or it was
            not finite.
        valid_loss: mean validation loss of the hyperparameter steps since the last record, or None.
        unrounded: of whole numbers the real number that was rounded, by name; empty where it is not known.
    """

    step: int
    epoch: int
    values: Mapping[str, Value]
    scales: Mapping[str, float]
    train_loss: float | None = None
    valid_loss: float | None = None
    unrounded: Mapping[str, float] = field(default_factory=dict)
