"""`ResponseEmbedding` against effective tables that are built entry by entry."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import random_gates
from torch import Tensor, nn

from lightning_stn import Float, HyperparameterSet, convert
from lightning_stn.binding import bind
from lightning_stn.layers import ResponseEmbedding

H, V, D = 2, 5, 3


def tables(layer: ResponseEmbedding, sample: Tensor) -> list[Tensor]:
    """The effective table of every row, built entry by entry."""
    built = []
    for row in sample:
        table = layer.weight.detach().clone()
        for k in range(V):
            for o in range(D):
                gate = sum(layer.weight_gate[o, h].item() * row[h].item() for h in range(H))  # type: ignore[index]
                table[k, o] += gate * layer.response_weight[k, o].item()  # type: ignore[index]
        built.append(table)
    return built


def layer_and_set(padding_idx: int | None = None) -> tuple[ResponseEmbedding, HyperparameterSet]:
    hyperparameters = HyperparameterSet({name: Float(0.0, 1.0, init=0.5) for name in "ab"})
    layer = convert(nn.Embedding(V, D, padding_idx=padding_idx).double(), hyperparameters)
    assert isinstance(layer, ResponseEmbedding)
    return layer, hyperparameters


@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 2, 3)])
@pytest.mark.parametrize("rows", [1, 4])
def test_embedding_equals_the_naive_loop(shape: tuple[int, ...], rows: int) -> None:
    layer, hyperparameters = layer_and_set()
    random_gates(layer)
    indices, sample = torch.randint(V, shape), torch.randn(rows, H, dtype=torch.float64)
    with bind(hyperparameters, sample):
        output = layer(indices)
    expected = [F.embedding(i, t) for i, t in zip(indices, tables(layer, sample.expand(4, H)), strict=True)]
    torch.testing.assert_close(output, torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 4])
def test_embedding_gradients_equal_those_of_effective_tables(rows: int) -> None:
    layer, hyperparameters = layer_and_set()
    random_gates(layer)
    indices, sample = torch.randint(V, (4, 6)), torch.randn(rows, H, dtype=torch.float64, requires_grad=True)
    wanted = (sample, *layer.parameters())
    with bind(hyperparameters, sample):
        got = torch.autograd.grad(layer(indices).square().sum(), wanted)
    gates = (sample @ layer.gate_weights("weight").T).expand(4, D)
    table = layer.weight + gates[:, None, :] * layer.response_weights("weight")
    loss = torch.stack([table[n, indices[n]] for n in range(4)]).square().sum()
    torch.testing.assert_close(got, torch.autograd.grad(loss, wanted))


def test_padding_vector_stays_zero_and_gets_no_gradient() -> None:
    layer, hyperparameters = layer_and_set(padding_idx=2)
    nn.init.normal_(layer.gate_weights("weight"))
    with bind(hyperparameters, torch.randn(3, H)):
        output = layer(torch.full((3, 2), 2))
        output.square().sum().backward()
    assert torch.equal(output, torch.zeros_like(output))
    assert not layer.weight.grad.any()  # type: ignore[union-attr]
    assert not layer.response_weights("weight").grad.any()  # type: ignore[union-attr]


def test_embedding_with_zero_gates_equals_the_plain_layer_bit_for_bit() -> None:
    plain = nn.Embedding(V, D)
    hyperparameters = HyperparameterSet({"a": Float(0.0, 1.0, init=0.5)})
    layer = convert(copy.deepcopy(plain), hyperparameters)
    indices = torch.randint(V, (4, 6))
    assert torch.equal(layer(indices), plain(indices))
    with bind(hyperparameters, torch.randn(4, 1)):
        assert torch.equal(layer(indices), plain(indices))


@pytest.mark.parametrize("indices", [torch.zeros(3, 2, dtype=torch.int64), torch.tensor(1)])
def test_embedding_refuses_rows_that_do_not_match_the_batch(indices: Tensor) -> None:
    layer, hyperparameters = layer_and_set()
    with bind(hyperparameters, torch.randn(4, H)), pytest.raises(ValueError, match=r"4 rows.*got shape"):
        layer(indices)


def test_indices_that_all_examples_share_get_a_row_for_each_of_them() -> None:
    hyperparameters = HyperparameterSet({"a": Float(0.0, 1.0, init=0.3), "b": Float(0.0, 1.0, init=0.6)})
    layer: Any = random_gates(convert(nn.Embedding(5, 3), hyperparameters).double(), 0.5)
    positions, samples = torch.arange(4).unsqueeze(0), torch.randn(6, 2)
    with bind(hyperparameters, samples):
        found = layer(positions)
        torch.testing.assert_close(found, layer(positions.expand(6, -1)))
    assert found.shape == (6, 4, 3)
