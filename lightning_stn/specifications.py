"""Specifications of hyperparameters: range or choices, start, and perturbation."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from types import UnionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from lightning_stn.schedule import Value
from lightning_stn.transforms import invert, range_transform

Per = Literal["example", "batch"]

START_MARGIN = 1.0
"""How far the logit of a `Categorical`'s start lies above the others, in perturbation scales."""

_LARGEST_INTEGER_RANGE = 2**20
"""Above this, float32 logits no longer reach every integer."""


class Hyperparameter(ABC):
    """What `Float`, `Integer` and `Categorical` share: entries in unconstrained units, and how they are perturbed.

    The type to annotate with, and abstract on purpose: a configuration file has to say which kind it means.
    """

    init: Value
    scale: float
    per: Per

    def _check_perturbation(self) -> None:
        scale: Any = self.scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"{self!r}: expected scale to be a finite number, got {scale!r}; 0.5 suits most.")
        if scale <= 0:
            raise ValueError(
                f"{self!r}: expected scale > 0, a standard deviation in unconstrained units, got {scale!r}; to hold a "
                "value fixed, leave it out of the hyperparameters."
            )
        if self.per not in ("example", "batch"):
            raise ValueError(f"{self!r}: expected per='example' or per='batch', got {self.per!r}.")

    @property
    def entries(self) -> int:
        """How many unconstrained entries the hyperparameter has."""
        return 1

    def __getstate__(self) -> dict[str, Any]:
        own: Any = self
        return {f.name: getattr(self, f.name) for f in fields(own)}  # without what is cached

    @property
    def signature(self) -> str:
        """What decides how unconstrained entries are read: the specification without start and scale."""
        own: Any = self
        parts = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(own) if f.name not in ("init", "scale")]
        return f"{type(self).__name__}({', '.join(parts)})"

    @abstractmethod
    def unconstrained_init(self) -> list[float]:
        """`init` in unconstrained units, entry by entry."""

    @abstractmethod
    def read(self, entries: Tensor) -> Tensor:
        """Values in natural units: `[..., entries]`, unconstrained units, to `[...]`."""

    @abstractmethod
    def to_python(self, value: Tensor) -> Value:
        """A scalar in natural units as the user writes it."""


@dataclass(frozen=True)
class _Ranged(Hyperparameter):
    """What the hyperparameters with a range share."""

    low: float | None
    high: float | None
    init: float
    _: KW_ONLY
    scale: float = 0.5
    per: Per = "example"

    def _check(self, wanted: type | UnionType, kind: str) -> None:
        for name in ("low", "high", "init"):
            number: Any = getattr(self, name)
            if number is None and name in ("low", "high") and isinstance(self, Float):
                continue
            if isinstance(number, bool) or not isinstance(number, wanted) or not math.isfinite(getattr(self, name)):
                raise ValueError(
                    f"{self!r}: expected {name} to be a {kind}, got {number!r}; write it as a plain Python number."
                )
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"{self!r}: expected low < high, got {self.low!r} and {self.high!r}; the range is empty.")
        self._check_perturbation()

    @property
    def transform(self) -> Transform:
        """From unconstrained to natural units (for an integer: before rounding)."""
        raise NotImplementedError

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """Values in natural units, elementwise."""
        value: Tensor = self.transform(unconstrained)
        return value

    def unconstrained_init(self) -> list[float]:
        """`init` in unconstrained units."""
        return [invert(self.transform, self.init)]

    def read(self, entries: Tensor) -> Tensor:
        """Values in natural units: `[..., 1]`, unconstrained units, to `[...]`."""
        return self.constrain(entries.squeeze(-1))

    def to_python(self, value: Tensor) -> Value:
        """A scalar as a number."""
        number: float = value.item()
        return number


