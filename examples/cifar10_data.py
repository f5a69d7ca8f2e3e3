"""Data and plain classifier that the CIFAR-10 examples in this folder share."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from command_line import downloading
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.io import decode_image, read_file

Batch = tuple[Tensor, Tensor]
"""Images `[n, 3, 32, 32]`, uint8, and labels `[n]`."""

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Mean and standard deviation of the training pixels by channel, for pixels in [0, 1]."""


class CIFAR10Data(L.LightningDataModule):
    """Training, validation and test images of CIFAR-10, held in memory as uint8.

    Args:
        data_dir: folder with `train/<class>/*` and `test/<class>/*`; if it has no `train`, torchvision downloads the
            data set into it.
        subset: training images to use, validation included; None for all 50,000.
        validation: fraction of them that tunes the hyperparameters.
        batch_size: images in a batch.
        num_workers: processes that collate batches.
        seed: fixes the order of the training images.
    """

    def __init__(
        self,
        data_dir: Path,
        subset: int | None = None,
        *,
        validation: float = 0.2,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.data_dir = data_dir
        self.subset = subset
        self.validation = validation
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    @property
    def is_folder(self) -> bool:
        """Whether `data_dir` has a folder of images for each class."""
        return (self.data_dir / "train").is_dir()

    def prepare_data(self) -> None:
        """Download the data set, unless `data_dir` has folders of images."""
        if not self.is_folder:
            with downloading("CIFAR-10", "put train/<class>/* and test/<class>/* into --data-dir"):
                for train in (True, False):
                    CIFAR10(self.data_dir, train=train, download=True)

    def setup(self, stage: str) -> None:
        """Read the images that are used, on the first call."""
        if hasattr(self, "test"):
            return
        drawn = torch.Generator().manual_seed(0)  # the same images for every seed
        used = torch.randperm(self.size("train"), generator=drawn)[: self.subset]
        n_valid = int(self.validation * len(used))
        self.valid = self.read("train", used[:n_valid])
        self.train = self.read("train", used[n_valid:])
        self.test = self.read("test", torch.arange(self.size("test")))

    def size(self, part: str) -> int:
        """Number of images in the training or test part."""
        return len(self.listing(part))

    def listing(self, part: str) -> ImageFolder | CIFAR10:
        """File list of the training or test part."""
        if self.is_folder:
            return ImageFolder(self.data_dir / part)
        return CIFAR10(self.data_dir, train=part == "train")

    def read(self, part: str, indices: Tensor) -> TensorDataset:
        """Read images `[n, 3, 32, 32]`, uint8, and labels `[n]`."""
        listing = self.listing(part)
        labels = torch.tensor(listing.targets)[indices]
        if isinstance(listing, ImageFolder):
            images = torch.stack([decode_image(read_file(listing.samples[index][0])) for index in indices.tolist()])
        else:
            images = torch.from_numpy(listing.data)[indices].permute(0, 3, 1, 2).contiguous()
        return TensorDataset(images, labels)

    def loader(self, data: TensorDataset, batch_size: int, **settings: Any) -> DataLoader:
        """Batches of one part."""
        return DataLoader(data, batch_size, num_workers=self.num_workers, **settings)

    def train_dataloader(self) -> DataLoader:
        """Training images, shuffled by a separate generator, so that compared networks read the same order."""
        order = torch.Generator().manual_seed(self.seed)
        return self.loader(self.train, self.batch_size, shuffle=True, drop_last=True, generator=order)

    def val_dataloader(self) -> DataLoader:
        """Validation images, in order."""
        return self.loader(self.valid, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Test images, in order."""
        return self.loader(self.test, 500)


def normalise(images: Tensor) -> Tensor:
    """Normalise pixels in [0, 1] to mean 0 and standard deviation 1 in each channel."""
    mean, std = (torch.tensor(numbers, device=images.device, dtype=images.dtype) for numbers in (MEAN, STD))
    return (images - mean[:, None, None]) / std[:, None, None]


class LitCIFAR10(L.LightningModule):
    """An ordinary LightningModule, whose regularisation has to be chosen by hand.

    Args:
        net: network from normalised images to logits.
        augment: augmentation of training images in [0, 1].
        lr: learning rate of SGD with momentum 0.9.
    """

    def __init__(self, net: nn.Module, augment: nn.Module, lr: float) -> None:
        super().__init__()
        self.net = net
        self.augment = augment
        self.lr = lr
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Images in 0..255 to logits, without augmentation."""
        return self.net(normalise(images / 255))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy with dropout and augmentation."""
        images, labels = batch
        return F.cross_entropy(self.net(normalise(self.augment(images / 255))), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self.evaluate(batch, "test")

    def evaluate(self, batch: Batch, stage: str) -> None:
        """Log loss and accuracy without regularisation."""
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log(f"{stage}_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum over the weights."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
