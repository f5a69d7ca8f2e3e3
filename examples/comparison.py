"""Networks compared over seeds: the examples in this folder share their training, tables and pictures."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from command_line import set_up
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib import pyplot as plt
from scipy.stats import t as student
from torch.utils.data import DataLoader

from lightning_stn import Schedule, STNCallback, STNModule

plt.switch_backend("Agg")

SELF_TUNED = "self-tuned"
"""Name of the network that is trained with `STNCallback`."""

COLUMNS = ("best_epoch", "val_loss", "test_loss", "test_accuracy")
"""Scores of a classifier that are printed."""

LINES = 4
"""Lines of progress in a run, at most."""

SHOWN = 3
"""Hyperparameters in a line of progress, at most."""

Scores = dict[str, float]


class Loaders(NamedTuple):
    """Batches of one comparison; validation data tune and select, test data are read once for each network."""

    train: DataLoader[Any]
    valid: DataLoader[Any]
    test: DataLoader[Any]


def print_hyperparameters(schedule: Schedule) -> None:
    """Print first and last value of each hyperparameter, natural units, and its last scale, unconstrained units."""
    first, last = schedule.rows[0], schedule.rows[-1]
    width = max(24, *(2 + len(name) for name in schedule.names))
    print(f"\n{'hyperparameter':<{width}}{'start':>9}{'end':>9}{'scale':>9}")
    for name in schedule.names:
        print(f"{name:<{width}}{first.values[name]:>9.3g}{last.values[name]:>9.3g}{last.scales[name]:>9.3g}")


def print_scores(scores: Mapping[str, Scores], columns: Sequence[str]) -> None:
    """Print the scores of all networks side by side."""
    print(f"\n{'network':<12}" + "".join(f"{column:>17}" for column in columns) + f"{'seconds':>10}")
    for name, row in scores.items():
        cells = (f"{row[column]:>17{'' if isinstance(row[column], int) else '.4f'}}" for column in columns)
        print(f"{name:<12}" + "".join(cells) + f"{row['seconds']:>10.1f}")


def print_summary(runs: Sequence[Mapping[str, Scores]], columns: Sequence[str]) -> None:
    """Print mean and standard deviation over the seeds, and paired differences to the self-tuned network."""
    print(f"\nOver {len(runs)} seeds, mean ± standard deviation:")
    print(f"{'network':<12}" + "".join(f"{column:>28}" for column in columns))
    for name in runs[0]:
        values = [[scores[name][column] for scores in runs] for column in columns]
        cells = (f"{statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for v in values)
        print(f"{name:<12}" + "".join(f"{cell:>28}" for cell in cells))
    if SELF_TUNED not in runs[0]:
        return
    print(f"The {SELF_TUNED} network minus another, paired by seed, 95% interval:")
    for name in (name for name in runs[0] if name != SELF_TUNED):
        pairs = [[scores[SELF_TUNED][column] - scores[name][column] for scores in runs] for column in columns]
        print(f"{name:<12}" + "".join(f"{with_interval(differences):>28}" for differences in pairs))


def with_interval(values: Sequence[float]) -> str:
    """Mean of at least two values, and its 95% interval by Student's t."""
    mean = statistics.mean(values)
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def save_picture(schedule: Schedule, path: Path, title: str) -> None:
    """Save a plot of losses and hyperparameters over the training batches."""
    figure, _ = schedule.plot()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def compare(
    names: Sequence[str],
    train: Callable[[str, list[Callback]], tuple[LightningModule, Scores]],
    stn: STNCallback,
    picture: Path,
    title: str,
    columns: Sequence[str],
) -> dict[str, Scores]:
    """Train networks one after the other; print their scores, and plot the schedules.

    Args:
        names: of the networks; `SELF_TUNED` is trained with `stn`.
        train: trains one network with callbacks, and returns it and its scores.
        stn: the callback of the self-tuned network.
        picture: path of the plot of its schedules.
        title: of the picture.
        columns: scores to print.
    """
    scores = {}
    for name in names:
        _, scores[name] = train(name, [stn] if name == SELF_TUNED else [])
    print_scores(scores, columns)
    if SELF_TUNED in scores:
        print_hyperparameters(stn.schedule)
        save_picture(stn.schedule, picture, title)
        print(f"\nSchedules: {picture}")
    return scores


