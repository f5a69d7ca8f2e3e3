"""With frozen weights, as in hyperparameter steps, hypergradients are the same and no weight gradient is computed."""

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
    """The output, and the gradients of a weighted sum of its entries in sample and input."""
    shared_set = next(module for module in net.modules() if isinstance(module, ResponseLayer)).hyperparameters
    assert shared_set is not None
    sample, input = sample.clone().requires_grad_(), input.clone().requires_grad_()
    with bind(shared_set, sample, frozen=frozen), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output: Tensor = net(input)
        weights = torch.linspace(-1, 2, output.numel(), dtype=sample.dtype).reshape(output.shape)
        return (output.detach().clone(), *torch.autograd.grad((output.to(weights) * weights).sum(), (sample, input)))


def assert_same(net: nn.Module, sample: Tensor, input: Tensor, **tolerance: float) -> None:
    """Check that output and gradients are the same with frozen weights and without."""
    for frozen, other in zip(*(gradients(net, sample, input, frozen=f) for f in (True, False)), strict=True):
        torch.testing.assert_close(frozen, other, **tolerance)


@every_case
def test_frozen_weights_give_the_same_output_and_gradients(case: Case) -> None:
    layer, _ = respond(case)
    sample = torch.randn(1, H, dtype=torch.float64)
    assert_same(layer, sample, torch.randn(case.shape, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@every_case
def test_frozen_weights_with_rows_per_example_give_the_same_output_and_gradients(case: Case) -> None:
    layer, _ = respond(case)
    sample = torch.randn(case.shape[0], H, dtype=torch.float64)
    assert_same(layer, sample, torch.randn(case.shape, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [CASES[0], CASES[7], CASES[15]], ids=str)
def test_frozen_weights_work_without_a_batch_dimension(case: Case) -> None:
    layer, plain = respond(case)
    dims = 1 if isinstance(plain, nn.Linear) else len(case.shape) - 1
    input = torch.randn(case.shape[-dims:], dtype=torch.float64)
    assert_same(layer, torch.randn(1, H, dtype=torch.float64), input, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_frozen_weights_work_where_only_one_parameter_responds(parameter: str) -> None:
    plain = nn.Linear(4, 5).double()
    getattr(plain, parameter).requires_grad_(False)
    net = random_gates(convert(nn.Sequential(plain), hyperparameters()))
    assert_same(net, torch.randn(1, H, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64))


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=str)
def test_later_layers_may_modify_the_output_in_place(case: Case) -> None:
    layer, _ = respond(case)
    net = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True))
    sample, input = torch.randn(1, H, dtype=torch.float64), torch.randn(case.shape, dtype=torch.float64)
    assert_same(net, sample, input, rtol=1e-10, atol=1e-10)


def test_frozen_gradient_under_autocast_is_as_accurate() -> None:
    """Its median error against float32, over twenty draws, is at most 1.1 times that of backward through weights."""
    all_errors: dict[bool, list[Tensor]] = {True: [], False: []}
    for seed in range(20):
        torch.manual_seed(seed)
        layer, _ = respond(Case(lambda: nn.Conv2d(8, 16, 3), (16, 8, 8, 8)), dtype=torch.float32)
        sample, input = torch.randn(1, H), torch.randn(16, 8, 8, 8)
        exact = gradients(layer, sample, input, frozen=False)[1]
        for frozen, errors in all_errors.items():
            gradient = gradients(layer, sample, input, frozen=frozen, autocast=True)[1]
            errors.append((gradient - exact).norm() / exact.norm())
    frozen, through_weights = (torch.stack(errors).median() for errors in (all_errors[True], all_errors[False]))
    assert 0 < frozen <= 1.1 * through_weights


class Calls(TorchDispatchMode):
    """Records which operators are called, and of each convolution's backward pass whether it has a weight gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []
        self.weight_gradients: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        if func is torch.ops.aten.convolution_backward.default:
            self.weight_gradients.append(args[-1][1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 4])
def test_frozen_convolutions_compute_no_weight_gradient(rows: int) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    net = random_gates(convert(net, hyperparameters()))
    with Calls() as calls:
        gradients(net, torch.randn(rows, H), torch.randn(4, 2, 6, 6), frozen=True)
    assert calls.weight_gradients
    assert not any(calls.weight_gradients)


def test_convolutions_that_are_not_frozen_compute_a_weight_gradient() -> None:
    """Shows that `Calls` detects weight gradients."""
    net = random_gates(convert(nn.Sequential(nn.Conv2d(2, 3, 3)), hyperparameters()))
    with Calls() as calls:
        gradients(net, torch.randn(1, H), torch.randn(4, 2, 6, 6), frozen=False)
    assert any(calls.weight_gradients)


def test_linear_layer_takes_all_examples_in_one_product_where_time_is_the_first_dimension_in_memory() -> None:
    """The output of an LSTM is so; torch would take one product for each example there."""
    layer = random_gates(convert(nn.Linear(6, 7).double(), hyperparameters()))
    sample, input = torch.randn(1, H, dtype=torch.float64), torch.randn(5, 4, 6, dtype=torch.float64).transpose(0, 1)
    with Calls() as calls:
        gradients(layer, sample, input, frozen=True)
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
    assert products & set(calls.operators)
    assert torch.ops.aten.bmm.default not in calls.operators
    assert_same(layer, sample, input, rtol=1e-10, atol=1e-10)


def test_frozen_layer_may_be_called_twice_and_its_output_reshaped() -> None:
    """The layer is called twice in a step, and its outputs are reshaped, then modified in place."""

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


def test_frozen_weights_refuse_a_loss_that_differentiates_the_network() -> None:
    shared_set = hyperparameters()
    net = random_gates(convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double(), shared_set))
    sample, x = torch.randn(1, H).double().requires_grad_(), torch.randn(5, 3).double().requires_grad_()
    with bind(shared_set, sample, frozen=True), pytest.raises(FrozenWeightsError, match="frozen=False"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("frozen", [True, False])
def test_vmap_of_jacrev_equals_the_jacobian_of_each_example(frozen: bool) -> None:
    shared_set = hyperparameters()
    net = random_gates(convert(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), shared_set))
    x, sample = torch.randn(5, 3).double(), torch.randn(1, H).double()
    with bind(shared_set, sample, frozen=frozen):
        jacobians = torch.func.vmap(torch.func.jacrev(net))(x)
    with bind(shared_set, sample):
        expected = torch.stack([torch.autograd.functional.jacobian(net, row) for row in x])
    torch.testing.assert_close(jacobians, expected)
