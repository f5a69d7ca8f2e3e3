"""Penalties: scalars for the training loss, as heavy as hyperparameters say, and zero outside the weight phase."""

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_stn.layers import ResponseLayer
from lightning_stn.regularizer import Regularizer


class Penalty(Regularizer):
    """A term of the training loss: the mean over the examples of a weight times a cost.

    Args:
        weight: of the cost in the loss: a hyperparameter's name, or a constant of at least 0.

    Raises:
        ValueError: a negative constant.
    """

    ranges: ClassVar = {"weight": (0.0, math.inf)}

    def __init__(self, weight: str | float) -> None:
        super().__init__()
        self.weight = self.checked("weight", weight)

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
                f"{len(costs)}; keep the batch first, or declare {self.weight!r} with perturb='batch'."
            )
        return (weight * costs).mean()

    def make_plain(self) -> nn.Module:
        """Nothing can stand in.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} is a term of the training loss, and has no plain counterpart inside a network that "
            "is taken away; hold it in the STNModule and call it in training_loss."
        )


class L2Penalty(Penalty):
    """Weight decay in the training loss, where it can be tuned: half the squared norm of a network's parameters.

    `penalty(net)` is added to the training loss. Its gradient in a weight `w` is `weight * w`, so that `weight` is on
    the scale of the `weight_decay` of `torch.optim.SGD`, which must be 0 then. In a converted network it is the
    effective weights that decay, each example's own `W + diag(V h_n) R`. A parameter that several modules share decays
    once, as the first of them sees it, and one without a gradient not at all.

    Args:
        weight: a hyperparameter's name, as of `Float(1e-6, 1e-1, init=1e-4, log=True)`, or a constant of at least 0.
        names: shell patterns of the qualified names of the parameters that decay; by default all but the biases and
            parameters of normalisation layers.

    Raises:
        ValueError: a negative constant, a pattern that no parameter of the network fits, or what is no network.
    """

    def __init__(self, weight: str | float, names: Sequence[str] = ()) -> None:
        super().__init__(weight)
        if isinstance(names, str):
            raise ValueError(
                f"L2Penalty: expected names to be a list of patterns, got the string {names!r}; put it in a list."
            )
        self.names = tuple(names)

    def forward(self, net: nn.Module) -> Tensor:
        """The term, a scalar; zero outside the weight phase."""
        if not isinstance(net, nn.Module):
            raise ValueError(f"L2Penalty: expected a network, got {type(net).__name__}; call penalty(self.net).")
        if not self.active:
            first = next(net.parameters(), None)
            return torch.zeros(()) if first is None else first.new_zeros(())
        held = frozenset() if self._hyperparameters is None else self._hyperparameters.current_pass.held
        found = dict(_decaying(net, held))
        unknown = [pattern for pattern in self.names if not any(fnmatchcase(name, pattern) for name in found)]
        norms = [
            module.squared_norm(own) if isinstance(module, ResponseLayer) else module.get_parameter(own).square().sum()
            for name, (module, own) in found.items()
            if self._decays(name, module, own)
        ]
        if unknown or not norms:
            raise ValueError(
                f"L2Penalty: no trainable parameter fits {unknown or 'the default, more than one axis'}; there are "
                f"{list(found)}; give names among them."
            )
        return self.weighted((sum(norms[1:], start=norms[0]) / 2).reshape(-1))

    def _decays(self, name: str, module: nn.Module, own: str) -> bool:
        if self.names:
            return any(fnmatchcase(name, pattern) for pattern in self.names)
        return "Norm" not in type(module).__name__ and module.get_parameter(own).dim() > 1


def _decaying(net: nn.Module, held: frozenset[int]) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Trainable parameters by qualified name, once each, without response weights and gates.

    Args:
        net: whose parameters.
        held: identities of trainable parameters that get no gradient now.
    """
    seen = {id(p) for layer in net.modules() if isinstance(layer, ResponseLayer) for p in layer.response_parameters()}
    for place, module in net.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if (parameter.requires_grad or id(parameter) in held) and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{place}.{own}".lstrip("."), (module, own)


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
        if not isinstance(activations, Tensor) or activations.dim() < 2:
            got = f"shape {list(activations.shape)}" if isinstance(activations, Tensor) else type(activations).__name__
            raise ValueError(
                f"{type(self).__name__}: expected activations as a tensor of at least two dimensions, got {got}; keep "
                "the batch, and of what a recurrent layer returns pass the outputs alone."
            )
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
        ignore_index: a label that does not count, as of `cross_entropy`.

    Raises:
        ValueError: a negative constant, labels that are no class indices of the logits' examples, or weights and
            examples that do not match.
    """

    def __init__(self, weight: str | float, *, ignore_index: int = -100) -> None:
        super().__init__(weight)
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The term, a scalar; zero outside the weight phase."""
        if labels.shape != logits.shape[:1] + logits.shape[2:] or labels.is_floating_point():
            raise ValueError(
                f"LabelSmoothing: expected labels as class indices of shape {[*logits.shape[:1], *logits.shape[2:]]}, "
                f"one for each example of the logits {list(logits.shape)}, got shape {list(labels.shape)} of "
                f"{labels.dtype}; smooth class indices, not probabilities."
            )
        if not self.active:
            return logits.new_zeros(())
        counts = labels != self.ignore_index
        likelihoods = F.log_softmax(logits, 1)
        entropy = F.nll_loss(likelihoods, labels, reduction="none", ignore_index=self.ignore_index)
        excess = (-likelihoods.mean(1) - entropy) * counts
        # Summed by example; the mean over the examples becomes one over the labels that count.
        return self.weighted(excess.reshape(len(excess), -1).sum(1) * (len(excess) / counts.sum()))
