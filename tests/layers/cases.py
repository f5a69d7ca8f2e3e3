"""Plain layers with the shape of an input, at least one for every response layer, for tests of all of them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support import random_gates
from torch import nn

from lightning_stn import Float, HyperparameterSet
from lightning_stn.layers import ResponseLayer, response_type

H = 3


@dataclass(frozen=True)
class Case:
    plain: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.plain()}-{self.shape}".replace(" ", "")


CASES = [
    Case(lambda: nn.Linear(4, 5), (6, 4)),
    Case(lambda: nn.Linear(4, 5, bias=False), (6, 4)),
    Case(lambda: nn.Linear(4, 5), (6, 6, 4)),  # as many time steps as examples
    Case(lambda: nn.Linear(4, 5), (6, 2, 3, 4)),
    Case(lambda: nn.Linear(4, 6), (6, 6, 4)),
    Case(lambda: nn.Conv1d(4, 6, 3), (6, 4, 7)),
    Case(lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular", stride=2), (6, 4, 6)),
    Case(lambda: nn.Conv2d(4, 6, 3), (6, 4, 6, 6)),
    Case(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), (6, 4, 7, 5)),
    Case(lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), (6, 4, 6, 6)),
    Case(lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), (6, 4, 5, 5)),
    Case(lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate"), (6, 4, 5, 5)),
    Case(lambda: nn.Conv3d(2, 3, 2, padding=1, groups=1), (6, 2, 3, 4, 3)),
    Case(lambda: nn.Conv3d(2, 4, 2, padding="valid", groups=2, bias=False, stride=2), (6, 2, 4, 4, 4)),
    Case(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, bias=False), (6, 4, 5)),
    Case(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (6, 4, 3, 4)),
    Case(lambda: nn.ConvTranspose3d(2, 4, 2, dilation=2, groups=2), (6, 2, 3, 2, 3)),
    Case(lambda: nn.LayerNorm(4), (6, 4)),
    Case(lambda: nn.LayerNorm((6, 4)), (6, 6, 4)),
    Case(lambda: nn.LayerNorm(4, bias=False), (6, 6, 2, 4)),
    Case(lambda: nn.RMSNorm(4), (6, 6, 4)),
    Case(lambda: nn.GroupNorm(2, 6), (6, 6, 3)),
    Case(lambda: nn.GroupNorm(2, 4), (6, 4, 3, 2)),
    Case(lambda: nn.BatchNorm1d(4).eval(), (6, 4)),
    Case(lambda: nn.BatchNorm2d(4).eval(), (6, 4, 3, 2)),
    Case(lambda: nn.BatchNorm3d(4).eval(), (6, 4, 3, 2, 2)),
    Case(lambda: nn.SyncBatchNorm(4).eval(), (6, 4, 3)),
    Case(lambda: nn.InstanceNorm1d(4, affine=True), (6, 4, 5)),
    Case(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), (6, 4, 3, 2)),
    Case(lambda: nn.InstanceNorm3d(4, affine=True), (6, 4, 3, 2, 2)),
    Case(lambda: nn.PReLU(), (6, 4, 3)),
    Case(lambda: nn.PReLU(4), (6, 4, 3, 2)),
    Case(lambda: nn.PReLU(4), (6, 4)),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def hyperparameters() -> HyperparameterSet:
    return HyperparameterSet({name: Float(0.0, 1.0, init=0.5) for name in "abc"[:H]})


def respond(case: Case, gates: bool = True, dtype: torch.dtype = torch.float64) -> tuple[ResponseLayer, nn.Module]:
    """A converted layer, and the plain layer that it is a copy of."""
    plain = case.plain().to(dtype)
    layer = copy.deepcopy(plain)
    response = response_type(type(plain))
    assert response is not None
    response.adopt(layer, hyperparameters())
    assert isinstance(layer, ResponseLayer)
    if gates:
        random_gates(layer)
    return layer, plain
