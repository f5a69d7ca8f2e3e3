"""The scale of the gates: it changes how fast a response is learned, and not what it can be."""

import copy
from typing import Any

import pytest
import torch
from support import random_gates
from torch import Tensor, nn

from lightning_stn import STN, DeltaSTN, Float, HyperparameterSet, convert
from lightning_stn.binding import bind, bind_weight_phase, unbind
from lightning_stn.methods import Method

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
STEP = torch.tensor([0.7, -1.1])


def prepared(method: Method, learned: bool = True) -> tuple[Any, HyperparameterSet]:
    torch.manual_seed(1)
    hyperparameters = HyperparameterSet({"a": Float(0.0, 1.0, init=0.2), "b": Float(0.0, 1.0, init=0.6)})
    net = convert(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), hyperparameters).double()
    if learned:
        random_gates(net, 0.3)
    method.prepare(net, hyperparameters)
    return net, hyperparameters


def outputs(net: nn.Module, hyperparameters: HyperparameterSet, sample: Tensor) -> Tensor:
    with bind(hyperparameters, sample):
        output: Tensor = net(X)
    return output


@pytest.mark.parametrize(
    ("method", "scale"),
    [(STN(), 0.5), (STN(centred=False), 1.0), (STN(gate_scale=0.3), 0.3), (DeltaSTN(), 1.0)],
    ids=repr,
)
def test_method_sets_the_scale_and_changes_no_output(method: Method, scale: float) -> None:
    net, hyperparameters = prepared(STN(centred=False))
    assert hyperparameters.gate_scale == 1.0
    samples = hyperparameters.sample(5, torch.Generator().manual_seed(2))
    expected = outputs(net, hyperparameters, samples)
    method.prepare(net, hyperparameters)
    assert hyperparameters.gate_scale == scale
    torch.testing.assert_close(outputs(net, hyperparameters, samples), expected)
    hyperparameters.unconstrained += STEP
    method.follow(net, hyperparameters, STEP)
    if method.moves_base or not method.centred:
        torch.testing.assert_close(outputs(net, hyperparameters, samples), expected)


@pytest.mark.parametrize(("optimizer", "power"), [(torch.optim.SGD, 2), (torch.optim.Adam, 1)])
def test_response_of_new_gates_moves_at_a_power_of_the_scale(optimizer: Any, power: int) -> None:
    """Gates at zero, one step: the change of `diag(V s) R` against that at a scale of one."""
    moved = {}
    for scale in (1.0, 0.5):
        net, hyperparameters = prepared(STN(gate_scale=scale), learned=False)
        steps = optimizer(net.parameters(), lr=1e-3)
        sample = hyperparameters.unconstrained + torch.tensor([[0.4, -0.3]])
        bind_weight_phase(hyperparameters, sample)
        net(X).square().sum().backward()
        unbind(hyperparameters)
        steps.step()
        moved[scale] = scale * net[0].weight_gate.detach()
    assert moved[1.0].abs().min() > 0
    torch.testing.assert_close(moved[0.5], moved[1.0] * 0.5**power, rtol=1e-4, atol=0)


def test_scale_is_saved_and_a_run_with_another_one_goes_on_from_the_same_function() -> None:
    net, hyperparameters = prepared(STN(gate_scale=0.3))
    samples = hyperparameters.sample(5, torch.Generator().manual_seed(2))
    expected = outputs(net, hyperparameters, samples)
    again, loaded = prepared(STN(gate_scale=2.0))
    again.load_state_dict(net.state_dict())
    loaded.load_state_dict(hyperparameters.state_dict())
    gates = copy.deepcopy(again[0].weight_gate)
    STN(gate_scale=0.3).prepare(again, loaded)
    assert torch.equal(gates, again[0].weight_gate)  # the saved scale is float32, and is still the same one
    STN().prepare(again, loaded)
    assert not torch.equal(gates, again[0].weight_gate)
    torch.testing.assert_close(outputs(again, loaded, samples), expected)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "0.5", True])
def test_scale_is_a_positive_number(scale: Any) -> None:
    with pytest.raises(ValueError, match="STN: expected gate_scale to be a positive number, got"):
        STN(gate_scale=scale)
