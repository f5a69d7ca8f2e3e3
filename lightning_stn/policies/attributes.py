"""Attributes of a module that hold replayed values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from lightning_stn.policies.checks import READER
from lightning_stn.rates import TunedRate
from lightning_stn.regularizer import Regularizer
from lightning_stn.specifications import Value


class _Place(NamedTuple):
    """Where a value is set: an attribute of an owner, by the name of the hyperparameter."""

    owner: Any
    attribute: str
    name: str


class Attributes:
    """Attributes below a module, each with the value of a hyperparameter.

    Args:
        root: the module that paths begin from.
        paths: path to name of the hyperparameter, as in `{"net.drop.p": "dropout"}`; a number in a path is the index
            in a list, or the name of a module in an `nn.Sequential`.
        values: values by name, of the types that will be set.

    Raises:
        ValueError: a hyperparameter is unknown, or an attribute does not exist or cannot hold the value; the message
            lists all of them.
    """

    def __init__(self, root: nn.Module, paths: Mapping[str, str], values: Mapping[str, Value]) -> None:
        self._places: list[_Place] = []
        problems: list[str] = []
        for path, name in paths.items():
            try:
                self._places.append(_resolve(root, path, name, values))
            except _Unusable as unusable:
                problems.append(f"{path!r}: {unusable}")
        if problems:
            raise ValueError(
                f"{READER}: expected attributes to lead from paths in {type(root).__name__} to names of "
                "hyperparameters; correct these:\n  " + "\n  ".join(problems)
            )

    def set(self, values: Mapping[str, Value]) -> None:
        """Set every attribute to the value of its hyperparameter."""
        for owner, attribute, name in self._places:
            setattr(owner, attribute, values[name])


class _Unusable(Exception):
    """Why an attribute cannot be set."""


def _resolve(root: nn.Module, path: str, name: str, values: Mapping[str, Value]) -> _Place:
    if name not in values:
        raise _Unusable(f"there is no hyperparameter {name!r} among {list(values)}")
    *owners, attribute = path.split(".")
    owner: Any = root
    for index, part in enumerate(owners):
        owner = _step(owner, part, ".".join(owners[:index]) or "the module")
    place = ".".join(owners) or "the module"
    if (read := _reads(owner, attribute)) is not None:
        raise _Unusable(f"{place} reads the hyperparameter {read!r} itself; leave the path out")
    current = _step(owner, attribute, place)
    value = values[name]
    kinds = "text" if isinstance(value, str) else "a number"
    if current is not None and (isinstance(current, bool) or not isinstance(current, _types(value))):
        raise _Unusable(f"expected {kinds}, as {name!r} is, got {type(current).__name__}")
    _guarded(lambda: setattr(owner, attribute, current), f"{attribute!r} of {place} cannot be set")
    return _Place(owner, attribute, name)


def _reads(owner: Any, attribute: str) -> str | None:
    """The hyperparameter that a module of this package reads in the place of an attribute; None for no such module."""
    if isinstance(owner, Regularizer) and attribute in owner.strengths:
        given = owner.given(attribute)
        return given if isinstance(given, str) else None
    return owner.tuned_by if isinstance(owner, TunedRate) and attribute == owner.rate_name() else None


def _types(value: Value) -> tuple[type, ...]:
    return (str,) if isinstance(value, str) else (int, float)


def _step(owner: Any, part: str, place: str) -> Any:
    """The attribute of an owner, or the entry of a list."""
    if isinstance(owner, Sequence) and not isinstance(owner, str) and part.isdigit():
        return _guarded(lambda: owner[int(part)], f"{place} has no entry {part}")
    return _guarded(lambda: getattr(owner, part), f"{place} ({type(owner).__name__}) has no attribute {part!r}")


def _guarded(action: Callable[[], Any], problem: str) -> Any:
    try:
        return action()
    except (AttributeError, IndexError, TypeError, RuntimeError) as error:
        raise _Unusable(problem) from error
