"""Pictures of schedules: a panel for each hyperparameter, or for each group with one axis, below the losses."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_stn.named import describe_unknown
from lightning_stn.schedule.row import Row
from lightning_stn.specifications import Axis, Hyperparameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_stn.schedule.schedule import Schedule

MOST_PANELS = 9
"""Hyperparameters of which each has a panel; of more, those with one axis share panels."""

MOST_LINES = 8
"""Hyperparameters in one panel, so that colours stay apart."""

LONGEST_SIDE_BY_SIDE = 20
"""Characters of the longest name in a legend of two columns that is no wider than its panel."""

COLUMNS = 3
RUN_ALPHA = 0.7
"""Of lines where several runs lie over one another."""


class Panel(NamedTuple):
    """Names of the hyperparameters that share a panel, and their axis."""

    axis: Axis
    names: list[str]


def pyplot(what: str) -> Any:
    """`matplotlib.pyplot`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to install it.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{what} needs matplotlib; run: pip install "lightning-stn[plot]"') from error
    return plt


def plot(
    schedules: Sequence["Schedule"], labels: Sequence[str] | None, names: Sequence[str] | None, group: bool | None
) -> tuple["Figure", list["Axes"]]:
    """Draw schedules; see `Schedule.plot`."""
    _check(schedules)
    plt = pyplot("Schedule.plot")
    specifications = _chosen(schedules[0], names)
    labels = _labels(schedules, labels)
    panels = list(_panels(specifications, len(specifications) > MOST_PANELS if group is None else group))
    losses = any(row.train_loss is not None for schedule in schedules for row in schedule.rows)
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = plt.figure(figsize=(4.2 * max(2, columns), 2.6 * (rows + losses)), layout="constrained")
    grid = figure.add_gridspec(rows + losses, columns)
    axes: list[Axes] = []
    if losses:
        axes.append(figure.add_subplot(grid[0, :]))
        _draw_losses(axes[0], schedules, labels)
    for index, panel in enumerate(panels):
        place = grid[index // columns + losses, index % columns]
        axes.append(figure.add_subplot(place, sharex=axes[0] if axes else None))
        _draw_panel(axes[-1], panel, schedules, labels)
        _shade_warmup(axes[-1], schedules, label=len(axes) == 1)
        if len(panel.names) > 1 or (len(schedules) > 1 and len(axes) == 1):
            side_by_side = len(panel.names) > 4 and max(map(len, panel.names)) <= LONGEST_SIDE_BY_SIDE
            axes[-1].legend(fontsize="x-small", ncols=2 if side_by_side else 1)
        if index >= len(panels) - columns:
            axes[-1].set_xlabel("training batches")
    return figure, axes


def _check(schedules: Sequence["Schedule"]) -> None:
    """Check that schedules can be drawn over one another."""
    names = schedules[0].names
    for one in schedules:
        if getattr(one, "names", None) != names or not one.rows:
            raise ValueError(
                f"Schedule.plot: expected schedules of {list(names)} with rows, got {one!r}; record or load them first."
            )


def _labels(schedules: Sequence["Schedule"], labels: Sequence[str] | None) -> list[str]:
    found = [f"run {index}" for index in range(1, len(schedules) + 1)] if labels is None else list(labels)
    if len(found) != len(schedules):
        raise ValueError(f"Schedule.plot: expected {len(schedules)} labels, got {labels!r}; give one for each.")
    return found


def _chosen(schedule: "Schedule", names: Sequence[str] | None) -> dict[str, Hyperparameter]:
    """The specifications of the hyperparameters to draw."""
    if names is not None and (isinstance(names, str) or not names):
        raise ValueError(f"Schedule.plot: expected names to be a list of names, got {names!r}; None draws all.")
    for name in names or ():
        if name not in schedule.specifications:
            raise ValueError(f"Schedule.plot: names holds {name!r}, {describe_unknown(name, schedule.names)}")
    return {name: schedule.specifications[name] for name in names or schedule.names}


def _panels(specifications: dict[str, Hyperparameter], group: bool) -> Iterator[Panel]:
    """One panel for each hyperparameter, or for those with one axis, few at a time."""
    if not group:
        yield from (Panel(specification.axis, [name]) for name, specification in specifications.items())
        return
    shared: dict[Axis, list[str]] = {}
    for name, specification in specifications.items():
        shared.setdefault(specification.axis, []).append(name)
    for axis, names in shared.items():
        count = math.ceil(len(names) / math.ceil(len(names) / MOST_LINES))
        yield from (Panel(axis, names[start : start + count]) for start in range(0, len(names), count))


def _draw_losses(axes: "Axes", schedules: Sequence["Schedule"], labels: Sequence[str]) -> None:
    for index, (schedule, label) in enumerate(zip(schedules, labels, strict=True)):
        several = len(schedules) > 1
        for style, kind in (("-", "training"), ("--", "validation")):
            losses = [row.train_loss if kind == "training" else row.valid_loss for row in schedule.rows]
            points = [(row.step, loss) for row, loss in zip(schedule.rows, losses, strict=True) if loss is not None]
            name = f"{kind}, {label}" if several else kind
            axes.plot(*_columns(points), style, color=f"C{index}" if several else None, label=name, alpha=RUN_ALPHA)
    _shade_warmup(axes, schedules, label=True)
    axes.set_ylabel("loss")
    axes.legend(fontsize="small", ncols=2 if len(schedules) > 1 else 1)


def _draw_panel(axes: "Axes", panel: Panel, schedules: Sequence["Schedule"], labels: Sequence[str]) -> None:
    alone, single = len(panel.names) == 1, len(schedules) == 1
    for line, name in enumerate(panel.names):
        for index, (schedule, label) in enumerate(zip(schedules, labels, strict=True)):
            colour = f"C{index if alone else line}"
            text = name if single or not alone else label
            points = [(row.step, _height(panel.axis, row, name)) for row in schedule.rows]
            shown = text if alone or index == 0 else None
            (drawn,) = axes.plot(*_columns(points), color=colour, label=shown, alpha=1 if single else RUN_ALPHA)
            if panel.axis.whole or panel.axis.choices:
                drawn.set_drawstyle("steps-post")
            if single and alone:
                _draw_band(axes, schedule, name, colour)
    _scale(axes, panel.axis)
    if alone:
        axes.set_title(panel.names[0], fontsize="medium")


def _height(axis: Axis, row: Row, name: str) -> float:
    value = row.values[name]
    return axis.choices.index(value) if isinstance(value, str) else float(value)


def _draw_band(axes: "Axes", schedule: "Schedule", name: str, colour: str) -> None:
    """One perturbation scale to each side of a number that knows its range."""
    specification = schedule.specifications[name]
    if not specification.is_number or specification.size > 1:
        return
    values = torch.tensor([row.values[name] for row in schedule.rows], dtype=torch.float64, device="cpu")
    scales = torch.tensor([row.scales[name] for row in schedule.rows], dtype=torch.float64, device="cpu")
    band = specification.band(values, scales)
    if band is not None:
        lower, upper = (edge.tolist() for edge in band)
        axes.fill_between([row.step for row in schedule.rows], lower, upper, color=colour, alpha=0.2, linewidth=0)


def _shade_warmup(axes: "Axes", schedules: Sequence["Schedule"], label: bool) -> None:
    ends = [schedule.warmup for schedule in schedules if schedule.warmup]
    if not ends:
        return
    axes.axvspan(0, min(ends), color="0.5", alpha=0.2, linewidth=0)
    if label:
        axes.annotate(
            "warm-up",
            (0, 1),  # above the axes, where no legend lies
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize="x-small",
            alpha=0.7,
        )


def _scale(axes: "Axes", axis: Axis) -> None:
    """Ticks and limits that suit the values."""
    if axis.choices:
        axes.set_yticks(range(len(axis.choices)), axis.choices)
        axes.set_ylim(-0.5, len(axis.choices) - 0.5)
    elif axis.log:
        axes.set_yscale("log")
    elif axis.whole:
        axes.locator_params("y", integer=True, min_n_ticks=1)
    if axis.unit:
        axes.set_ylabel(axis.unit)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
