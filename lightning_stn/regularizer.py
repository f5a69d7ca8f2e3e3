"""The base of everything that acts in the weight phase, as strongly as hyperparameters or constants say."""

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from lightning_stn.binding import BoundModule
from lightning_stn.hyperparameters import HyperparameterSet


class Regularizer(BoundModule):
    """Something that acts in the weight phase only, as strongly as hyperparameters or constants say.

    A subclass gives its strengths in `ranges`; each is an attribute that holds a hyperparameter's name or a number.
    Attached to a set it acts in the weight phase and lets its input pass otherwise. Never attached, and with constants
    only, it acts in training mode, as torch's own layers do.
    """

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """For each strength the smallest and the largest value that makes sense, natural units."""

    def attach(self, hyperparameters: HyperparameterSet, name: str = "") -> None:
        """Read from this set from now on; see `BoundModule.attach`.

        Raises:
            KeyError: a strength names a hyperparameter that the set does not have.
            ValueError: a strength names a `Categorical`, or a hyperparameter that ranges beyond what makes sense.
        """
        self._require_set(hyperparameters)
        for strength, (low, high) in self.ranges.items():
            value = getattr(self, strength)
            if not isinstance(value, str):
                continue
            hyperparameters.require_number(value, self._label(name))
            specification = hyperparameters.specifications[value]
            bounds = specification.bounds
            if bounds is not None and (bounds[0] < low or bounds[1] > high):
                raise ValueError(
                    f"{self._label(name)}: expected {strength} {_interval(low, high)}, but the hyperparameter "
                    f"{value!r} is {specification!r}; narrow its range."
                )
        super().attach(hyperparameters, name)

    def checked(self, name: str, value: str | float) -> str | float:
        """The strength `name` as it was given.

        Raises:
            ValueError: neither a hyperparameter's name nor a number in range.
        """
        low, high = self.ranges[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not isinstance(value, str) and not (number and low <= value <= high):
            raise ValueError(
                f"{type(self).__name__}: expected {name} to be a hyperparameter's name or a number "
                f"{_interval(low, high)}, got {value!r}."
            )
        return value

    @property
    def strengths(self) -> tuple[str, ...]:
        """Names of the attributes that hold a hyperparameter's name or a number."""
        return tuple(self.ranges)

    def reads(self) -> list[str]:
        """Names of the hyperparameters that this module reads."""
        return [value for value in (getattr(self, name) for name in self.strengths) if isinstance(value, str)]

    @property
    def active(self) -> bool:
        """Whether to act on this call.

        Raises:
            RuntimeError: a strength names a hyperparameter, and the module trains outside an `STNModule`.
        """
        if not self.training:
            return False
        if self._hyperparameters is not None:
            return self._hyperparameters.bound.values is not None
        if self.reads():
            raise self._no_set()
        return True

    def _no_set(self) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__} reads {self.reads()} but belongs to no HyperparameterSet yet. It joins its "
            "STNModule's when training starts; elsewhere call attach(hyperparameters) or give a number."
        )

    def strength(self, name: str) -> Tensor | float:
        """The strength to act with: `[n]`, a scalar tensor, or the constant."""
        value: str | float = getattr(self, name)
        if not isinstance(value, str):
            return value
        assert self._hyperparameters is not None
        return self._hyperparameters[value]

    def shared_strength(self, name: str) -> Tensor | float:
        """The strength to act with where the examples cannot differ in it.

        Raises:
            ValueError: there is a value for each example.
        """
        strength = self.strength(name)
        if isinstance(strength, Tensor) and strength.dim():
            raise ValueError(
                f"{type(self).__name__}: acts on the batch as a whole, but {getattr(self, name)!r} has a value for "
                "each of its examples; declare it with perturb='batch', or use STNCallback(perturb='batch')."
            )
        return strength

    def make_plain(self) -> nn.Module:
        """What stands in for this module in a network that is taken away: nothing, since it acts in training only."""
        return nn.Identity()

    def current_strength(self, name: str) -> float:
        """The strength at the current hyperparameters, as a number.

        Raises:
            RuntimeError: it names a hyperparameter, and the module was never attached to a set.
        """
        value: str | float = getattr(self, name)
        if isinstance(value, str):
            if self._hyperparameters is None:
                raise self._no_set()
            current = self._hyperparameters.values()[value]
            assert not isinstance(current, str)
            return current
        return value

    def extra_repr(self) -> str:
        """The strengths."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.strengths)


def _interval(low: float, high: float) -> str:
    return f"of at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
