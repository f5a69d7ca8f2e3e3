"""Names and bases of a user's class that collide with those of a mixin, found where they are written."""

import functools
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn


def public_names(mixin: type, plain: type) -> frozenset[str]:
    """The public names that a mixin and its bases add to a plain class."""
    bases = [base for base in mixin.__mro__ if base not in plain.__mro__]
    names = {name for base in bases for name in (*vars(base), *inspect.get_annotations(base))}
    return frozenset(name for name in names if not name.startswith("_") and not hasattr(plain, name))


def check_class(kind: type, mixin: type, plain: type) -> None:
    """Check the bases and the body of a class that derives from a mixin.

    Args:
        kind: the class.
        mixin: stands in front of other subclasses of `plain`.
        plain: base of the mixin.

    Raises:
        TypeError: the bases stand in the wrong order, the class or one in front of the mixin gives a name of the mixin
            another meaning, or a base behind the mixin defines a name of it, whose calls would reach the mixin.
    """
    _check_order(kind, mixin, plain)
    names = sorted(public_names(mixin, plain))
    _check_definitions(kind, mixin, names)
    _check_hidden(kind, mixin, names)


def _check_order(kind: type, mixin: type, plain: type) -> None:
    front = kind.__mro__[: kind.__mro__.index(mixin)]
    if not any(issubclass(base, plain) and not issubclass(base, mixin) for base in front):
        return
    right = sorted(kind.__bases__, key=lambda base: not issubclass(base, mixin))
    raise TypeError(
        f"Expected {mixin.__name__} in front of other bases, so that it can call their steps, got "
        f"{_written(kind, kind.__bases__)}; write {_written(kind, right)}."
    )


def _written(kind: type, bases: Any) -> str:
    return f"class {kind.__name__}({', '.join(base.__name__ for base in bases)})"


def _check_definitions(kind: type, mixin: type, names: list[str]) -> None:
    """Check what the class and others in front define under names of the mixin: methods where the mixin has methods."""
    for base in kind.__mro__[: kind.__mro__.index(mixin)]:
        wrong = [name for name in names if name in vars(base) and not _may_define(vars(base)[name], mixin, name)]
        if wrong:
            raise TypeError(
                f"{base.__name__} defines {', '.join(wrong)}, which {mixin.__name__} uses otherwise: "
                f"{_meanings(mixin, wrong)}. Give each another name."
            )


def _may_define(value: Any, mixin: type, name: str) -> bool:
    wrapped = isinstance(value, staticmethod | classmethod | functools.partialmethod)
    is_method = wrapped or (callable(value) and not isinstance(value, nn.Module))
    return inspect.isfunction(_member(mixin, name)) and is_method


def _member(mixin: type, name: str) -> Any:
    """What a mixin or a base of it has under a name; None for a name that is annotated only."""
    return inspect.getattr_static(mixin, name, None)


def _check_hidden(kind: type, mixin: type, names: list[str]) -> None:
    """Check that no base behind the mixin defines a name of the mixin, unless a class in front says what it means."""
    place = kind.__mro__.index(mixin)
    front, behind = kind.__mro__[:place], kind.__mro__[place + 1 :]
    hidden = {
        name: base
        for name in names
        if not any(name in vars(base) for base in front)
        for base in reversed(behind)
        if name in vars(base) and base not in mixin.__mro__
    }
    if not hidden:
        return
    advice = "Give each another name there"
    methods = [(name, base) for name, base in hidden.items() if inspect.isfunction(_member(mixin, name))]
    if methods:
        name, base = methods[0]
        advice += f", or say in {kind.__name__} which counts: define {name} there, or write {name} = "
        advice += f"{base.__name__}.{name}"
    raise TypeError(
        f"{', '.join(f'{base.__name__}.{name}' for name, base in hidden.items())} would be hidden by {mixin.__name__} "
        f"in {kind.__name__}: {_meanings(mixin, hidden)}. {advice}."
    )


def check_assignment(owner: Any, mixin: type, name: str, value: Any) -> None:
    """Check a value that is assigned to a name of a mixin on an instance.

    Raises:
        TypeError: the value is neither what the mixin keeps there, nor a function with the parameters of its method.
    """
    annotation = inspect.get_annotations(mixin).get(name)
    if isinstance(annotation, type) and isinstance(value, annotation):
        return
    method = _member(mixin, name)
    if inspect.isfunction(method) and _has_parameters_of(value, method):
        return
    raise TypeError(
        f"{type(owner).__name__}: cannot assign {type(value).__name__} to {name!r}, a name that {mixin.__name__} uses "
        f"otherwise: {_meanings(mixin, [name])}. Give the attribute another name, such as {name}_."
    )


def _has_parameters_of(value: Any, method: Any) -> bool:
    """Whether a value can be called as the method is, judged by the name of the first parameter."""
    if isinstance(value, nn.Module) or not callable(value):
        return False
    try:
        first = next(iter(inspect.signature(value).parameters.values()), None)
    except (TypeError, ValueError):
        return False
    wanted = list(inspect.signature(method).parameters)[1]
    return first is not None and (first.name == wanted or first.kind is first.VAR_POSITIONAL)


def _meanings(mixin: type, names: Iterable[str]) -> str:
    """What names of the mixin stand for."""
    return "; ".join(_meaning(mixin, name) for name in names)


def _meaning(mixin: type, name: str) -> str:
    member = _member(mixin, name)
    if inspect.isfunction(member):
        parameters = [one for one in inspect.signature(member).parameters if one != "self"]
        return f"{name}({', '.join(parameters)}) is its method"
    if isinstance(member, property):
        return f"{name} is its property"
    return f"{name} is its {inspect.get_annotations(mixin)[name].__name__}"
