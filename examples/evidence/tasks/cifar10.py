"""CIFAR-10 for the tasks that read it: images by their position in the data set."""

from functools import cache
from pathlib import Path

import torch
from cifar10_data import CIFAR10Data, normalise
from torch import Tensor
from torch.utils.data import TensorDataset


class CIFAR10Inputs:
    """Images in 0..255 as inputs: augmentation acts on [0, 1], and the network reads normalised pixels."""

    def prepare(self, inputs: Tensor) -> Tensor:
        """Images in [0, 1]."""
        return inputs / 255

    def normalise(self, inputs: Tensor) -> Tensor:
        """Images of mean 0 and standard deviation 1 in each channel."""
        return normalise(inputs)


@cache
def _data(data_dir: Path) -> CIFAR10Data:
    data = CIFAR10Data(data_dir)
    data.prepare_data()
    return data


@cache
def _targets(data_dir: Path, part: str) -> Tensor:
    return torch.tensor(_data(data_dir).listing(part).targets)


def of_classes(data_dir: Path, part: str, classes: range) -> Tensor:
    """Positions of the images of some classes, in the order of the data set."""
    targets = _targets(data_dir, part)
    return torch.nonzero((targets >= classes.start) & (targets < classes.stop)).flatten()


def images(data_dir: Path, part: str, positions: Tensor) -> TensorDataset:
    """Images `[n, 3, 32, 32]`, uint8, and labels `[n]`, at some positions of the training or test part."""
    return _data(data_dir).read(part, positions)
