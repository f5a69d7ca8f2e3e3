"""Delta-STN: a response centred at the current hyperparameters, fitted beside the base weights.

Bae and Grosse (2020), arXiv:2010.13514.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_stn.dual import has_tangent
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.kept import keep_metrics, keep_statistics
from lightning_stn.layers import ResponseLayer
from lightning_stn.methods.base import Method, Rates, end_forward
from lightning_stn.methods.linearized import linear_predictions
from lightning_stn.passes import Pass


@dataclass(frozen=True)
class DeltaSTN(Method):
    """Base weights learn at the current hyperparameters, and the response beside them at perturbed ones.

    Bae and Grosse (2020), arXiv:2010.13514. The response is counted from the current hyperparameters,
    `W(h) = W + diag(V (h - lambda)) R`.

    Args:
        linearize: whether the response learns on the first-order prediction `f(x; w) + J_w f dw(h)`, as in the paper,
            or on the network's own prediction, which costs less.
        passes: 2 evaluates the training loss twice a step, once for the base weights and once for the response, as in
            the paper. 1 trains both on the first-order prediction at the perturbed hyperparameters: it costs less, and
            `training_loss` runs once.

    Raises:
        ValueError: an argument has another type or value, or `passes=1` comes without `linearize=True`.
    """

    linearize: bool = True
    passes: int = 2

    name = "delta-stn"
    centred = True
    # Small steps, since a step of the hyperparameters leaves the network as it is: the weights have to follow by
    # training before the next hypergradient can tell how far to go.
    rates = Rates(travel=10.0, smallest=1e-3, largest=3e-2, unknown=3e-3)

    def __post_init__(self) -> None:
        """Check the settings."""
        linearize: Any = self.linearize
        passes: Any = self.passes
        if not isinstance(linearize, bool):
            raise ValueError(f"DeltaSTN: expected linearize to be True or False, got {linearize!r}.")
        if not isinstance(passes, int) or isinstance(passes, bool) or passes not in (1, 2):
            raise ValueError(f"DeltaSTN: expected passes=1 or passes=2, got {passes!r}.")
        if passes == 1 and not linearize:
            raise ValueError(
                "DeltaSTN: passes=1 trains on linearised predictions, got linearize=False; use linearize=True, or "
                "passes=2."
            )

    def objective(
        self, root: nn.Module, hyperparameters: HyperparameterSet, loss: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the training loss in one pass or two, whose sum one backward pass differentiates.

        See `Method.objective`.

        Raises:
            ValueError: the loss is computed from parts of a network, which are not linearised.
            NotImplementedError: a network cannot be linearised.
        """
        if self.passes == 1:
            with shared_pass(hyperparameters):
                value = objective = _linearized(loss())
        else:
            with response_pass(root, hyperparameters, linear=self.linearize):
                response_loss = _linearized(loss())
            with base_pass(hyperparameters):
                value = loss()
            objective = value + response_loss
        end_forward(hyperparameters, recomputes=False)
        return value, objective


def _linearized(loss: Tensor) -> Tensor:
    """The loss, if the networks that it was computed with have returned their predictions as a whole."""
    if has_tangent(loss):
        raise ValueError(
            "training_loss calls parts of a converted network, whose prediction is therefore not linearised; call "
            "the network as convert() returned it, or use DeltaSTN(linearize=False)."
        )
    return loss


@contextmanager
def base_pass(hyperparameters: HyperparameterSet) -> Iterator[None]:
    """Within a weight phase: layers have their base weights, regularisers act at the current hyperparameters."""
    bound = hyperparameters.current_pass.sample
    assert bound is not None
    values = hyperparameters.bound_values(hyperparameters.current().expand(len(bound), -1))
    with hyperparameters.running(Pass(values=values)):
        yield


@contextmanager
def response_pass(root: nn.Module, hyperparameters: HyperparameterSet, *, linear: bool) -> Iterator[None]:
    """Within a weight phase: only the response gets gradients; batch statistics and metrics stay as they were.

    Args:
        root: the module that owns the networks.
        hyperparameters: the set that they respond to, with a sample bound.
        linear: whether converted networks return their first-order predictions.
    """
    with ExitStack() as stack:
        held = stack.enter_context(_base_held(root))
        run = replace(hyperparameters.current_pass, held=held, extra=True)
        stack.enter_context(hyperparameters.running(run))
        stack.enter_context(keep_statistics(root))
        stack.enter_context(keep_metrics(root))
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
def _base_held(root: nn.Module) -> Iterator[frozenset[int]]:
    """Switch off the gradients of all parameters but those of the response; yields the identities of the former."""
    layers = [module for module in root.modules() if isinstance(module, ResponseLayer)]
    responses = {id(parameter) for layer in layers for parameter in layer.response_parameters()}
    held = [p for p in root.parameters() if p.requires_grad and id(p) not in responses]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield frozenset(map(id, held))
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
