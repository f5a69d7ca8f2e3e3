"""Kinds of hyperparameters: the base class of all, and checks of a dictionary of them."""

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_stn.arguments import SMALLEST, is_number
from lightning_stn.schedule import Schedule, Value

Perturb = Literal["example", "batch"]
"""Whether each example has a perturbation, or the mini-batch has one."""

ResponseForm = Literal["full", "gates"]
"""Whether layers learn response weights beside their gates, or gates alone."""


LARGEST_SCALE = 1e6
"""Largest initial scale; the layers that read such samples would compute what is not finite."""


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


def describe_unknown(name: Any, known: Sequence[str]) -> str:
    """What is wrong with a name that no hyperparameter has, for an error message.

    Of two similar names either may be the misspelt one: that of the reader, or that of the hyperparameter.
    """
    similar = difflib.get_close_matches(str(name), known, n=1)
    advice = (
        f"{name!r} or {similar[0]!r} is misspelt; correct it here, or in hyperparameters={{...}}."
        if similar
        else "use one of them, or add it to hyperparameters={...}."
    )
    return f"which is not one of {list(known)}: {advice}"


def empty_schedule(specifications: Mapping[str, Hyperparameter]) -> Schedule:
    """A schedule of hyperparameters, without rows.

    Raises:
        ValueError: columns would collide.
    """
    choices = {name: s.parts for name, s in specifications.items() if not s.is_number}
    parts = {name: s.parts for name, s in specifications.items() if s.is_number and s.parts}
    return Schedule(tuple(specifications), choices=choices, parts=parts)
