"""Recurrent layers in many configurations, and the naive loop that they are compared with."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import random_gates
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from lightning_stn import Float, HyperparameterSet
from lightning_stn.binding import bind
from lightning_stn.layers import ResponseLayer, response_type

H, N, I, O = 2, 4, 5, 3  # noqa: E741


@dataclass(frozen=True)
class Case:
    plain: type[nn.RNNBase]
    options: dict[str, Any] = field(default_factory=dict)
    t: int = 6
    initial: bool = False

    def __str__(self) -> str:
        options = [name if value is True else f"{name}={value}" for name, value in self.options.items()]
        return "-".join([self.plain.__name__, *options, f"t={self.t}"] + ["initial"] * self.initial)

    def build(self, **options: Any) -> nn.RNNBase:
        return self.plain(I, O, dtype=torch.float64, **{**self.options, **options})

    def input(self, n: int = N) -> Tensor:
        shape = (n, self.t, I) if self.options.get("batch_first") else (self.t, n, I)
        return torch.randn(shape, dtype=torch.float64)

    def states(self, n: int = N) -> Any:
        """Initial states as the torch layer takes them; None where the case has none."""
        if not self.initial:
            return None
        layers = self.options.get("num_layers", 1) * (1 + self.options.get("bidirectional", False))
        h = torch.randn(layers, n, self.options.get("proj_size", O), dtype=torch.float64)
        return (h, torch.randn(layers, n, O, dtype=torch.float64)) if self.plain is nn.LSTM else h


DEEP = {"num_layers": 2, "bidirectional": True, "batch_first": True}
CASES = [
    *(
        Case(plain, options, t, initial)
        for plain in (nn.LSTM, nn.GRU)
        for options, t, initial in [
            ({}, 6, False),
            ({}, N, True),  # time as long as the batch
            ({"batch_first": True}, N, False),
            ({"batch_first": True, "bias": False}, 6, True),
            ({"bidirectional": True}, 6, True),
            ({"num_layers": 2}, 1, False),
            (DEEP, N, True),
        ]
    ),
    Case(nn.LSTM, {"proj_size": 2}),
    Case(nn.LSTM, {"proj_size": 2, "bias": False, **DEEP}, N, True),
    Case(nn.RNN, {}),
    Case(nn.RNN, {"bias": False, **DEEP}, N, True),
    Case(nn.RNN, {"nonlinearity": "relu", **DEEP}, 6, True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_kind = pytest.mark.parametrize("case", [Case(k, DEEP, initial=True) for k in (nn.LSTM, nn.GRU, nn.RNN)], ids=str)


def hyperparameters() -> HyperparameterSet:
    return HyperparameterSet({name: Float(0.0, 1.0, init=0.5) for name in "ab"})


def respond(plain: nn.RNNBase, gates: bool = True) -> Any:
    layer = copy.deepcopy(plain)
    response = response_type(type(plain))
    assert response is not None
    response.adopt(layer, hyperparameters())
    return random_gates(layer, std=0.5) if gates else layer


def at(layer: Any, sample: Tensor, *arguments: Any) -> Any:
    with bind(layer.hyperparameters, sample):
        return layer(*arguments)


def tensors(result: Any) -> Iterator[Tensor]:
    """All tensors of a result of a recurrent layer."""
    if isinstance(result, PackedSequence):
        yield result.data
    elif isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from tensors(part)


def assert_close(actual: Any, expected: Any) -> None:
    for one, other in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def assert_equal(actual: Any, expected: Any) -> None:
    assert all(torch.equal(one, other) for one, other in zip(tensors(actual), tensors(expected), strict=True))


def example(states: Any, n: int) -> Any:
    """Initial states of one example."""
    if states is None or isinstance(states, Tensor):
        return states if states is None else states[:, n : n + 1]
    return tuple(part[:, n : n + 1] for part in states)


def effective_parameters(layer: ResponseLayer, names: list[str], row: Tensor) -> dict[str, Tensor]:
    """`W[o] + sum_h V[o, h] h[h] R[o]` of each parameter, unit by unit."""
    effective = {}
    for name in names:
        base, response, gates = (getattr(layer, each) for each in (name, f"response_{name}", f"{name}_gate"))
        units = []
        for o in range(base.shape[0]):
            gate = sum(gates[o, h] * row[h] for h in range(H))
            units.append(base[o] + gate * response[o])
        effective[name] = torch.stack(units)
    return effective


def naive(layer: Any, plain: nn.RNNBase, sample: Tensor, input: Tensor, states: Any) -> Any:
    """The plain layer on each example alone, with the effective parameters of that example."""
    names = [name for name, _ in plain.named_parameters()]
    dim = 0 if plain.batch_first else 1
    results = [
        functional_call(
            plain,
            effective_parameters(layer, names, sample[n]),
            (input.narrow(dim, n, 1), example(states, n)),
            strict=True,
        )
        for n in range(input.shape[dim])
    ]
    output = torch.cat([each for each, _ in results], dim)
    if not isinstance(plain, nn.LSTM):
        return output, torch.cat([h for _, h in results], 1)
    return output, (torch.cat([h for _, (h, _) in results], 1), torch.cat([c for _, (_, c) in results], 1))


def rows(n: int) -> Tensor:
    return torch.randn(n, H, dtype=torch.float64)


LENGTHS = [[6, 4, 4, 1], [2, 6, 1, 5]]  # the second one is unsorted
