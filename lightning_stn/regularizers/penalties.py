"""Penalties: scalar terms of the training loss, weighted by hyperparameters, and zero outside the weight phase."""

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_stn.arguments import is_whole, require_bool
from lightning_stn.layers import ResponseLayer
from lightning_stn.regularizer import Regularizer


class Penalty(Regularizer):
    """Base class of penalties, terms of the training loss: the mean over the examples of weight times cost.

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
            costs: `[n]`, or `[1]` if the examples share one cost.

        Raises:
            ValueError: there is a weight for each example, but the number of costs differs.
        """
        weight = torch.as_tensor(self.strength("weight"), device=costs.device).to(costs.dtype)
        if weight.dim() and len(costs) not in (1, len(weight)):
            raise ValueError(
                f"{type(self).__name__}: expected one example for each of the {len(weight)} sampled weights, got "
                f"{len(costs)}; keep the batch first, or declare {self.weight!r} with perturb='batch'."
            )
        return (weight * costs).mean()

    def make_plain(self) -> nn.Module:
        """Refuse: a penalty has no plain counterpart.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} is a term of the training loss, and has no plain counterpart in an exported "
            "network; hold it in the STNModule and call it in training_loss."
        )


class L2Penalty(Penalty):
    """Tunable weight decay: half the squared norm of a network's parameters, as a term of the training loss.

    Add `penalty(net)` to the training loss. Its gradient with respect to a weight `w` is `weight * w`, so `weight` is
    on the scale of the `weight_decay` of `torch.optim.SGD`; set that one to 0. In a converted network the effective
    weights decay, `W + diag(V h_n) R` for each example. A parameter that several modules share decays once, as the
    first of them sees it. A parameter without a gradient does not decay.

    Args:
        weight: name of a hyperparameter such as `Float(1e-6, 1e-1, init=1e-4, log=True)`, or a constant of at least 0.
        names: shell patterns for the qualified names of the parameters that decay; by default all parameters except
            biases and those of normalisation layers.

    Raises:
        ValueError: a constant is negative, a pattern matches no trainable parameter, or the argument is not a network.
    """

    def __init__(self, weight: str | float, names: Sequence[str] = ()) -> None:
        super().__init__(weight)
        if isinstance(names, str):
            raise ValueError(
                f"L2Penalty: expected names to be a list of patterns, got the string {names!r}; put it in a list."
            )
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"L2Penalty: expected names to be a list of patterns, got {names!r}; give strings.")
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
            module.squared_norm(parameter)
            if isinstance(module, ResponseLayer)
            else module.get_parameter(parameter).square().sum()
            for name, (module, parameter) in found.items()
            if self._decays(name, module._parameters[parameter], type(module))
        ]
        if unknown or not norms:
            raise ValueError(
                f"L2Penalty: no trainable parameter matches {unknown or 'the default, more than one dimension'}; there "
                f"are {list(found)}; give names among them."
            )
        return self.weighted((sum(norms[1:], start=norms[0]) / 2).reshape(-1))

    def _decays(self, name: str, parameter: Tensor | None, kind: type[nn.Module]) -> bool:
        if self.names:
            return any(fnmatchcase(name, pattern) for pattern in self.names)
        return "Norm" not in kind.__name__ and parameter is not None and parameter.dim() > 1


def _decaying(net: nn.Module, held: frozenset[int]) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Trainable parameters by qualified name, each once, without response weights and gates.

    Args:
        net: the network.
        held: ids of parameters that count as trainable, although they get no gradient in this pass.
    """
    seen = {id(p) for layer in net.modules() if isinstance(layer, ResponseLayer) for p in layer.response_parameters()}
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (parameter.requires_grad or id(parameter) in held) and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}".lstrip("."), (module, name)


