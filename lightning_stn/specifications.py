"""Kinds of hyperparameters: the base class of all."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_stn.arguments import SMALLEST, is_number
from lightning_stn.decimals import half_spacing
from lightning_stn.written import constructor

Value = float | str
"""Value of a hyperparameter in natural units: a number, whole or real, or the name of a choice."""

Perturb = Literal["example", "batch"]
"""Whether each example has a perturbation, or the mini-batch has one."""

ResponseForm = Literal["full", "gates"]
"""Whether layers learn response weights beside their gates, or gates alone."""


ReadTogether = Callable[[Tensor], Tensor]
"""Reads several hyperparameters: entries `[..., k]`, unconstrained units, to values `[..., k]`, natural units."""

LARGEST_SCALE = 1e6
"""Largest initial scale; the layers that read such samples would compute what is not finite."""


BAND = ("value", "value_lower", "value_upper")
"""Kinds of the curves of a number: the value, and one scale below and above it."""

PLACE = "place"
"""Kind of the curve that shows how far along its range a value is."""


class Chart(NamedTuple):
    """A chart of TensorBoard's custom scalars: lines, or a value with the band between lower and upper."""

    kind: Literal["Multiline", "Margin"]
    tags: list[str]


class Axis(NamedTuple):
    """The axis on which values are drawn; hyperparameters with equal axes can share one.

    Args:
        unit: name of the natural unit.
        bounds: of the value, natural units; None for a choice.
        log: whether the axis is logarithmic.
        whole: whether values are whole numbers.
        choices: names at the ticks of a choice; empty for a number.
    """

    unit: str
    bounds: tuple[float, float] | None
    log: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()


