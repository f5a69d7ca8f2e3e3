"""Perturbation scales: their entropy, and their update by the hyperparameter step."""

import math

import pytest
import torch
from science.oracles import double
from torch import Tensor

from lightning_stn import Float, HyperparameterSet, Scales, functional
from lightning_stn.methods.hypergradient import HyperparameterOptimizer, Leaves

SCALES = {"narrow": 0.01, "middling": 0.5, "wide": 7.0}


def make_set() -> HyperparameterSet:
    return HyperparameterSet({name: Float(None, None, init=0.4, scale=scale) for name, scale in SCALES.items()})


def make_optimizer(
    tuned: HyperparameterSet, lr: float = 0.1, scale_lr: float = 0.1, entropy_weight: float = 0.0
) -> HyperparameterOptimizer:
    return HyperparameterOptimizer(
        tuned, torch.optim.SGD, lr=lr, scales=Scales(tune=True, lr=scale_lr, entropy_weight=entropy_weight)
    )


def test_entropy_is_the_sum_of_the_normal_entropies_of_torch_distributions():
    normals = torch.distributions.Normal(torch.zeros(3), torch.tensor(list(SCALES.values())))
    torch.testing.assert_close(make_set().entropy(), normals.entropy().sum(), rtol=1e-5, atol=1e-5)


def test_entropy_gradient_in_sigma_is_one_over_sigma_in_closed_form():
    sigma = double(*SCALES.values()).requires_grad_()
    (found,) = torch.autograd.grad(functional.entropy(sigma), sigma)
    torch.testing.assert_close(found, 1 / sigma.detach(), rtol=1e-12, atol=0)


def test_entropy_gradient_in_rho_is_sigmoid_over_softplus_in_closed_form():
    rho = make_set().raw_scale.double().requires_grad_()
    (found,) = torch.autograd.grad(Leaves(torch.zeros_like(rho), rho).entropy(), rho)
    expected = [1 / (1 + math.exp(-r)) / math.log1p(math.exp(r)) for r in rho.tolist()]
    torch.testing.assert_close(found, double(*expected), rtol=1e-9, atol=0)


def step_without_noise(entropy_weight: float) -> tuple[Tensor, Tensor, HyperparameterSet]:
    """Take one step on a loss that does not depend on the scales; return lambda and rho before it, and the set."""
    hyperparameters = make_set()
    before = hyperparameters.unconstrained.detach().clone(), hyperparameters.raw_scale.detach().clone()
    optimizer = make_optimizer(hyperparameters, entropy_weight=entropy_weight)
    leaves = optimizer.leaves()
    optimizer.receive(optimizer.hypergradient(leaves.sample(None).square().sum(), leaves))
    optimizer.step()
    return *before, hyperparameters


def test_scale_step_without_validation_gradient_follows_the_closed_form_entropy_gradient():
    weight = 0.05
    centre, rho, hyperparameters = step_without_noise(weight)
    expected = rho + 0.1 * weight * torch.sigmoid(rho) / torch.nn.functional.softplus(rho)
    torch.testing.assert_close(hyperparameters.raw_scale.data, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hyperparameters.unconstrained.data, centre - 0.1 * 2 * centre, rtol=1e-5, atol=1e-6)
    assert (hyperparameters.raw_scale > rho).all()
    assert (hyperparameters.scale > torch.tensor(list(SCALES.values()))).all()


def test_scale_step_without_any_gradient_keeps_the_scales_bit_for_bit():
    _, rho, hyperparameters = step_without_noise(0.0)
    assert torch.equal(hyperparameters.raw_scale, rho)


@pytest.mark.parametrize("curvature", [0.5, 4.0])
def test_scales_converge_to_the_closed_form_optimum_of_a_quadratic_validation_loss(curvature):
    """`E a/2 (h - g)^2 - tau log sigma` is least at `lambda = g` and `sigma = sqrt(tau / a)`."""
    weight, goal = 0.1, -1.0
    hyperparameters = make_set()
    optimizer = make_optimizer(hyperparameters, lr=0.2 / curvature, scale_lr=2.0, entropy_weight=weight)
    noise = torch.tensor([[1.0], [-1.0]]).expand(-1, 3)  # Two nodes are an exact quadrature for a quadratic.
    for _ in range(1000):
        leaves = optimizer.leaves()
        loss = (curvature / 2 * (leaves.sample(noise) - goal).square()).mean(0).sum()
        optimizer.receive(optimizer.hypergradient(loss, leaves))
        optimizer.step()
    torch.testing.assert_close(hyperparameters.unconstrained.data, torch.full((3,), goal), rtol=1e-4, atol=0)
    expected = torch.full((3,), math.sqrt(weight / curvature))
    torch.testing.assert_close(hyperparameters.scale.data, expected, rtol=1e-4, atol=0)