@dataclass(frozen=True)
class Float(_Ranged):
    """A real hyperparameter.

    Args:
        low: lower bound, natural units; None for no bound.
        high: upper bound, natural units; None for no bound.
        init: the value to start from, strictly between the bounds, natural units.
        scale: initial standard deviation of the perturbation, unconstrained units.
        per: "example" draws a perturbation for each example, "batch" shares one over the mini-batch (for what acts on
            a batch as a whole, such as the weight of a penalty).
        log: perturb and step on the logarithm, for positive quantities that span orders of magnitude.

    Raises:
        ValueError: the range is empty, `init` lies on or beyond a bound, `log` meets a range that is not positive, or
            an argument has a wrong type.
    """

    _: KW_ONLY
    log: bool = False

    def __post_init__(self) -> None:
        """Check the range."""
        self._check(int | float, "finite number")
        log: Any = self.log
        if not isinstance(log, bool):
            raise ValueError(f"{self!r}: expected log to be True or False, got {log!r}.")
        if self.log and (self.low is None or self.low < 0):
            raise ValueError(f"{self!r}: log=True needs a positive range, got low={self.low!r}; give low >= 0.")
        if (self.low is not None and self.init <= self.low) or (self.high is not None and self.init >= self.high):
            raise ValueError(
                f"{self!r}: expected init strictly between low and high, since a bound lies infinitely far away in "
                f"unconstrained units; move init inwards or widen the range."
            )

    @cached_property
    def transform(self) -> Transform:
        """From unconstrained to natural units."""
        return range_transform(self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Integer(_Ranged):
    """A whole-number hyperparameter; each integer of the closed range owns an equal share of the underlying range.

    Args:
        low: smallest value; it is reached.
        high: largest value; it is reached.
        init: the value to start from; the bounds are allowed.
        scale: initial standard deviation of the perturbation, unconstrained units.
        per: as for `Float`.

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


@dataclass(frozen=True)
class Categorical(Hyperparameter):
    """One of several named choices: the argmax of perturbed logits, one unconstrained entry for each choice.

    It is read as the index of the choice, int64; `choices[index]` is its name. Of equal logits the first counts. At the
    start the logit of `init` lies one scale above the others, which are zero, so that whatever the scale the
    perturbation draws `init` in 76% of cases out of 2 choices, 63% of 3, 49% of 5 and 34% of 10, and the others alike.

    The network must have learnt what each choice does before the logits move, so give it a warm-up in which every
    choice is drawn for a thousand examples or more; one that is hardly drawn any more is forgotten, and stays away.

    For what acts in the weight phase only: augmentation operations, losses, masks. What acts in validation too, such as
    an activation function, is not tuned, since the validation loss is differentiated through the weights alone.

    Args:
        choices: two or more names, printable and distinct; they become TensorBoard tags and columns of `schedule.csv`.
        init: the choice to start from.
        scale: initial standard deviation of every logit's perturbation.
        per: as for `Float`.

    Raises:
        ValueError: there are fewer than two choices, one is repeated, empty or not printable (a line break or a control
            character does not survive in a CSV file or a tag), `init` is not among them, or an argument has a wrong
            type.

    Example:
        Every example under the operation that was drawn for it, `[n]`, or all under one where the batch shares it:

        >>> from lightning_stn import HyperparameterSet
        >>> operation = Categorical(("none", "mirror", "noise"), init="none")
        >>> hyperparameters = HyperparameterSet({"operation": operation})
        >>> def augment(images):
        ...     operated = torch.stack([images, images.flip(-1), images + torch.randn_like(images)])
        ...     return operated[hyperparameters["operation"], torch.arange(len(images))]
        >>> augment(torch.zeros(8, 1, 6, 6)).shape
        torch.Size([8, 1, 6, 6])
        >>> hyperparameters.values()
        {'operation': 'none'}
    """

    choices: Sequence[str]
    init: str
    _: KW_ONLY
    scale: float = 0.5
    per: Per = "example"

    def __post_init__(self) -> None:
        """Check the choices, and keep them as a tuple."""
        choices: Any = self.choices
        if not isinstance(choices, tuple | list) or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"{self!r}: expected choices to be a list or tuple of strings, got {choices!r}.")
        object.__setattr__(self, "choices", tuple(choices))
        if len(choices) < 2:
            raise ValueError(f"{self!r}: expected at least two choices, got {len(choices)}; with one nothing is tuned.")
        if len(set(choices)) < len(choices):
            raise ValueError(f"{self!r}: expected distinct choices, got some of {choices!r} twice; rename them.")
        unusable = [choice for choice in choices if not choice or not choice.isprintable()]
        if unusable:
            raise ValueError(
                f"{self!r}: expected choices of printable characters, got {unusable}; they become TensorBoard tags and "
                "columns of schedule.csv, so leave out line breaks and control characters."
            )
        if self.init not in choices:
            raise ValueError(f"{self!r}: expected init to be one of {list(choices)}, got {self.init!r}.")
        self._check_perturbation()

    @property
    def entries(self) -> int:
        """One for each choice."""
        return len(self.choices)

    def unconstrained_init(self) -> list[float]:
        """Logits, zero but for that of `init`."""
        return [START_MARGIN * self.scale * (choice == self.init) for choice in self.choices]

    def read(self, entries: Tensor) -> Tensor:
        """Index of the largest logit, the first of equal ones: `[..., choices]` to `[...]`, int64."""
        return entries.argmax(-1)

    def to_python(self, value: Tensor) -> Value:
        """The choice with this index."""
        return self.choices[int(value)]


# A module may save its arguments, and a checkpoint that holds specifications shall load with weights_only=True.
torch.serialization.add_safe_globals([Float, Integer, Categorical])
