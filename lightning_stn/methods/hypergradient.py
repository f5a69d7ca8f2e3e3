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

RATES = ("lr", "scale_lr")
"""What the learning rates of the two parameter groups are called."""


class Rates(NamedTuple):
    """What decides the learning rate of the hyperparameters where none is given, unconstrained units.

    Args:
        travel: how far a hyperparameter may move over a run: rate times number of steps.
        smallest: the rate of a long run.
        largest: the rate of a short run.
        unknown: the rate of a run of unknown length.
    """

    travel: float
    smallest: float
    largest: float
    unknown: float


DERIVED = {
    # The smallest is the paper's rate for its convolutional networks, MacKay et al. (2019), section 4.2.
    "stn": Rates(travel=30.0, smallest=3e-3, largest=1e-1, unknown=1e-2),
    # A third: with a centred response a step of the hyperparameters does not move the network by itself, which has to
    # follow by training before the next hypergradient can tell how far to go.
    "delta-stn": Rates(travel=10.0, smallest=1e-3, largest=3e-2, unknown=3e-3),
}


def derived_rate(steps: int | None, method: str = "stn") -> float:
    """Learning rate for a run of so many hyperparameter steps (None: unknown).

    What decides is how far a hyperparameter can travel, so that a short run needs larger steps than a long one.

    >>> derived_rate(600), derived_rate(100_000), derived_rate(10)
    (0.05, 0.003, 0.1)
    >>> derived_rate(1000, "delta-stn")
    0.01
    """
    rates = DERIVED[method]
    if steps is None:
        return rates.unknown
    return min(max(rates.travel / max(steps, 1), rates.smallest), rates.largest)


def own_scaler(precision: str | int, device: torch.device) -> torch.amp.GradScaler | None:
    """What scales the loss of the hyperparameter phase where the network computes in float16."""
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
    """Steps `lambda` and, if scales are tuned, `rho`: one optimiser, two parameter groups.

    It is stepped outside Lightning's optimisers, which would count its steps in `trainer.global_step`.

    Args:
        hyperparameters: what is stepped.
        factory: builds the optimiser from the parameter groups.
        lr: learning rate of `lambda`, unconstrained units.
        scale_lr: learning rate of `rho`.
        tune_scales: whether `rho` is stepped at all.
        scaler: scales the loss, where gradients would vanish in half precision. It is not the weights' own: each
            optimiser that steps updates its scaler, and the other would then unscale by the wrong factor.

    Raises:
        TypeError: the factory builds no optimiser.
    """

    def __init__(
        self,
        hyperparameters: HyperparameterSet,
        factory: OptimizerFactory,
        *,
        lr: float,
        scale_lr: float,
        tune_scales: bool,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._parameters = [hyperparameters.unconstrained]
        groups: list[dict[str, Any]] = [{"params": [hyperparameters.unconstrained], "lr": lr}]
        if tune_scales:
            self._parameters.append(hyperparameters.raw_scale)
            groups.append({"params": [hyperparameters.raw_scale], "lr": scale_lr})
        self._hyperparameters = hyperparameters
        self.optimizer = factory(groups)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"Expected STNCallback(optimizer=...) to return a torch.optim.Optimizer, got "
                f"{type(self.optimizer).__name__}; pass a class such as torch.optim.Adam, or a functools.partial of it."
            )
        self.scaler = scaler

    def leaves(self) -> Leaves:
        """Copies of the current state that require a gradient."""
        hyperparameters = self._hyperparameters
        return Leaves(
            hyperparameters.unconstrained.detach().clone().requires_grad_(),
            hyperparameters.raw_scale.detach().clone().requires_grad_(),
        )

    def hypergradient(self, loss: Tensor, leaves: Leaves, entropy_weight: float) -> Tensor:
        """Gradient of `L_V - tau * entropy`, `[2, h]`: a row for `lambda`, and one for `rho` (zero if it is fixed).

        It is scaled, if there is a scaler; `receive` undoes that, once the ranks have averaged their gradients. Only
        these leaves are differentiated, so that no gradient of a network weight is computed or stored.

        Raises:
            ValueError: the loss is not a scalar with a gradient in the hyperparameters.
            NotImplementedError: reentrant activation checkpoints lie between the two.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"Expected validation_loss to return a scalar tensor, got {got}; return the mean loss.")
        tuned = leaves[: len(self._parameters)]
        objective = loss.float()
        if len(tuned) > 1:
            objective = objective - entropy_weight * leaves.entropy()
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
    def rates(self) -> dict[str, float]:
        """The learning rates: `lr` and, if scales are tuned, `scale_lr`."""
        return {name: group["lr"] for name, group in zip(RATES, self.optimizer.param_groups, strict=False)}

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
            if self.scaler is not None:
                self.scaler.step(self.optimizer)  # It finds out for itself what is not finite.
                self.scaler.update()
            elif admitted:
                self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser, by the name of its class, and the scaler."""
        return {
            "class": type(self.optimizer).__qualname__,
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: it is that of another class of optimiser.
        """
        name = type(self.optimizer).__qualname__
        if state["class"] != name:
            raise ValueError(
                f"The checkpoint holds the state of a hyperparameter optimiser of class {state['class']}, but this "
                f"STNCallback has {name}; pass the same, or override=['optimizer'] to begin with a new state."
            )
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


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
