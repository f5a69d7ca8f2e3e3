"""The hyperparameters of a `schedule.csv`, which names no ranges."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_stn.specifications import Hyperparameter, Perturb, Value


@dataclass(frozen=True)
class Unspecified(Hyperparameter):
    """A hyperparameter of which a file tells values and scales, but neither range nor start.

    Args:
        init: the first recorded value; "" for a choice and 0 for a number without one.
        low: the smallest recorded value; None for a choice, and without rows.
        high: the largest recorded value.
        choices: for a choice, the choices.
        names: for a number with several unconstrained entries, their names.
        scale: 1; the recorded scales are in the rows.
        perturb: "example", since the file does not tell.
    """

    init: Value = 0.0
    low: float | None = None
    high: float | None = None
    choices: Sequence[str] = ()
    names: Sequence[str] = ()
    scale: float = 1.0
    perturb: Perturb = "example"

    def __post_init__(self) -> None:
        """Check the labels, and keep them as tuples."""
        for field in ("choices", "names"):
            labels: Any = getattr(self, field)
            if not isinstance(labels, tuple | list) or not all(isinstance(label, str) for label in labels):
                raise ValueError(f"{self!r}: expected {field} to be a tuple of strings, got {labels!r}; give one.")
            object.__setattr__(self, field, tuple(labels))
        super().__post_init__()

    @property
    def parts(self) -> tuple[str, ...]:
        """The choices, or the names of the entries."""
        return tuple(self.choices or self.names)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Smallest and largest recorded value, natural units; None for a choice."""
        if self.choices:
            return None
        return (-math.inf if self.low is None else self.low, math.inf if self.high is None else self.high)

    def unconstrained_init(self) -> list[float]:
        """Of a choice logits; of a number the value in each entry, since its range is not known."""
        if self.choices:
            return [float(choice == self.init) for choice in self.choices]
        return [float(self.init)] * self.size

    def read(self, unconstrained: Tensor) -> Tensor:
        """Of a choice the index of the largest entry; of a number the first entry."""
        return unconstrained.argmax(-1) if self.choices else unconstrained[..., 0]

    def to_python(self, value: Tensor) -> Value:
        """The number, or the choice with this index."""
        return self.choices[int(value)] if self.choices else float(value)

    def observe(self, values: Sequence[Value]) -> "Unspecified":
        """The same with the range of recorded values."""
        if not values:
            return self
        if self.choices:
            return Unspecified(init=values[0], choices=self.choices)
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")
        return Unspecified(values[0], float(numbers.min()), float(numbers.max()), names=self.names)
