"""Algorithm 1 of MacKay et al. (2019) in a plain loop, with no Trainer."""

import re
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from support import loader, trainer
from torch import Tensor, nn

import lightning_stn.methods
from lightning_stn import STN, DeltaSTN, Float, HyperparameterSet, Method, Scales, STNCallback, STNModule, convert
from lightning_stn.binding import attach_all, bind_weight_phase, unbind
from lightning_stn.callback.stream import ValidationStream
from lightning_stn.methods import HyperparameterOptimizer, SharedAdam
from lightning_stn.randomness import derive_seed
from lightning_stn.regularizers import L2Penalty

SEED, EPOCHS, LR = 1, 4, 0.05
SPECIFICATIONS = {"gain": Float(0.0, None, init=0.5), "decay": Float(1e-6, 1.0, init=1e-3, log=True)}


def plain_network() -> nn.Sequential:
    """A network that draws nothing, so that the loop and the Trainer need not draw in one order."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))


class Lit(STNModule):
    """The network whose input is multiplied by one hyperparameter, and whose weights decay by another."""

    def __init__(self) -> None:
        super().__init__(hyperparameters=SPECIFICATIONS)
        self.net = self.convert(plain_network())
        self.decay = L2Penalty("decay")

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return training_loss(self.net, self.decay, self.hyperparameters, batch)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)


def training_loss(net: nn.Module, decay: nn.Module, hyperparameters: HyperparameterSet, batch: Any) -> Tensor:
    x, y = batch
    loss: Tensor = F.cross_entropy(net(x * hyperparameters["gain"].reshape(-1, 1, 1, 1)), y) + decay(net)
    return loss


def generator(phase: str, step: int) -> torch.Generator:
    """The noise that `STNCallback(seed=SEED)` draws in one step."""
    return torch.Generator().manual_seed(derive_seed(SEED, 0, phase, step))


def run_plain_loop(method: Method, perturb: str, scales: Scales) -> tuple[nn.Module, HyperparameterSet]:
    """Two weight steps and a hyperparameter step in turn, by the functions of the package alone."""
    hyperparameters = HyperparameterSet(SPECIFICATIONS)
    net, decay = convert(plain_network(), hyperparameters), L2Penalty("decay")
    root = nn.ModuleDict({"net": net, "decay": decay})
    attach_all(root, hyperparameters)
    method.prepare(root, hyperparameters)
    weights = torch.optim.SGD(root.parameters(), lr=LR, momentum=0.9)
    optimizer = HyperparameterOptimizer(hyperparameters, SharedAdam, lr=LR, scales=scales)
    validation = ValidationStream(loader(16, seed=1), seed=SEED)
    steps = hyperparameter_steps = 0
    for _ in range(EPOCHS):
        for batch in loader(24):
            rows = len(batch[1]) if perturb == "example" else 1
            bind_weight_phase(hyperparameters, hyperparameters.sample(rows, generator("weight", steps)))
            _, objective = method.objective(
                root, hyperparameters, lambda batch=batch: training_loss(net, decay, hyperparameters, batch)
            )
            objective.backward()
            weights.step()
            weights.zero_grad()
            unbind(hyperparameters)
            steps += 1
            if steps % 2:
                continue
            x, y = next(validation)
            root.eval()
            rows = len(y) if perturb == "example" else 1
            noise = hyperparameters.noise(rows, generator("hyperparameter", hyperparameter_steps))
            _, hypergradient = optimizer.differentiate(
                lambda x=x, y=y: F.cross_entropy(net(x), y), noise if scales.tune else None
            )
            optimizer.receive(hypergradient)
            before = hyperparameters.unconstrained.clone()
            optimizer.anneal((steps - 1) / (3 * EPOCHS))
            optimizer.step()
            method.follow(root, hyperparameters, hyperparameters.unconstrained - before)
            hyperparameter_steps += 1
            root.train()
    return net, hyperparameters


@pytest.mark.parametrize("perturb", ["example", "batch"])
@pytest.mark.parametrize("scales", [Scales(tune=True), Scales()], ids=["tuned scales", "fixed scales"])
@pytest.mark.parametrize(
    "method", [STN(), STN(centred=False), DeltaSTN(), DeltaSTN(passes=1), DeltaSTN(linearize=False)], ids=repr
)
def test_plain_loop_equals_the_run_under_lightning(method: Method, perturb: Any, scales: Scales) -> None:
    net, hyperparameters = run_plain_loop(method, perturb, scales)
    L.seed_everything(7, verbose=False)
    module = Lit()
    stn = STNCallback(2, 1, 0, method=method, perturb=perturb, scales=scales, lr=LR, seed=SEED)
    trainer(stn, max_epochs=EPOCHS).fit(module, loader(24), loader(16, seed=1))
    start = HyperparameterSet(SPECIFICATIONS)
    assert (hyperparameters.unconstrained != start.unconstrained).all()
    assert torch.equal(hyperparameters.raw_scale, start.raw_scale) is not scales.tune
    torch.testing.assert_close(module.hyperparameters.state_dict(), hyperparameters.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(module.net.state_dict(), net.state_dict(), rtol=0, atol=0)


def test_the_loop_of_the_docstring_runs_and_tunes() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", lightning_stn.methods.__doc__ or "", re.DOTALL)
    hyperparameters = HyperparameterSet({"dropout": Float(0.0, 0.9, init=0.05)})
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3))
    net = convert(net, hyperparameters, dropout="dropout")
    start = hyperparameters.unconstrained.clone()
    (x, y), (x_valid, y_valid) = next(iter(loader(24, batch_size=24))), next(iter(loader(16, batch_size=16, seed=1)))
    batch = SimpleNamespace(x=x, y=y), SimpleNamespace(x=x_valid, y=y_valid)
    names = {
        **vars(lightning_stn.methods),
        "F": F,
        "torch": torch,
        "bind_weight_phase": bind_weight_phase,
        "unbind": unbind,
        "net": net,
        "hyperparameters": hyperparameters,
        "weights": torch.optim.SGD(net.parameters(), lr=LR),
        "batches": [batch] * 10,
    }
    with torch.no_grad():
        before = F.cross_entropy(net.eval()(x), y)
        net.train()
    exec(code, names)
    assert F.cross_entropy(net.eval()(x), y) < before
    assert not torch.equal(hyperparameters.unconstrained, start)
