"""The validation loss as a function of each hyperparameter."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_stn.analysis import figures
from lightning_stn.analysis.evaluation import evaluating, read_batches, require_module
from lightning_stn.analysis.positions import Swept, one_by_one, resolve_names, spread, swept_at
from lightning_stn.analysis.report import Report
from lightning_stn.schedule.tables import Cell, describe

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Report):
    """The validation loss as a function of each hyperparameter around its current value; see `sweep`.

    Args:
        swept: the hyperparameters; `swept[i].values` are their values in natural units.
        offsets: distances from the current value, `[points]`, unconstrained units, float64.
        losses: `[names, points]`, float64; what is not finite is a gap in the figure.
        loss: the loss at the current hyperparameters.

    Example:
        >>> offsets = torch.tensor([-1.0, 0.0, 1.0]).double()
        >>> rate = Swept("dropout", "", value=0.5, scale=0.5, values=offsets.sigmoid())
        >>> found = Sweep((rate,), offsets, torch.tensor([[0.75, 0.5, 0.25]]).double(), loss=0.5)
        >>> print(found)
        | hyperparameter | value | loss | lowest at | lowest loss | highest loss |
        |----------------|------:|-----:|----------:|------------:|-------------:|
        | dropout        |   0.5 |  0.5 |    0.7311 |        0.25 |         0.75 |
        >>> found.table()[0]
        {'hyperparameter': 'dropout', 'offset': -1.0, 'value': 0.268..., 'loss': 0.75}
    """

    swept: tuple[Swept, ...]
    offsets: Tensor
    losses: Tensor
    loss: float

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hyperparameters."""
        return tuple(one.name for one in self.swept)

    @property
    def values(self) -> dict[str, Tensor]:
        """Natural units at the offsets by name, `[points]`, float64; of a whole number before rounding."""
        return {one.name: one.values for one in self.swept}

    def table(self) -> list[dict[str, Cell]]:
        """A row for each point: hyperparameter, offset (unconstrained units), value (natural units) and loss."""
        return [
            {"hyperparameter": one.name, "offset": offset, "value": value, "loss": loss}
            for one, losses in zip(self.swept, self.losses, strict=True)
            for offset, value, loss in zip(*map(Tensor.tolist, (self.offsets, one.values, losses)), strict=True)
        ]

    def summary(self) -> list[dict[str, Cell]]:
        """A row for each hyperparameter: value and loss now, and the lowest and the highest loss of its curve."""
        rows: list[dict[str, Cell]] = []
        for one, losses in zip(self.swept, self.losses, strict=True):
            finite = losses.isfinite()
            row: dict[str, Cell] = {"hyperparameter": one.name, "value": one.value, "loss": self.loss}
            low, high = losses.where(finite, torch.inf).min(0), losses.where(finite, -torch.inf).max(0)
            found = (one.values[low.indices], low.values, high.values)
            numbers = [number.item() if finite.any() else float("nan") for number in found]
            rows.append(row | dict(zip(("lowest at", "lowest loss", "highest loss"), numbers, strict=True)))
        return rows

    def plot(self, *, same_scale: bool = True) -> "tuple[Figure, numpy.ndarray[Any, Any]]":
        """Draw a panel for each hyperparameter: the curve, the current value, and one and two perturbation scales.

        Beyond two scales the response was hardly trained, so that the curve there is an extrapolation. Panels are
        linear in unconstrained units, with ticks in natural units.

        Args:
            same_scale: whether all panels have the same loss axis, so that their curves can be compared.

        Returns:
            The figure, and an array of its panels, `[names]`.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        rows, columns = figures.grid(len(self.swept))
        width, height = (3.4, 2.8) if len(self.swept) <= 4 else (1.75, 1.45)
        size = (width * columns + 0.5, height * rows + 0.5)
        figure, panels = figures.pyplot().subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=False, sharey=same_scale
        )
        panels = panels.flatten()
        for panel in panels[len(self.swept) :]:
            panel.set_visible(False)
        for panel, one, losses in zip(panels, self.swept, self.losses, strict=False):
            self._draw(panel, one, losses, small=len(self.swept) > 4)
            figures.title(panel, one.label, width if same_scale else 0.75 * width, 8 if len(self.swept) > 4 else 12)
        figure.supylabel("validation loss")
        figure.supxlabel("value, natural units (shaded: one and two perturbation scales)", fontsize="medium")
        return figure, panels[: len(self.swept)]

    def _draw(self, panel: "Axes", one: Swept, losses: Tensor, small: bool) -> None:
        end = self.offsets[-1].item()
        colour = figures.text_colour()
        for multiple in figures.SHADES:
            reach = min(multiple * one.scale, end)
            panel.axvspan(-reach, reach, color=colour, alpha=0.07, linewidth=0)
        panel.axhline(self.loss, color=colour, alpha=0.5, linewidth=0.8, linestyle=":")
        panel.plot(self.offsets.numpy(), losses.where(losses.isfinite(), torch.nan).numpy(), color="C0")
        panel.plot([0.0], [self.loss], "o", color="C1", markersize=5)
        ticks = [one.values[0].item(), one.value, one.values[-1].item()]
        panel.set_xlim(-end, end)
        panel.set_xticks([-end, 0.0, end], [f"{tick:.2g}" for tick in ticks], fontsize="x-small" if small else "medium")
        first, _, last = panel.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
        panel.ticklabel_format(axis="y", useOffset=False)
        panel.tick_params(axis="y", labelsize="x-small" if small else "medium")

    def __repr__(self) -> str:
        """One line."""
        end = describe(self.offsets[-1].item())
        return f"Sweep of {', '.join(self.names)}: {len(self.offsets)} points each, {end} unconstrained units each way"


def sweep(
    module: nn.Module,
    loader: Iterable[Any],
    names: str | Sequence[str] | None = None,
    *,
    points: int = 21,
    width: float = 2.0,
    batches: int | None = None,
) -> Sweep:
    """The validation loss as a function of each hyperparameter, through the response, the others held.

    Each point is the mean of `validation_loss` at the effective weights `w(lambda + t e_i)`, in eval mode. It shows
    what the response predicts for a network that has been trained at this value. Nothing is trained, and the module
    stays as it is. Random numbers are the same at all points. Weights keep their precision; wrap the call in
    `torch.autocast` for mixed precision.

    Args:
        module: an `STNModule` with a converted network; needs no Trainer.
        loader: yields validation batches, which pass through the module's batch-transfer hooks. It is read once, and
            its batches stay in memory. They count by their size or, where `infer_batch_size` cannot tell it, equally.
        names: hyperparameters; None for all numbers. A `Categorical` has no value between two choices.
        points: number of points of each curve; an odd number has the current value among them.
        width: distance of the ends from the current value, unconstrained units.
        batches: largest number of batches to read; None for all.

    Returns:
        The curves, with `plot()` and a table.

    Raises:
        TypeError: `module` is no `STNModule`, or `names` are not names.
        KeyError: a hyperparameter is unknown; the message lists the names.
        ValueError: no network is converted, a hyperparameter is no number, the loader is empty, or an argument is out
            of its range.
    """
    owner = require_module("sweep", module)
    names = resolve_names("sweep", owner.hyperparameters, names)
    offsets = spread("sweep", points, width)
    with evaluating(owner):
        data = read_batches("sweep", owner, loader, batches)
        losses = data.losses(owner, one_by_one(owner, names, offsets.expand(len(names), -1)))
    curves = losses[1:].reshape(len(names), points)
    return Sweep(swept_at(owner.hyperparameters, names, offsets), offsets, curves, losses[0].item())
