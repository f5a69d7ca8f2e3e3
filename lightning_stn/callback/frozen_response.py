"""Response weights and gates that get no gradient during a `fit`."""

from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_stn.layers import ResponseLayer
from lightning_stn.module import STNModule

_HOOKS = ("setup", "configure_model")
"""Hooks in which a module may be converted behind the `setup` of callbacks, and before the strategy wraps it."""


class FrozenResponse:
    """Freezes the response of a module before the strategy wraps it, since DDP expects a gradient in every parameter.

    Args:
        module: the module of the run; what its hooks `setup` and `configure_model` convert is frozen too.
    """

    def __init__(self, module: STNModule) -> None:
        self._module = module
        self._frozen: list[tuple[ResponseLayer, str]] = []  # by name, since sharding replaces the parameters
        self._freeze()
        self._assigned = {name: module.__dict__.get(name) for name in _HOOKS if is_overridden(name, module)}
        for name in self._assigned:
            self._wrap(name)

    def _wrap(self, name: str) -> None:
        """Freeze what the hook converts, once it has been called."""
        hook = getattr(self._module, name)

        def wrapped(*args: Any, **kwargs: Any) -> None:
            self._unwrap(name)
            hook(*args, **kwargs)
            self._freeze()

        self._module.__dict__[name] = wrapped

    def _unwrap(self, name: str) -> None:
        assigned = self._assigned.pop(name)
        self._module.__dict__.pop(name)
        if assigned is not None:
            self._module.__dict__[name] = assigned

    def _freeze(self) -> None:
        for layer in self._module.modules():
            if isinstance(layer, ResponseLayer):
                own = {id(parameter) for parameter in layer.response_parameters() if parameter.requires_grad}
                named = layer.named_parameters(recurse=False, remove_duplicate=False)
                self._frozen += [(layer, name) for name, parameter in named if id(parameter) in own]
        self._require_grad(False)

    def _require_grad(self, needed: bool) -> None:
        for layer, name in self._frozen:
            parameter = layer._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(needed)

    def release(self) -> None:
        """Let the parameters that were frozen train again."""
        for name in list(self._assigned):
            self._unwrap(name)
        self._require_grad(True)
        self._frozen = []
