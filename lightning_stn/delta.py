"""What Delta-STN adds: the response centred at the current hyperparameters, and the pass that fits it.

Bae and Grosse (2020), arXiv:2010.13514. The base weights train at the current hyperparameters. The response trains
beside them, at perturbed hyperparameters, with the base weights held fixed, on the first-order prediction
`f(x; w) + J_w f dw(h)`.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from lightning_stn import functional
from lightning_stn.hyperparameters import Bound, HyperparameterSet
from lightning_stn.layers import ResponseLayer


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
        linear: let the networks that were converted return their first-order predictions. Tangents are carried by
            torch's forward-mode derivatives, in eager mode, with attention computed step by step.
    """
    with ExitStack() as stack:
        stack.enter_context(_held(root, hyperparameters))
        stack.enter_context(_spare_statistics(root))
        if linear:
            stack.enter_context(_linear_predictions(hyperparameters))
        if linear and sharded(root):
            stack.enter_context(_keep_whole(root))
        yield


def sharded(root: nn.Module) -> bool:
    """Whether FSDP2 shares parameters out among the ranks."""
    return any(map(_is_shared_out, root.parameters()))


def _is_shared_out(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")  # a DTensor, whose public place moved with torch 2.5


def _keep_whole(root: nn.Module) -> AbstractContextManager[None]:
    """Save copies of weights for backward.

    Outside a module's own passes FSDP2 frees what it has gathered, and hears of the backward pass from outputs that
    require a gradient. Of first-order predictions only the tangents do.
    """

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        gathered = (p for p in root.parameters() if not _is_shared_out(p))
        return tensor.detach().clone() if any(p.untyped_storage().data_ptr() == place for p in gathered) else tensor

    return saved_tensors_hooks(pack, lambda tensor: tensor)


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


@cache
def _load_rules() -> None:
    """Let torch compile its rules of forward-mode differentiation, which it does once, with a warning to itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        functional.with_tangent(torch.zeros(()), torch.zeros(()))


def _eager() -> AbstractContextManager[None]:
    """Run compiled modules as they were written; torch before 2.6 has no way to say so."""
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


@contextmanager
def _linear_predictions(hyperparameters: HyperparameterSet) -> Iterator[None]:
    def predict(module: nn.Module, args: object, output: object) -> object:
        return tree_map_only(Tensor, functional.linear_prediction, output)

    _load_rules()
    hooks = [network.register_forward_hook(predict) for network in hyperparameters.networks]
    hyperparameters.bound.linear = True
    try:
        # Neither compiled graphs nor fused attention carry tangents.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _eager():
            yield
    except RuntimeError as error:  # NotImplementedError is one; a Function without jvp raises the other
        if not any(words in str(error) for words in ("forward AD", "forward mode AD")):
            raise
        raise NotImplementedError(
            "An operation of this network has no forward-mode derivative in torch, so that its prediction cannot be "
            f"linearised; use STNCallback(linearize=False). Torch says: {str(error).splitlines()[0]}"
        ) from error
    finally:
        hyperparameters.bound.linear = False
        for hook in hooks:
            hook.remove()
