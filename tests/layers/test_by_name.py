"""Layers of other libraries that are known by name: stand-ins that compute as they do."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import random_gates
from torch import Tensor, nn

from lightning_stn import STN, DeltaSTN, Float, HyperparameterSet, convert, export
from lightning_stn.binding import bind, bind_weight_phase, unbind


class NormAct(nn.BatchNorm2d):
    __module__, __qualname__ = "timm.layers.norm_act", "BatchNormAct2d"

    def __init__(self) -> None:
        super().__init__(4)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        out: Tensor = self.act(self.drop(x))
        return out


class ChannelNorm(nn.LayerNorm):
    __module__, __qualname__ = "timm.layers.norm", "LayerNorm2d"

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class OwnLayerNorm(nn.LayerNorm):
    __module__, __qualname__ = "timm.layers.norm", "LayerNorm"

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    __module__, __qualname__ = "transformers.models.llama.modeling_llama", "LlamaRMSNorm"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class OwnLinear(nn.Linear):
    __module__, __qualname__ = "timm.layers.linear", "Linear"

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv1D(nn.Module):
    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], 6)


CASES = {
    "norm with activation": (NormAct, (5, 4, 3, 2)),
    "norm of channels": (lambda: ChannelNorm(4), (5, 4, 3, 2)),
    "layer norm": (lambda: OwnLayerNorm(4), (5, 3, 4)),
    "rms norm": (RMSNorm, (5, 3, 4)),
    "linear": (lambda: OwnLinear(4, 6), (5, 3, 4)),
    "conv1d": (Conv1D, (5, 3, 4)),
}


def converted(build: Any) -> tuple[Any, HyperparameterSet]:
    torch.manual_seed(0)
    hyperparameters = HyperparameterSet({"a": Float(0.0, 1.0, init=0.3), "b": Float(0.0, 1.0, init=0.6)})
    net = random_gates(convert(nn.Sequential(build()), hyperparameters).double().eval(), 0.3)
    STN(gate_scale=1.0).prepare(net, hyperparameters)
    return net, hyperparameters


@pytest.mark.parametrize(("build", "shape"), CASES.values(), ids=CASES)
def test_row_for_each_example_equals_the_rows_one_after_the_other(build: Any, shape: tuple[int, ...]) -> None:
    net, hyperparameters = converted(build)
    x, samples = torch.randn(shape, dtype=torch.float64), hyperparameters.sample(5)
    with bind(hyperparameters, samples):
        found = net(x)
    expected = []
    for n in range(5):
        with bind(hyperparameters, samples[n : n + 1]):
            expected.append(net(x[n : n + 1]))
    torch.testing.assert_close(found, torch.cat(expected))
    assert not torch.allclose(found, net(x))
    torch.testing.assert_close(export(net)(x), net(x))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("build", "shape"), CASES.values(), ids=CASES)
def test_linearised_prediction_equals_central_differences(build: Any, shape: tuple[int, ...], rows: int) -> None:
    net, hyperparameters = converted(build)
    x, samples, width = torch.randn(shape, dtype=torch.float64), hyperparameters.sample(rows), 1e-3
    distance = samples - hyperparameters.unconstrained

    def at(step: float) -> Tensor:
        with bind(hyperparameters, hyperparameters.unconstrained + step * distance):
            output: Tensor = net(x)
        return output

    expected = at(0.0) + (at(width) - at(-width)) / (2 * width)
    predictions: list[Tensor] = []

    def loss() -> Tensor:
        predictions.append(net(x))
        return predictions[-1].square().sum()

    bind_weight_phase(hyperparameters, samples)
    DeltaSTN().objective(net, hyperparameters, loss)
    unbind(hyperparameters)
    torch.testing.assert_close(predictions[0], expected, rtol=1e-4, atol=1e-4)
