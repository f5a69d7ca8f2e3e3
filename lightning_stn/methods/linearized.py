"""First-order predictions of networks, `f(x; w) + J_w f dw(h)`, by forward propagation of tangents.

Tangents are carried by response layers, and in between by torch's forward-mode derivatives. They are constants: the
gradient of a prediction is that of its primal, which response layers hand on to the response; see
`dual.respond`.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from lightning_stn import dual
from lightning_stn.hyperparameters import HyperparameterSet

_DUAL = "_lightning_stn_dual"
"""Where a prediction keeps the dual tensor that it is the sum of."""


@contextmanager
def linear_predictions(hyperparameters: HyperparameterSet, *, shared: bool) -> Iterator[None]:
    """Let the networks that respond to a set return their first-order predictions, with a sample bound.

    They run in eager mode, with attention computed step by step: neither compiled graphs nor fused attention carry
    tangents.

    Args:
        hyperparameters: the set.
        shared: whether the base weights train in this very pass, so that what comes before a network may as well.

    Raises:
        NotImplementedError: a network cannot be linearised, or not for the input that it gets.
    """
    _load_rules()
    passage = _Passage(shared)
    hooks = [
        hook
        for network in hyperparameters.networks
        for hook in (
            network.register_forward_pre_hook(passage.enter, with_kwargs=True),
            network.register_forward_hook(passage.leave),
            *(hook for module in network.modules() if hasattr(module, "unshard") for hook in _spare(module)),
        )
    ]
    run = replace(hyperparameters.current_pass, tangent=True)
    try:
        with hyperparameters.running(run), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _eager():
            yield
    except RuntimeError as error:  # NotImplementedError is one; a Function without jvp raises the other
        if not any(words in str(error) for words in ("forward AD", "forward mode AD")):
            raise
        raise NotImplementedError(
            "An operation of this network has no forward-mode derivative in torch, so that its prediction cannot be "
            f"linearised; use DeltaSTN(linearize=False). Torch says: {str(error).splitlines()[0]}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


@cache
def _load_rules() -> None:
    """Let torch compile its rules of forward-mode differentiation, which it does once, with a warning to itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        dual.with_tangent(torch.zeros(()), torch.zeros(()))


def _eager() -> AbstractContextManager[None]:
    """Run compiled modules as they were written; torch before 2.6 has no way to say so."""
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


@dataclass
class _Passage:
    """What happens where values enter and leave networks.

    Args:
        shared: see `linear_predictions`.
        depth: networks that are running now, one inside the other.
    """

    shared: bool
    depth: int = field(init=False, default=0)

    def enter(self, network: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give the prediction of a network before this one its tangent again.

        Raises:
            NotImplementedError: an input requires a gradient and is no such prediction.
        """
        self.depth += 1
        if self.depth > 1:
            return None

        def with_known_tangent(tensor: Tensor) -> Tensor:
            known: Tensor = getattr(tensor, _DUAL, tensor)
            if known is tensor and tensor.requires_grad and (tensor.is_leaf or not self.shared):
                raise NotImplementedError(
                    f"The prediction of {type(network).__name__} cannot be linearised for an input that requires a "
                    "gradient; detach it, convert what computes it and this network as one, or use "
                    "DeltaSTN(linearize=False)."
                )
            return known

        return tree_map_only(Tensor, with_known_tangent, (args, kwargs))

    def leave(self, network: nn.Module, args: Any, output: Any) -> Any:
        """Return primal and tangent in one sum."""
        self.depth -= 1
        return None if self.depth else tree_map_only(Tensor, _prediction, output)


def _prediction(output: Tensor) -> Tensor:
    prediction = dual.linear_prediction(output)
    if prediction is not output:
        setattr(prediction, _DUAL, output)
    return prediction


def _spare(module: nn.Module) -> tuple[Any, Any]:
    """Keep tangents out of the function that FSDP2 passes the inputs of its modules through, which has no rule."""
    tangents: list[Tensor | None] = []

    def lay_aside(tensor: Tensor) -> Tensor:
        primal, tangent = dual.parts(tensor)
        tangents.append(tangent)
        return primal

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        tangents.clear()
        return tree_map_only(Tensor, lay_aside, (args, kwargs))

    def behind(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda primal: dual.with_tangent(primal, tangents.pop(0)), (args, kwargs))

    return (
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        module.register_forward_pre_hook(behind, with_kwargs=True),
    )
