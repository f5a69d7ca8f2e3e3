"""Base class of the hyperparameters that are a number in a range."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from types import UnionType
from typing import Any, cast

from torch import Tensor
from torch.distributions.transforms import Transform

from lightning_stn.arguments import is_number
from lightning_stn.specifications import Hyperparameter, Perturb, Value
from lightning_stn.transforms import invert

BOUND_REACHED = 7.0
"""Distance from zero, unconstrained units, beyond which a bound counts as reached: 0.1% of the range is left."""

FARTHEST = 100.0
"""Distance from zero, unconstrained units, of the entry that stands for a bound itself."""


@dataclass(frozen=True, repr=False)
class Ranged(Hyperparameter):
    """Base class of `Float` and `Integer`: a number in a range."""

    low: float | None
    high: float | None
    init: float = cast(float, None)
    _: KW_ONLY
    scale: float = 0.5
    perturb: Perturb = "example"
    unit: str = ""

    def _choose_init(self, init: float | None) -> None:
        """Set `init` where none was given; None where the range has no default."""
        if cast(Any, self.init) is None:
            if init is None:
                raise ValueError(
                    f"{self!r}: expected init for a range without a bound or from zero on a logarithmic "
                    "scale, got None; give the value at which training starts."
                )
            object.__setattr__(self, "init", init)

    def _derived_defaults(self) -> dict[str, Any]:
        """That of `init`."""
        return {"init": self._default_init()} if is_number(self.low) and is_number(self.high) else {}

    @abstractmethod
    def _default_init(self) -> float | None:
        """`init` where none is given, for bounds that are any numbers; None for a range without a default."""

    def _check(self, wanted: type | UnionType, kind: str, optional: Sequence[str] = ()) -> None:
        for name in ("low", "high", "init"):
            number: Any = getattr(self, name)
            if number is None and name in optional:
                continue
            if isinstance(number, bool) or not isinstance(number, wanted) or not _is_finite(number):
                raise ValueError(
                    f"{self!r}: expected {name} to be a {kind}, got {number!r}; write it as a plain Python number."
                )
            self._check_size(name, number)
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"{self!r}: expected low < high, got {self.low!r} and {self.high!r}; the range is empty.")
        super().__post_init__()

    @abstractmethod
    def _check_size(self, name: str, number: Any) -> None:
        """Check that a number is neither too large nor too small to compute with."""

    @property
    @abstractmethod
    def transform(self) -> Transform:
        """From unconstrained to natural units (for an integer: its distance from `low`, before rounding)."""

    @property
    def bounds(self) -> tuple[float, float]:
        """`low` and `high`, infinite where they are None."""
        return (
            -math.inf if self.low is None else float(self.low),
            math.inf if self.high is None else float(self.high),
        )

    @abstractmethod
    def constrain(self, unconstrained: Tensor) -> Tensor:
        """Values in natural units, elementwise."""

    @cached_property
    def _start(self) -> float:
        (start,) = self.unconstrained_init()
        return start

    def unconstrained_init(self) -> list[float]:
        """`init` in unconstrained units."""
        return [invert(self.transform, self.init)]

    def entries(self, value: Value) -> list[float]:
        """The entry at which the hyperparameter has a value; at a bound, one beyond which the value stays the same."""
        assert not isinstance(value, str)
        return [max(-FARTHEST, min(FARTHEST, invert(self.transform, self._position(value))))]

    def _position(self, value: float) -> float:
        """What `transform` returns for a value."""
        low, high = self.bounds
        if not low <= value <= high:
            raise ValueError(f"{self!r}: expected a value from low to high, got {value!r}; give one in the range.")
        return value

    def read(self, unconstrained: Tensor) -> Tensor:
        """Values in natural units: `[..., 1]`, unconstrained units, to `[...]`."""
        return self.constrain(unconstrained.squeeze(-1))

    def to_python(self, value: Tensor) -> Value:
        """A scalar as a number."""
        number: float = value.item()
        return number

    def bound_reached(self, unconstrained: Sequence[float]) -> float | None:
        """The bound beyond `BOUND_REACHED` whose side the hyperparameter has moved to since its start."""
        (place,), start = unconstrained, self._start
        low, high = self.bounds
        if place > max(BOUND_REACHED, start + 1):
            return high if math.isfinite(high) else None
        return low if place < min(-BOUND_REACHED, start - 1) and math.isfinite(low) else None


def _is_finite(number: Any) -> bool:
    """As `math.isfinite`, which whole numbers beyond float64 overflow."""
    return bool(-math.inf < number < math.inf)
