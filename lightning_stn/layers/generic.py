"""The response of any module that owns parameters, for samples that the batch shares."""

from typing import Any

from torch import nn

from lightning_stn.layers.base import ResponseLayer


class GenericResponse(ResponseLayer):
    """A module of any type whose own parameters respond while its `forward` runs.

    It computes with effective parameters in the place of its own, whatever it does with them, which takes a sample of
    one row. The gates act on the first dimension that is longer than one.
    """

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """A module that computes past its attributes, or has names that the response would hide."""
        for kind in (nn.MultiheadAttention, nn.RNNBase):
            if isinstance(layer, kind):
                return (
                    f"torch computes a {kind.__name__} past its attributes, so that only LSTM, GRU and "
                    "MultiheadAttention themselves respond"
                )
        own = {*dir(type(layer)), *layer.__dict__, *layer._parameters, *layer._modules, *layer._buffers}
        hidden = sorted((own - set(dir(nn.Module))) & _RESPONSE_NAMES)
        if hidden:
            return f"a response would hide its own {hidden}; rename them, or register a response for its type"
        return super().refusal(layer)

    def gate_size(self, name: str) -> int:
        """The first dimension longer than one."""
        size: int = getattr(self, name).shape[self._gated_dim(name)] if getattr(self, name).dim() else 1
        return size

    def spread(self, name: str, gated: Any) -> Any:
        """`[o]` along the gated dimension."""
        parameter = getattr(self, name)
        shape = [1] * parameter.dim()
        if shape:
            shape[self._gated_dim(name)] = -1
        return gated.reshape(shape)

    def _gated_dim(self, name: str) -> int:
        return next((dim for dim, size in enumerate(getattr(self, name).shape) if size > 1), 0)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the plain type, since this class is made at run time."""
        return _rebuild, (self.plain,), self.__getstate__()  # type: ignore[no-untyped-call]


_RESPONSE_NAMES = {"plain"}.union(*(vars(kind) for kind in GenericResponse.__mro__)) - set(dir(nn.Module))

_GENERIC: dict[type[nn.Module], type[GenericResponse]] = {}


def generic_response(plain: type[nn.Module]) -> type[GenericResponse]:
    """The generic response layer of a module type; one class for each type."""
    if plain not in _GENERIC:
        _GENERIC[plain] = type(f"Response{plain.__name__}", (GenericResponse, plain), {"plain": plain})
    return _GENERIC[plain]


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    kind = generic_response(plain)
    return kind.__new__(kind)