class Hyperparameter(ABC):
    """Base class of all kinds, and the type to annotate with.

    A further kind is a frozen dataclass with the fields `init`, `scale` and `perturb` and the three abstract methods;
    the other members suit a number with one unconstrained entry. A kind whose value is a string has no `bounds`, and
    its `parts` are these strings. The fields are the whole state, so that checkpoints load with `weights_only=True`.

    Attributes:
        init: the initial value, natural units.
        scale: initial standard deviation of the perturbation, unconstrained units.
        perturb: "example" draws a perturbation for each example, "batch" one for the mini-batch.
        unit: name of the natural unit, for the axes of plots; "" where there is none.
        kinds: every kind by the name of its class, for files that name kinds; of equal names that of this package, or
            the last one defined.
    """

    init: Value
    scale: float
    perturb: Perturb
    unit: str = ""

    kinds: ClassVar[dict[str, type["Hyperparameter"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A module may save its arguments, so checkpoints may hold specifications.
        torch.serialization.add_safe_globals([cls])
        known = Hyperparameter.kinds.get(cls.__name__)
        if known is None or not known.__module__.startswith("lightning_stn."):
            Hyperparameter.kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Check the perturbation; a kind that defines this method calls this one in it."""
        scale: Any = self.scale
        if not is_number(scale):
            raise ValueError(f"{self!r}: expected scale to be a finite number, got {scale!r}; 0.5 suits most.")
        if scale > LARGEST_SCALE:
            raise ValueError(
                f"{self!r}: expected scale of at most {LARGEST_SCALE:g}, a standard deviation in unconstrained units, "
                f"got {scale!r}; 0.5 suits most."
            )
        if scale < SMALLEST:
            raise ValueError(
                f"{self!r}: expected scale > 0, a standard deviation in unconstrained units, got {scale!r}; to hold a "
                "value fixed, leave it out of the hyperparameters."
            )
        if self.perturb not in ("example", "batch"):
            raise ValueError(
                f"{self!r}: expected perturb='example' or perturb='batch', got {self.perturb!r}; choose one."
            )
        unit: Any = self.unit
        if not isinstance(unit, str) or not unit.isprintable():
            raise ValueError(
                f"{self!r}: expected unit to be printable text, got {unit!r}; write for instance 'pixels'."
            )

    def __repr__(self) -> str:
        """As one would write it: bounds or choices by position, other fields where they differ from their defaults.

        Error messages show a specification before its fields have been checked, so that they may have any values.
        """
        own: Any = self
        return constructor(own, self._derived_defaults()) if is_dataclass(own) else object.__repr__(self)

    def _derived_defaults(self) -> dict[str, Any]:
        """Defaults that depend on other fields, by name; none where these have no usable values."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        own: Any = self
        return {f.name: getattr(self, f.name) for f in fields(own)}  # without cached properties

    @property
    def signature(self) -> str:
        """The specification without `init`, `scale` and `unit`; equal signatures give saved state the same meaning."""
        own: Any = self
        without = ("init", "scale", "unit")
        parts = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(own) if f.name not in without]
        return f"{type(self).__name__}({', '.join(parts)})"

    def to_plain(self) -> dict[str, Any]:
        """Kind and fields, as JSON holds them."""
        own: Any = self
        return {"kind": type(self).__name__, **{f.name: getattr(self, f.name) for f in fields(own)}}

    @staticmethod
    def from_plain(plain: Any) -> "Hyperparameter":
        """The specification that `to_plain` described.

        Raises:
            ValueError: the kind is not known, a field is unknown or missing, or a value does not fit.
        """
        kind = plain.get("kind") if isinstance(plain, Mapping) else plain
        if not isinstance(plain, Mapping) or not isinstance(kind, str) or kind not in Hyperparameter.kinds:
            known = sorted(name for name, cls in Hyperparameter.kinds.items() if not inspect.isabstract(cls))
            raise ValueError(
                f"expected a kind of hyperparameter, one of {known}, got {kind!r}; import the module that defines the "
                "kind before."
            )
        cls: Any = Hyperparameter.kinds[kind]
        given = {name: value for name, value in plain.items() if name != "kind"}
        unknown = sorted(given.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"expected the fields of {cls.__name__}, got {unknown}; leave them out.")
        try:
            specification: Hyperparameter = cls(**given)
        except TypeError as error:
            raise ValueError(f"{error}; give the fields of {cls.__name__}.") from error
        return specification

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

    @property
    def axis(self) -> Axis:
        """The axis on which values are drawn."""
        choices = () if self.is_number else self.parts
        return Axis(self.unit, self.bounds, whole=self.is_rounded, choices=choices)

    @abstractmethod
    def unconstrained_init(self) -> list[float]:
        """`init` in unconstrained units, entry by entry."""

    @abstractmethod
    def read(self, unconstrained: Tensor) -> Tensor:
        """Natural units: `[..., size]`, unconstrained units, to `[...]`; a string as its index in `parts`, int64."""

    @abstractmethod
    def to_python(self, value: Tensor) -> Value:
        """A scalar that `read` returned, as a number or a string."""

    @property
    def family(self) -> Hashable | None:
        """What hyperparameters that `read_together` reads in one go have in common; None for a kind without it."""
        return None

    def read_together(self, specifications: Sequence["Hyperparameter"]) -> "ReadTogether":
        """A function that reads hyperparameters of this family, which have one entry each, as `read` does.

        Args:
            specifications: `k` of them.

        Returns:
            A function from entries `[..., k]` to values `[..., k]`.
        """
        raise NotImplementedError(f"{type(self).__name__} has a family, but not read_together; define it.")

    def value(self, unconstrained: Tensor) -> Value:
        """The value at entries `[size]`, float64 numbers that float32 holds, as a number or a string."""
        return self.written(self.read(surroundings(unconstrained)))

    def written(self, values: Tensor) -> Value:
        """The value as a number or a string, natural units.

        Args:
            values: what `read` returns at `surroundings` of the entries, `[3]`.
        """
        return self.to_python(values[1])

    def unrounded(self, unconstrained: Tensor) -> float | None:
        """The real number that was rounded to the value at entries `[size]`; None for a value that is not rounded."""
        return None

    @property
    def is_rounded(self) -> bool:
        """Whether the value is a rounded number; a schedule then keeps the real number beside it."""
        return False

    def entries(self, value: Value) -> list[float]:
        """Entries in unconstrained units at which the hyperparameter has a value, natural units.

        Raises:
            ValueError: the hyperparameter cannot have this value.
        """
        own: Any = self
        same: Hyperparameter = replace(own, init=value)
        return same.unconstrained_init()

    def between(self, before: float, after: float, share: float) -> Value:
        """A value between two, natural units, for a number: linear, for a kind that does not override this.

        Args:
            before: the first value; of a rounded one the real number.
            after: the second value.
            share: of the way from the first to the second, in [0, 1].
        """
        return before + share * (after - before)

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

    def curves(self, name: str, values: Tensor, unconstrained: Tensor, scale: Tensor) -> dict[str, float]:
        """Scalars to log of the hyperparameter `name`, by tag: the value, and one scale below and above it.

        A number with one entry logs its place, too: how far along its range it is, in [0, 1].

        Args:
            name: name of the hyperparameter.
            values: what `read` returns at its entries, one scale below and one above, `[3]`.
            unconstrained: its entries of `lambda`, `[size]`, unconstrained units.
            scale: its entries of `sigma`, `[size]`, unconstrained units.
        """
        curves = {f"{kind}/{name}": value for kind, value in zip(BAND, values.tolist(), strict=True)}
        if self.has_place:
            curves[f"{PLACE}/{name}"] = float(unconstrained.sigmoid())
        return curves

    @property
    def has_place(self) -> bool:
        """Whether the value is a number with one entry, whose sigmoid is a place between the ends of its range."""
        return self.is_number and self.size == 1

    def chart(self, name: str) -> Chart:
        """The chart of the hyperparameter `name`, with tags of `curves`."""
        return Chart("Margin", [f"{kind}/{name}" for kind in BAND])


def surroundings(unconstrained: Tensor) -> Tensor:
    """Entries, `[h]` in float64, and the ends of what float32 rounds to them: lower end, entry, upper end, `[3, h]`."""
    half = half_spacing(unconstrained)
    return torch.stack([unconstrained - half, unconstrained, unconstrained + half])
