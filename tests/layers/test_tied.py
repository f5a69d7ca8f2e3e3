"""Tied weights: one response for one parameter, whichever layers hold it."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import random_gates
from torch import Tensor, nn

from lightning_stn import STN, DeltaSTN, Float, HyperparameterSet, convert
from lightning_stn.binding import bind, bind_weight_phase, unbind
from lightning_stn.methods import Method
from lightning_stn.regularizers import L2Penalty

WORDS = torch.tensor([[0, 3, 1], [4, 4, 2], [1, 0, 3], [2, 1, 0]])


class Tied(nn.Module):
    """The decoder has the weight of the embedding: as a layer that comes later, or earlier, or by reading it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5) if kind == "linear first" else None
        self.words = nn.Embedding(5, 3)
        self.hidden = nn.Linear(3, 3)
        if self.first is not None:
            self.words.weight = self.first.weight
        self.decoder = nn.Linear(3, 5) if kind == "embedding first" else None
        if self.decoder is not None:
            self.decoder.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.hidden(self.words(words)).tanh()
        layer = self.decoder or self.first
        logits: Tensor = F.linear(x, self.words.weight) if layer is None else layer(x)
        return logits


KINDS = ("embedding first", "linear first", "read")


def converted(kind: str, response: Any = "full") -> tuple[Any, HyperparameterSet]:
    torch.manual_seed(0)
    specifications = {"a": Float(0.0, 1.0, init=0.3), "b": Float(0.0, 1.0, init=0.6)}
    hyperparameters = HyperparameterSet(specifications, response=response)
    net = random_gates(convert(Tied(kind).double(), hyperparameters), 0.4)
    return net, hyperparameters


def effective(net: Any, row: Tensor) -> dict[str, Tensor]:
    """Effective parameters at one row by hand; gates of a tied weight are those of the layer that comes first."""
    found = {}
    for name, layer in (("words", net.words), ("hidden", net.hidden), ("layer", net.decoder or net.first)):
        for parameter in () if layer is None else ("weight", "bias"):
            base = layer._parameters.get(parameter)
            if base is not None:
                gates = layer.gate_weights(parameter) @ row.to(base.dtype)
                by_row = gates.numel() == base.shape[0]
                gates = gates.reshape(-1, *[1] * (base.dim() - 1)) if by_row else gates
                found[f"{name}.{parameter}"] = base + gates * layer.response_weights(parameter)
    return found


def by_hand(net: Any, row: Tensor, words: Tensor) -> Tensor:
    at = effective(net, row)
    x = F.linear(F.embedding(words, at["words.weight"]), at["hidden.weight"], at["hidden.bias"]).tanh()
    return F.linear(x, at.get("layer.weight", at["words.weight"]), at.get("layer.bias"))


@pytest.mark.parametrize("response", ["full", "gates"])
@pytest.mark.parametrize("kind", KINDS)
def test_tied_weight_has_one_response_and_computes_what_its_definition_says(kind: str, response: Any) -> None:
    net, hyperparameters = converted(kind, response)
    layer = net.decoder or net.first
    if layer is not None:
        assert layer.weight is net.words.weight
        assert layer.gate_weights("weight") is net.words.gate_weights("weight")
    samples = hyperparameters.sample(4, torch.Generator().manual_seed(1))
    with bind(hyperparameters, samples[:1]):
        torch.testing.assert_close(net(WORDS), by_hand(net, samples[0], WORDS))
    if layer is not None:
        with bind(hyperparameters, samples):
            expected = torch.cat([by_hand(net, row, words[None]) for row, words in zip(samples, WORDS, strict=True)])
            torch.testing.assert_close(net(WORDS), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_tied_weight_equal_those_by_hand(kind: str) -> None:
    net, hyperparameters = converted(kind)
    parameters = list(net.parameters())
    row = hyperparameters.sample(1, torch.Generator().manual_seed(1))
    bind_weight_phase(hyperparameters, row)
    found = torch.autograd.grad(net(WORDS).square().sum(), parameters)
    unbind(hyperparameters)
    expected = torch.autograd.grad(by_hand(net, row[0], WORDS).square().sum(), parameters)
    torch.testing.assert_close(found, expected)


def test_weight_read_under_a_row_for_each_example_is_refused() -> None:
    net, hyperparameters = converted("read")
    with (
        bind(hyperparameters, hyperparameters.sample(4)),
        pytest.raises(ValueError, match="Embedding: 'weight' is read outside the layer's own forward"),
    ):
        net(WORDS)


@pytest.mark.parametrize("method", [STN(), STN(centred=False), DeltaSTN()], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_methods_move_a_tied_weight_once(kind: str, method: Method) -> None:
    net, hyperparameters = converted(kind)
    row = hyperparameters.sample(1, torch.Generator().manual_seed(1))
    with bind(hyperparameters, row):
        expected = net(WORDS)
    step = torch.tensor([0.4, -0.7])
    method.prepare(net, hyperparameters)
    if method.moves_base or not method.centred:
        hyperparameters.unconstrained += step
        method.follow(net, hyperparameters, step)
    with bind(hyperparameters, row):
        torch.testing.assert_close(net(WORDS), expected)


@pytest.mark.parametrize("kind", ["embedding first", "linear first"])
@pytest.mark.parametrize("rows", [1, 4])
def test_linearised_prediction_is_that_of_the_tied_network(kind: str, rows: int) -> None:
    """Against central differences of the network computed by hand."""
    net, hyperparameters = converted(kind)
    STN(gate_scale=1.0).prepare(net, hyperparameters)
    samples = hyperparameters.sample(rows, torch.Generator().manual_seed(1))
    distances, width = samples - hyperparameters.unconstrained, 1e-4
    examples = [distances[min(i, rows - 1)] for i in range(len(WORDS))]
    up, down = (
        torch.cat([by_hand(net, sign * width * d, w[None]) for d, w in zip(examples, WORDS, strict=True)])
        for sign in (1, -1)
    )
    expected = by_hand(net, 0 * distances[0], WORDS) + (up - down) / (2 * width)
    bind_weight_phase(hyperparameters, samples)
    predictions: list[Tensor] = []

    def loss() -> Tensor:
        predictions.append(net(WORDS))
        return predictions[-1].square().sum()

    DeltaSTN().objective(net, hyperparameters, loss)
    unbind(hyperparameters)
    torch.testing.assert_close(predictions[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4])
def test_penalty_counts_a_tied_weight_once_at_its_effective_value(rows: int) -> None:
    net, hyperparameters = converted("embedding first")
    penalty = L2Penalty(2.0)
    penalty.attach(hyperparameters)
    samples = hyperparameters.sample(rows, torch.Generator().manual_seed(1))
    bind_weight_phase(hyperparameters, samples)
    found = penalty(net)
    unbind(hyperparameters)
    at = [effective(net, row) for row in samples]
    expected = torch.stack([row["words.weight"].square().sum() + row["hidden.weight"].square().sum() for row in at])
    torch.testing.assert_close(found, expected.mean())


def test_copies_keep_the_tie() -> None:
    net, hyperparameters = converted("embedding first")
    again, _ = copy.deepcopy((net, hyperparameters))
    assert again.decoder.response_owner("weight")[0] is again.words
    assert (
        again.decoder.gate_weights("weight")
        is again.words.gate_weights("weight")
        is not net.words.gate_weights("weight")
    )
