"""Registry of the response layers, by the type of the plain layer."""

import re
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from lightning_stn.layers.base import ResponseLayer

_Response = TypeVar("_Response", bound=type[ResponseLayer])

_RESPONSES: dict[type[nn.Module], type[ResponseLayer]] = {}


def register_response(plain: type[nn.Module], *, overwrite: bool = False) -> Callable[[_Response], _Response]:
    """Class decorator: `convert` turns instances of `plain` into the decorated response layer.

    Args:
        plain: the type of module to convert. Its subclasses are converted where they override none of its methods but
            the constructor and the representation.
        overwrite: replace an earlier registration.

    Raises:
        ValueError: `plain` is registered already.
        TypeError: `plain` is not the type of a plain module, or the decorated class does not subclass `ResponseLayer`
            and `plain`, in that order, or its attribute `plain_type` is another type.
    """
    if not (isinstance(plain, type) and issubclass(plain, nn.Module)) or issubclass(plain, ResponseLayer):
        raise TypeError(
            f"register_response: expected the type of a plain module, got {plain!r}; write "
            "@register_response(nn.Linear)."
        )

    def register(response: _Response) -> _Response:
        if plain in _RESPONSES and not overwrite:
            raise ValueError(
                f"{plain.__name__} already has {_RESPONSES[plain].__name__}; pass overwrite=True to replace it."
            )
        bases: tuple[type, ...] = response.__mro__ if isinstance(response, type) else ()
        if not (ResponseLayer in bases and plain in bases and bases.index(ResponseLayer) < bases.index(plain)):
            raise TypeError(
                f"Expected {getattr(response, '__name__', response)} to subclass ResponseLayer and {plain.__name__}, "
                f"in that order, got {[base.__name__ for base in bases[1:]]}; change its bases."
            )
        if getattr(response, "plain_type", None) is not plain:
            raise TypeError(
                f"Expected {response.__name__}.plain_type to be {plain.__name__}, got "
                f"{getattr(response, 'plain_type', None)!r}; write 'plain_type = {plain.__name__}' in its body."
            )
        _RESPONSES[plain] = response
        return response

    return register


_BY_NAME: list[tuple[re.Pattern[str], type[ResponseLayer]]] = []


def register_response_by_name(pattern: str) -> Callable[[_Response], _Response]:
    """Class decorator: `convert` turns classes of other libraries, which need not be imported, into such layers.

    The decorated class is a response layer without a plain type; `convert` adds the one it finds.

    Args:
        pattern: a regular expression that matches the whole name of a plain type, `<module>.<class>`.
    """

    def register(response: _Response) -> _Response:
        _BY_NAME.append((re.compile(pattern), response))
        return response

    return register


def response_type(plain: type[nn.Module]) -> type[ResponseLayer] | None:
    """The response layer registered for this type, or for the type whose methods it inherits unchanged; or None."""
    if plain not in _RESPONSES:
        name = f"{plain.__module__}.{plain.__qualname__}"
        for pattern, response in _BY_NAME:
            if pattern.fullmatch(name):
                return _renamed(plain, response)
        registered = next((base for base in plain.__mro__ if base in _RESPONSES), None)
        if registered is None or not _only_renames(plain, registered):
            return None
        return _renamed(plain, _RESPONSES[registered])
    return _RESPONSES[plain]


_FREE = {
    *("__init__", "__repr__", "extra_repr"),
    *("__doc__", "__module__", "__qualname__", "__annotations__"),
    *("__firstlineno__", "__static_attributes__"),  # of every class, from Python 3.13 on
}
"""What a subclass may override and still compute what its base class does."""


def _only_renames(plain: type[nn.Module], registered: type[nn.Module]) -> bool:
    """Whether a subclass overrides nothing that computes."""
    between = plain.__mro__[: plain.__mro__.index(registered)]
    return not any(hasattr(registered, name) for kind in between for name in vars(kind).keys() - _FREE)


_RENAMED: dict[tuple[type[nn.Module], type[ResponseLayer]], type[ResponseLayer]] = {}


def _renamed(plain: type[nn.Module], response: type[ResponseLayer]) -> type[ResponseLayer]:
    """The response layer of a type that computes what `response` expects of it, created once."""
    if (plain, response) in _RENAMED:
        return _RENAMED[plain, response]
    names = {"plain_type": plain, "__reduce__": lambda self: (_rebuild, (plain,), self.__getstate__())}
    _RENAMED[plain, response] = type(f"Response{plain.__name__}", (response, plain), names)
    return _RENAMED[plain, response]


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    kind = response_type(plain)
    assert kind is not None
    return kind.__new__(kind)
