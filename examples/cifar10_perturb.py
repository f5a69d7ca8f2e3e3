"""One perturbation for each example, or one for the whole mini-batch? Both tune a small CNN on part of CIFAR-10.

Three networks start from the same weights and train on the same batches for the same number of epochs: with
hyperparameters tuned by `perturb="example"`, tuned by `perturb="batch"`, and fixed at their start values. The test
images are read once for each network, after its training.

    python examples/cifar10_perturb.py --data-dir DIR                  # an hour on one core: three seeds
    python examples/cifar10_perturb.py --data-dir DIR --epochs 3 --subset 1000 --seeds 0
"""

import argparse
import statistics
import time
from pathlib import Path

import lightning as L
import torch.nn.functional as F
from cifar10_data import CIFAR10Data, LitCIFAR10
from command_line import positive, set_up, summary
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_stn import Float, Integer, STNCallback, STNModule
from lightning_stn.augment import Cutout, GaussianNoise

Batch = tuple[Tensor, Tensor]
RUNS = ("example", "batch", "fixed")
DROPOUT, NOISE, CUTOUT = 0.05, 0.05, 4
LR = 0.03


def augmentation(noise: float | str = NOISE, cutout: int | str = CUTOUT) -> nn.Module:
    """Noise and cutout."""
    return nn.Sequential(GaussianNoise(std=noise), Cutout(length=cutout))


def small_cnn(dropout: float = DROPOUT) -> nn.Module:
    """Three convolutions and a hidden layer, with a dropout after each."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 48), (48, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)]
    layers += [nn.Flatten(), nn.Linear(1024, 256), nn.ReLU(), nn.Dropout(dropout), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


class SelfTunedCIFAR10(STNModule, LitCIFAR10):
    """The same module with six tuned hyperparameters."""

    def __init__(self) -> None:
        hyperparameters = {"noise": Float(0.0, 1.0, init=NOISE), "cutout": Integer(0, 16, init=CUTOUT)}
        augment = augmentation("noise", "cutout")
        super().__init__(hyperparameters=hyperparameters, net=small_cnn(), augment=augment, lr=LR)
        self.net = self.convert(self.net, dropout="per-layer")

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train one network, and return its scores; the test images are read once."""
    L.seed_everything(seed, verbose=False)
    data = CIFAR10Data(args.data_dir, args.subset, seed=seed)
    tuned = name != "fixed"
    module = SelfTunedCIFAR10() if tuned else LitCIFAR10(small_cnn(), augmentation(), LR)
    stn = STNCallback(perturb="example" if name == "example" else "batch")
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[stn] if tuned else [],
        logger=TensorBoardLogger(args.out, name=f"{name}_seed{seed}"),
        log_every_n_steps=10,
        check_val_every_n_epoch=5,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data.prepare_data()
    data.setup("fit")
    begin, begin_cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, datamodule=data)
    scores = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - begin_cpu}
    scores |= trainer.validate(module, datamodule=data, verbose=False)[0]
    scores |= trainer.test(module, datamodule=data, verbose=False)[0]
    columns = ("val_loss", "test_loss", "test_accuracy")
    print(
        f"seed {seed}  {name:<8}" + "".join(f"  {column} {scores[column]:.4f}" for column in columns),
        f" {scores['seconds']:.0f} s, {scores['cpu_seconds']:.0f} s of CPU",
        flush=True,
    )
    if tuned:
        values = stn.schedule.rows[-1].values.items()
        print("  ends at " + ", ".join(f"{name} {value:.3g}" for name, value in values), flush=True)
    return scores


def print_summary(scores: dict[str, list[dict[str, float]]]) -> None:
    """Print mean and standard deviation over the seeds."""
    columns = ("val_loss", "test_loss", "test_accuracy", "seconds", "cpu_seconds")
    print(f"\n{'perturb':<10}" + "".join(f"{column:>20}" for column in columns))
    for name, runs in scores.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            cells.append(f"{statistics.mean(values):.4g} ± {statistics.stdev(values) if len(values) > 1 else 0:.2g}")
        print(f"{name:<10}" + "".join(f"{cell:>20}" for cell in cells))


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="train/<class>/* and test/<class>/*")
    parser.add_argument("--subset", type=int, default=6250, help="images, a fifth of them for tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=positive, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_perturb"), help="folder of the logs")
    args = parser.parse_args()

    set_up()
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for seed in args.seeds:
        for name in RUNS:
            scores[name].append(run(name, seed, args))
    print_summary(scores)


if __name__ == "__main__":
    main()
