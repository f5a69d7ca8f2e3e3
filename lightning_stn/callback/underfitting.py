"""Whether regularisers were switched off because the network underfits, judged by what a run has recorded."""

import math
from collections.abc import Collection
from typing import NamedTuple

from lightning_stn.ranges import START
from lightning_stn.schedule import Row, Schedule
from lightning_stn.specifications import Axis, Hyperparameter, Value

LAST = 0.25
"""Share of a run, at its end, over which losses are averaged."""

OFF, SMALL = 0.05, 0.15
"""Shares of its range up to which a strength counts as switched off, and as too small to raise the training loss."""

GAP = 0.1
"""Share of the validation loss by which the training loss may be lower in a network that does not overfit."""

FITTED = 0.05
"""Share of its first value down to which a training loss falls in a network that fits its training data."""


class Underfitting(NamedTuple):
    """A run whose network underfits, and which has therefore switched regularisers off.

    Args:
        names: the hyperparameters that were switched off.
        train_loss: mean at the end of the run.
        valid_loss: mean at the end of the run.
    """

    names: list[str]
    train_loss: float
    valid_loss: float

    def __str__(self) -> str:
        """In words, with what to do."""
        below = "hardly" if self.train_loss < self.valid_loss else "not"
        return (
            f"The network underfits: at the end of the run its training loss, {self.train_loss:.3g}, was {below} below "
            f"its validation loss, {self.valid_loss:.3g}. Regularisation can only raise both, which is why "
            f"{', '.join(self.names)} ended near zero. Use a larger network, train for longer, raise the learning rate "
            "of the weights, or weaken what is not tuned, such as fixed augmentation or label smoothing."
        )


def underfitting(schedule: Schedule, slight: Collection[str]) -> Underfitting | None:
    """Whether strengths were switched off because the network underfits; None if not, or if it cannot be told.

    A strength is a number whose range begins at zero, or at a small number on a logarithmic scale. Four things hold:

    - At least one strength fell, and ended near zero.
    - The others ended near zero as well, or hardly mattered. The recorded training loss is one under regularisation, so
      that it can be compared with the validation loss only where hardly any regularisation is left.
    - Over the last quarter of the run the training loss was not below the validation loss, by more than 10% of it. A
      network that overfits has a lower training loss.
    - The training loss did not fall to 5% of its first value. A network that fits its data has no use for
      regularisation either, but needs no advice.

    Args:
        schedule: of the run, with losses.
        slight: labels of hyperparameters that hardly mattered for the validation loss.
    """
    names = _switched_off(schedule, slight)
    first = next((row.train_loss for row in schedule.rows if row.train_loss is not None), None)
    losses = _final_losses(schedule.rows)
    if not names or first is None or losses is None:
        return None
    train_loss, valid_loss = losses
    fits = train_loss <= FITTED * first
    overfits = valid_loss - train_loss > GAP * abs(valid_loss)
    return None if fits or overfits else Underfitting(names, train_loss, valid_loss)


def _switched_off(schedule: Schedule, slight: Collection[str]) -> list[str]:
    """Names of strengths that fell to zero; none if another strength is left."""
    first, last = schedule.rows[0].values, schedule.rows[-1].values
    off = []
    for name, specification in schedule.specifications.items():
        start, end = (_strength(specification, values[name]) for values in (first, last))
        if start is None or end is None:
            continue
        if end <= OFF < start:
            off.append(name)
        elif end > _small(specification.axis) and name not in slight:
            return []
    return off


def _strength(specification: Hyperparameter, value: Value) -> float | None:
    """How far along its range a strength is, from 0 for switched off; None for a hyperparameter that is no strength."""
    axis = specification.axis
    if axis.bounds is None or isinstance(value, str):
        return None
    low, high = axis.bounds
    if math.isinf(high):
        high = float(specification.init) / START  # as if it had started where a bounded range does
    if axis.log and 0 < low < value < high:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low) if low == 0 or (axis.log and low > 0) else None


def _small(axis: Axis) -> float:
    """The share up to which a strength is small; the smallest whole number above zero is small, too."""
    assert axis.bounds is not None
    low, high = axis.bounds
    return max(SMALL, 1 / (high - low)) if axis.whole else SMALL


def _final_losses(rows: list[Row]) -> tuple[float, float] | None:
    """Means of training and validation loss over the last rows; None where these have none."""
    begin = (1 - LAST) * rows[-1].step
    losses = [(row.train_loss, row.valid_loss) for row in rows if row.step > begin]
    pairs = [(train, valid) for train, valid in losses if train is not None and valid is not None]
    if not pairs:
        return None
    train, valid = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return train, valid
