"""Kinds of hyperparameters: the base class of all, `Float` and `Integer`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from types import UnionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from lightning_stn.schedule import Schedule, Value
from lightning_stn.transforms import invert, range_transform

Perturb = Literal["example", "batch"]
"""Whether each example has a perturbation, or the mini-batch has one."""

ResponseForm = Literal["full", "gates"]
"""Whether layers learn response weights beside their gates, or gates alone."""

BOUND_REACHED = 7.0
"""Distance from zero, unconstrained units, beyond which a bound counts as reached: 0.1% of the range is left."""

_LARGEST_INTEGER_RANGE = 2**20
"""Above this, float32 logits no longer reach every integer."""


class Chart(NamedTuple):
    """A chart of TensorBoard's custom scalars: lines, or a value with the band between lower and upper."""

    kind: Literal["Multiline", "Margin"]
    tags: list[str]


class Hyperparameter(ABC):
    """Base class of all kinds, and the type to annotate with.

    A further kind is a frozen dataclass with the fields `init`, `scale` and `perturb` and the three abstract methods;
    the other members suit a number with one unconstrained entry. A kind whose value is a string has no `bounds`, and
    its `parts` are these strings. The fields are the whole state, so that checkpoints load with `weights_only=True`.

    Attributes:
        init: the initial value, natural units.
        scale: initial standard deviation of the perturbation, unconstrained units.
        perturb: "example" draws a perturbation for each example, "batch" one for the mini-batch.
    """

    init: Value
    scale: float
    perturb: Perturb

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A module may save its arguments, so checkpoints may hold specifications.
        torch.serialization.add_safe_globals([cls])

    def __post_init__(self) -> None:
        """Check the perturbation; a kind that defines this method calls this one in it."""
        scale: Any = self.scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"{self!r}: expected scale to be a finite number, got {scale!r}; 0.5 suits most.")
        if scale <= 0:
            raise ValueError(
                f"{self!r}: expected scale > 0, a standard deviation in unconstrained units, got {scale!r}; to hold a "
                "value fixed, leave it out of the hyperparameters."
            )
        if self.perturb not in ("example", "batch"):
            raise ValueError(
                f"{self!r}: expected perturb='example' or perturb='batch', got {self.perturb!r}; choose one."
            )

    def __getstate__(self) -> dict[str, Any]:
        own: Any = self
        return {f.name: getattr(self, f.name) for f in fields(own)}  # without cached properties

    @property
    def signature(self) -> str:
        """The specification without `init` and `scale`; equal signatures give saved state the same meaning."""
        own: Any = self
        parts = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(own) if f.name not in ("init", "scale")]
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the unconstrained entries; empty for a single entry."""
        return ()

    @property
    def size(self) -> int:
        """Number of unconstrained entries."""
        return max(1, len(self.parts))

    def labels(self, name: str) -> list[str]:
        """A label for each unconstrained entry of the hyperparameter `name`: `<name>`, or `<name>/<part>`."""
        return [f"{name}/{part}" for part in self.parts] or [name]

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Bounds of the value, natural units, infinite where there is none; None for a value that is a string."""
        return -math.inf, math.inf

    @property
    def is_number(self) -> bool:
        """Whether the value is a number; otherwise it is one of `parts`."""
        return self.bounds is not None

    @abstractmethod
    def unconstrained_init(self) -> list[float]:
        """`init` in unconstrained units, entry by entry."""

    @abstractmethod
    def read(self, unconstrained: Tensor) -> Tensor:
        """Natural units: `[..., size]`, unconstrained units, to `[...]`; a string as its index in `parts`, int64."""

    @abstractmethod
    def to_python(self, value: Tensor) -> Value:
        """A scalar that `read` returned, as a number or a string."""

    def bound_reached(self, unconstrained: Sequence[float]) -> float | None:
        """The bound, natural units, that the hyperparameter has moved to since its start; None if there is none."""
        return None

    def band(self, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor] | None:
        """Values one scale below and above recorded ones; None if values are too coarse for it, as whole numbers are.

        Args:
            values: natural units.
            scales: perturbation scales, unconstrained units, of the same shape.
        """
        return None

    def curves(self, name: str, unconstrained: Tensor, scale: Tensor) -> dict[str, float]:
        """Scalars to log of the hyperparameter `name`, by tag: the value, and one scale below and above it.

        Args:
            name: name of the hyperparameter.
            unconstrained: its entries of `lambda`, `[size]`, unconstrained units.
            scale: its entries of `sigma`, `[size]`, unconstrained units.
        """
        values = self.read(torch.stack([unconstrained, unconstrained - scale, unconstrained + scale])).tolist()
        return {f"{kind}/{name}": value for kind, value in zip(("value", "lower", "upper"), values, strict=True)}

    def chart(self, name: str) -> Chart:
        """The chart of the hyperparameter `name`, with tags of `curves`."""
        return Chart("Margin", [f"{kind}/{name}" for kind in ("value", "lower", "upper")])


