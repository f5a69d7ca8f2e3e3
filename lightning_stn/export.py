"""Export of a plain network after training."""

import copy

import torch
from torch import nn

from lightning_stn.binding import BoundModule
from lightning_stn.layers import ResponseLayer
from lightning_stn.regularizer import Regularizer


def export(net: nn.Module) -> nn.Module:
    """A copy of a converted network at the current hyperparameters that does not need this package.

    Response layers become the plain layers that they replaced, with their effective weights. Tuned dropouts become
    torch's, at the current rate. Other regularisers and augmentations act in training only and become `nn.Identity`. A
    wrapper such as `WeightDrop` is replaced by the module that it wraps. All other types, names and state-dict keys are
    those before the conversion. Parameters that were shared stay shared, and keep their attributes.

    Args:
        net: a network that `convert` returned, on any device; it is not changed.

    Returns:
        The plain network, in the mode of `net`.

    Raises:
        TypeError: `net` is not a module.
        ValueError: no part of the network was converted, or a regulariser has no plain counterpart.
        RuntimeError: a regulariser is not attached to hyperparameters yet.
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
    for original, copied in zip(net.parameters(), plain.parameters(), strict=True):
        vars(copied).update(vars(original))  # torch does not copy the attributes of a Parameter
    with torch.no_grad():
        for module in list(plain.modules()):
            if isinstance(module, ResponseLayer):
                module.make_plain()
    return _without_regularizers(plain)


def _without_regularizers(module: nn.Module) -> nn.Module:
    """Replace every regulariser, including the module itself, by its plain counterpart, and undo `torch.compile`."""
    compiled = module._modules.get("_orig_mod")  # the name in torch 2.6 to 2.14; importing its class takes seconds
    if compiled is not None:
        return _without_regularizers(compiled)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _without_regularizers(child)
    return module.make_plain() if isinstance(module, Regularizer) else module
