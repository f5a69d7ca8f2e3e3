"""Penalties: scalars for the training loss, as heavy as hyperparameters say, and zero outside the weight phase."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_stn.binding import Regularizer
from lightning_stn.layers import ResponseLayer


class Penalty(Regularizer):
    """A term of the training loss: the mean over the examples of a weight times a cost.

    Args:
        weight: of the cost in the loss: a hyperparameter's name, or a constant of at least 0.

    Raises:
        ValueError: a negative constant.
    """

    strengths = ("weight",)

    def __init__(self, weight: str | float) -> None:
        super().__init__()
        if not isinstance(weight, str) and not weight >= 0:
            raise ValueError(f"{type(self).__name__}: expected weight to be a name or at least 0, got {weight!r}.")
        self.weight = weight

    def weighted(self, costs: Tensor) -> Tensor:
        """The term, a scalar.

        Args:
            costs: `[n]`, or `[1]` where the examples share one.

        Raises:
            ValueError: there are weights for each example, but not as many as costs.
        """
        weight = torch.as_tensor(self.strength("weight"), device=costs.device).to(costs.dtype)
        if weight.dim() and len(costs) not in (1, len(weight)):
            raise ValueError(
                f"{type(self).__name__}: expected one example for each of the {len(weight)} sampled weights, got "
                f"{len(costs)}; keep the batch first, or declare {self.weight!r} with per='batch'."
            )
        return (weight * costs).mean()


class L2Penalty(Penalty):
    """Weight decay in the training loss, where it can be tuned: half the squared norm of a network's parameters.

    `penalty(net)` is added to the training loss. Its gradient in a weight `w` is `weight * w`, so that `weight` is on
    the scale of the `weight_decay` of `torch.optim.SGD`, which must be 0 then. In a converted network it is the
    effective weights that decay, each example's own `W + diag(V h_n) R`.

    Args:
        weight: a hyperparameter's name, as of `Float(1e-6, 1e-1, init=1e-4, log=True)`, or a constant of at least 0.
        names: shell patterns of the qualified names of the parameters that decay; by default all but the biases and
            parameters of normalisation layers, that is, all with more than one dimension.

    Raises:
        ValueError: a negative constant, or no parameter of the network is called so.
    """

    def __init__(self, weight: str | float, names: Sequence[str] = ()) -> None:
        super().__init__(weight)
        if isinstance(names, str):
            raise ValueError(f"L2Penalty: expected names to be a list of patterns, got the string {names!r}.")
        self.names = tuple(names)

    def forward(self, net: nn.Module) -> Tensor:
        """The term, a scalar; zero outside the weight phase."""
        if not self.active:
            return next(net.parameters()).new_zeros(())
        norms = [
            module.squared_norm(name) if isinstance(module, ResponseLayer) else parameter.square().sum().reshape(1)
            for place, module in net.named_modules()
            for name, parameter in _own_parameters(module)
            if self._decays(f"{place}.{name}".lstrip("."), parameter)
        ]
        if not norms:
            raise ValueError(f"L2Penalty: no parameter of the network fits {list(self.names) or 'more than one axis'}.")
        return self.weighted(sum(norms[1:], start=norms[0]) / 2)

    def _decays(self, name: str, parameter: Tensor) -> bool:
        if not self.names:
            return parameter.dim() > 1
        return any(fnmatchcase(name, pattern) for pattern in self.names)


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """A module's parameters by name, without response weights and gates."""
    added = {id(p) for p in module.response_parameters()} if isinstance(module, ResponseLayer) else set()
    return [(name, p) for name, p in module.named_parameters(recurse=False) if id(p) not in added]


class ActivationPenalty(Penalty):
    """Activation regularisation (AR): the mean square of activations, Merity et al. (2017), arXiv:1708.01009.

    Shape:
        activations `[n, *]`, or with `batch_first=False` `[t, n, *]`, to a scalar.

    Args:
        weight: a hyperparameter's name, as of `Float(0.0, None, init=0.05)`, or a constant of at least 0.
        batch_first: whether the first dimension counts the examples; otherwise it is the second.

    Raises:
        ValueError: a negative constant, or weights and examples that do not match.
    """

    def __init__(self, weight: str | float, *, batch_first: bool = True) -> None:
        super().__init__(weight)
        self.batch_first = batch_first

    def forward(self, activations: Tensor) -> Tensor:
        """The term, a scalar; zero outside the weight phase."""
        if not self.active:
            return activations.new_zeros(())
        if not self.batch_first:
            activations = activations.transpose(0, 1)
        return self.weighted(self.cost(activations).flatten(1).mean(1))

    def cost(self, activations: Tensor) -> Tensor:
        """What is averaged: `[n, *]` to `[n, *]`."""
        return activations.square()


class TemporalActivationPenalty(ActivationPenalty):
    """Temporal activation regularisation (TAR): the mean square change from one time step to the next.

    Merity et al. (2017), arXiv:1708.01009.

    Shape:
        activations `[n, t, *]`, or with `batch_first=False` `[t, n, *]`, to a scalar; zero where `t` is 1.

    Args:
        weight: a hyperparameter's name, as of `Float(0.0, None, init=0.05)`, or a constant of at least 0.
        batch_first: whether the first dimension counts the examples and the second the time steps.

    Raises:
        ValueError: a negative constant, or weights and examples that do not match.
    """

    def cost(self, activations: Tensor) -> Tensor:
        """Squared differences in time."""
        if activations.shape[1] < 2:
            return activations.new_zeros(len(activations), 1)
        return activations.diff(dim=1).square()


class LabelSmoothing(Penalty):
    """What label smoothing adds to the cross entropy, Szegedy et al. (2016), arXiv:1512.00567, section 7.

    `cross_entropy(logits, labels) + smoothing(logits, labels)` equals
    `cross_entropy(logits, labels, label_smoothing=weight)`, each example at its own weight.

    Shape:
        logits `[n, c, *]` and labels `[n, *]` to a scalar.

    Args:
        weight: a hyperparameter's name, as of `Float(0.0, 0.5, init=0.05)`, or a constant of at least 0.

    Raises:
        ValueError: a negative constant, or weights and examples that do not match.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The term, a scalar; zero outside the weight phase."""
        if not self.active:
            return logits.new_zeros(())
        spread = -F.log_softmax(logits, 1).mean(1)
        excess = spread - F.cross_entropy(logits, labels, reduction="none")
        return self.weighted(excess.flatten(1).mean(1) if excess.dim() > 1 else excess)
