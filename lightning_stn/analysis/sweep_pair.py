"""The validation loss as a function of two hyperparameters."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_stn.analysis import figures
from lightning_stn.analysis.evaluation import evaluating, read_batches, require_module
from lightning_stn.analysis.positions import Swept, resolve_names, shifted, spread, swept_at
from lightning_stn.analysis.report import Report
from lightning_stn.schedule.tables import Cell, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class PairSweep(Report):
    """The validation loss as a function of two hyperparameters around their current values; see `sweep_pair`.

    Args:
        swept: the two hyperparameters; `swept[i].values` are their values in natural units.
        offsets: distances from the current values, `[points]`, unconstrained units, float64.
        losses: `[points, points]`, a row for each value of the first hyperparameter, float64; what is not finite
            is a gap in the figure.
        loss: the loss at the current hyperparameters.
    """

    swept: tuple[Swept, Swept]
    offsets: Tensor
    losses: Tensor
    loss: float

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two hyperparameters."""
        return self.swept[0].name, self.swept[1].name

    def table(self) -> list[dict[str, Cell]]:
        """A row for each pair of values, natural units, with its loss."""
        (first, second), (rows, columns) = self.names, [one.values.tolist() for one in self.swept]
        return [
            {first: row, second: column, "loss": loss}
            for row, losses in zip(rows, self.losses.tolist(), strict=True)
            for column, loss in zip(columns, losses, strict=True)
        ]

    def summary(self) -> list[dict[str, Cell]]:
        """The current values with their loss, and those with the lowest."""
        (first, second), rows = self.names, self.table()
        now: dict[str, Cell] = {first: self.swept[0].value, second: self.swept[1].value, "loss": self.loss}
        lowest = rows[self._lowest()] if self.losses.isfinite().any() else dict.fromkeys(now, float("nan"))
        return [{"": "now", **now}, {"": "lowest", **lowest}]

    def _lowest(self) -> int:
        return int(self.losses.where(self.losses.isfinite(), torch.inf).argmin())

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the loss as colours with contour lines.

        Marked are the current values, one and two perturbation scales around them, and the lowest loss. Axes are linear
        in unconstrained units, with ticks in natural units.

        Args:
            ax: axes to draw on; None for a new figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        figure, ax = figures.single(ax, (5.4, 4.4))
        offsets, losses = self.offsets.numpy(), self.losses.where(self.losses.isfinite(), torch.nan).T.numpy()
        end = self.offsets[-1].item()
        edge = end + (self.offsets[1] - self.offsets[0]).item() / 2
        extent = (-edge, edge, -edge, edge)
        image = ax.imshow(losses, origin="lower", extent=extent, aspect="auto", interpolation="bilinear")
        figure.colorbar(image, ax=ax, label="validation loss")
        finite = self.losses[self.losses.isfinite()]
        if len(finite) and finite.amin() < finite.amax():
            ax.contour(offsets, offsets, losses, levels=8, colors="white", linewidths=0.7, alpha=0.6)
        self._mark(ax)
        for axis, one in zip((ax.xaxis, ax.yaxis), self.swept, strict=True):
            labels = [f"{value:.2g}" for value in (one.values[0].item(), one.value, one.values[-1].item())]
            axis.set_ticks([-end, 0.0, end], labels=labels)
        ax.set(xlabel=self.swept[0].label, ylabel=self.swept[1].label, xlim=(-end, end), ylim=(-end, end))
        return figure, ax

    def _mark(self, ax: "Axes") -> None:
        from matplotlib.patches import Ellipse

        for multiple in figures.SHADES:
            width, height = (2 * multiple * one.scale for one in self.swept)
            ax.add_patch(Ellipse((0, 0), width, height, fill=False, edgecolor="white", linestyle="--", linewidth=0.9))
        ax.plot([0.0], [0.0], "o", color="white", markeredgecolor="black", label="now")
        if self.losses.isfinite().any():
            row, column = divmod(self._lowest(), len(self.offsets))
            place = ([self.offsets[row].item()], [self.offsets[column].item()])
            ax.plot(*place, "*", color="white", markeredgecolor="black", markersize=12, label="lowest", clip_on=False)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

    def __repr__(self) -> str:
        """One line."""
        end = describe(self.offsets[-1].item())
        return (
            f"PairSweep of {', '.join(self.names)}: {len(self.offsets)} points each, {end} unconstrained units each way"
        )


def sweep_pair(
    module: nn.Module,
    loader: Iterable[Any],
    names: Sequence[str],
    *,
    points: int = 15,
    width: float = 2.0,
    batches: int | None = None,
) -> PairSweep:
    """The validation loss as a function of two hyperparameters, through the response, the others held.

    Arguments and errors are those of `sweep`, with `points` squared evaluations.

    Args:
        module: an `STNModule` with a converted network; needs no Trainer.
        loader: yields validation batches.
        names: two hyperparameters.
        points: number of values of each of them.
        width: distance of the ends from the current value, unconstrained units.
        batches: largest number of batches to read; None for all.

    Raises:
        TypeError: as for `sweep`.
        KeyError: as for `sweep`.
        ValueError: as for `sweep`, or `names` are not two.
    """
    owner = require_module("sweep_pair", module)
    pair = resolve_names("sweep_pair", owner.hyperparameters, names)
    if len(pair) != 2:
        raise ValueError(f"sweep_pair: expected names to be two hyperparameters, got {list(pair)}; name two.")
    offsets = spread("sweep_pair", points, width)
    table = torch.cat([offsets.new_zeros(1, 2), torch.cartesian_prod(offsets, offsets)])
    with evaluating(owner):
        data = read_batches("sweep_pair", owner, loader, batches)
        losses = data.losses(owner, shifted(owner, pair, table))
    first, second = swept_at(owner.hyperparameters, pair, offsets)
    return PairSweep((first, second), offsets, losses[1:].reshape(points, points), losses[0].item())
