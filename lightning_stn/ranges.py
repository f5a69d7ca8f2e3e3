"""Numbers in a range: `Float` and `Integer`."""

from collections.abc import Hashable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from lightning_stn.arguments import LARGEST, SMALLEST, is_whole
from lightning_stn.decimals import shortest_between
from lightning_stn.ranged import Ranged
from lightning_stn.specifications import Axis, Hyperparameter, ReadTogether, surroundings
from lightning_stn.transforms import BoundedRanges, invert, range_transform

_LARGEST_INTEGER_RANGE = 2**20
"""Above this, float32 logits no longer reach every integer."""

START = 0.1
"""Start of a hyperparameter without `init`, as a share of its range."""

LOG_START = 0.5
"""The same on a logarithmic scale, where a tenth of the way is often a strength without any effect."""


@dataclass(frozen=True, repr=False)
class Float(Ranged):
    """A real hyperparameter.

    Args:
        low: lower bound, natural units; None for no bound.
        high: upper bound, natural units; None for no bound.
        init: initial value, strictly between the bounds, natural units; None for a tenth of the range, with `log` for
            the middle of its logarithm.
        scale: initial standard deviation of the perturbation, unconstrained units.
        perturb: "example" draws a perturbation for each example, "batch" one for the mini-batch (for strengths that act
            on the batch as a whole, such as the weight of a penalty).
        unit: name of the natural unit, such as "degrees", for the axes of plots.
        log: perturb and step the logarithm, for positive quantities that span orders of magnitude.

    Raises:
        ValueError: the range is empty, `init` lies on or beyond a bound or is missing for an unbounded range, `log` is
            set for a range that is not positive, float32 does not hold a number or tells it from a bound, or an
            argument has a wrong type.

    Example:
        >>> Float(0.0, 0.9, init=0.3), Float(0.0, None, init=0.1), Float(1e-6, 1e-1, log=True)
        (Float(0.0, 0.9, init=0.3), Float(0.0, None, init=0.1), Float(1e-06, 0.1, log=True))
        >>> [f"{kind.init:.2g}" for kind in (Float(0.0, 0.8), Float(1e-6, 1e-1, log=True))]
        ['0.08', '0.00032']
    """

    _: KW_ONLY
    log: bool = False

    def __post_init__(self) -> None:
        """Check the range."""
        self._check(int | float, "finite number", optional=("low", "high", "init"))
        log: Any = self.log
        if not isinstance(log, bool):
            raise ValueError(f"{self!r}: expected log to be True or False, got {log!r}; set one of them.")
        if self.log and (self.low is None or self.low < 0):
            raise ValueError(f"{self!r}: log=True needs a positive range, got low={self.low!r}; give low >= 0.")
        self._choose_init(self._default_init())
        if (self.low is not None and self.init <= self.low) or (self.high is not None and self.init >= self.high):
            raise ValueError(
                f"{self!r}: expected init strictly between low and high, got {self.init!r}: a bound is infinitely far "
                "away in unconstrained units; move init inwards or widen the range."
            )
        self._check_resolution()

    def _check_size(self, name: str, number: Any) -> None:
        if number and not SMALLEST <= abs(number) <= LARGEST:
            raise ValueError(
                f"{self!r}: expected {name} to be 0, or between {SMALLEST:.2g} and {LARGEST:.2g} in size, which "
                f"float32 holds, got {number!r}; give the hyperparameter other units."
            )

    def _check_resolution(self) -> None:
        """Check that float32, in which values are computed, tells bounds and start apart."""
        ordered = [number for number in (self.low, self.init, self.high) if number is not None]
        rounded = torch.tensor(list(map(float, ordered)), dtype=torch.float64, device="cpu").float().tolist()
        if any(one >= other for one, other in pairwise(rounded)):
            raise ValueError(
                f"{self!r}: expected low, init and high to differ in float32, got {ordered}; widen the range, or give "
                "the distance from low as the hyperparameter."
            )
        if self.low is not None and self.high is not None and self.high - self.low > LARGEST:
            raise ValueError(
                f"{self!r}: expected high - low of at most {LARGEST:.2g}, which float32 holds, got {ordered}; "
                "narrow the range."
            )

    @property
    def axis(self) -> Axis:
        """As for every number; logarithmic with `log`."""
        return super().axis._replace(log=self.log)

    def _default_init(self) -> float | None:
        """A tenth of the range, or the middle of its logarithm; None for a range without bounds."""
        if self.low is None or self.high is None:
            return None
        if self.log is True:
            return float(self.low * (self.high / self.low) ** LOG_START) if 0 < self.low < self.high else None
        return float(self.low + START * (self.high - self.low))

    @cached_property
    def transform(self) -> Transform:
        """From unconstrained to natural units."""
        low, high = (None if bound is None else float(bound) for bound in (self.low, self.high))
        return range_transform(low, high, log=self.log)

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """Values in natural units, elementwise; never beyond the bounds, infinite, or 0 on a log scale."""
        value: Tensor = self.transform(unconstrained)
        low, high = self.bounds
        return value.clamp(max(low, SMALLEST if self.log else -LARGEST), min(high, LARGEST))

    def written(self, values: Tensor) -> float:
        """The shortest decimal number whose entry is the same float32 number."""
        low, value, high = values.tolist()
        return shortest_between(low, value, high)

    @property
    def family(self) -> Hashable | None:
        """Ranges with two bounds, on a linear or a logarithmic scale; on the latter zero is no bound.

        A subclass may read its entries in another way, and is read alone.
        """
        bounded = self.low is not None and self.high is not None and (not self.log or self.low > 0)
        return (Float, self.log) if bounded and type(self) is Float else None

    def read_together(self, specifications: Sequence[Hyperparameter]) -> ReadTogether:
        """Reads ranges with two bounds; see `Hyperparameter.read_together`."""
        return BoundedRanges([cast(Float, one).bounds for one in specifications], self.log)

    def between(self, before: float, after: float, share: float) -> float:
        """A value between two, linear in unconstrained units."""
        (start,), (end,) = self.entries(before), self.entries(after)
        entry = torch.tensor([start + share * (end - start)], dtype=torch.float32, device="cpu")
        return float(self.value(entry.double()))

    def bound_reached(self, unconstrained: Sequence[float]) -> float | None:
        """As for every range; on a logarithmic scale, zero is no bound."""
        bound = super().bound_reached(unconstrained)
        return None if self.log and not bound else bound

    def band(self, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Values one scale below and above `values`."""
        centre = self.transform.inv(values)
        return self.constrain(centre - scales), self.constrain(centre + scales)


@dataclass(frozen=True, repr=False)
class Integer(Ranged):
    """A whole-number hyperparameter: a real one, rounded, so that each integer has an equal share of the real range.

    Args:
        low: smallest value, included.
        high: largest value, included.
        init: initial value; the bounds are allowed. None for a tenth of the range, and at least one above `low`.
        scale: initial standard deviation of the perturbation, unconstrained units.
        perturb: as for `Float`.
        unit: as for `Float`.

    Raises:
        ValueError: the range has fewer than two integers or more than 2**20, `init` lies outside it, or an argument is
            not a whole number.

    Example:
        >>> length = Integer(0, 16, unit="pixels")
        >>> length, length.init
        (Integer(0, 16, unit='pixels'), 2)
        >>> length.read(torch.tensor([[-9.0], [0.0], [9.0]]))
        tensor([ 0,  8, 16])
    """

    low: int
    high: int
    init: int = cast(int, None)

    def __post_init__(self) -> None:
        """Check the range."""
        self._check(int, "whole number", optional=("init",))
        self._choose_init(self._default_init())
        if self.high - self.low > _LARGEST_INTEGER_RANGE:
            raise ValueError(
                f"{self!r}: expected high - low of at most {_LARGEST_INTEGER_RANGE}, got {self.high - self.low}, whose "
                "integers cannot be resolved; use Float(..., log=True) and round where it is read."
            )
        if not self.low <= self.init <= self.high:
            raise ValueError(f"{self!r}: expected low <= init <= high, got init={self.init!r}; move it into the range.")

    def _default_init(self) -> int:
        """A tenth of the range above `low`, and at least one."""
        return self.low + max(1, round(START * min(self.high - self.low, _LARGEST_INTEGER_RANGE)))

    def _check_size(self, name: str, number: Any) -> None:
        if not is_whole(number):
            raise ValueError(f"{self!r}: expected {name} to be a whole number of int64, got {number!r}; lower it.")

    @cached_property
    def transform(self) -> Transform:
        """From unconstrained units to the distance from `low` that is rounded, half an integer wider at each end."""
        return range_transform(-0.5, self.high - self.low + 0.5)

    def unconstrained_init(self) -> list[float]:
        """`init` in unconstrained units."""
        return [invert(self.transform, self.init - self.low)]

    @property
    def is_rounded(self) -> bool:
        """True."""
        return True

    def unrounded(self, unconstrained: Tensor) -> float:
        """The real number, natural units, that is rounded to the value at an entry, `[1]`."""
        low, number, high = (self.transform(surroundings(unconstrained)) + self.low).flatten().tolist()
        return shortest_between(low, number, high)

    def curves(self, name: str, values: Tensor, unconstrained: Tensor, scale: Tensor) -> dict[str, float]:
        """As for every number, and the real number before rounding."""
        curves = super().curves(name, values, unconstrained, scale)
        return {**curves, f"value_unrounded/{name}": self.unrounded(unconstrained)}

    def _position(self, value: float) -> float:
        """The distance from `low`; of a real number that is rounded to a value in the range, too."""
        distance = value - self.low
        if not -0.5 <= distance <= self.high - self.low + 0.5:
            raise ValueError(f"{self!r}: expected a value from low to high, got {value!r}; give one in the range.")
        return distance

    def between(self, before: float, after: float, share: float) -> int:
        """A value between two, which may be real numbers: linear in unconstrained units, and rounded."""
        (start,), (end,) = self.entries(before), self.entries(after)
        return int(self.constrain(torch.tensor(start + share * (end - start), dtype=torch.float64, device="cpu")))

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """Values in natural units, elementwise, as int64."""
        distance: Tensor = self.transform(unconstrained)
        # `low` is added as an integer, since float32 holds no whole numbers beyond 2^24 one by one.
        return distance.round().clamp(0, self.high - self.low).to(torch.int64) + self.low
