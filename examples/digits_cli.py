"""The network of `digits.py`, with hyperparameters, phases and optimiser in a configuration file.

python examples/digits_cli.py fit --config examples/digits.yaml
python examples/digits_cli.py fit --config examples/digits.yaml --optimizer.lr 3e-3 --trainer.max_epochs 100
tensorboard --logdir lightning_logs          # `config.yaml` beside the event file repeats the run
"""

import lightning as L
import torch.nn.functional as F
from digits import Batch, DigitsCNN, load_data
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stn import Hyperparameter, STNModule
from lightning_stn.augment import Cutout, GaussianNoise


class TunedDigits(STNModule):
    """A small CNN with the hyperparameters of the configuration: `dropout`, `noise` and `cutout`."""

    def __init__(self, hyperparameters: dict[str, Hyperparameter]) -> None:
        super().__init__(hyperparameters=hyperparameters)
        self.augment = nn.Sequential(GaussianNoise(std="noise"), Cutout(length="cutout"))
        self.net = self.convert(DigitsCNN(dropout=0.5), dropout="dropout")  # the hyperparameter replaces the 0.5

    def training_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy with dropout and augmentation."""
        images, labels = batch
        return F.cross_entropy(self.net(self.augment(images)), labels)

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)


class Digits(L.LightningDataModule):
    """The handwritten digits of `digits.py`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.loaders = load_data(seed)

    def train_dataloader(self) -> DataLoader:
        """250 images."""
        return self.loaders[0]

    def val_dataloader(self) -> DataLoader:
        """500 images, which tune the hyperparameters."""
        return self.loaders[1]

    def test_dataloader(self) -> DataLoader:
        """1,047 images."""
        return self.loaders[2]


if __name__ == "__main__":
    LightningCLI(TunedDigits, Digits)
