"""The base of every module that reads the hyperparameters, and what binds a sample for the duration of a step."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor, nn

from lightning_stn.hyperparameters import Bound, HyperparameterSet
from lightning_stn.specifications import Float, Integer


class BoundModule(nn.Module):
    """A module that reads the sample bound to a `HyperparameterSet`.

    The set lives outside the module tree, so it adds no state-dict keys and no parameters here, while deep copies,
    pickles and compiled graphs keep it.
    """

    _hyperparameters: HyperparameterSet | None = None

    @property
    def hyperparameters(self) -> HyperparameterSet | None:
        """The set that this module reads, or None before it is attached to one."""
        return self._hyperparameters

    def attach(self, hyperparameters: HyperparameterSet, name: str = "") -> None:
        """Read from this set from now on.

        Args:
            hyperparameters: the set.
            name: the qualified name of this module, for error messages.

        Raises:
            TypeError: what is given is no set.
            KeyError: this module reads a hyperparameter that the set does not have.
            ValueError: it was attached to another set before.
        """
        self._require_set(hyperparameters)
        if self._hyperparameters is not None and self._hyperparameters is not hyperparameters:
            raise ValueError(
                f"{type(self).__name__} {name!r} already reads another HyperparameterSet; "
                "build a new module for each network that is tuned."
            )
        for wanted in self.reads():
            hyperparameters.require(wanted, self._label(name))
        self.__dict__["_hyperparameters"] = hyperparameters

    def _require_set(self, hyperparameters: HyperparameterSet) -> None:
        if not isinstance(hyperparameters, HyperparameterSet):
            raise TypeError(
                f"{type(self).__name__}: expected hyperparameters to be a HyperparameterSet, got "
                f"{type(hyperparameters).__name__}; build HyperparameterSet({{...}}), or pass an STNModule's."
            )

    def _label(self, name: str) -> str:
        return f"{type(self).__name__} {name!r}" if name else type(self).__name__

    def detach(self) -> None:
        """Read from no set any more."""
        self.__dict__.pop("_hyperparameters", None)

    def reads(self) -> list[str]:
        """Names of the hyperparameters that this module reads."""
        return []


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
            assert isinstance(specification, Float | Integer)
            least = -math.inf if specification.low is None else specification.low
            most = math.inf if specification.high is None else specification.high
            if least < low or most > high:
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
                "each of its examples; declare it with per='batch', or use STNCallback(perturb='batch')."
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


def attach(root: nn.Module, hyperparameters: HyperparameterSet) -> None:
    """Attach every module below `root` that is not attached yet; all of them, or none.

    Raises:
        KeyError: some read hyperparameters that the set does not have; the message names each of them.
        ValueError: some cannot use what they read, or read another set; likewise.
    """
    problems: list[Exception] = []
    joined = []
    for name, module in root.named_modules():
        if isinstance(module, BoundModule):
            if module.hyperparameters is None:
                joined.append(module)
            try:
                module.attach(hyperparameters, name)
            except (KeyError, ValueError) as error:
                problems.append(error)
    if problems:
        for module in joined:
            module.detach()
        kind = KeyError if any(isinstance(problem, KeyError) for problem in problems) else ValueError
        raise kind(" ".join(str(problem.args[0]) for problem in problems))


def bind_weight_phase(hyperparameters: HyperparameterSet, sample: Tensor) -> None:
    """Bind a sample and its values: response layers respond, regularisers act. `unbind` ends it.

    Raises:
        ValueError: the sample is none of this set.
    """
    _check_sample(hyperparameters, sample)
    hyperparameters.bound.sample = hyperparameters.from_centre(sample)
    hyperparameters.bound.merged = None
    hyperparameters.bound.values = hyperparameters.bound_values(sample)


def _check_sample(hyperparameters: HyperparameterSet, sample: Tensor) -> None:
    h = len(hyperparameters)
    if sample.dim() != 2 or sample.shape[1] != h:
        raise ValueError(
            f"Expected a sample of shape [n, {h}], a column for each entry of {list(hyperparameters.names)}, got "
            f"{list(sample.shape)}; draw one with hyperparameters.sample(n)."
        )


def unbind(hyperparameters: HyperparameterSet) -> None:
    """End a step: layers respond to the current hyperparameters again, and regularisers rest."""
    bound = hyperparameters.bound
    bound.sample = bound.values = None
    bound.linear, bound.closed = False, ""


def keep_merged(hyperparameters: HyperparameterSet, keep: bool) -> None:
    """Reuse effective parameters from batch to batch, for as long as neither weights nor hyperparameters move."""
    hyperparameters.bound.merged = {} if keep else None


@contextmanager
def bind(hyperparameters: HyperparameterSet, sample: Tensor, *, frozen: bool = False) -> Iterator[None]:
    """Bind a sample that only response layers read; what was bound before is bound again at the end.

    Args:
        hyperparameters: the set.
        sample: `[n, h]` or `[1, h]`, unconstrained units.
        frozen: hold the network's weights fixed, so that gradients reach the sample more cheaply, and only the sample.

    Raises:
        ValueError: the sample is none of this set.
    """
    _check_sample(hyperparameters, sample)
    bound = hyperparameters.bound
    hyperparameters.bound = Bound(hyperparameters.from_centre(sample), frozen=frozen, read=bound.read)
    try:
        yield
    finally:
        hyperparameters.bound = bound
