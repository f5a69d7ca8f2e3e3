"""The hyperparameter step: gradients on detached leaves, and the one optimiser that uses them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stn import functional
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.transforms import positive

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Builds an optimiser from parameter groups, each with its `params` and `lr`."""

TRAVEL = 30.0
"""How far a hyperparameter may move over a run, in unconstrained units: rate times number of steps."""

SMALLEST_RATE = 3e-3
"""Also the paper's rate for its convolutional networks, MacKay et al. (2019), section 4.2."""

LARGEST_RATE = 1e-1
UNKNOWN_LENGTH_RATE = 1e-2


def derived_rate(steps: int | None) -> float:
    """Learning rate for a run of so many hyperparameter steps (None: unknown).

    What decides is how far a hyperparameter can travel, so that a short run needs larger steps than a long one.

    >>> derived_rate(600), derived_rate(100_000), derived_rate(10)
    (0.05, 0.003, 0.1)
    """
    if steps is None:
        return UNKNOWN_LENGTH_RATE
    return min(max(TRAVEL / max(steps, 1), SMALLEST_RATE), LARGEST_RATE)


class Leaves(NamedTuple):
    """Detached copies to differentiate: `lambda` and `rho`, `[h]` each, unconstrained units."""

    unconstrained: Tensor
    raw_scale: Tensor

    def sample(self, noise: Tensor | None) -> Tensor:
        """`lambda + softplus(rho) * eps`, or `lambda` as one row where there is no noise."""
        if noise is None:
            return self.unconstrained.unsqueeze(0)
        return functional.perturb(self.unconstrained, positive(self.raw_scale), noise)

    def entropy(self) -> Tensor:
        """Entropy of the perturbation, in nats."""
        return functional.entropy(positive(self.raw_scale))


class HyperparameterOptimizer:
    """Steps `lambda` and, if scales are tuned, `rho`: one optimiser, two parameter groups.

    It is stepped outside Lightning's optimisers, which would count its steps in `trainer.global_step`.

    Args:
        hyperparameters: what is stepped.
        factory: builds the optimiser from the parameter groups.
        lr: learning rate of `lambda`, unconstrained units.
        scale_lr: learning rate of `rho`.
        tune_scales: whether `rho` is stepped at all.
    """

    def __init__(
        self,
        hyperparameters: HyperparameterSet,
        factory: OptimizerFactory,
        *,
        lr: float,
        scale_lr: float,
        tune_scales: bool,
    ) -> None:
        self._parameters = [hyperparameters.unconstrained]
        groups: list[dict[str, Any]] = [{"params": [hyperparameters.unconstrained], "lr": lr}]
        if tune_scales:
            self._parameters.append(hyperparameters.raw_scale)
            groups.append({"params": [hyperparameters.raw_scale], "lr": scale_lr})
        self._hyperparameters = hyperparameters
        self.optimizer = factory(groups)

    def leaves(self) -> Leaves:
        """Copies of the current state that require a gradient."""
        hyperparameters = self._hyperparameters
        return Leaves(
            hyperparameters.unconstrained.detach().clone().requires_grad_(),
            hyperparameters.raw_scale.detach().clone().requires_grad_(),
        )

    def hypergradient(self, loss: Tensor, leaves: Leaves, entropy_weight: float) -> Tensor:
        """Gradient of `L_V - tau * entropy`, `[2, h]`: a row for `lambda`, and one for `rho` (zero if it is fixed).

        Only these leaves are differentiated, so that no gradient of a network weight is computed or stored.

        Raises:
            ValueError: the loss is not a scalar with a gradient in the hyperparameters.
        """
        tuned = leaves[: len(self._parameters)]
        objective = loss.float()
        if len(tuned) > 1:
            objective = objective - entropy_weight * leaves.entropy()
        gradients: list[Tensor | None] = [None]
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            gradients = list(torch.autograd.grad(objective, tuned, allow_unused=True))
        if gradients[0] is None:
            raise ValueError(
                "The validation loss does not depend on the hyperparameters: no response layer led to it. Compute it "
                "with the network that convert() returned, without torch.no_grad or detach, as a scalar."
            )
        rows = [torch.zeros_like(leaves.raw_scale) if gradient is None else gradient for gradient in gradients]
        if len(rows) == 1:
            rows.append(torch.zeros_like(rows[0]))
        return torch.stack(rows)

    def step(self, hypergradient: Tensor) -> None:
        """Step along a hypergradient, `[2, h]`; the parameters keep no gradient afterwards."""
        try:
            for parameter, gradient in zip(self._parameters, hypergradient, strict=False):
                parameter.grad = gradient
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
