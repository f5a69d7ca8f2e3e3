"""STN or Delta-STN? Both tune the same networks, from the same seeds, for the same epochs, from three different starts.

`method="stn"` is MacKay et al. (2019), `method="delta-stn"` is Bae and Grosse (2020). All other settings are defaults.
Compared are the losses of the tuned networks, their spread over the seeds, how far the final hyperparameters depend on
the start, and the cost. The test images are read once for each network, after its training.

    python examples/methods.py digits                        # about 10 minutes on one core: five seeds, three starts
    python examples/methods.py cifar10 --data-dir DIR        # some hours
    python examples/methods.py digits --seeds 0 --epochs 20
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from cifar10_data import CIFAR10Data, LitCIFAR10
from cifar10_perturb import LR, augmentation, small_cnn
from command_line import positive, set_up, summary
from comparison import Scores
from digits import DigitsCNN, LitDigits, load_data
from torch import Tensor

from lightning_stn import DeltaSTN, Float, Integer, STNCallback, STNModule

Batch = tuple[Tensor, Tensor]

METHODS: dict[str, dict[str, Any]] = {
    "stn": {},
    "delta-stn": {"method": "delta-stn"},
    "shared": {"method": DeltaSTN(passes=1)},
    "direct": {"method": DeltaSTN(linearize=False)},
}
"""Arguments of `STNCallback`; "shared" is Delta-STN in one pass, "direct" Delta-STN on predictions of the network."""
STARTS = {"weak": (0.05, 1), "middle": (0.2, 2), "strong": (0.5, 4)}
"""Start values: dropout rates and standard deviation of the noise; side of the cutout for images of 8 x 8 pixels."""


class TunedDigits(STNModule, LitDigits):
    """Five hyperparameters on the digits of `digits.py`."""

    def __init__(self, start: float, side: int) -> None:
        hyperparameters = {"noise": Float(0.0, 1.0, init=start), "cutout": Integer(0, 6, init=side)}
        super().__init__(hyperparameters=hyperparameters, noise="noise", cutout="cutout")
        self.net = self.convert(DigitsCNN(start), dropout="per-layer")

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)


class TunedCIFAR10(STNModule, LitCIFAR10):
    """Six hyperparameters of a small CNN."""

    def __init__(self, start: float, side: int) -> None:
        hyperparameters = {"noise": Float(0.0, 1.0, init=start), "cutout": Integer(0, 16, init=4 * side)}
        augment = augmentation("noise", "cutout")
        super().__init__(hyperparameters=hyperparameters, net=small_cnn(start), augment=augment, lr=LR)
        self.net = self.convert(self.net, dropout="per-layer")

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)


class Task(NamedTuple):
    """Module, data and number of epochs of a comparison."""

    module: Callable[[float, int], STNModule]
    data: Callable[[int, argparse.Namespace], L.LightningDataModule]
    epochs: int


def digits(seed: int, args: argparse.Namespace) -> L.LightningDataModule:
    """The digits, split as in `digits.py`."""
    train, valid, test = load_data(seed)
    data = L.LightningDataModule()
    data.train_dataloader, data.val_dataloader, data.test_dataloader = (lambda: train), (lambda: valid), (lambda: test)
    return data


def cifar10(seed: int, args: argparse.Namespace) -> L.LightningDataModule:
    """A part of CIFAR-10."""
    return CIFAR10Data(args.data_dir, args.subset, seed=seed)


TASKS = {"digits": Task(TunedDigits, digits, 200), "cifar10": Task(TunedCIFAR10, cifar10, 40)}


def run(task: Task, method: str, start: str, seed: int, args: argparse.Namespace) -> tuple[Scores, Tensor]:
    """Train one network; return its scores, and its final hyperparameters in unconstrained units."""
    L.seed_everything(seed, verbose=False)
    module = task.module(*STARTS[start])
    data = task.data(seed, args)
    trainer = L.Trainer(
        max_epochs=args.epochs or task.epochs,
        callbacks=[STNCallback(lr=args.lr, **METHODS[method])],
        logger=False,
        accelerator="cpu",
        limit_val_batches=1.0,
        check_val_every_n_epoch=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begin, begin_cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, datamodule=data)
    scores = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - begin_cpu}
    scores |= trainer.validate(module, datamodule=data, verbose=False)[0]
    scores |= trainer.test(module, datamodule=data, verbose=False)[0]
    print(
        f"{method:<10} from {start:<7} seed {seed}"
        + "".join(f"  {column} {scores[column]:.4f}" for column in ("val_loss", "test_loss"))
        + f"  {scores['cpu_seconds']:.0f} s of CPU\n  ends at "
        + ", ".join(f"{name} {value:.3g}" for name, value in module.hyperparameters.values().items()),
        flush=True,
    )
    return scores, module.hyperparameters.unconstrained.clone()


Results = dict[tuple[str, str], dict[int, tuple[Scores, Tensor]]]
"""Scores and final hyperparameters, by method and start, then by seed."""


def print_summary(results: Results, task: Task) -> None:
    """Print mean and standard deviation over the seeds, and the spread of the hyperparameters over the starts."""
    columns = ("val_loss", "test_loss", "test_accuracy", "cpu_seconds")
    print(f"\n{'method':<12}{'start':<9}" + "".join(f"{column:>19}" for column in columns))
    for (method, start), runs in results.items():
        cells = [_spread([scores[column] for scores, _ in runs.values()]) for column in columns]
        print(f"{method:<12}{start:<9}" + "".join(f"{cell:>19}" for cell in cells) + f"  {len(runs)} seeds")
    starts = [task.module(*STARTS[start]).hyperparameters.unconstrained for start in STARTS]
    print("\nSpread of the hyperparameters over the starts, unconstrained units, mean over hyperparameters and seeds:")
    print(f"  at the start {_distance(starts):.2f}")
    for method in dict.fromkeys(method for method, _ in results):
        ends = [{seed: end for seed, (_, end) in results.get((method, start), {}).items()} for start in STARTS]
        seeds = [seed for seed in ends[0] if all(seed in others for others in ends)]
        if seeds:
            distances = [_distance([end[seed] for end in ends]) for seed in seeds]
            print(f"  {method} at the end {_spread(distances)}, {len(seeds)} seeds")


def _distance(points: list[Tensor]) -> float:
    """Standard deviation over `points`, mean over their entries."""
    return torch.stack(points).std(0, correction=0).mean().item()


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values) if len(values) > 1 else 0:.2g}"


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="train/<class>/* and test/<class>/*")
    parser.add_argument("--subset", type=int, default=6250, help="images of CIFAR-10, a fifth of them for tuning")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["stn", "delta-stn"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--spread-seeds", type=int, nargs="+", help="seeds to run from every start; by default all")
    parser.add_argument("--epochs", type=positive, help="of each network; by default 200 on digits, 40 on CIFAR-10")
    parser.add_argument("--lr", type=float, help="of the hyperparameters; by default from the length of the run")
    args = parser.parse_args()

    set_up()
    task = TASKS[args.task]
    results: Results = {}
    for seed in args.seeds:
        everywhere = args.spread_seeds is None or seed in args.spread_seeds
        for method in args.methods:
            for start in STARTS if everywhere else [next(iter(STARTS))]:
                results.setdefault((method, start), {})[seed] = run(task, method, start, seed, args)
    print_summary(results, task)


if __name__ == "__main__":
    main()
