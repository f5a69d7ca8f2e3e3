"""Networks as people write them: what `convert` refuses, with the reason, and what it leaves as it was."""

from typing import Any

import pytest
import torch
from support import random_gates
from torch import Tensor, nn

from lightning_stn import STN, ConversionError, DeltaSTN, Float, HyperparameterSet, convert
from lightning_stn.binding import bind_weight_phase, unbind
from lightning_stn.layers import ResponseLinear
from lightning_stn.methods import Method


def one() -> HyperparameterSet:
    return HyperparameterSet({"rate": Float(0.0, 0.9, init=0.3)})


class Owner(nn.Module):
    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.own = nn.Parameter(parameter)


class Bag(nn.EmbeddingBag):
    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args)


REFUSED = {
    "complex": (lambda: Owner(torch.randn(3, dtype=torch.cfloat)), "complex parameters"),
    "complex layer": (lambda: nn.Linear(2, 2, dtype=torch.cfloat), "complex parameters"),
    "scripted": (lambda: torch.jit.script(nn.Linear(2, 2)), "compiled by TorchScript"),
    "sparse": (lambda: nn.EmbeddingBag(4, 2, sparse=True), "its gradient is sparse"),
    "max_norm": (lambda: Bag(4, 2, max_norm=1.0), "max_norm rewrites the weights"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_respond_is_refused_with_the_reason(build: Any, reason: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), build())
    with pytest.raises(ConversionError, match=rf"1 \(\w+\): .*{reason}"):
        convert(net, one())
    assert type(net[0]) is nn.Linear
    assert type(convert(net, one(), exclude=["1"])[0]) is ResponseLinear  # type: ignore[index]


class Breaks(nn.Module):
    """Raises when its response is drawn, as a bug in a registered layer would."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(2))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.startswith("response"):
            raise ArithmeticError(name)
        super().register_parameter(name, param)


@pytest.mark.parametrize("dropout", ["rate", "per-layer"])
def test_conversion_that_fails_changes_nothing(dropout: str) -> None:
    hyperparameters = one()
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3), Breaks())
    before = (repr(net), list(net.state_dict()), hyperparameters.signature, hyperparameters.unconstrained.clone())
    with pytest.raises(ArithmeticError):
        convert(net, hyperparameters, dropout=dropout)
    after = (repr(net), list(net.state_dict()), hyperparameters.signature, hyperparameters.unconstrained)
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])
    assert hyperparameters.networks == []
    hyperparameters.add({"later": Float(0.0, 1.0, init=0.5)})  # nothing responds to it yet
    assert type(convert(net, hyperparameters, dropout="rate", exclude=["2"])[0]) is ResponseLinear  # type: ignore[index]


def test_parameter_containers_convert_where_they_hold_nothing_that_trains() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.empty = nn.Linear(2, 2), nn.ParameterDict()
            self.frozen = nn.ParameterList([nn.Parameter(torch.ones(1), requires_grad=False)])

    assert type(convert(Adapter(), one()).layer) is ResponseLinear
    with pytest.raises(ConversionError, match=r"1 \(ParameterList\): its parameters are read from outside"):
        convert(nn.Sequential(nn.Linear(2, 2), nn.ParameterList([nn.Parameter(torch.ones(1))])), one())


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.none, self.some, self.nothing = nn.Linear(0, 3), nn.Linear(2, 3), nn.Parameter(torch.ones(0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.none(x[:, :0]) + self.some(x) + self.nothing.sum()
        return out


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("method", [STN(), DeltaSTN()], ids=repr)
def test_layers_without_inputs_respond_by_their_biases(method: Method) -> None:
    hyperparameters = one()
    net: Any = random_gates(convert(Empty(), hyperparameters), 0.3)
    method.prepare(net, hyperparameters)
    x = torch.randn(5, 2)
    bind_weight_phase(hyperparameters, hyperparameters.sample(1))
    method.objective(net, hyperparameters, lambda: net(x).square().sum())[1].backward()
    unbind(hyperparameters)
    assert net.none.bias_gate.grad.abs().sum() > 0


class Children(nn.Module):
    """Children with names that people use."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("gates", "base", "response", "effective", "owner", "plain"):
            setattr(self, name, nn.Linear(2, 2))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x * self.scale


def test_children_may_have_everyday_names() -> None:
    net, x = Children(), torch.randn(3, 2)
    expected = net(x)
    assert torch.equal(convert(net, one())(x), expected)


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
        return x - self.mean


STATISTICS = {
    "batch norm": lambda: nn.BatchNorm1d(2),
    "instance norm": lambda: nn.InstanceNorm1d(2, track_running_stats=True),
    "own": RunningMean,
}


@pytest.mark.parametrize("build", STATISTICS.values(), ids=STATISTICS)
def test_running_statistics_of_any_module_move_once_in_a_step_of_delta_stn(build: Any) -> None:
    hyperparameters = one()
    plain, net = build(), convert(nn.Sequential(nn.Linear(5, 5), build()), hyperparameters)
    x = torch.randn(8, 2, 5)
    DeltaSTN(linearize=False).prepare(net, hyperparameters)
    bind_weight_phase(hyperparameters, hyperparameters.sample(1))
    DeltaSTN(linearize=False).objective(net, hyperparameters, lambda: net(x).square().sum())
    unbind(hyperparameters)
    plain(net[0](x))  # type: ignore[index]
    torch.testing.assert_close(dict(net[1].named_buffers()), dict(plain.named_buffers()))  # type: ignore[index]
