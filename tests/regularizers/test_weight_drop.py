"""DropConnect: equal to the wrapped module with masked weights."""

import copy
from typing import Any

import pytest
import torch
from support import random_gates
from torch import Tensor, nn

from lightning_stn import Float, HyperparameterSet, convert, export
from lightning_stn.binding import attach_all, bind_weight_phase, unbind
from lightning_stn.functional import keep_mask
from lightning_stn.layers import ResponseLayer
from lightning_stn.regularizers import WeightDrop

CASES: list[tuple[nn.Module, list[str], tuple[int, ...]]] = [
    (nn.LSTM(3, 4, 2, batch_first=True), ["weight_hh_l0", "weight_hh_l1"], (5, 6, 3)),
    (nn.GRU(3, 4, batch_first=True), ["weight_hh_l0"], (5, 6, 3)),
    (nn.Linear(3, 4), ["weight", "bias"], (5, 3)),
    (nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)), ["0.weight", "2.bias"], (5, 2, 4, 4)),
]
every_case = pytest.mark.parametrize(("plain", "names", "shape"), CASES, ids=lambda value: str(value)[:20])


def make_set() -> HyperparameterSet:
    return HyperparameterSet({"rate": Float(0.0, 1.0, init=0.5, perturb="batch"), "other": Float(0.0, 1.0, init=0.5)})


def first(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def masked(module: nn.Module, names: list[str], rate: float) -> nn.Module:
    """A copy of the module with masked weights; the masks are the next draws."""
    other = copy.deepcopy(module)
    for name in names:
        parameter = other.get_parameter(name)
        parameter.data.mul_(keep_mask(parameter.shape, rate, parameter.device))
    return other


@every_case
def test_weight_drop_equals_the_plain_module_with_masked_weights(
    plain: nn.Module, names: list[str], shape: tuple[int, ...]
) -> None:
    module, input = WeightDrop(copy.deepcopy(plain), names, 0.4), torch.randn(shape)
    torch.manual_seed(1)
    output = first(module(input))
    torch.manual_seed(1)
    torch.testing.assert_close(output, first(masked(plain, names, 0.4)(input)), rtol=1e-6, atol=1e-6)
    assert not torch.equal(output, first(plain(input)))
    assert torch.equal(first(module.eval()(input)), first(plain(input)))


@every_case
@pytest.mark.parametrize("rows", [1, 5])
def test_weight_drop_masks_a_weight_and_its_response_together(
    plain: nn.Module, names: list[str], shape: tuple[int, ...], rows: int
) -> None:
    """Reference: the plain module in float64 with the masked effective weights of each example."""
    hyperparameters = make_set()
    module = WeightDrop(copy.deepcopy(plain).double(), names, "rate")
    attach_all(module, hyperparameters)
    random_gates(convert(module, hyperparameters))
    sample, input = torch.randn(rows, 2, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    sample[:, 0] = 0.3
    bind_weight_phase(hyperparameters, sample)
    torch.manual_seed(1)
    output = first(module(input))
    rate = torch.sigmoid(torch.tensor(0.3)).item()
    expected = []
    for n in range(5):
        expected_module = copy.deepcopy(plain).double()
        for path, layer in module.module.named_modules():
            if isinstance(layer, ResponseLayer):
                expected_module.get_submodule(path).load_state_dict(
                    layer.effective_parameters(sample[n % rows].unsqueeze(0))
                )
        torch.manual_seed(1)
        expected.append(first(masked(expected_module, names, rate)(input[n : n + 1])))
    torch.testing.assert_close(output, torch.cat(expected), rtol=1e-9, atol=1e-9)
    unbind(hyperparameters)
    assert torch.equal(first(module(input)), first(module.module(input)))


def test_weight_drop_restores_weights_and_gives_dropped_ones_no_gradient() -> None:
    layer = nn.Linear(20, 30)
    before = layer.weight.clone()
    WeightDrop(layer, ["weight"], 0.5)(torch.rand(4, 20) + 0.1).sum().backward()
    assert torch.equal(layer.weight, before)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.grad is not None
    assert 0.3 < (layer.weight.grad == 0).double().mean() < 0.7


def test_weight_drop_refuses_a_rate_for_each_example() -> None:
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 1.0, init=0.5)})
    module = WeightDrop(nn.Linear(3, 4), ["weight"], "rate")
    attach_all(module, hyperparameters)
    bind_weight_phase(hyperparameters, torch.randn(5, 1))
    with pytest.raises(ValueError, match=r"WeightDrop: acts on the batch as a whole, but 'rate' .* perturb='batch'"):
        module(torch.randn(5, 3))
    bind_weight_phase(hyperparameters, torch.randn(1, 1))
    assert module(torch.randn(5, 3)).shape == (5, 4)


@pytest.mark.parametrize("names", [["weigth"], [], "weight"])
def test_weight_drop_refuses_names_that_are_not_parameters(names: Any) -> None:
    with pytest.raises(ValueError, match=r"expected names to be a list from \['weight', 'bias'\], got"):
        WeightDrop(nn.Linear(3, 4), names, 0.5)


def test_export_replaces_weight_drop_by_its_module() -> None:
    hyperparameters = make_set()
    net = nn.Sequential(WeightDrop(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2)), ["0.weight"], "rate"))
    attach_all(net, hyperparameters)
    random_gates(convert(net, hyperparameters, dropout="other")).eval()
    exported, input = export(net), torch.randn(5, 3)
    assert [type(module) for module in exported.modules()] == [nn.Sequential, nn.Sequential, nn.Linear, nn.Dropout]
    torch.testing.assert_close(exported(input), net(input))
