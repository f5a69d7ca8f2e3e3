"""The optimiser that steps hyperparameters unless the user gives another."""

from collections.abc import Callable
from typing import Any

import torch


class SharedAdam(torch.optim.Optimizer):
    """Adam with one second moment for all entries of a tensor, the mean of their squared gradients.

    `m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) mean(g^2)`, `lambda <- lambda - lr m / sqrt(v)`, with Adam's
    corrections of the bias of `m` and `v`. Adam divides each entry by its own root mean square, so that a
    hyperparameter whose gradient is noise moves as far as one whose gradient matters. With a shared second moment an
    entry moves in proportion to its gradient, and the step does not depend on the scale of the loss either. Adam-mini,
    Zhang et al. (2024), arXiv:2406.16793, shares the second moment within blocks of weights.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, the length of a step for an entry whose gradient is the root mean square.
        betas: decay rates `b1` and `b2` of the moments, each in [0, 1).
        eps: added to the root mean square.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> entries = torch.zeros(2, requires_grad=True)
        >>> optimizer = SharedAdam([entries], lr=0.1)
        >>> entries.grad = torch.tensor([4.0, 3.0])
        >>> optimizer.step()
        >>> entries.detach()
        tensor([-0.1131, -0.0849])
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-12
    ) -> None:
        for name, value, allowed in (("lr", lr, lr >= 0), ("eps", eps, eps >= 0)):
            if not allowed:
                raise ValueError(f"SharedAdam: expected {name} to be at least 0, got {value!r}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"SharedAdam: expected both betas to be in [0, 1), got {betas!r}.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: evaluates the loss anew and returns it; None leaves gradients as they are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = parameter.new_zeros(())
        first, second = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].lerp_(gradient.square().mean(), 1 - second)
        mean = state["exp_avg"] / (1 - first ** state["step"])
        rms = (state["exp_avg_sq"] / (1 - second ** state["step"])).sqrt()
        parameter.sub_(group["lr"] * mean / (rms + group["eps"]))
