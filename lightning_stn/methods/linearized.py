"""First-order predictions of networks, `f(x; w) + J_w f dw(h)`, computed in forward mode.

Response layers compute their jvps themselves; all other operations use torch's forward-mode rules. Tangents are
constants: backward differentiates the primal, and response layers share its gradient with the response; see
`dual.respond`.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map, tree_map_only

from lightning_stn import dual
from lightning_stn.hyperparameters import HyperparameterSet

_DUAL = "_lightning_stn_dual"
"""Attribute of a prediction that holds the dual tensor whose primal and tangent it is the sum of."""


@contextmanager
def linear_predictions(hyperparameters: HyperparameterSet, *, shared: bool) -> Iterator[None]:
    """Inside this context the converted networks return their first-order predictions.

    Networks run in eager mode and without fused attention, since neither compiled graphs nor fused attention support
    forward mode.

    Args:
        hyperparameters: the set that the networks respond to, with a sample bound.
        shared: whether the base weights train in the same pass; inputs of a network may then require a gradient too.

    Raises:
        NotImplementedError: a network cannot be linearised, or not for an input that requires a gradient.
    """
    _load_rules()
    boundary = _NetworkBoundary(shared)
    hooks = [
        hook
        for network in hyperparameters.networks
        for hook in (
            network.register_forward_pre_hook(boundary.enter, with_kwargs=True),
            network.register_forward_hook(boundary.leave),
            *(hook for module in network.modules() if hasattr(module, "unshard") for hook in _hide_tangents(module)),
        )
    ]
    run = replace(hyperparameters.current_pass, tangent=True)
    try:
        with hyperparameters.running(run), dual.dual_level(), sdpa_kernel(SDPBackend.MATH), eager():
            yield
    except RuntimeError as error:  # or its subclass NotImplementedError, which operations of torch raise
        if not any(words in str(error) for words in ("forward AD", "forward mode AD")):
            raise
        raise NotImplementedError(
            "The prediction cannot be linearised, since an operation of the network has no forward-mode derivative in "
            f"torch; use DeltaSTN(linearize=False). Torch's message: {str(error).splitlines()[0]}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


@cache
def _load_rules() -> None:
    """Load torch's forward-mode rules, which it compiles at their first use with a warning about its own code."""
    with warnings.catch_warnings(), dual.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        dual.with_tangent(torch.zeros(()), torch.zeros(()))


def eager() -> AbstractContextManager[None]:
    """Run compiled modules in eager mode."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@dataclass
class _NetworkBoundary:
    """Hooks on the inputs and outputs of networks; inner networks are left to the outermost one.

    Args:
        shared: see `linear_predictions`.
        depth: how many networks are running now, one inside the other.
    """

    shared: bool
    depth: int = field(init=False, default=0)

    def enter(self, network: nn.Module, args: Any, kwargs: Any) -> Any:
        """Restore the tangent of an input that is another converted network's prediction.

        Raises:
            NotImplementedError: another input requires a gradient.
        """
        self.depth += 1
        if self.depth > 1:
            return None

        def restored(tensor: Tensor) -> Tensor:
            original: Tensor = getattr(tensor, _DUAL, tensor)
            if original is tensor and tensor.requires_grad and (tensor.is_leaf or not self.shared):
                raise NotImplementedError(
                    f"The prediction of {type(network).__name__} cannot be linearised for an input that requires a "
                    "gradient; detach the input, convert the module that computes it and this network as one, or use "
                    "DeltaSTN(linearize=False)."
                )
            return original

        return _map_tensors(restored, (args, kwargs))

    def leave(self, network: nn.Module, args: Any, output: Any) -> Any:
        """Replace the output of the outermost network by its first-order prediction."""
        self.depth -= 1
        return None if self.depth else _map_tensors(_prediction, output)


def _map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """A copy of nested collections and dataclasses, with `function` applied to every tensor in them."""

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        new = copy.copy(leaf)
        for part in fields(leaf):
            object.__setattr__(new, part.name, _map_tensors(function, getattr(leaf, part.name)))
        return new

    return tree_map(visit, tree)


def _prediction(output: Tensor) -> Tensor:
    """The first-order prediction, which remembers the dual tensor `output` for a network that follows."""
    prediction = dual.linear_prediction(output)
    if prediction is not output:
        setattr(prediction, _DUAL, output)
    return prediction


def _hide_tangents(module: nn.Module) -> tuple[Any, Any]:
    """Remove the tangents of a module's inputs before the pre-forward hook of FSDP2, and restore them after it.

    That hook passes the inputs through an autograd function without a forward-mode rule.
    """
    tangents: list[Tensor | None] = []

    def primal_of(tensor: Tensor) -> Tensor:
        primal, tangent = dual.parts(tensor)
        tangents.append(tangent)
        return primal

    def hide(module: nn.Module, args: Any, kwargs: Any) -> Any:
        tangents.clear()
        return tree_map_only(Tensor, primal_of, (args, kwargs))

    def restore(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda primal: dual.with_tangent(primal, tangents.pop(0)), (args, kwargs))

    return (
        module.register_forward_pre_hook(hide, prepend=True, with_kwargs=True),
        module.register_forward_pre_hook(restore, with_kwargs=True),
    )
