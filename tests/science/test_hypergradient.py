"""Hypergradients: correct, and through the response alone."""

import pytest
import torch
import torch.nn.functional as F
from support import LitSmall, fit, random_gates
from torch import Tensor, nn

from lightning_stn import Float, HyperparameterSet, Integer, Scales, STNCallback, convert
from lightning_stn.augment import Cutout, GaussianNoise
from lightning_stn.binding import attach_all, bind, bind_weight_phase, unbind
from lightning_stn.methods.hypergradient import HyperparameterOptimizer, Leaves

EXAMPLES = 6
SPECIFICATIONS = {
    "rate": Float(0.0, 0.9, init=0.2),
    "noise": Float(0.0, None, init=0.3),
    "length": Integer(0, 3, init=2),
    "decay": Float(1e-5, 1.0, init=1e-2, log=True, perturb="batch"),
}


def make_net(gate_std: float) -> tuple[nn.Module, HyperparameterSet]:
    """A smooth network in float64 and training mode, whose regularisers read three of the four hyperparameters.

    With `gate_std` of 0 the gates are zero, but not the response weights; otherwise both are random.
    """
    torch.manual_seed(0)
    hyperparameters = HyperparameterSet(SPECIFICATIONS)
    net = nn.Sequential(
        Cutout("length"),
        GaussianNoise("noise"),
        nn.Conv2d(1, 2, 3),
        nn.Tanh(),
        nn.Dropout2d(),
        nn.Flatten(),
        nn.Linear(18, 5),
        nn.Softplus(),
        nn.Dropout(),
        nn.Linear(5, 3),
    )
    convert(net, hyperparameters, dropout="rate", exclude=["0", "1"]).double()
    attach_all(net, hyperparameters)
    if gate_std:
        random_gates(net, gate_std)
    return net, hyperparameters


def gates(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in module.named_parameters() if name.endswith("_gate")]


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(EXAMPLES, 1, 5, 5, generator=generator, dtype=torch.float64), torch.arange(EXAMPLES) % 3


def validation_loss(net: nn.Module, hyperparameters: HyperparameterSet, sample: Tensor) -> Tensor:
    inputs, labels = make_batch()
    with bind(hyperparameters, sample):
        return F.cross_entropy(net(inputs), labels)


def make_leaves(hyperparameters: HyperparameterSet) -> Leaves:
    """The current state in float64, as leaves that require gradients."""
    current = hyperparameters.unconstrained, hyperparameters.raw_scale
    return Leaves(*(parameter.double().requires_grad_() for parameter in current))


def make_optimizer(hyperparameters: HyperparameterSet, entropy_weight: float = 0.0) -> HyperparameterOptimizer:
    scales = Scales(tune=True, entropy_weight=entropy_weight)
    return HyperparameterOptimizer(hyperparameters, torch.optim.SGD, lr=0.1, scales=scales)


NOISE = {
    "no perturbation": None,
    "one row": torch.linspace(-1, 1, len(SPECIFICATIONS)).double().unsqueeze(0),
    "a row per example": torch.linspace(-2, 2, EXAMPLES * len(SPECIFICATIONS)).double().sin().reshape(EXAMPLES, -1),
}
ENTROPY_WEIGHT = 0.05


def objective(net: nn.Module, hyperparameters: HyperparameterSet, leaves: Leaves, noise: Tensor | None) -> float:
    """`L_V - tau * entropy`, the entropy by `torch.distributions`."""
    loss = validation_loss(net, hyperparameters, leaves.sample(noise))
    entropy = torch.distributions.Normal(0.0, F.softplus(leaves.raw_scale)).entropy().sum()
    return (loss - ENTROPY_WEIGHT * entropy).item()


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_hypergradient_equals_central_finite_differences(noise):
    net, hyperparameters = make_net(0.5)
    leaves = make_leaves(hyperparameters)
    loss = validation_loss(net, hyperparameters, leaves.sample(noise))
    found = make_optimizer(hyperparameters, ENTROPY_WEIGHT).hypergradient(loss, leaves)
    step = 1e-5
    point = torch.stack([leaf.detach() for leaf in leaves])
    expected = torch.empty_like(point)
    for index in range(point.numel()):
        shift = torch.zeros_like(point).view(-1).index_fill(0, torch.tensor(index), step).view_as(point)
        above, below = (objective(net, hyperparameters, Leaves(*p), noise) for p in (point + shift, point - shift))
        expected.view(-1)[index] = (above - below) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def hypergradient_of_lambda(net: nn.Module, hyperparameters: HyperparameterSet) -> Tensor:
    leaves = make_leaves(hyperparameters)
    loss = validation_loss(net, hyperparameters, leaves.sample(None))
    return make_optimizer(hyperparameters).hypergradient(loss, leaves)[0]


