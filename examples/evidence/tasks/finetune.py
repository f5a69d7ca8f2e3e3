"""`finetune`: a small CNN trained on five classes of CIFAR-10, then on 400 images of the others; ten hyperparameters.

The first training runs once and is kept in the cache folder; every run of the task begins from its weights.
"""

from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_stn import Float, Integer
from lightning_stn.augment import ColorJitter, Cutout, RandomAffine
from tasks.base import Classifier, Folders, Loaders, SelfTuned, Strengths, Task, batches, dropout
from tasks.cifar10 import CIFAR10Inputs, images, of_classes

FIRST, OTHERS = range(5), range(5, 10)
CHANNELS = (32, 48, 64)
UNITS = 256
PLACES = ("conv1", "conv2", "conv3", "hidden")

SPACE = {
    **{f"{place}_dropout": Float(0.0, 0.8) for place in PLACES},
    "brightness": Float(0.0, 1.0),
    "contrast": Float(0.0, 1.0),
    "saturation": Float(0.0, 1.0),
    "degrees": Float(0.0, 45.0),
    "translate": Float(0.0, 0.5),
    "cutout_length": Integer(0, 24),
}


def cnn(strengths: Strengths) -> nn.Sequential:
    """Three convolutions and a hidden layer, with a dropout after each, for five classes."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (before, after) in enumerate(zip((3, *CHANNELS), CHANNELS, strict=False), start=1):
        layers[f"conv{number}"] = nn.Conv2d(before, after, 3, padding=1)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        layers[f"after_conv{number}"] = dropout(strengths[f"conv{number}_dropout"])
    layers["flatten"] = nn.Flatten()
    layers["hidden"] = nn.Linear(CHANNELS[-1] * 16, UNITS)
    layers["relu4"] = nn.ReLU()
    layers["after_hidden"] = dropout(strengths["hidden_dropout"])
    layers["output"] = nn.Linear(UNITS, 5)
    return nn.Sequential(layers)


class LitCNN(CIFAR10Inputs, Classifier):
    """A dropout after each layer but the last; jitter, rotation, translation and cutout of the images."""

    def __init__(self, strengths: Strengths) -> None:
        super().__init__()
        self.net = cnn(strengths)
        jitter = {name: strengths[name] for name in ("brightness", "contrast", "saturation")}
        affine = RandomAffine(strengths["degrees"], strengths["translate"])
        self.augment = nn.Sequential(ColorJitter(**jitter), affine, Cutout(strengths["cutout_length"]))

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class TunedCNN(SelfTuned, LitCNN):
    """The same with tuned hyperparameters."""


def _first_training(folders: Folders) -> dict[str, torch.Tensor]:
    """Train on 10,000 images of the first five classes, with dropouts of 0.2 and mild augmentation."""
    positions = of_classes(folders.data / "cifar10", "train", FIRST)
    drawn = positions[torch.randperm(len(positions))[:10_000]]
    mild = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "degrees": 5.0, "translate": 0.1, "cutout_length": 4}
    module = LitCNN(strengths=mild | {f"{place}_dropout": 0.2 for place in PLACES})
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=10, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(module, batches(images(folders.data / "cifar10", "train", drawn), 100, seed=0))
    return module.net.state_dict()


def begin(net: nn.Module, folders: Folders) -> None:
    """Load the weights of the first training into all layers but the last."""
    path = folders.cache / "finetune_start.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng():  # so that the run which trains first draws what every other run draws
            torch.manual_seed(0)
            torch.save(_first_training(folders), path)
    weights = {name: weight for name, weight in torch.load(path).items() if not name.startswith("output")}
    net.load_state_dict(weights, strict=False)  # a converted network has response weights beside them


@lru_cache(maxsize=1)
def _parts(seed: int, folder: Path) -> list[TensorDataset]:
    positions = of_classes(folder, "train", OTHERS)
    drawn = positions[torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))]
    parts = [("train", drawn[:400]), ("train", drawn[400:1200]), ("test", of_classes(folder, "test", OTHERS))]
    return [TensorDataset(*_relabelled(images(folder, part, positions))) for part, positions in parts]


def _relabelled(data: TensorDataset) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = data.tensors
    return pixels, labels - OTHERS.start


def loaders(seed: int, folders: Folders) -> Loaders:
    """400 training and 800 validation images drawn by the seed; 5,000 test images; all of the last five classes."""
    train, valid, test = _parts(seed, folders.data / "cifar10")
    return Loaders(batches(train, 50, seed), batches(valid, 200), batches(test, 500))


TASK = Task(LitCNN, TunedCNN, SPACE, loaders, epochs=40, metric="accuracy", begin=begin)
