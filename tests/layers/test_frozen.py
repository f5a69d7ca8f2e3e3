"""Hyperparameter steps hold the weights fixed: the same hypergradient by another way, and no gradient of a weight."""

import copy
from typing import Any

import pytest
import torch
from layers.cases import CASES, Case, H, every_case, hyperparameters, respond
from support import random_gates
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_stn import convert
from lightning_stn.binding import bind
from lightning_stn.functional import FrozenWeightsError
from lightning_stn.layers import ResponseLayer


def gradients(
    net: nn.Module, sample: Tensor, input: Tensor, *, frozen: bool, autocast: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the gradients of a weighted sum of it in the sample and the input."""
    held = next(module for module in net.modules() if isinstance(module, ResponseLayer)).hyperparameters
    assert held is not None
    sample, input = sample.clone().requires_grad_(), input.clone().requires_grad_()
    with bind(held, sample, frozen=frozen), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output: Tensor = net(input)
        weights = torch.linspace(-1, 2, output.numel(), dtype=sample.dtype).reshape(output.shape)
        return (output.detach().clone(), *torch.autograd.grad((output.to(weights) * weights).sum(), (sample, input)))


def assert_same(net: nn.Module, sample: Tensor, input: Tensor, **tolerance: float) -> None:
    for frozen, other in zip(*(gradients(net, sample, input, frozen=f) for f in (True, False)), strict=True):
        torch.testing.assert_close(frozen, other, **tolerance)


@every_case
def test_frozen_weights_leave_output_and_gradients_as_they_are(case: Case) -> None:
    layer, _ = respond(case)
    sample = torch.randn(1, H, dtype=torch.float64)
    assert_same(layer, sample, torch.randn(case.shape, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@every_case
def test_a_row_for_each_example_does_not_change_either(case: Case) -> None:
    layer, _ = respond(case)
    sample = torch.randn(case.shape[0], H, dtype=torch.float64)
    assert_same(layer, sample, torch.randn(case.shape, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [CASES[0], CASES[7], CASES[15]], ids=str)
def test_an_input_without_a_batch(case: Case) -> None:
    layer, plain = respond(case)
    dims = 1 if isinstance(plain, nn.Linear) else len(case.shape) - 1
    input = torch.randn(case.shape[-dims:], dtype=torch.float64)
    assert_same(layer, torch.randn(1, H, dtype=torch.float64), input, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_layer_that_responds_in_one_parameter_only(parameter: str) -> None:
    plain = nn.Linear(4, 5).double()
    getattr(plain, parameter).requires_grad_(False)
    net = random_gates(convert(nn.Sequential(plain), hyperparameters()))
    assert_same(net, torch.randn(1, H, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64))


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=str)
def test_a_layer_behind_may_work_in_place(case: Case) -> None:
    layer, _ = respond(case)
    net = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True))
    sample, input = torch.randn(1, H, dtype=torch.float64), torch.randn(case.shape, dtype=torch.float64)
    assert_same(net, sample, input, rtol=1e-10, atol=1e-10)


def test_under_autocast_the_frozen_gradient_is_as_good() -> None:
    """Against float32, over twenty draws, no further off than the way through the weights, but for a tenth."""
    off: dict[bool, list[Tensor]] = {True: [], False: []}
    for seed in range(20):
        torch.manual_seed(seed)
        layer, _ = respond(Case(lambda: nn.Conv2d(8, 16, 3), (16, 8, 8, 8)), dtype=torch.float32)
        sample, input = torch.randn(1, H), torch.randn(16, 8, 8, 8)
        exact = gradients(layer, sample, input, frozen=False)[1]
        for frozen, errors in off.items():
            gradient = gradients(layer, sample, input, frozen=frozen, autocast=True)[1]
            errors.append((gradient - exact).norm() / exact.norm())
    frozen, through_weights = (torch.stack(errors).median() for errors in (off[True], off[False]))
    assert 0 < frozen <= 1.1 * through_weights


class Calls(TorchDispatchMode):
    """Writes down which convolutions' backward passes ask for a weight gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_gradients: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.weight_gradients.append(args[-1][1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 4])
def test_no_convolution_computes_a_weight_gradient(rows: int) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    net = random_gates(convert(net, hyperparameters()))
    with Calls() as calls:
        gradients(net, torch.randn(rows, H), torch.randn(4, 2, 6, 6), frozen=True)
    assert calls.weight_gradients
    assert not any(calls.weight_gradients)


def test_the_same_step_outside_it_does() -> None:
    """The counter of the test above counts."""
    net = random_gates(convert(nn.Sequential(nn.Conv2d(2, 3, 3)), hyperparameters()))
    with Calls() as calls:
        gradients(net, torch.randn(1, H), torch.randn(4, 2, 6, 6), frozen=False)
    assert any(calls.weight_gradients)


def test_a_network_used_twice_and_nested_views() -> None:
    """A layer called twice in one step, and outputs that are reshaped at once."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).view(2, 3, 4).transpose(0, 1).relu_())

    net = random_gates(convert(Twice().double(), hyperparameters()))
    sample, input = torch.randn(1, H, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    assert_same(net, sample, input, rtol=1e-10, atol=1e-10)
    assert_same(copy.deepcopy(net), sample, input, rtol=1e-10, atol=1e-10)


def test_a_loss_that_differentiates_the_network_is_refused_here() -> None:
    held = hyperparameters()
    net = random_gates(convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double(), held))
    sample, x = torch.randn(1, H).double().requires_grad_(), torch.randn(5, 3).double().requires_grad_()
    with bind(held, sample, frozen=True), pytest.raises(FrozenWeightsError, match="frozen=False"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("frozen", [True, False])
def test_transforms_of_torch_func_work(frozen: bool) -> None:
    held = hyperparameters()
    net = random_gates(convert(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), held))
    x, sample = torch.randn(5, 3).double(), torch.randn(1, H).double()
    with bind(held, sample, frozen=frozen):
        jacobians = torch.func.vmap(torch.func.jacrev(net))(x)
    with bind(held, sample):
        expected = torch.stack([torch.autograd.functional.jacobian(net, row) for row in x])
    torch.testing.assert_close(jacobians, expected)
