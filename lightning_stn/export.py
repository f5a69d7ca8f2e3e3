"""Taking a plain network away after training."""

import copy

import torch
from torch import nn

from lightning_stn.binding import BoundModule
from lightning_stn.layers import ResponseLayer
from lightning_stn.regularizer import Regularizer


def export(net: nn.Module) -> nn.Module:
    """A copy of a converted network at the current hyperparameters, which needs nothing of this package.

    Response layers become the layers that they stood in for, with the effective weights as their own; tuned dropouts
    become torch's, at the current rate; other regularisers and augmentations, which act in training only, become
    `nn.Identity`; what wraps a module, as `WeightDrop` does, gives way to it. For the rest types, names and state-dict
    keys are those before the conversion. A parameter that two modules shared
    is shared no longer where they responded to it, since their effective weights differ.

    Args:
        net: a network that `convert` returned, on any device; it is not changed.

    Returns:
        The plain network, in the mode of `net`.

    Raises:
        TypeError: `net` is no module.
        ValueError: the network holds nothing that was converted, or a regulariser that has no plain counterpart.
        RuntimeError: it holds a regulariser that has found no hyperparameters yet.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"export: expected net to be a network, an nn.Module, got {net!r}; pass what convert() returned."
        )
    if not any(isinstance(module, BoundModule) for module in net.modules()):
        raise ValueError(
            f"Expected a converted network, got {type(net).__name__} without a response layer; "
            "pass what convert() returned."
        )
    plain = copy.deepcopy(net)
    with torch.no_grad():
        for module in list(plain.modules()):
            if isinstance(module, ResponseLayer):
                module.make_plain()
    return _without_regularizers(plain)


def _without_regularizers(module: nn.Module) -> nn.Module:
    """Replace every regulariser by its plain counterpart, the module itself included, and undo `torch.compile`."""
    compiled = module._modules.get("_orig_mod")  # the name in torch 2.4 to 2.14; its class would take seconds to import
    if compiled is not None:
        return _without_regularizers(compiled)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _without_regularizers(child)
    return module.make_plain() if isinstance(module, Regularizer) else module
