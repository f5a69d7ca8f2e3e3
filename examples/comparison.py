"""Tables and plots that the examples in this folder share: networks compared over seeds, and their schedules."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from lightning import Callback, LightningModule

from lightning_stn import Schedule, STNCallback

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Scores = dict[str, float]


def print_hyperparameters(schedule: Schedule) -> None:
    """Print first and last value of each hyperparameter, natural units, and its last scale, unconstrained units."""
    first, last = schedule.rows[0], schedule.rows[-1]
    print(f"\n{'hyperparameter':<24}{'start':>9}{'end':>9}{'scale':>9}")
    for name in schedule.names:
        print(f"{name:<24}{first.values[name]:>9.3g}{last.values[name]:>9.3g}{last.scales[name]:>9.3g}")


def print_scores(scores: Mapping[str, Scores], columns: Sequence[str]) -> None:
    """Print the scores of all networks side by side."""
    print(f"\n{'network':<12}" + "".join(f"{column:>17}" for column in columns) + f"{'seconds':>10}")
    for name, row in scores.items():
        print(f"{name:<12}" + "".join(f"{row[column]:>17.4f}" for column in columns) + f"{row['seconds']:>10.1f}")


def print_summary(runs: Sequence[Mapping[str, Scores]], columns: Sequence[str]) -> None:
    """Print mean and standard deviation over the seeds."""
    print(f"\nOver {len(runs)} seeds, mean ± standard deviation:")
    print(f"{'network':<12}" + "".join(f"{column:>20}" for column in columns))
    for name in runs[0]:
        values = [[scores[name][column] for scores in runs] for column in columns]
        cells = (f"{statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for v in values)
        print(f"{name:<12}" + "".join(f"{cell:>20}" for cell in cells))


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
        names: of the networks; "self-tuned" is trained with `stn`.
        train: trains one network with callbacks, and returns it and its scores.
        stn: the callback of the self-tuned network.
        picture: path of the plot of its schedules.
        title: of the picture.
        columns: scores to print.
    """
    scores = {}
    for name in names:
        _, scores[name] = train(name, [stn] if name == "self-tuned" else [])
    print_scores(scores, columns)
    if "self-tuned" in scores:
        print_hyperparameters(stn.schedule)
        save_picture(stn.schedule, picture, title)
        print(f"\nSchedules: {picture}")
    return scores
