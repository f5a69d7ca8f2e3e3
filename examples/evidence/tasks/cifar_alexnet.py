"""`cifar_alexnet`: the thin AlexNet of `examples/cifar10_alexnet.py`, fifteen hyperparameters, 2,000 images."""

from functools import lru_cache
from pathlib import Path

import torch
from cifar10_alexnet import alexnet
from torch import nn
from torch.utils.data import TensorDataset

from lightning_stn import Float, recommended_hyperparameters
from lightning_stn.augment import ColorJitter, Cutout, InputScale
from tasks.base import Classifier, Folders, Loaders, SelfTuned, Strengths, Task, batches, dropout
from tasks.cifar10 import CIFAR10Inputs, images

WIDTH = 0.25
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "hidden1", "hidden2")

SPACE = {
    **recommended_hyperparameters("image"),
    "input_dropout": Float(0.0, 0.8),
    **{f"{layer}_dropout": Float(0.0, 0.8) for layer in LAYERS},
}


class LitAlexNet(CIFAR10Inputs, Classifier):
    """AlexNet with a dropout on the input and after each layer but the last; jitter, scaling and cutout of images."""

    def __init__(self, strengths: Strengths) -> None:
        super().__init__()
        self.net = alexnet(WIDTH, 0.0, 0.0)
        self.net.input_dropout = dropout(strengths["input_dropout"])
        for layer in LAYERS:
            setattr(self.net, f"after_{layer}", dropout(strengths[f"{layer}_dropout"]))
        jitter = {name: strengths[name] for name in ("brightness", "contrast", "saturation", "hue")}
        cutout = Cutout(strengths["cutout_length"], strengths["cutout_holes"])
        self.augment = nn.Sequential(ColorJitter(**jitter), InputScale(strengths["input_scale"]), cutout)

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam; SGD would spend a tenth of so short a run on the plateau that AlexNet begins with."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class TunedAlexNet(SelfTuned, LitAlexNet):
    """The same with tuned hyperparameters."""


@lru_cache(maxsize=1)
def _parts(seed: int, folder: Path) -> list[TensorDataset]:
    drawn = torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))
    every_other = torch.arange(0, 10_000, 2)  # the test images are sorted by class
    return [
        images(folder, "train", drawn[:2000]),
        images(folder, "train", drawn[2000:3000]),
        images(folder, "test", every_other),
    ]


def loaders(seed: int, folders: Folders) -> Loaders:
    """2,000 training and 1,000 validation images drawn by the seed; 5,000 test images."""
    train, valid, test = _parts(seed, folders.data / "cifar10")
    return Loaders(batches(train, 100, seed), batches(valid, 250), batches(test, 500))


TASK = Task(LitAlexNet, TunedAlexNet, SPACE, loaders, epochs=30, metric="accuracy")
