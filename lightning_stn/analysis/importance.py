"""How much each hyperparameter matters for the validation loss."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_stn.analysis import figures
from lightning_stn.analysis.evaluation import Batches, evaluating, read_batches, require_module
from lightning_stn.analysis.positions import Swept, one_by_one, resolve_names, spread, swept_at
from lightning_stn.analysis.report import Report
from lightning_stn.kept import keep_metrics
from lightning_stn.methods import HyperparameterOptimizer, SharedAdam
from lightning_stn.schedule.tables import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Importance(Report):
    """How much each hyperparameter matters for the validation loss, the most important first; see `importance`.

    Args:
        swept: the hyperparameters; `swept[i].values` are natural units within one perturbation scale.
        losses: on a curve from one perturbation scale below the current value to one above, the others held, `[names,
            points]`, float64.
        effects: hypergradient times scale, `[names]`, float64: first-order change of the loss where the hyperparameter
            rises by one scale. The loss falls where a hyperparameter with a negative effect is raised.
        loss: the loss at the current hyperparameters.

    Example:
        >>> rate = Swept("dropout", "", value=0.5, scale=0.5, values=torch.tensor([0.38, 0.62]).double())
        >>> curve = torch.tensor([[2.25, 1.95]]).double()
        >>> found = Importance((rate,), curve, torch.tensor([-0.1]).double(), loss=2.0)
        >>> print(found)
        | hyperparameter | value | range | effect | to lower the loss |
        |----------------|------:|------:|-------:|-------------------|
        | dropout        |   0.5 |   0.3 |   -0.1 | raise             |
    """

    swept: tuple[Swept, ...]
    losses: Tensor
    effects: Tensor
    loss: float

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hyperparameters, the most important first."""
        return tuple(one.name for one in self.swept)

    @property
    def ranges(self) -> Tensor:
        """Highest minus lowest finite loss of each curve, `[names]`, float64; NaN where none is finite."""
        return _ranges(self.losses)

    def table(self) -> list[dict[str, Cell]]:
        """A row for each hyperparameter: value, range, effect, and whether to raise or lower it."""
        return [
            {
                "hyperparameter": one.name,
                "value": one.value,
                "range": size,
                "effect": effect,
                "to lower the loss": "raise" if effect < 0 else "lower" if effect > 0 else "-",
            }
            for one, size, effect in zip(self.swept, self.ranges.tolist(), self.effects.tolist(), strict=True)
        ]

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw how the loss changes where each hyperparameter is raised by one perturbation scale, and where lowered.

        Args:
            ax: axes to draw on; None for a new figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        count = len(self.swept)
        figure, ax = figures.single(ax, (6.4, 1.3 + 0.26 * max(count, 3)))
        changes = (self.losses - self.loss).where(self.losses.isfinite(), 0.0)
        for column, place, text in ((-1, -0.2, "raised by one scale"), (0, 0.2, "lowered by one scale")):
            rows = [row + place for row in range(count)]
            ax.barh(rows, changes[:, column].numpy(), height=0.4, label=text)
        ax.axvline(0.0, color=figures.text_colour(), linewidth=0.8)
        ax.set_yticks(range(count), [one.label for one in self.swept], fontsize="small" if count > 12 else "medium")
        ax.set_ylim(count - 0.4, -0.6)
        ax.locator_params(axis="x", nbins=6)
        ax.set_xlabel("change of the validation loss")
        ax.legend(loc="lower right", fontsize="small")
        return figure, ax

    def __repr__(self) -> str:
        """One line."""
        return f"Importance of {', '.join(self.names)}"


def importance(
    module: nn.Module,
    loader: Iterable[Any],
    names: str | Sequence[str] | None = None,
    *,
    points: int = 5,
    batches: int | None = None,
) -> Importance:
    """How much each hyperparameter matters for the validation loss, through the response.

    Measured in two ways, each for a change of one perturbation scale, with the others held: the range of the loss on
    the curve of `sweep` within one scale, which also sees a minimum, and the hypergradient times the scale, which says
    which way the loss falls. A hyperparameter in its minimum has a small effect and may have a large range.

    Args:
        module: an `STNModule` with a converted network; needs no Trainer.
        loader: yields validation batches, as for `sweep`.
        names: hyperparameters; None for all numbers.
        points: number of points of each curve, from one scale below the current value to one above.
        batches: largest number of batches to read; None for all.

    Returns:
        The hyperparameters sorted by their ranges, with `plot()` and a table.

    Raises:
        TypeError: as for `sweep`.
        KeyError: as for `sweep`.
        ValueError: as for `sweep`, or the loss has no gradient in the hyperparameters.
    """
    owner = require_module("importance", module)
    names = resolve_names("importance", owner.hyperparameters, names)
    own = [owner.hyperparameters.slices[name].start for name in names]
    scales = owner.hyperparameters.scale.cpu().double()[own]
    offsets = scales.outer(spread("importance", points, 1.0))
    with evaluating(owner):
        data = read_batches("importance", owner, loader, batches)
        losses = data.losses(owner, one_by_one(owner, names, offsets))
        gradient = _hypergradient(owner, data)
    found = swept_at(owner.hyperparameters, names, offsets)
    curves = losses[1:].reshape(len(names), points)
    order = _ranges(curves).nan_to_num(-1.0).argsort(descending=True, stable=True)
    effects = gradient[own] * scales
    return Importance(tuple(found[i] for i in order.tolist()), curves[order], effects[order], losses[0].item())


def _ranges(losses: Tensor) -> Tensor:
    """Highest minus lowest finite loss of each row, `[names, points]` to `[names]`; NaN where none is finite."""
    finite = losses.isfinite()
    high, low = losses.where(finite, -torch.inf).amax(-1), losses.where(finite, torch.inf).amin(-1)
    return (high - low).where(finite.any(-1), torch.nan)


def _hypergradient(module: Any, data: Batches) -> Tensor:
    """Mean gradient of the validation loss in the current hyperparameters, `[h]`, unconstrained units."""
    optimizer = HyperparameterOptimizer(module.hyperparameters, SharedAdam, lr=1.0)  # differentiates, and never steps
    with torch.enable_grad(), keep_metrics(module):
        pairs = [optimizer.differentiate(partial(module.validation_loss, batch, i), None)[1] for i, batch in data]
    return data.mean([gradient[0] for gradient in pairs])
