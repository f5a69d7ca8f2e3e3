"""Weight decay of a ridge regression on real data: one self-tuned run against the optimum of a grid.

The data are the diabetes data of scikit-learn (Efron et al., 2004): ten measurements of 442 patients, with squares and
products. 120 patients train, 322 validate. The grid has 15 values over five decades; its optimum is known from
closed-form solutions, and from 15 full training runs.
"""

import math
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from support import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import STN, Float, Scales, STNCallback, STNModule
from lightning_stn.regularizers import L2Penalty

LOW, HIGH, POINTS = 1e-4, 10.0, 15
GRID = torch.logspace(math.log10(LOW), math.log10(HIGH), POINTS, dtype=torch.float64).tolist()
SPACING = math.log(HIGH / LOW) / (POINTS - 1)
TRAIN = 120
EPOCHS = 300


def data() -> tuple[Tensor, Tensor]:
    features, target = load_diabetes(return_X_y=True)
    features = StandardScaler().fit_transform(PolynomialFeatures(2, include_bias=False).fit_transform(features))
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(features)[order], torch.tensor(target)[order].unsqueeze(1)
    return x, (y - y.mean()) / y.std()


def part(rows: slice) -> TensorDataset:
    x, y = data()
    return TensorDataset(x[rows].float(), y[rows].float())


def train_loader(seed: int) -> DataLoader[Any]:
    return DataLoader(part(slice(TRAIN)), 40, shuffle=True, generator=torch.Generator().manual_seed(seed))


class Ridge(L.LightningModule):
    """Plain ridge regression with the loss `mean (y - w x - b)^2 + decay / 2 |w|^2`."""

    def __init__(self, decay: float | str) -> None:
        super().__init__()
        self.net: nn.Module = nn.Linear(65, 1)
        self.penalty = L2Penalty(decay)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        penalty: Tensor = self.penalty(self.net)
        return F.mse_loss(self.net(batch[0]), batch[1]) + penalty

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class TunedRidge(STNModule, Ridge):
    def __init__(self, init: float) -> None:
        decay = Float(LOW, HIGH, init=init, log=True, perturb="batch")
        super().__init__(hyperparameters={"decay": decay}, decay="decay")
        self.net = self.convert(self.net)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])


def tuned(init: float, seed: int, perturb: Any) -> float:
    torch.manual_seed(seed)
    module = TunedRidge(init)
    # From so far away the response is learnt only if the scale grows; with fixed scales the decay hardly moves.
    steps: dict[str, Any] = {"lr": 0.07, "anneal": False, "optimizer": torch.optim.Adam, "scales": Scales(tune=True)}
    stn = STNCallback(2, warmup=5, method=STN(centred=False), perturb=perturb, seed=seed, **steps)
    fit = trainer(stn, max_epochs=EPOCHS)
    fit.fit(module, train_loader(seed), DataLoader(part(slice(TRAIN, None)), 80))
    decay = module.hyperparameters.values()["decay"]
    assert isinstance(decay, float)
    return decay


def spacings_off(decay: float, optimum: float) -> float:
    return abs(math.log(decay / optimum)) / SPACING


def best_in_closed_form() -> float:
    x, y = data()
    mean_x, mean_y = x[:TRAIN].mean(0), y[:TRAIN].mean()
    a, b = x[:TRAIN] - mean_x, y[:TRAIN] - mean_y
    losses = []
    for decay in GRID:
        w = torch.linalg.solve(2 * a.T @ a / TRAIN + decay * torch.eye(65, dtype=torch.float64), 2 * a.T @ b / TRAIN)
        losses.append(((x[TRAIN:] - mean_x) @ w + mean_y - y[TRAIN:]).square().mean().item())
    return GRID[losses.index(min(losses))]


def test_self_tuned_run_from_a_distant_start_ends_at_the_closed_form_grid_optimum() -> None:
    assert spacings_off(tuned(1e-3, seed=0, perturb="example"), best_in_closed_form()) < 1
    assert spacings_off(1e-3, best_in_closed_form()) > 5


@pytest.mark.slow
def test_self_tuned_run_ends_at_the_optimum_of_fifteen_full_runs_for_all_starts_and_perturbations() -> None:
    losses = []
    for decay in GRID:
        torch.manual_seed(0)
        module, valid = Ridge(decay), DataLoader(part(slice(TRAIN, None)), 400)
        trainer(max_epochs=EPOCHS, limit_val_batches=0).fit(module, train_loader(0), valid)
        losses.append(trainer().validate(module, valid, verbose=False)[0]["val_loss"])
    best = GRID[losses.index(min(losses))]
    assert best == best_in_closed_form()
    for init in (1e-3, 1.0):
        for perturb in ("example", "batch"):
            for seed in range(3):
                assert spacings_off(tuned(init, seed, perturb), best) < 1, (init, perturb, seed)
