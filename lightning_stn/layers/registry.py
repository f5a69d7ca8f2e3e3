"""Which response layer stands in for which torch layer."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from lightning_stn.layers.base import ResponseLayer

_Response = TypeVar("_Response", bound=type[ResponseLayer])

_RESPONSES: dict[type[nn.Module], type[ResponseLayer]] = {}


def register_response(plain: type[nn.Module], *, overwrite: bool = False) -> Callable[[_Response], _Response]:
    """Class decorator: `convert` turns exact instances of `plain` into the decorated response layer.

    Args:
        plain: the layer that is converted; subclasses of it are not.
        overwrite: replace an earlier registration.

    Raises:
        ValueError: `plain` is registered already.
        TypeError: the decorated class is not a `ResponseLayer` that subclasses `plain`.
    """

    def register(response: _Response) -> _Response:
        if plain in _RESPONSES and not overwrite:
            raise ValueError(
                f"{plain.__name__} already has {_RESPONSES[plain].__name__}; pass overwrite=True to replace it."
            )
        if not (issubclass(response, ResponseLayer) and issubclass(response, plain)):
            raise TypeError(
                f"Expected {response.__name__} to subclass ResponseLayer and {plain.__name__}, in that order."
            )
        _RESPONSES[plain] = response
        return response

    return register


def response_type(plain: type[nn.Module]) -> type[ResponseLayer] | None:
    """The response layer registered for exactly this type, or None."""
    return _RESPONSES.get(plain)
