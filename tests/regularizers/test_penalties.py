"""Penalties: equal to torch's where torch has one, and to formulas and loops over the examples."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layers.cases import Case, every_case, respond
from support import random_gates, small_net
from torch import Tensor, nn

from lightning_stn import Float, HyperparameterSet, convert, export
from lightning_stn.binding import attach_all, bind, bind_weight_phase, unbind
from lightning_stn.regularizers import (
    ActivationPenalty,
    L2Penalty,
    LabelSmoothing,
    Penalty,
    TemporalActivationPenalty,
)

WEIGHTS = torch.tensor([0.1, 0.0, 2.0, 0.7], dtype=torch.float64)


class Unconstrained(Float):
    """A `Float` whose natural units are its unconstrained units, so that a sampled weight can be exactly zero."""

    def constrain(self, unconstrained: Tensor) -> Tensor:
        return unconstrained


def bound(penalty: Penalty, weights: Tensor = WEIGHTS) -> HyperparameterSet:
    hyperparameters = HyperparameterSet({"weight": Unconstrained(0.0, None, init=0.1)})
    attach_all(penalty, hyperparameters)
    bind_weight_phase(hyperparameters, weights.reshape(-1, 1))
    return hyperparameters


def test_activation_penalty_equals_a_loop_over_examples() -> None:
    penalty, h = ActivationPenalty("weight"), torch.randn(4, 3, 5, dtype=torch.float64)
    bound(penalty)
    expected = sum(w * (x**2).mean() for w, x in zip(WEIGHTS, h, strict=True)) / 4
    torch.testing.assert_close(penalty(h), expected)


def test_temporal_activation_penalty_equals_a_loop_over_examples_and_steps() -> None:
    penalty, h = TemporalActivationPenalty("weight"), torch.randn(4, 3, 5, dtype=torch.float64)
    bound(penalty)
    steps = [[(x[t + 1] - x[t]).square().mean() for t in range(2)] for x in h]
    expected = sum(w * sum(row) / 2 for w, row in zip(WEIGHTS, steps, strict=True)) / 4
    torch.testing.assert_close(penalty(h), expected)
    assert penalty(h[:, :1]) == 0


@pytest.mark.parametrize("kind", [ActivationPenalty, TemporalActivationPenalty])
def test_activation_penalties_with_time_first_equal_batch_first_transposed(kind: type[ActivationPenalty]) -> None:
    h, values = torch.randn(4, 3, 5), []
    for penalty, x in ((kind("weight"), h), (kind("weight", batch_first=False), h.transpose(0, 1))):
        bound(penalty)
        values.append(penalty(x))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 2, 2)])
def test_label_smoothing_equals_that_of_torch(shape: tuple[int, ...]) -> None:
    logits, labels = torch.randn(shape, dtype=torch.float64), torch.randint(0, 6, (4, *shape[2:]))
    penalty = LabelSmoothing("weight")
    weights = torch.tensor([0.1, 0.0, 0.9, 0.3], dtype=torch.float64)
    bound(penalty, weights)
    expected = torch.stack(
        [
            F.cross_entropy(logits[n : n + 1], labels[n : n + 1], label_smoothing=weight.item())
            for n, weight in enumerate(weights)
        ]
    ).mean()
    torch.testing.assert_close(F.cross_entropy(logits, labels) + penalty(logits, labels), expected)
    constant = LabelSmoothing(0.2)
    together = F.cross_entropy(logits, labels) + constant(logits, labels)
    torch.testing.assert_close(together, F.cross_entropy(logits, labels, label_smoothing=0.2))


@every_case
@pytest.mark.parametrize("rows", [1, 6])
def test_squared_norm_and_its_gradients_equal_those_of_the_effective_weights(case: Case, rows: int) -> None:
    layer, _ = respond(case)
    hyperparameters = layer.hyperparameters
    assert hyperparameters is not None
    sample = torch.randn(rows, len(hyperparameters), dtype=torch.float64, requires_grad=True)
    wanted = (sample, *layer.parameters())
    for name in layer.responding:
        with bind(hyperparameters, sample):
            norms = layer.squared_norm(name)
        expected = torch.stack([layer.effective_parameters(row.unsqueeze(0))[name].square().sum() for row in sample])
        torch.testing.assert_close(norms, expected, rtol=1e-10, atol=1e-10)
        weights = torch.linspace(0.5, 2, rows, dtype=torch.float64)
        gradients, others = (
            torch.autograd.grad(values @ weights, wanted, allow_unused=True) for values in (norms, expected)
        )
        for gradient, other in zip(gradients, others, strict=True):
            assert (gradient is None) == (other is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-9)


def test_l2_penalty_equals_the_weight_decay_of_sgd() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    other = copy.deepcopy(net)
    L2Penalty(0.3, ["*"])(net).backward()
    for parameter in other.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    torch.optim.SGD(other.parameters(), lr=0.1, weight_decay=0.3).step()
    for parameter, wanted in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted)


def test_l2_penalty_decays_tied_parameters_once_and_skips_frozen_ones() -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5), nn.Linear(5, 2))
    net[1].weight = net[0].weight
    net[2].weight.requires_grad_(False)
    L2Penalty(0.3)(net).backward()
    torch.testing.assert_close(net[0].weight.grad, 0.3 * net[0].weight)


def test_label_smoothing_skips_ignored_labels() -> None:
    logits, labels = torch.randn(4, 6, 7, dtype=torch.float64), torch.randint(0, 6, (4, 7))
    labels[0, :3] = labels[2, 5] = -100
    together = F.cross_entropy(logits, labels) + LabelSmoothing(0.2)(logits, labels)
    torch.testing.assert_close(together, F.cross_entropy(logits, labels, label_smoothing=0.2))
    labels[labels == -100] = 0
    together = F.cross_entropy(logits, labels, ignore_index=0) + LabelSmoothing(0.2, ignore_index=0)(logits, labels)
    torch.testing.assert_close(together, F.cross_entropy(logits, labels, ignore_index=0, label_smoothing=0.2))


def test_export_refuses_a_penalty_inside_a_network() -> None:
    net = convert(
        nn.Sequential(nn.Linear(3, 2), ActivationPenalty(0.1)), HyperparameterSet({"a": Float(0.0, 1.0, init=0.5)})
    )
    with pytest.raises(ValueError, match=r"ActivationPenalty is a term of the training loss.*call it in training_loss"):
        export(net)


def test_l2_penalty_skips_biases_and_norm_layers_unless_named() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    torch.testing.assert_close(L2Penalty(1.0)(net), net[0].weight.square().sum() / 2)
    torch.testing.assert_close(L2Penalty(1.0, ["0.*"])(net), sum(p.square().sum() for p in net[0].parameters()) / 2)
    with pytest.raises(ValueError, match=r"no trainable parameter matches \['head.*'\]; there are \['0.weight', "):
        L2Penalty(1.0, ["0.*", "head.*"])(net)
    with pytest.raises(ValueError, match="no trainable parameter matches the default, more than one dimension"):
        L2Penalty(1.0)(net[1])
    assert L2Penalty(1.0, ["*"])(nn.LayerNorm((2, 3))) == 3.0
    with pytest.raises(ValueError, match="matches the default"):
        L2Penalty(1.0)(nn.LayerNorm((2, 3)))
    with pytest.raises(ValueError, match="list of patterns, got the string"):
        L2Penalty(1.0, "0.weight")


@pytest.mark.parametrize("per_example", [True, False])
def test_l2_penalty_weighs_the_effective_weights_of_each_example(per_example: bool) -> None:
    hyperparameters = HyperparameterSet(
        {"weight": Unconstrained(0.0, None, init=0.1), "other": Float(0.0, 1.0, init=0.5)}
    )
    net = random_gates(convert(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), hyperparameters))
    penalty = L2Penalty("weight")
    attach_all(penalty, hyperparameters)
    sample = torch.stack([WEIGHTS, torch.randn(4, dtype=torch.float64)], dim=1)
    sample = sample if per_example else sample[:1]
    bind_weight_phase(hyperparameters, sample)
    expected = [
        row[0]
        * sum(layer.effective_parameters(row.unsqueeze(0))["weight"].square().sum() for layer in (net[0], net[2]))
        / 2
        for row in sample
    ]
    torch.testing.assert_close(penalty(net), torch.stack(expected).mean())


@pytest.mark.parametrize("kind", [ActivationPenalty, TemporalActivationPenalty, LabelSmoothing, L2Penalty])
def test_penalties_are_zero_outside_the_weight_phase(kind: type[Penalty]) -> None:
    """In the hyperparameter phase, value and gradient are those of the loss without a penalty."""
    hyperparameters = HyperparameterSet({"weight": Float(0.0, None, init=5.0)})
    net = random_gates(convert(small_net(), hyperparameters))
    penalty = kind("weight")
    attach_all(penalty, hyperparameters)
    x, y = torch.randn(4, 1, 6, 6), torch.arange(4) % 3

    def term() -> Tensor:
        logits = net(x)
        arguments = {LabelSmoothing: (logits, y), L2Penalty: (net,)}.get(kind, (logits.unsqueeze(-1),))
        value: Tensor = penalty(*arguments)
        return F.cross_entropy(logits, y) + value

    sample = hyperparameters.current().detach().clone().requires_grad_()
    net.eval()
    with bind(hyperparameters, sample, frozen=True):
        gradient = torch.autograd.grad(term(), sample)[0]
        alone = torch.autograd.grad(F.cross_entropy(net(x), y), sample)[0]
    assert torch.equal(gradient, alone)
    assert gradient.abs().sum() > 0
    assert torch.equal(term(), F.cross_entropy(net(x), y))
    bind_weight_phase(hyperparameters, sample.detach())
    assert kind is TemporalActivationPenalty or not torch.equal(term(), F.cross_entropy(net(x), y))
    unbind(hyperparameters)


@pytest.mark.parametrize("kind", [ActivationPenalty, TemporalActivationPenalty, LabelSmoothing, L2Penalty])
def test_penalties_refuse_negative_and_nan_weights(kind: type[Penalty]) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: expected weight to be .* of at least 0, got -1"):
        kind(-1.0)
    with pytest.raises(ValueError, match="got nan"):
        kind(float("nan"))


def test_activation_penalty_refuses_a_batch_of_another_size_than_the_sample() -> None:
    penalty = ActivationPenalty("weight")
    bound(penalty)
    with pytest.raises(ValueError, match=r"each of the 4 sampled weights, got 3; .* 'weight' with perturb='batch'"):
        penalty(torch.randn(3, 2))


def test_penalties_accept_half_precision() -> None:
    assert LabelSmoothing(0.1)(torch.randn(4, 3, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.long)).isfinite()
    assert ActivationPenalty(0.1)(torch.randn(4, 3, dtype=torch.float16)).dtype == torch.float16