@dataclass(frozen=True)
class _Ranged(Hyperparameter):
    """Base class of `Float` and `Integer`: a number in a range."""

    low: float | None
    high: float | None
    init: float
    _: KW_ONLY
    scale: float = 0.5
    perturb: Perturb = "example"

    def _check(self, wanted: type | UnionType, kind: str, optional: Sequence[str] = ()) -> None:
        for name in ("low", "high", "init"):
            number: Any = getattr(self, name)
            if number is None and name in optional:
                continue
            if isinstance(number, bool) or not isinstance(number, wanted) or not math.isfinite(getattr(self, name)):
                raise ValueError(
                    f"{self!r}: expected {name} to be a {kind}, got {number!r}; write it as a plain Python number."
                )
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"{self!r}: expected low < high, got {self.low!r} and {self.high!r}; the range is empty.")
        super().__post_init__()

    @property
    @abstractmethod
    def transform(self) -> Transform:
        """From unconstrained to natural units (for an integer: before rounding)."""

    @property
    def bounds(self) -> tuple[float, float]:
        """`low` and `high`, infinite where they are None."""
        return (
            -math.inf if self.low is None else float(self.low),
            math.inf if self.high is None else float(self.high),
        )

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """Values in natural units, elementwise."""
        value: Tensor = self.transform(unconstrained)
        return value

    def unconstrained_init(self) -> list[float]:
        """`init` in unconstrained units."""
        return [invert(self.transform, self.init)]

    def read(self, unconstrained: Tensor) -> Tensor:
        """Values in natural units: `[..., 1]`, unconstrained units, to `[...]`."""
        return self.constrain(unconstrained.squeeze(-1))

    def to_python(self, value: Tensor) -> Value:
        """A scalar as a number."""
        number: float = value.item()
        return number

    def bound_reached(self, unconstrained: Sequence[float]) -> float | None:
        """The bound beyond `BOUND_REACHED` whose side the hyperparameter has moved to since its start."""
        (place,), (start,) = unconstrained, self.unconstrained_init()
        low, high = self.bounds
        if place > max(BOUND_REACHED, start + 1):
            return high if math.isfinite(high) else None
        return low if place < min(-BOUND_REACHED, start - 1) and math.isfinite(low) else None


