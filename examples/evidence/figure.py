"""The figure: lowest validation loss so far against the CPU time spent, a panel for each task."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from results import Key, Row, plain_runs
from trials import GUESSES, METHODS, SEARCHES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"guesses": "0.4"} | {name: f"C{number}" for number, name in enumerate([*METHODS, *SEARCHES])}
"""Colour of each line, the same in every panel and for every choice of methods."""

Curve = list[tuple[float, float]]
"""Cost so far in plain runs, and the lowest validation loss so far."""


def progress(rows: Iterable[Row]) -> Curve:
    """The lowest validation loss so far, over the cost of runs one after the other."""
    curve: Curve = []
    best, before = float("inf"), 0.0
    for row in rows:
        for _, loss, seconds in row["curve"]:
            if loss is not None and loss < best:
                best = loss
                curve.append((before + plain_runs(row, seconds), best))
        before += plain_runs(row)
    return [*curve, (before, best)] if curve else []


def plot(rows: Mapping[Key, Row], tasks: Sequence[str], methods: Sequence[str], trials: int, path: Path) -> None:
    """Draw the panels: means over the seeds as lines; of the methods, lowest and highest seed as bands.

    A line over fewer seeds than the others of its panel is left out, since seeds differ more than methods do.
    """
    columns = min(3, len(tasks))
    size = (4.6 * columns, 3.6 * math.ceil(len(tasks) / columns) + 0.5)
    figure, grid = plt.subplots(-(-len(tasks) // columns), columns, figsize=size, layout="constrained", squeeze=False)
    for task, axes in zip(tasks, grid.flat, strict=False):
        lines = {name: over_seeds(curves(rows, task, name, trials)) for name in [*methods, "guesses", *SEARCHES]}
        most = max(len(line.losses) for line in lines.values())
        whole = {name: line for name, line in lines.items() if len(line.costs) and len(line.losses) == most}
        _panel(axes, whole, methods)
        axes.set(title=task, xscale="log", xlabel="CPU time, plain runs", ylabel="best validation loss so far")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in list(grid.flat)[len(tasks) :]:
        axes.axis("off")
    labels = [axes.get_legend_handles_labels() for axes in grid.flat]
    handles = {label: handle for pair in labels for handle, label in zip(*pair, strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=150)
    plt.close(figure)


class Line(NamedTuple):
    """Costs at which every seed has a loss, `[t]`, and the loss of each seed at these costs, `[seeds, t]`."""

    costs: np.ndarray
    losses: np.ndarray


def _panel(axes: Axes, lines: Mapping[str, Line], methods: Sequence[str]) -> None:
    """Draw the lines, and show the part in which they end, no closer than the spread of the seeds allows to tell."""
    if not lines:
        return
    ends = np.array([line.losses.mean(0)[-1] for line in lines.values()])
    spread = max(line.losses[:, -1].std() for line in lines.values())
    margin = max(np.ptp(ends), spread) or 0.1 * abs(ends[0])
    top, first = ends.max() + margin, math.inf
    for name, line in lines.items():
        mean, tuned = line.losses.mean(0), name in methods
        (drawn,) = axes.plot(line.costs, mean, "-" if tuned else "--", color=COLOURS[name], label=name, linewidth=2)
        axes.plot(line.costs[-1], mean[-1], "o", color=drawn.get_color())
        if tuned:
            lowest, highest = line.losses.min(0), line.losses.max(0)
            axes.fill_between(line.costs, lowest, highest, color=drawn.get_color(), alpha=0.15, linewidth=0)
        first = min(first, line.costs[mean <= top][0])
    last = max(line.costs[-1] for line in lines.values())
    axes.set(ylim=(ends.min() - margin, top), xlim=(0.8 * first, 1.25 * last))


def over_seeds(found: Sequence[Curve]) -> Line:
    """The curves of several seeds at common costs."""
    if not found:
        return Line(np.empty(0), np.empty((0, 0)))
    first = max(curve[0][0] for curve in found)
    last = max(statistics.mean(curve[-1][0] for curve in found), first)
    costs = np.geomspace(first, last, 200)
    losses = []
    for curve in found:
        spent, best = np.array(curve).T
        losses.append(best[np.searchsorted(spent, costs, side="right") - 1])
    return Line(costs, np.stack(losses))


def curves(rows: Mapping[Key, Row], task: str, name: str, trials: int) -> list[Curve]:
    """The progress of each seed of an entry whose cost is known; "guesses" are all guesses, one after the other."""
    entries = GUESSES if name == "guesses" else (name,)
    seeds = sorted({key.seed for key in rows if key.task == task and key.what in entries})
    wanted = [(entry, trial) for entry in entries for trial in range(trials if name in SEARCHES else 1)]
    found = []
    for seed in seeds:
        keys = [Key(task, entry, seed, trial) for entry, trial in wanted]
        if all(key in rows for key in keys):
            found.append(progress([rows[key] for key in keys]))
    return [curve for curve in found if curve and math.isfinite(curve[-1][0])]
