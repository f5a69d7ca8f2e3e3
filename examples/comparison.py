"""Tables and plots that the examples in this folder share: networks compared over seeds, and their schedules."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from lightning import Callback, LightningModule

from lightning_stn import HyperparameterSet, Phase, Schedule, STNCallback

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


def plot_schedules(
    stn: STNCallback, hyperparameters: HyperparameterSet, path: Path, title: str, units: Mapping[str, str]
) -> None:
    """Plot every hyperparameter over the training batches, in natural units, with a band of one scale.

    Args:
        stn: the callback of the run.
        hyperparameters: those of the trained module.
        path: of the picture.
        title: of the picture.
        units: axis label of each hyperparameter; "rate" for those left out.
    """
    schedule = stn.schedule
    columns = 3 if len(schedule.names) < 8 else 4
    rows = math.ceil((len(schedule.names) + 1) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained")
    steps = [row.step for row in schedule.rows]
    warm = [row.step for row in schedule.rows if stn.phases.phase(row.step, row.epoch) is Phase.WARMUP]
    for name, axes in zip(schedule.names, grid.flat, strict=False):
        specification = hyperparameters.specifications[name]
        values = torch.tensor([row.values[name] for row in schedule.rows], dtype=torch.float64)
        scales = torch.tensor([row.scales[name] for row in schedule.rows], dtype=torch.float64)
        axes.plot(steps, values, label="value")
        band = specification.band(values, scales)
        if band is not None:
            axes.fill_between(steps, *band, alpha=0.3, label="value ± one sigma")
        axes.axvspan(0, max(warm, default=0), color="0.8", zorder=0, label="warm-up")
        axes.set(title=name, xlabel="training batches", ylabel=units.get(name, "rate"), ylim=(0, None))
    rest = list(grid.flat)[len(schedule.names) :]
    for axes in rest:
        axes.axis("off")
    rest[0].legend(*grid.flat[0].get_legend_handles_labels(), loc="center")
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
    units: Mapping[str, str],
) -> dict[str, Scores]:
    """Train networks one after the other; print their scores, and plot the schedules.

    Args:
        names: of the networks; "self-tuned" is trained with `stn`.
        train: trains one network with callbacks, and returns it and its scores.
        stn: the callback of the self-tuned network.
        picture: path of the plot of its schedules.
        title: of the picture.
        columns: scores to print.
        units: as for `plot_schedules`.
    """
    modules, scores = {}, {}
    for name in names:
        modules[name], scores[name] = train(name, [stn] if name == "self-tuned" else [])
    print_scores(scores, columns)
    if "self-tuned" in modules:
        print_hyperparameters(stn.schedule)
        plot_schedules(stn, modules["self-tuned"].hyperparameters, picture, title, units)
        print(f"\nSchedules: {picture}")
    return scores
