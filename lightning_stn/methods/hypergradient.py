"""The hyperparameter step: a gradient in detached copies of the hyperparameters, and the optimiser that uses it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stn import functional
from lightning_stn.arguments import is_number
from lightning_stn.binding import bind
from lightning_stn.functional import FrozenWeightsError
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.methods.base import check_loss
from lightning_stn.methods.optimizers import OptimizerFactory, build_optimizer, refuse_decay
from lightning_stn.transforms import positive

RATES = ("lr", "scale_lr")
"""Names of the learning rates of the two parameter groups."""


@dataclass(frozen=True)
class Scales:
    """How the perturbation scales `sigma` are tuned.

    Args:
        tune: whether the scales are tuned. If not, hyperparameter steps run at the current hyperparameters, without
            perturbation.
        lr: learning rate of the scales, unconstrained units per step; None for that of the hyperparameters.
        entropy_weight: `tau`, weight of the perturbation's entropy in the objective; a larger one keeps scales larger.

    Raises:
        ValueError: an argument is out of its range.
    """

    tune: bool = False
    lr: float | None = None
    entropy_weight: float = 1e-3

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.tune, bool):
            raise ValueError(f"Scales: expected tune to be True or False, got {self.tune!r}.")
        if self.lr is not None and not (is_number(self.lr) and self.lr > 0):
            raise ValueError(f"Scales: expected lr to be positive, or None, got {self.lr!r}.")
        if not (is_number(self.entropy_weight) and self.entropy_weight >= 0):
            raise ValueError(
                f"Scales: expected entropy_weight to be a number of at least 0, got {self.entropy_weight!r}."
            )


def own_scaler(precision: str | int, device: torch.device) -> torch.amp.GradScaler | None:
    """A gradient scaler for the hyperparameter phase of a network that computes in float16; None for other networks."""
    if precision not in ("16-mixed", "16-true"):
        return None
    # The default of 2^16 is itself beyond float16, and would cost the first step where the loss has that precision.
    return torch.amp.GradScaler(device.type, init_scale=2.0**15)


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
    """Steps `lambda` and, if scales are tuned, `rho`: one optimiser with two parameter groups.

    It steps outside Lightning's optimisers, which would count its steps in `trainer.global_step`.

    Args:
        hyperparameters: the set to tune.
        factory: builds the optimiser from the parameter groups.
        lr: learning rate of `lambda`, unconstrained units per step.
        scales: how `rho` is tuned.
        scaler: scales the loss, where gradients would vanish in half precision. The weights need another scaler: each
            optimiser that steps updates its scaler, and the other would then unscale by the wrong factor.

    Raises:
        TypeError: the factory returns no optimiser.
        ValueError: the optimiser needs a closure, decays what it steps, or cannot be built.
    """

    def __init__(
        self,
        hyperparameters: HyperparameterSet,
        factory: OptimizerFactory,
        *,
        lr: float,
        scales: Scales = Scales(),
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._parameters = [hyperparameters.unconstrained]
        groups: list[dict[str, Any]] = [{"params": [hyperparameters.unconstrained], "lr": lr}]
        if scales.tune:
            self._parameters.append(hyperparameters.raw_scale)
            groups.append({"params": [hyperparameters.raw_scale], "lr": lr if scales.lr is None else scales.lr})
        self._hyperparameters = hyperparameters
        self._entropy_weight = scales.entropy_weight
        self._freeze = True
        self.optimizer = build_optimizer(factory, groups)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.scaler = scaler

    @property
    def tunes_scales(self) -> bool:
        """Whether `rho` is stepped."""
        return len(self._parameters) > 1

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates: `lr` and, if scales are tuned, `scale_lr`."""
        return {name: group["lr"] for name, group in zip(RATES, self.optimizer.param_groups, strict=False)}

    def set_rate(self, name: str, rate: float) -> None:
        """Change one of the `rates`, and keep the state of the optimiser."""
        group = self.optimizer.param_groups[RATES.index(name)]
        group["lr"] = group["initial_lr"] = rate

    def anneal(self, share: float) -> None:
        """Lower the rates along a half cosine, from their initial values to zero.

        Args:
            share: part of the run that is over, in [0, 1].
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 + math.cos(math.pi * min(share, 1.0))) / 2

    def leaves(self) -> Leaves:
        """Copies of the current state that require a gradient."""
        hyperparameters = self._hyperparameters
        return Leaves(
            hyperparameters.unconstrained.detach().clone().requires_grad_(),
            hyperparameters.raw_scale.detach().clone().requires_grad_(),
        )

    def differentiate(self, loss: Callable[[], Tensor], noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Validation loss, and its hypergradient through the response alone.

        Args:
            loss: computes the validation loss, a scalar, without regularisation; it runs twice where it turns out to
                differentiate the network by itself.
            noise: `eps`, `[n, h]` or `[1, h]`; None evaluates at the current hyperparameters.

        Returns:
            The loss, and the hypergradient as of `hypergradient`.

        Raises:
            ValueError: the loss is not a scalar with a gradient in the hyperparameters.
            NotImplementedError: reentrant activation checkpoints lie between the two.
        """
        leaves = self.leaves()
        sample = leaves.sample(noise)
        try:
            return self._differentiate(loss, leaves, sample)
        except FrozenWeightsError:
            # The loss has a gradient of the network in it: from now on gradients pass through the weights.
            self._freeze = False
            return self._differentiate(loss, leaves, sample)

    def _differentiate(self, loss: Callable[[], Tensor], leaves: Leaves, sample: Tensor) -> tuple[Tensor, Tensor]:
        with bind(self._hyperparameters, sample, frozen=self._freeze):
            value = loss()
            return value, self.hypergradient(value, leaves)

    def hypergradient(self, loss: Tensor, leaves: Leaves) -> Tensor:
        """Gradient of `L_V - tau * entropy`, `[2, h]`: a row for `lambda`, and one for `rho` (zero if it is fixed).

        With a scaler the gradient is scaled; `receive` unscales it, once the ranks have averaged their gradients. Only
        these leaves are differentiated, so that no gradient of a network weight is computed or stored.

        Raises:
            ValueError: the loss is not a scalar with a gradient in the hyperparameters.
            NotImplementedError: reentrant activation checkpoints lie between the two.
        """
        loss = check_loss(loss, "validation_loss")
        tuned = leaves[: len(self._parameters)]
        objective = loss.float()
        if self.tunes_scales:
            objective = objective - self._entropy_weight * leaves.entropy()
        gradients: list[Tensor | None] = [None]
        if loss.requires_grad:
            scaled = objective if self.scaler is None else self.scaler.scale(objective)
            gradients = list(_gradients(scaled, tuned))
        if gradients[0] is None:
            raise ValueError(
                "The validation loss does not depend on the hyperparameters: no response layer led to it. Compute it "
                "with the network that convert() returned, without torch.no_grad or detach."
            )
        rows = [torch.zeros_like(leaves.raw_scale) if gradient is None else gradient for gradient in gradients]
        if len(rows) == 1:
            rows.append(torch.zeros_like(rows[0]))
        return torch.stack(rows)

    @property
    def rescales(self) -> bool:
        """Whether a gradient that is not finite may be one that was scaled too much."""
        return self.scaler is not None and self.scaler.get_scale() > 1

    def receive(self, hypergradient: Tensor) -> Tensor:
        """Take a hypergradient, `[2, h]`, for the next step; returns it unscaled."""
        for parameter, gradient in zip(self._parameters, hypergradient, strict=False):
            parameter.grad = gradient.clone()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        received = hypergradient.clone()
        for row, parameter in zip(received, self._parameters, strict=False):
            row.copy_(parameter.grad)
        return received

    def step(self, *, admitted: bool = True) -> None:
        """Step along the hypergradient that was received, if it is admitted; the parameters keep no gradient."""
        try:
            if admitted and self.scaler is not None:
                self.scaler.step(self.optimizer)
            elif admitted:
                self.optimizer.step()
            if self.scaler is not None:
                self.scaler.update()  # to a smaller scale, where `receive` found what is not finite
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser, by the name of its class, the scaler, and whether weights can be frozen."""
        return {
            "class": type(self.optimizer).__qualname__,
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "freeze": self._freeze,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: the state is of another class of optimiser, or of one that decays.
        """
        name = type(self.optimizer).__qualname__
        if state["class"] != name:
            raise ValueError(
                f"The checkpoint holds the state of a hyperparameter optimiser of class {state['class']}, but this "
                f"STNCallback has {name}; pass the same, or on_resume_use=['optimizer'] to begin with a new state."
            )
        refuse_decay(name, state["optimizer"]["param_groups"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self._freeze = state["freeze"]


def _gradients(objective: Tensor, tuned: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of these leaves, and of nothing else."""
    try:
        return torch.autograd.grad(objective, tuned, allow_unused=True)
    except RuntimeError as error:
        if "torch.utils.checkpoint" not in str(error):
            raise
        raise NotImplementedError(
            "The hyperparameter phase differentiates the hyperparameters alone, which activation checkpoints with "
            "use_reentrant=True do not allow; use checkpoint(..., use_reentrant=False), or checkpoint only where "
            "self.training, which is False in this phase."
        ) from error
