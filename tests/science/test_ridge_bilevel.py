"""Weight decay of ridge regression: a bilevel problem whose optimum is found by a grid of exact solutions.

`w*(decay) = argmin_w |X w - t|^2 / N + sum_i decay_i w_i^2` is a linear solve, so the validation loss of every decay is
known in float64. A self-tuned run must find the decay that minimises it.
"""

from typing import NamedTuple

import lightning as L
import pytest
import torch
from science.oracles import double, gauss_hermite, minimize
from support import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stn import Float, HyperparameterSet, Scales, STNCallback, STNModule, Warmup, convert
from lightning_stn.binding import bind

EXAMPLES, HELD_OUT, FEATURES = 24, 100, 12


class Ridge(NamedTuple):
    """Synthetic data with `decays` weight decays, each for an equal share of the features, in order.

    The seeds were chosen out of a few dozen, so that the optimum lies inside the grid, and the validation loss is so
    curved there that the noise of a short training moves the optimum by less than the tolerance.
    """

    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor
    decays: int

    @classmethod
    def draw(cls, stretch: Tensor, weight: Tensor, decays: int, seed: int) -> "Ridge":
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(EXAMPLES + HELD_OUT, FEATURES, generator=generator, dtype=torch.float64) * stretch
        noise = torch.randn(EXAMPLES + HELD_OUT, generator=generator, dtype=torch.float64)
        targets = inputs @ weight + 3.0 * noise
        train, held_out = slice(EXAMPLES), slice(EXAMPLES, None)
        return cls(inputs[train], targets[train], inputs[held_out], targets[held_out], decays)

    def per_feature(self, decays: Tensor) -> Tensor:
        """The decay of each feature, `[..., h]` to `[..., i]`."""
        return decays.repeat_interleave(FEATURES // self.decays, -1)

    def validation_losses(self, log_decays: Tensor) -> Tensor:
        """Validation losses at the exact ridge solutions, `[..., h]` to `[...]`."""
        normal = self.inputs.T @ self.inputs / EXAMPLES + torch.diag_embed(self.per_feature(log_decays.exp()))
        moments = self.inputs.T @ self.targets / EXAMPLES
        weight = torch.linalg.solve(normal, moments.expand(normal.shape[:-1]))
        return (weight @ self.held_inputs.T - self.held_targets).square().mean(-1)

    def hypergradient(self, log_decays: Tensor) -> Tensor:
        """Total derivative of the validation loss, `[h]`, through the linear solve."""
        leaf = log_decays.clone().requires_grad_()
        return torch.autograd.grad(self.validation_losses(leaf), leaf)[0]

    def grid_optimum(self) -> Tensor:
        """The best log decays `[h]` on a grid of `[-7, 4]^h`, refined twice around its best point; step 0.001."""
        centre, reach = torch.full((self.decays,), -1.5, dtype=torch.float64), 5.5
        for _ in range(3):
            axes = [torch.linspace(middle - reach, middle + reach, 111).double() for middle in centre.tolist()]
            grid = torch.cartesian_prod(*axes).reshape(-1, self.decays)
            centre, reach = grid[self.validation_losses(grid).argmin()], reach / 10
        return centre


ONE = Ridge.draw(torch.logspace(0.2, -0.3, FEATURES), torch.linspace(-2, 2, FEATURES).double(), decays=1, seed=9)
TWO = Ridge.draw(
    torch.ones(FEATURES), double(1, -1.5, 1, -0.5, 1.5, -1, 0.6, -0.6, 0.4, -0.5, 0.6, 0.3), decays=2, seed=21
)


class Summed(nn.Module):
    """A linear predictor as a sum of units: `w(h) = sum_o W_o + (V h)_o R_o` can be any affine response."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Linear(FEATURES, FEATURES, bias=False)
        nn.init.zeros_(self.units.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.units(inputs).sum(-1)


def penalised(net: nn.Module, inputs: Tensor, targets: Tensor, decays: Tensor) -> Tensor:
    """Squared error plus `sum_i decay_i w_i^2`, with the decays `[n, i]` and the weights of each example.

    The predictor is linear, so an example's weights are its input Jacobian.
    """
    inputs = inputs.clone().requires_grad_()
    outputs = net(inputs)
    (weights,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return (outputs - targets) ** 2 + (decays * weights.square()).sum(-1)


def specifications(decays: list[float], scale: float) -> dict[str, Float]:
    return {f"decay_{i}": Float(0.0, None, init=decay, scale=scale, log=True) for i, decay in enumerate(decays)}


class LitRidge(STNModule):
    """Ridge regression that tunes its decays."""

    def __init__(self, problem: Ridge, start: list[float], steps: int) -> None:
        super().__init__(hyperparameters=specifications(start, scale=0.4))
        self.problem = problem
        self.steps = steps
        self.net = self.convert(Summed())

    def training_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        decays = torch.stack([self.hyperparameters[name] for name in self.hyperparameters.names], dim=-1)
        return penalised(self.net, *batch, self.problem.per_feature(decays)).mean()

    def validation_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.03)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps, eta_min=3e-4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def self_tuned(problem: Ridge, start: Tensor, perturb: str) -> Tensor:
    """The decays at the end of a run, `[h]`. Per example, copies of the data give each step more perturbations."""
    steps, copies = 1000, 40 if perturb == "example" else 1
    L.seed_everything(0, verbose=False)
    batch = problem.inputs.float().repeat(copies, 1), problem.targets.float().repeat(copies)
    held_out = problem.held_inputs.float(), problem.held_targets.float()
    module = LitRidge(problem, start.tolist(), steps)
    callback = STNCallback(2, 1, warmup=Warmup(300, "steps"), lr=0.05, scales=Scales(tune=False), perturb=perturb)
    loaders = DataLoader([batch] * steps, batch_size=None), DataLoader([held_out], batch_size=None)
    trainer(callback, max_epochs=1, log_every_n_steps=steps).fit(module, *loaders)
    return double(*module.hyperparameters.values().values())


RUNS = {
    "one decay, far below": (ONE, double(1 / 30), "example"),
    "one decay, near": (ONE, double(1.2), "example"),
    "one decay, far above": (ONE, double(30), "example"),
    "one decay, far below, one row": (ONE, double(1 / 30), "batch"),
    "two decays, below and above": (TWO, double(1 / 5, 4), "example"),
    "two decays, above and below": (TWO, double(10, 1 / 10), "example"),
    "two decays, above and below, one row": (TWO, double(10, 1 / 10), "batch"),
}
"""Problem, start as a multiple of the optimum, and `perturb`."""


SLOW = {"one decay, near", "one decay, far above", "two decays, below and above"}


@pytest.mark.parametrize(
    ("problem", "multiple", "perturb"),
    [pytest.param(*run, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, run in RUNS.items()],
)
def test_self_tuned_run_ends_within_ten_percent_of_the_grid_optimum(problem, multiple, perturb):
    optimum = problem.grid_optimum().exp()
    found = self_tuned(problem, multiple * optimum, perturb)
    torch.testing.assert_close(found, optimum, rtol=0.1, atol=0)


def hypergradient_of_the_exact_fit(problem: Ridge, log_decays: Tensor, sigma: float) -> Tensor:
    """Derivative of the validation loss through response layers that are fitted by quadrature, `[h]`."""
    torch.manual_seed(0)
    hyperparameters = HyperparameterSet(specifications(log_decays.exp().tolist(), sigma))
    net = convert(Summed(), hyperparameters).double()
    nodes, mass = gauss_hermite(log_decays, double(sigma), order=3)
    inputs, targets = problem.inputs.repeat(len(nodes), 1), problem.targets.repeat(len(nodes))
    sample, weights = nodes.repeat_interleave(EXAMPLES, 0), mass.repeat_interleave(EXAMPLES) / EXAMPLES

    def expected_loss() -> Tensor:
        with bind(hyperparameters, sample):
            return (weights * penalised(net, inputs, targets, problem.per_feature(sample.exp()))).sum()

    minimize(net, expected_loss)
    leaf = log_decays.clone().requires_grad_()
    with bind(hyperparameters, leaf.unsqueeze(0)):
        loss = (net(problem.held_inputs) - problem.held_targets).square().mean()
    return torch.autograd.grad(loss, leaf)[0]


PLACES = {"below": -1.0, "at": 0.0, "above": 1.0}


@pytest.mark.parametrize("shift", PLACES.values(), ids=[f"{place} the optimum" for place in PLACES])
@pytest.mark.parametrize("problem", [ONE, TWO], ids=["one decay", "two decays"])
def test_hypergradient_of_the_exact_fit_is_the_total_derivative_through_the_linear_solve(problem, shift):
    log_decays = problem.grid_optimum() + shift
    found = hypergradient_of_the_exact_fit(problem, log_decays, sigma=0.05)
    torch.testing.assert_close(found, problem.hypergradient(log_decays), rtol=0.01, atol=0.01)