class Progress(Callback):
    """Prints the validation loss, and the first hyperparameters where there are any, a few times in a run.

    Args:
        name: of the network.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: LightningModule) -> None:
        """Print a line when a share of the run is over."""
        done, planned = trainer.current_epoch + 1, trainer.max_epochs or 1
        if done * LINES // planned == (done - 1) * LINES // planned:
            return
        values = list(pl_module.hyperparameters.values().items()) if isinstance(pl_module, STNModule) else []
        shown = [f"val_loss {trainer.callback_metrics['val_loss'].item():.3f}"]
        shown += [f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}" for name, value in values]
        more = ", ..." if len(values) > SHOWN else ""
        print(f"  {self.name:<12}epoch {done:>3}/{planned}  {', '.join(shown[: SHOWN + 1])}{more}", flush=True)


def train_and_test(
    name: str, module: LightningModule, data: Loaders, epochs: int, out: Path, callbacks: Sequence[Callback] = ()
) -> Scores:
    """Train a network, keep its best epoch by validation loss, and test it there.

    Args:
        name: of the network.
        module: logs `val_loss` in validation and `test_loss` in testing; afterwards it is that of the best epoch.
        data: batches.
        epochs: length of the run.
        out: folder of the logs.
        callbacks: further callbacks.

    Returns:
        What it logs in validation and testing, the number of its best epoch as `best_epoch`, and `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, filename="{epoch}", monitor="val_loss", save_weights_only=True)
        trainer = L.Trainer(
            max_epochs=epochs,
            callbacks=[*callbacks, Progress(name), best],
            logger=TensorBoardLogger(out, name=name),
            accelerator="cpu",
            log_every_n_steps=max(1, min(10, len(data.train))),
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        begin = time.perf_counter()
        trainer.fit(module, data.train, data.valid)
        scores: Scores = {"seconds": time.perf_counter() - begin}
        scores["best_epoch"] = 1 + int(Path(best.best_model_path).stem.removeprefix("epoch="))
        scores |= trainer.validate(module, data.valid, ckpt_path=best.best_model_path, verbose=False)[0]
        scores |= trainer.test(module, data.test, verbose=False)[0]
    return scores


def over_seeds(
    names: Sequence[str],
    train: Callable[[int, str, list[Callback]], tuple[LightningModule, Scores]],
    args: argparse.Namespace,
    title: str,
    columns: Sequence[str],
) -> None:
    """Compare networks once from each seed; print tables, and save a picture of each schedule.

    Args:
        names: of the networks; `SELF_TUNED` is trained with `STNCallback` and all its defaults.
        train: trains one network from a seed with callbacks, and returns it and its scores.
        args: of `example_parser`.
        title: of the pictures.
        columns: scores to print; of those that begin with `test_` the mean over the seeds, too.
    """
    set_up()
    runs = []
    for seed in args.seed:
        print(f"\nSeed {seed}, {args.epochs} epochs", flush=True)
        picture = args.out / f"seed{seed}" / "schedules.png"
        runs.append(compare(names, partial(train, seed), STNCallback(), picture, title, columns))
    if len(runs) > 1:
        print_summary(runs, [column for column in columns if column.startswith("test_")])


def compare_over_seeds(
    networks: Mapping[str, Callable[[], LightningModule]],
    load: Callable[[int], Loaders],
    args: argparse.Namespace,
    title: str,
) -> None:
    """Train classifiers from the same seeds on the same batches, as `over_seeds` does.

    Args:
        networks: by name; `SELF_TUNED` is trained with `STNCallback` and all its defaults.
        load: gives the batches of a seed.
        args: of `example_parser`.
        title: of the pictures.
    """

    def train(seed: int, name: str, callbacks: list[Callback]) -> tuple[LightningModule, Scores]:
        L.seed_everything(seed, verbose=False)
        module = networks[name]()
        return module, train_and_test(name, module, load(seed), args.epochs, args.out / f"seed{seed}", callbacks)

    over_seeds(list(networks), train, args, title, COLUMNS)
    print(f"\nAll hyperparameters over time: tensorboard --logdir {args.out}")
