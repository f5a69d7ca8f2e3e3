"""Small sets of colour images for the examples: scikit-learn's digits, or a folder with a subfolder for each class."""

from pathlib import Path

import torch
import torch.nn.functional as F
from comparison import Loaders
from digits import load_data
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


def read_folder(folder: Path, count: int, size: int) -> TensorDataset:
    """Images `[n, 3, size, size]` in [0, 1] and labels `[n]`: at most `count` of those in `<class>/*`.

    Raises:
        FileNotFoundError: the folder has no subfolder, or one without images.
    """
    prepare = v2.Compose([v2.ToImage(), v2.Resize([size, size]), v2.ToDtype(torch.float32, scale=True)])
    listing = ImageFolder(folder, prepare)
    drawn = torch.randperm(len(listing), generator=torch.Generator().manual_seed(0))[:count].tolist()
    images, labels = zip(*(listing[index] for index in drawn), strict=True)
    return TensorDataset(torch.stack(images), torch.tensor(labels))


def enlarged_digits(size: int) -> list[TensorDataset]:
    """Training, validation and test images of `digits.py` as images of three equal channels."""
    parts = []
    for loader in load_data(seed=0):
        assert isinstance(loader.dataset, TensorDataset)
        images, labels = loader.dataset.tensors
        images = F.interpolate(images, (size, size), mode="bicubic").clamp(0, 1)
        parts.append(TensorDataset(images.expand(-1, 3, -1, -1), labels))
    return parts


def count_classes(folder: Path | None) -> int:
    """Number of classes of `load_images`."""
    return 10 if folder is None else len(ImageFolder(folder / "train").classes)


def load_images(seed: int, folder: Path | None, size: int) -> Loaders:
    """250 training images, 500 validation images and about 1,000 test images.

    Args:
        seed: fixes the order of the training images.
        folder: holds `train/<class>/*` and `test/<class>/*`; None for handwritten digits.
        size: height and width.
    """
    if folder is None:
        train, valid, test = enlarged_digits(size)
    else:
        seen = read_folder(folder / "train", 750, size)
        train, valid = TensorDataset(*seen[:250]), TensorDataset(*seen[250:])
        test = read_folder(folder / "test", 1000, size)
    shuffled = DataLoader(train, 50, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return Loaders(shuffled, DataLoader(valid, 250), DataLoader(test, 250))
