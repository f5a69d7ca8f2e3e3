"""Base class of regularisers and augmentations."""

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from lightning_stn.arguments import is_number
from lightning_stn.binding import BoundModule
from lightning_stn.hyperparameters import HyperparameterSet


class Regularizer(BoundModule):
    """Base class of modules that act in the weight phase only, at strengths that are hyperparameters or constants.

    A subclass lists its strengths in `ranges`; each is an attribute that holds a hyperparameter's name or a number. A
    module that is attached to a set acts in the weight phase and returns its input otherwise. A module with constants
    only that was never attached acts in training mode, as torch's layers do.

    Example:
        >>> import torch
        >>> from lightning_stn.regularizers import Regularizer
        >>> class Shrink(Regularizer):
        ...     ranges = {"amount": (0.0, 1.0)}
        ...
        ...     def __init__(self, amount):
        ...         super().__init__()
        ...         self.amount = self.checked("amount", amount)
        ...
        ...     def forward(self, input):  # [n], and so is a strength with a value for each example
        ...         return input * (1 - self.strength("amount")) if self.active else input
        >>> Shrink(0.25)(torch.ones(2))
        tensor([0.7500, 0.7500])
    """

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Smallest and largest allowed value of each strength, natural units."""

    def attach(self, hyperparameters: HyperparameterSet, name: str = "") -> None:
        """Read from this set from now on; see `BoundModule.attach`.

        Raises:
            KeyError: a strength names a hyperparameter that the set does not have.
            ValueError: a strength names a hyperparameter that is not a number, or whose bounds exceed the allowed ones.
        """
        self._require_set(hyperparameters)
        for strength in self.ranges:
            value = self.given(strength)
            if isinstance(value, str):
                self.check_hyperparameter(strength, value, hyperparameters, self._label(name))
        super().attach(hyperparameters, name)

    @classmethod
    def check_hyperparameter(cls, strength: str, name: str, hyperparameters: HyperparameterSet, reader: str) -> None:
        """Check that a hyperparameter can be a strength of this class.

        Args:
            strength: name of the strength.
            name: name of the hyperparameter.
            hyperparameters: the set that should have it.
            reader: name of the module or argument that reads it, for error messages.

        Raises:
            KeyError: the set has no such hyperparameter.
            ValueError: the hyperparameter is not a number, or its bounds exceed the allowed range.
        """
        hyperparameters.require_number(name, reader)
        specification = hyperparameters.specifications[name]
        low, high = cls.ranges[strength]
        bounds = specification.bounds
        if bounds is not None and (bounds[0] < low or bounds[1] > high):
            raise ValueError(
                f"{reader}: expected {strength} {_interval(low, high)}, but the hyperparameter {name!r} is "
                f"{specification!r}; narrow its range."
            )

    def checked(self, name: str, value: str | float) -> str | float:
        """Return `value` if it can be the strength `name`.

        Raises:
            ValueError: `value` is neither a hyperparameter's name nor a number in the allowed range.
        """
        low, high = self.ranges[name]
        if not isinstance(value, str) and not (is_number(value) and low <= value <= high):
            raise ValueError(
                f"{type(self).__name__}: expected {name} to be a hyperparameter's name or a number "
                f"{_interval(low, high)}, got {value!r}; give one of the two, finite in float32."
            )
        return value

    @property
    def strengths(self) -> tuple[str, ...]:
        """Names of the attributes that hold a hyperparameter's name or a number."""
        return tuple(self.ranges)

    def reads(self) -> list[str]:
        """Names of the hyperparameters that this module reads."""
        return [value for value in map(self.given, self.strengths) if isinstance(value, str)]

    def given(self, name: str) -> str | float:
        """A strength as it was given: a hyperparameter's name, or a constant."""
        value: str | float = getattr(self, name)
        return value

    @property
    def active(self) -> bool:
        """Whether this call acts on its input.

        Raises:
            RuntimeError: a strength names a hyperparameter, but the module is in training mode and not attached.
        """
        if not self.training:
            return False
        if self._hyperparameters is not None:
            return self._hyperparameters.current_pass.values is not None
        if self.reads():
            raise self._no_set()
        return True

    def _no_set(self) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__} reads {self.reads()} but belongs to no HyperparameterSet yet. An STNModule "
            "attaches it when training starts; elsewhere call attach(hyperparameters), or give a number."
        )

    def strength(self, name: str) -> Tensor | float:
        """The strength of this call: `[n]` or a scalar tensor, natural units, or the constant."""
        value = self.given(name)
        if not isinstance(value, str):
            return float(value)  # torch reads no int beyond int64
        assert self._hyperparameters is not None
        return self._hyperparameters[value]

    def shared_strength(self, name: str) -> Tensor | float:
        """The strength of a call that treats all examples alike: a scalar tensor, natural units, or the constant.

        Raises:
            ValueError: the strength has a value for each example.
        """
        strength = self.strength(name)
        if isinstance(strength, Tensor) and strength.dim():
            raise ValueError(
                f"{type(self).__name__}: acts on the batch as a whole, but {self.given(name)!r} has a value for "
                "each example; declare it with perturb='batch', or use STNCallback(perturb='batch')."
            )
        return strength

    def make_plain(self) -> nn.Module:
        """The plain module for an exported network: the identity, since this module acts in training only."""
        return nn.Identity()

    def current_strength(self, name: str) -> float:
        """The strength at the current hyperparameters, natural units.

        Raises:
            RuntimeError: the strength names a hyperparameter, but the module is not attached.
        """
        value = self.given(name)
        if isinstance(value, str):
            if self._hyperparameters is None:
                raise self._no_set()
            current = self._hyperparameters.values()[value]
            assert not isinstance(current, str)
            return current
        return value

    def extra_repr(self) -> str:
        """The strengths."""
        return ", ".join(f"{name}={self.given(name)!r}" for name in self.strengths)


def _interval(low: float, high: float) -> str:
    return f"of at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
