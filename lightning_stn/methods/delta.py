"""What Delta-STN adds: the response centred at the current hyperparameters, and the passes that fit it.

Bae and Grosse (2020), arXiv:2010.13514. The base weights train at the current hyperparameters. The response trains
beside them, at perturbed hyperparameters, with the base weights held fixed, on the first-order prediction
`f(x; w) + J_w f dw(h)`. Or both train on that, in one pass.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_stn.hyperparameters import Bound, HyperparameterSet
from lightning_stn.layers import ResponseLayer
from lightning_stn.methods.linearized import linear_predictions


def recentre(root: nn.Module, hyperparameters: HyperparameterSet, centred: bool) -> None:
    """Count responses from the current hyperparameters, or from zero, without a change in what networks compute."""
    if hyperparameters.centred == centred:
        return
    shift = hyperparameters.current() if centred else -hyperparameters.current()
    with torch.no_grad():
        for layer in root.modules():
            if isinstance(layer, ResponseLayer) and layer.hyperparameters is hyperparameters:
                for name, moved in layer.effective(shift).items():
                    getattr(layer, name).copy_(moved)
    hyperparameters.centred = centred


@contextmanager
def base_pass(hyperparameters: HyperparameterSet) -> Iterator[None]:
    """Within a weight phase: layers have their base weights, regularisers act at the current hyperparameters."""
    bound = hyperparameters.bound
    assert bound.sample is not None
    values = hyperparameters.bound_values(hyperparameters.current().expand(len(bound.sample), -1))
    hyperparameters.bound = Bound(values=values, read=bound.read)
    try:
        yield
    finally:
        hyperparameters.bound = bound


@contextmanager
def response_pass(root: nn.Module, hyperparameters: HyperparameterSet, *, linear: bool) -> Iterator[None]:
    """Within a weight phase: only the response gets gradients, and batch statistics stay as they were.

    Args:
        root: the module that owns the networks.
        hyperparameters: the set that they respond to, with a sample bound.
        linear: let the networks that were converted return their first-order predictions.
    """
    with ExitStack() as stack:
        stack.enter_context(_held(root, hyperparameters))
        stack.enter_context(_spare_statistics(root))
        if linear:
            stack.enter_context(linear_predictions(hyperparameters, shared=False))
        yield


def shared_pass(hyperparameters: HyperparameterSet) -> AbstractContextManager[None]:
    """Within a weight phase: first-order predictions, through whose primals base and response get gradients.

    With `g` the loss's gradient at the prediction, the base weights get `J^T g`, the response `J^T g` through
    `dw(h)`: both from one backward pass. To first order in the perturbation, the first is what they would get at the
    current hyperparameters, on average over perturbations.
    """
    return linear_predictions(hyperparameters, shared=True)


@contextmanager
def _held(root: nn.Module, hyperparameters: HyperparameterSet) -> Iterator[None]:
    """Hold all parameters but those of the response."""
    layers = [module for module in root.modules() if isinstance(module, ResponseLayer)]
    responses = {id(parameter) for layer in layers for parameter in layer.response_parameters()}
    held = [p for p in root.parameters() if p.requires_grad and id(p) not in responses]
    for parameter in held:
        parameter.requires_grad_(False)
    hyperparameters.bound.held = frozenset(map(id, held))
    try:
        yield
    finally:
        hyperparameters.bound.held = frozenset()
        for parameter in held:
            parameter.requires_grad_(True)


@contextmanager
def _spare_statistics(root: nn.Module) -> Iterator[None]:
    """Let running statistics move in copies: moved back in place, they would not be those that backward has saved."""
    norms = [module for module in root.modules() if isinstance(module, _BatchNorm)]
    own = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, own, strict=True):
        norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            norm._buffers.update(buffers)
