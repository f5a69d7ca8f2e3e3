"""`digits`: the CNN of `examples/digits.py`, five hyperparameters, 250 images."""

from functools import cache

import torch
from digits import DigitsCNN
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_stn import Float, Integer
from lightning_stn.augment import Cutout, GaussianNoise
from tasks.base import Classifier, Folders, Loaders, SelfTuned, Strengths, Task, batches, dropout

SPACE = {
    "noise": Float(0.0, 0.5),
    "cutout": Integer(0, 6),
    **{f"{place}_dropout": Float(0.0, 0.8) for place in ("conv1", "conv2", "hidden")},
}


class LitDigits(Classifier):
    """Two convolutions and a hidden layer, with a dropout after each; noise and cutout on the pixels."""

    def __init__(self, strengths: Strengths) -> None:
        super().__init__()
        self.net = DigitsCNN(0.0)
        for place in ("conv1", "conv2", "hidden"):
            setattr(self.net, f"after_{place}", dropout(strengths[f"{place}_dropout"]))
        self.augment = nn.Sequential(GaussianNoise(strengths["noise"]), Cutout(strengths["cutout"]))

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=4e-3)


class TunedDigits(SelfTuned, LitDigits):
    """The same with tuned hyperparameters."""


@cache
def _images() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)


def loaders(seed: int, folders: Folders) -> Loaders:
    """250 training and 500 validation images drawn by the seed; 1,047 test images, the same for every seed."""
    images, labels = _images()
    rest, test = train_test_split(range(len(labels)), train_size=750, stratify=labels, random_state=0)
    train, valid = train_test_split(rest, train_size=250, stratify=labels[rest], random_state=seed)
    train, valid, test = (TensorDataset(images[part], labels[part]) for part in (train, valid, test))
    return Loaders(batches(train, 25, seed), batches(valid, 100), batches(test, 500))


TASK = Task(LitDigits, TunedDigits, SPACE, loaders, epochs=300, metric="accuracy")
