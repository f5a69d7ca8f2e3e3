"""Objects as one would write them in Python: a call of the constructor, without arguments that are defaults."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import MappingProxyType
from typing import Any


def call(name: str, positional: Iterable[Any], named: Mapping[str, Any]) -> str:
    """The text of a call.

    Args:
        name: of the class.
        positional: arguments by position.
        named: arguments by name.

    Example:
        >>> call("Float", (0.0, 0.9), {"init": 0.3})
        'Float(0.0, 0.9, init=0.3)'
    """
    arguments = [*map(written, positional), *(f"{key}={written(value)}" for key, value in named.items())]
    return f"{name}({', '.join(arguments)})"


def written(value: Any) -> str:
    """A value as text: a dataclass as a call of its constructor, which `constructor` describes, others by `repr`.

    Example:
        >>> from lightning_stn import Scales, Warmup
        >>> written(Scales(tune=True)), written(Warmup(300, "steps")), written(0.1)
        ('Scales(tune=True)', "Warmup(300, unit='steps')", '0.1')
    """
    return constructor(value) if is_dataclass(value) and not isinstance(value, type) else repr(value)


def constructor(instance: Any, defaults: Mapping[str, Any] = MappingProxyType({})) -> str:
    """The call that builds a dataclass: required fields by position, others by name where they differ from a default.

    A required field `init` comes by name, as one writes it.

    Args:
        instance: of the dataclass; its fields may have any values.
        defaults: of fields whose default depends on other fields, by name.
    """
    positional, named = [], {}
    for field in fields(instance):
        value = getattr(instance, field.name)
        if field.default is MISSING and field.default_factory is MISSING:
            if field.name == "init":
                named[field.name] = value
            else:
                positional.append(value)
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if not (_equal(value, default) or (field.name in defaults and _equal(value, defaults[field.name]))):
            named[field.name] = value
    return call(type(instance).__name__, positional, named)


def _equal(value: Any, default: Any) -> bool:
    """Whether a value is written as its default is; values of other types, such as tensors, may not compare."""
    return type(value) is type(default) and bool(value == default)
