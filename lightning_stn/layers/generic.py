"""The response of modules of any type, for samples of one row."""

from typing import Any

from torch import nn

from lightning_stn.layers.base import ResponseLayer


class GenericResponse(ResponseLayer):
    """A module of any type whose parameters respond while its `forward` runs.

    The parameters read inside `forward` are the effective ones, so the sample must have one row. Gates act on the
    first dimension longer than one. Parameters of children respond only where the children are converted too.
    """

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Modules that do not read their parameters as attributes, or use names of the response, cannot respond."""
        for kind in (nn.MultiheadAttention, nn.RNNBase):
            if isinstance(layer, kind):
                return (
                    f"torch does not read all parameters of a {kind.__name__} as its attributes, so that a "
                    "subclass responds only where it overrides nothing that computes, and has no weight_norm"
                )
        if getattr(layer, "sparse", None) is True:
            return "its gradient is sparse; build it with sparse=False"
        if getattr(layer, "max_norm", None) is not None:
            return "max_norm rewrites the weights at each look-up, so that they cannot respond; remove max_norm"
        names = {*dir(type(layer)), *layer.__dict__, *layer._parameters, *layer._modules, *layer._buffers}
        hidden = sorted((names - set(dir(nn.Module))) & _RESPONSE_NAMES)
        if hidden:
            return f"a response would hide its attributes {hidden}; rename them, or register a response for its type"
        return super().refusal(layer)

    def gate_size(self, name: str) -> int:
        """The size of the first dimension longer than one."""
        size: int = getattr(self, name).shape[self._gated_dim(name)] if getattr(self, name).dim() else 1
        return size

    def broadcast_gates(self, name: str, gated: Any) -> Any:
        """`[o]` along the gated dimension."""
        parameter = getattr(self, name)
        shape = [1] * parameter.dim()
        if shape:
            shape[self._gated_dim(name)] = -1
        return gated.reshape(shape)

    def _gated_dim(self, name: str) -> int:
        return next((dim for dim, size in enumerate(getattr(self, name).shape) if size > 1), 0)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a reference to the plain type, since this class is created at run time."""
        return _rebuild, (self.plain_type,), self.__getstate__()  # type: ignore[no-untyped-call]


_RESPONSE_NAMES = {"plain_type"}.union(*(vars(kind) for kind in GenericResponse.__mro__)) - set(dir(nn.Module))

_GENERIC: dict[type[nn.Module], type[GenericResponse]] = {}


def generic_response(plain: type[nn.Module]) -> type[GenericResponse]:
    """The generic response layer of a module type, created at the first call for this type."""
    if plain not in _GENERIC:
        _GENERIC[plain] = type(f"Response{plain.__name__}", (GenericResponse, plain), {"plain_type": plain})
    return _GENERIC[plain]


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    kind = generic_response(plain)
    return kind.__new__(kind)