def test_hypergradient_is_exactly_zero_with_zero_gates():
    assert hypergradient_of_lambda(*make_net(0.0)).tolist() == [0.0] * len(SPECIFICATIONS)


@pytest.mark.parametrize("index", range(len(SPECIFICATIONS)), ids=SPECIFICATIONS)
def test_hypergradient_is_nonzero_only_for_hyperparameters_with_nonzero_gates(index):
    net, hyperparameters = make_net(0.5)
    others = [position for position in range(len(SPECIFICATIONS)) if position != index]
    for gate in gates(net):
        gate.data[:, others] = 0.0
    found = hypergradient_of_lambda(net, hyperparameters)
    assert found.nonzero().flatten().tolist() == [index]


def test_hyperparameter_step_computes_exactly_the_loss_of_eval_mode():
    """The network is in training mode, but its regularisers are inactive while only a sample is bound."""
    net, hyperparameters = make_net(0.5)
    in_training_mode = validation_loss(net, hyperparameters, hyperparameters.current())
    assert validation_loss(net.eval(), hyperparameters, hyperparameters.current()) == in_training_mode


def test_regularisers_and_penalties_of_the_training_loss_give_zero_hypergradient_with_zero_gates():
    net, hyperparameters = make_net(0.0)
    inputs, labels = make_batch()
    leaf = hyperparameters.unconstrained.detach().double().requires_grad_()
    bind_weight_phase(hyperparameters, leaf.expand(EXAMPLES, -1))
    losses = [F.cross_entropy(net(inputs), labels) for _ in range(2)]
    penalty = hyperparameters["decay"] * net[-1].base_parameter("weight").square().sum()
    unbind(hyperparameters)
    assert losses[0] != losses[1]  # The regularisers are active.
    (found,) = torch.autograd.grad(losses[0] + penalty, leaf)
    assert found.tolist() == [0.0] * len(SPECIFICATIONS)


def test_value_read_by_the_validation_loss_adds_exactly_nothing_to_the_hypergradient():
    net, hyperparameters = make_net(0.5)
    expected = hypergradient_of_lambda(net, hyperparameters)
    leaves = make_leaves(hyperparameters)
    loss = validation_loss(net, hyperparameters, leaves.sample(None))
    with bind(hyperparameters, leaves.sample(None)):
        loss = loss + 100 * hyperparameters["decay"] + hyperparameters["rate"]
    found = make_optimizer(hyperparameters).hypergradient(loss, leaves)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("frozen", "moved"), [(True, False), (False, True)], ids=["zero gates", "trained gates"])
def test_run_moves_hyperparameters_and_scales_only_with_trained_gates(frozen, moved):
    torch.manual_seed(0)
    module = LitSmall()
    for gate in gates(module):
        gate.requires_grad_(not frozen)
    before = module.hyperparameters.unconstrained.detach().clone(), module.hyperparameters.raw_scale.detach().clone()
    fit(module, STNCallback(1, 1, warmup=0, lr=0.05, scales=Scales(tune=True, entropy_weight=0.0), seed=1))
    after = module.hyperparameters.unconstrained, module.hyperparameters.raw_scale
    for old, new in zip(before, after, strict=True):
        assert (old != new).tolist() == [moved] * len(old)
