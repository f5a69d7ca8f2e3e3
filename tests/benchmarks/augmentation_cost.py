"""Cost of augmentation in the AlexNet example: all fifteen hyperparameters active, compared with alternatives.

    python tests/benchmarks/augmentation_cost.py [--rounds N] [--batches K] [--threads T] [--quick]

AlexNet at full width, batches of 128, a perturbation for each example. Every row is a ratio to the plain step of the
same network without augmentation; each round interleaves all rows. Times are wall-clock seconds from batch to batch,
including loading, because some rows augment in the loader.
"""

import argparse
import itertools
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from cifar10_alexnet import SelfTunedAlexNet, alexnet
from cifar10_data import LitCIFAR10
from report import machine

from lightning_stn import STNCallback

BATCH = 128


class Images(Dataset):  # type: ignore[type-arg]
    """Random uint8 images."""

    def __init__(self, batches: int, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (BATCH * batches, 3, 32, 32), generator=generator, dtype=torch.uint8)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), index % 10


def cutout(image: Tensor) -> Tensor:
    """Two squares of eight pixels, image by image."""
    image = image.clone()
    for _ in range(2):
        row, column = torch.randint(0, 32, (2,)).tolist()
        image[:, max(row - 4, 0) : row + 4, max(column - 4, 0) : column + 4] = 0
    return image


def per_image() -> Callable[[Tensor], Tensor]:
    """Torchvision's colour jitter and cutout, in the dataset."""
    return v2.Compose([v2.ColorJitter(0.3, 0.3, 0.3, 0.1), cutout])


def plain() -> L.LightningModule:
    """The network of the example, with its dropouts at a constant rate and no augmentation."""
    return LitCIFAR10(alexnet(1.0), nn.Identity(), 0.01)


def tuned(augmented: bool) -> L.LightningModule:
    """The example's module."""
    module = SelfTunedAlexNet(1.0, 0.01)
    module.hyperparameters.unconstrained.data.fill_(0.0)  # in mid-range, so that every operation acts
    if not augmented:
        module.augment = nn.Identity()
    return module


def seconds(module: L.LightningModule, data: DataLoader[Any], batches: int) -> float:
    """Median seconds between the ends of two training batches, without the first two."""
    ends: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            ends.append(time.perf_counter())

    callbacks: list[L.Callback] = [Watch()]
    if isinstance(module, SelfTunedAlexNet):
        callbacks.append(STNCallback(dataloader=data, warmup=1, perturb="example", seed=0))
    L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    ).fit(module, data)
    return statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))


def rows(batches: int) -> Iterator[tuple[str, L.LightningModule, DataLoader[Any]]]:
    """Rows to compare: name, module, loader."""
    raw = DataLoader(Images(batches + 2), BATCH)
    yield "plain, no augmentation", plain(), raw
    yield "plain, torchvision by image, 0 workers", plain(), DataLoader(Images(batches + 2, per_image()), BATCH)
    workers = DataLoader(Images(batches + 2, per_image()), BATCH, num_workers=2, persistent_workers=True)
    yield "plain, torchvision by image, 2 workers", plain(), workers
    yield "self-tuned, augmentation off", tuned(False), raw
    yield "self-tuned, all 15 active", tuned(True), raw


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=6, help="batches counted in each run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a single round")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times: dict[str, list[float]] = {}
    for number in range(1 if options.quick else options.rounds):
        print(f"round {number + 1}", file=sys.stderr, flush=True)
        for name, module, data in rows(options.batches):
            times.setdefault(name, []).append(seconds(module, data, options.batches))
    base = times["plain, no augmentation"]
    print(f"{machine(torch.device('cpu'))}; plain step {1000 * statistics.median(base):.0f} ms\n")
    print("| weight step | ratio to plain | quartiles |\n| --- | --- | --- |")
    for name, values in times.items():
        ratios = sorted(value / unit for value, unit in zip(values, base, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        print(f"| {name} | {statistics.median(ratios):.2f} | {low:.2f} to {high:.2f} |")
    cost = [
        (on - off) / unit
        for on, off, unit in zip(
            times["self-tuned, all 15 active"], times["self-tuned, augmentation off"], base, strict=True
        )
    ]
    print(f"\nAugmentation on the batch costs {statistics.median(cost):.3f} of a plain step.")


if __name__ == "__main__":
    main()