@dataclass(frozen=True)
class Float(_Ranged):
    """A real hyperparameter.

    Args:
        low: lower bound, natural units; None for no bound.
        high: upper bound, natural units; None for no bound.
        init: initial value, strictly between the bounds, natural units.
        scale: initial standard deviation of the perturbation, unconstrained units.
        perturb: "example" draws a perturbation for each example, "batch" one for the mini-batch (for strengths that act
            on the batch as a whole, such as the weight of a penalty).
        log: perturb and step the logarithm, for positive quantities that span orders of magnitude.

    Raises:
        ValueError: the range is empty, `init` lies on or beyond a bound, `log` is set for a range that is not positive,
            or an argument has a wrong type.
    """

    _: KW_ONLY
    log: bool = False

    def __post_init__(self) -> None:
        """Check the range."""
        self._check(int | float, "finite number", optional=("low", "high"))
        log: Any = self.log
        if not isinstance(log, bool):
            raise ValueError(f"{self!r}: expected log to be True or False, got {log!r}; set one of them.")
        if self.log and (self.low is None or self.low < 0):
            raise ValueError(f"{self!r}: log=True needs a positive range, got low={self.low!r}; give low >= 0.")
        if (self.low is not None and self.init <= self.low) or (self.high is not None and self.init >= self.high):
            raise ValueError(
                f"{self!r}: expected init strictly between low and high, got {self.init!r}: a bound is infinitely far "
                "away in unconstrained units; move init inwards or widen the range."
            )

    @cached_property
    def transform(self) -> Transform:
        """From unconstrained to natural units."""
        return range_transform(self.low, self.high, log=self.log)

    def bound_reached(self, unconstrained: Sequence[float]) -> float | None:
        """As for every range; on a logarithmic scale, zero is no bound."""
        bound = super().bound_reached(unconstrained)
        return None if self.log and not bound else bound

    def band(self, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Values one scale below and above `values`."""
        centre = self.transform.inv(values)
        return self.constrain(centre - scales), self.constrain(centre + scales)


@dataclass(frozen=True)
class Integer(_Ranged):
    """A whole-number hyperparameter: a real one, rounded, so that each integer has an equal share of the real range.

    Args:
        low: smallest value, included.
        high: largest value, included.
        init: initial value; the bounds are allowed.
        scale: initial standard deviation of the perturbation, unconstrained units.
        perturb: as for `Float`.

    Raises:
        ValueError: the range has fewer than two integers or more than 2**20, `init` lies outside it, or an argument is
            not a whole number.
    """

    low: int
    high: int
    init: int

    def __post_init__(self) -> None:
        """Check the range."""
        self._check(int, "whole number")
        if self.high - self.low > _LARGEST_INTEGER_RANGE:
            raise ValueError(
                f"{self!r}: a range of more than {_LARGEST_INTEGER_RANGE} integers cannot be resolved; "
                "use Float(..., log=True) and round where it is read."
            )
        if not self.low <= self.init <= self.high:
            raise ValueError(f"{self!r}: expected low <= init <= high, got init={self.init!r}; move it into the range.")

    @cached_property
    def transform(self) -> Transform:
        """From unconstrained units to the real range that is rounded, half an integer wider at each end."""
        return range_transform(self.low - 0.5, self.high + 0.5)

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """Values in natural units, elementwise, as int64."""
        return super().constrain(unconstrained).round().clamp(self.low, self.high).to(torch.int64)


def check_specifications(specifications: Any, taken: Container[str]) -> None:
    """Check names and specifications of new hyperparameters.

    Args:
        specifications: name to specification.
        taken: names that exist already.

    Raises:
        TypeError: `specifications` is not a mapping, or a value is not a `Hyperparameter`.
        ValueError: a name is taken, or is not a Python identifier.
    """
    if not isinstance(specifications, Mapping):
        raise TypeError(
            "Expected hyperparameters as a dictionary from names to specifications, got "
            f"{specifications!r}; write {{'dropout': Float(0.0, 0.9, init=0.05)}}."
        )
    for name, specification in specifications.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(
                f"Expected a hyperparameter's name to be a Python identifier, got {name!r}; "
                "it becomes a TensorBoard tag and a CSV column."
            )
        if name in taken:
            raise ValueError(f"Hyperparameter {name!r} exists already; choose another name.")
        if not isinstance(specification, Hyperparameter):
            raise TypeError(
                f"Expected hyperparameter {name!r} to be a Hyperparameter, such as a Float, an Integer or a "
                f"Categorical, got {specification!r}; write for instance Float(0.0, 1.0, init=0.5)."
            )


def empty_schedule(specifications: Mapping[str, Hyperparameter]) -> Schedule:
    """A schedule of hyperparameters, without rows.

    Raises:
        ValueError: columns would collide.
    """
    choices = {name: s.parts for name, s in specifications.items() if not s.is_number}
    parts = {name: s.parts for name, s in specifications.items() if s.is_number and s.parts}
    return Schedule(tuple(specifications), choices=choices, parts=parts)