class ActivationPenalty(Penalty):
    """Activation regularisation (AR): the mean square of activations, Merity et al. (2017), arXiv:1708.01009.

    Shape:
        activations `[n, *]`, or with `batch_first=False` `[t, n, *]`, to a scalar.

    Args:
        weight: name of a hyperparameter such as `Float(0.0, None, init=0.05)`, or a constant of at least 0.
        batch_first: whether the first dimension is that of the examples; otherwise the second is.

    Raises:
        ValueError: a constant is negative, the input has fewer than two dimensions, or the number of examples differs
            from the number of weights.
    """

    def __init__(self, weight: str | float, *, batch_first: bool = True) -> None:
        super().__init__(weight)
        self.batch_first = require_bool(type(self).__name__, "batch_first", batch_first)

    def forward(self, activations: Tensor) -> Tensor:
        """The term, a scalar; zero outside the weight phase."""
        if not isinstance(activations, Tensor) or activations.dim() < 2:
            got = f"shape {list(activations.shape)}" if isinstance(activations, Tensor) else type(activations).__name__
            raise ValueError(
                f"{type(self).__name__}: expected activations as a tensor of at least two dimensions, got {got}; keep "
                "the batch dimension, and pass the outputs of a recurrent layer without its state."
            )
        if not self.active:
            return activations.new_zeros(())
        if not self.batch_first:
            activations = activations.transpose(0, 1)
        return self.weighted(self.cost(activations).flatten(1).mean(1))

    def cost(self, activations: Tensor) -> Tensor:
        """The cost to be averaged over each example, `[n, *]` to `[n, *]`."""
        return activations.square()


class TemporalActivationPenalty(ActivationPenalty):
    """Temporal activation regularisation (TAR): the mean square change from one time step to the next.

    Merity et al. (2017), arXiv:1708.01009.

    Shape:
        activations `[n, t, *]`, or with `batch_first=False` `[t, n, *]`, to a scalar; zero where `t` is 1.

    Args:
        weight: name of a hyperparameter such as `Float(0.0, None, init=0.05)`, or a constant of at least 0.
        batch_first: whether the first dimension is that of the examples, and the second that of the time steps.

    Raises:
        ValueError: a constant is negative, the input has fewer than two dimensions, or the number of examples differs
            from the number of weights.
    """

    def cost(self, activations: Tensor) -> Tensor:
        """Squared differences between consecutive time steps."""
        if activations.shape[1] < 2:
            return activations.new_zeros(len(activations), 1)
        return activations.diff(dim=1).square()


class LabelSmoothing(Penalty):
    """The term that label smoothing adds to the cross entropy, Szegedy et al. (2016), arXiv:1512.00567, section 7.

    `cross_entropy(logits, labels) + smoothing(logits, labels)` equals
    `cross_entropy(logits, labels, label_smoothing=weight)`, with a weight for each example.

    Shape:
        logits `[n, c, *]` and labels `[n, *]` to a scalar.

    Args:
        weight: name of a hyperparameter such as `Float(0.0, 0.5, init=0.05)`, or a constant of at least 0.
        ignore_index: label that is left out of the loss, as in `cross_entropy`.

    Raises:
        ValueError: a constant is negative, the labels are not class indices of the shape of the logits, or the number
            of examples differs from the number of weights.
    """

    def __init__(self, weight: str | float, *, ignore_index: int = -100) -> None:
        super().__init__(weight)
        if not is_whole(ignore_index):
            raise ValueError(f"LabelSmoothing: expected ignore_index to be a whole number, got {ignore_index!r}.")
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
        counted = labels != self.ignore_index
        likelihoods = F.log_softmax(logits, 1)
        entropy = F.nll_loss(likelihoods, labels, reduction="none", ignore_index=self.ignore_index)
        excess = (-likelihoods.mean(1) - entropy) * counted
        # `weighted` divides by the number of examples; the loss divides by the number of labels that are not ignored.
        return self.weighted(excess.reshape(len(excess), -1).sum(1) * (len(excess) / counted.sum()))
