"""Attention layers with the inputs and options of a call, and helpers for tests of attention and transformer layers.

Index alphabet of the constants: `H` hyperparameters, `N` examples, `E` embedding features, `G` heads.
"""

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import random_gates, response_layers
from torch import Tensor, nn

from lightning_stn import Float, HyperparameterSet, convert
from lightning_stn.binding import bind

H, N, E, G = 3, 4, 6, 2
DOUBLE = torch.float64


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def nearly_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def hyperparameters() -> HyperparameterSet:
    return HyperparameterSet({name: Float(0.0, 1.0, init=0.5) for name in "abc"[:H]})


def causal(t: int, s: int) -> Tensor:
    return torch.ones(t, s).triu(1).bool()


def padding(s: int) -> Tensor:
    """Key padding mask: True for the last keys of every example but the first, in differing numbers."""
    return torch.arange(s) >= s - torch.arange(N)[:, None] % (s - 1)


@dataclass(frozen=True)
class Case:
    """A layer, the lengths of its inputs, whether key and value are one tensor, and the options of the call."""

    name: str
    layer: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    t: int = 3
    s: int | None = None
    same_key_and_value: bool = True

    def __str__(self) -> str:
        return self.name

    def plain(self, dropout: float = 0.0, dtype: torch.dtype = DOUBLE) -> nn.MultiheadAttention:
        layer = nn.MultiheadAttention(E, G, **{"batch_first": True, "dropout": dropout, **self.layer}, dtype=dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        return layer

    def inputs(self, n: int = N, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
        """Query, key and value; two or all of them may be one tensor."""

        def draw(length: int, size: int) -> Tensor:
            shape = (n, length, size) if self.layer.get("batch_first", True) else (length, n, size)
            return torch.randn(shape, dtype=dtype, requires_grad=True)

        query = draw(self.t, E)
        if self.s is None:
            return [query, query, query]
        key = draw(self.s, self.layer.get("kdim", E))
        return [query, key, key if self.same_key_and_value else draw(self.s, self.layer.get("vdim", E))]

    @property
    def batch_dim(self) -> int:
        return 0 if self.layer.get("batch_first", True) else 1


FLOAT_MASK = torch.randn(3, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
PER_HEAD = torch.randn(N * G, 3, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
NO_WEIGHTS = {"need_weights": False}
CASES = [
    Case("weights"),
    Case("no-weights", call=NO_WEIGHTS),
    Case("as-many-steps-as-examples", call=NO_WEIGHTS, t=N),
    Case("as-many-steps-as-examples-time-first", {"batch_first": False}, NO_WEIGHTS, t=N),
    Case("time-first", {"batch_first": False}),
    Case("no-bias", {"bias": False}, NO_WEIGHTS),
    Case("cross", call=NO_WEIGHTS, s=5),
    Case("cross-as-many-steps-as-examples", {"batch_first": False}, t=N, s=N),
    Case("separate-key-and-value", s=5, same_key_and_value=False),
    Case("kdim-vdim", {"kdim": 4, "vdim": 5}, s=5, same_key_and_value=False),
    Case("vdim-no-bias", {"vdim": 5, "bias": False}, NO_WEIGHTS, s=5, same_key_and_value=False),
    Case("bias-kv", {"add_bias_kv": True}, NO_WEIGHTS),
    Case("bias-kv-zero-attn", {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False}, s=5),
    Case("zero-attn", {"add_zero_attn": True}, NO_WEIGHTS),
    Case("causal", call={"attn_mask": causal(3, 3), "is_causal": True, **NO_WEIGHTS}),
    Case("causal-bias-kv", {"add_bias_kv": True}, {"attn_mask": causal(3, 3), "is_causal": True, **NO_WEIGHTS}),
    Case("causal-weights", call={"attn_mask": causal(3, 3), "is_causal": True}),
    Case("causal-padded", call={"attn_mask": causal(4, 4), "is_causal": True, "key_padding_mask": padding(4)}, t=4),
    Case("bool-mask", call={"attn_mask": causal(3, 5), **NO_WEIGHTS}, s=5),
    Case("float-mask", call={"attn_mask": FLOAT_MASK}, s=5),
    Case("mask-per-head", {"add_zero_attn": True}, {"attn_mask": PER_HEAD, **NO_WEIGHTS}, s=5),
    Case("mask-per-head-weights", call={"attn_mask": PER_HEAD, "average_attn_weights": False}, s=5),
    Case("padded", call={"key_padding_mask": padding(5), **NO_WEIGHTS}, s=5),
    Case("padded-time-first", {"batch_first": False, "add_bias_kv": True}, {"key_padding_mask": padding(5)}, s=5),
    Case(
        "float-padding",
        call={"key_padding_mask": -2.0 * padding(5).double(), "attn_mask": FLOAT_MASK, **NO_WEIGHTS},
        s=5,
    ),
    Case("both-masks", call={"key_padding_mask": padding(5), "attn_mask": causal(3, 5), **NO_WEIGHTS}, s=5),
    Case("weights-per-head", call={"average_attn_weights": False}, s=5),
]
MODES = list(itertools.product([True, False], [True, False], [1, N]))
"""Training or evaluation; with gradients or without; number of rows of the sample."""
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def respond(plain: nn.Module, gates: bool = True) -> Any:
    """A converted copy, with random response weights and gates unless told otherwise."""
    layer = convert(copy.deepcopy(plain), hyperparameters())
    return random_gates(layer, std=0.7) if gates else layer


def set_of(module: nn.Module) -> HyperparameterSet:
    found = next(response_layers(module)).hyperparameters
    assert found is not None
    return found


def at(module: nn.Module, sample: Tensor, *arguments: Any, **options: Any) -> Any:
    with bind(set_of(module), sample):
        return module(*arguments, **options)


def rows(n: int = N) -> Tensor:
    return torch.randn(n, H, dtype=DOUBLE)
