"""What the response predicts for other hyperparameters, against networks that train on there."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_stn.analysis import figures
from lightning_stn.analysis.evaluation import Batches, evaluating, read_batches, require_module
from lightning_stn.analysis.positions import resolve_names, shifted
from lightning_stn.analysis.report import Report
from lightning_stn.analysis.training import WeightOptimizer, copy_shifted, train_side_by_side
from lightning_stn.arguments import is_number, is_whole
from lightning_stn.randomness import random_state, set_random_state
from lightning_stn.schedule.tables import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class ResponseFit(Report):
    """Predicted and actual changes of the validation loss; see `response_fit`.

    Args:
        names: the hyperparameter that is shifted, for each point.
        shifts: distances, `[points]`, unconstrained units, float64.
        predicted: change of the loss through the response, `[points]`, float64.
        actual: loss of the copy that trained at the shifted value minus that of the copy that trained as long at the
            current one, `[points]`, float64.
        loss: the loss of the module.
        trained_loss: the loss of the copy that trained on at the current values.

    Example:
        >>> shifts = torch.tensor([-0.5, 0.5]).double()
        >>> found = ResponseFit(("dropout",) * 2, shifts, shifts / 10, shifts / 5, loss=1.0, trained_loss=0.9)
        >>> print(found)
        | hyperparameter | shift | predicted | actual |
        |----------------|------:|----------:|-------:|
        | dropout        |  -0.5 |     -0.05 |   -0.1 |
        | dropout        |   0.5 |      0.05 |    0.1 |
        >>> round(found.correlation, 6), round(found.slope, 6)
        (1.0, 2.0)
    """

    names: tuple[str, ...]
    shifts: Tensor
    predicted: Tensor
    actual: Tensor
    loss: float
    trained_loss: float

    @property
    def correlation(self) -> float:
        """Pearson's correlation of predicted and actual changes that are finite; NaN where one of them is constant."""
        both = self._finite()
        if both.shape[1] < 2 or (both.amin(1) == both.amax(1)).any():
            return float("nan")
        return torch.corrcoef(both)[0, 1].item()

    @property
    def slope(self) -> float:
        """`s` in the least-squares fit `actual = s * predicted`: above 1 where the response predicts too little."""
        predicted, actual = self._finite()
        return float(predicted @ actual / (predicted @ predicted))

    def _finite(self) -> Tensor:
        """Predicted and actual changes where both are finite, `[2, p]`."""
        both = torch.stack([self.predicted, self.actual])
        return both[:, both.isfinite().all(0)]

    def table(self) -> list[dict[str, Cell]]:
        """A row for each point: hyperparameter, shift (unconstrained units), predicted and actual change."""
        columns = map(Tensor.tolist, (self.shifts, self.predicted, self.actual))
        return [
            {"hyperparameter": name, "shift": shift, "predicted": predicted, "actual": actual}
            for name, shift, predicted, actual in zip(self.names, *columns, strict=True)
        ]

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw actual against predicted changes, with the diagonal on which they are equal.

        Args:
            ax: axes to draw on; None for a new figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        figure, ax = figures.single(ax, (5.2, 4.8))
        colour = figures.text_colour()
        for line in (ax.axhline, ax.axvline):
            line(0.0, color=colour, alpha=0.3, linewidth=0.8)
        ax.axline((0.0, 0.0), slope=1.0, color=colour, alpha=0.6, linestyle="--", linewidth=1.0, label="equal")
        figures.scatter(ax, self.names, self.predicted, self.actual, up=self.shifts > 0)
        for marker, text in (("^", "raised"), ("v", "lowered")):
            ax.plot([], [], marker, color=colour, linestyle="none", label=text)
        ax.margins(0.12)
        ax.locator_params(nbins=5)
        ax.set(xlabel="predicted change of the validation loss", ylabel="change after training")
        ax.set_title(f"correlation {self.correlation:.3f}, slope {self.slope:.2f}", fontsize="medium")
        ax.legend(fontsize="small")
        return figure, ax

    def __repr__(self) -> str:
        """One line."""
        return f"ResponseFit of {len(self.names)} points: correlation {self.correlation:.3f}, slope {self.slope:.2f}"


def response_fit(
    module: nn.Module,
    train_loader: Iterable[Any],
    valid_loader: Iterable[Any],
    names: str | Sequence[str] | None = None,
    *,
    shift: float | Sequence[float] = 0.5,
    steps: int = 100,
    optimizer: WeightOptimizer | None = None,
    gradient_clip_val: float | None = None,
    batches: int | None = None,
) -> ResponseFit:
    """Compare what the response predicts for shifted hyperparameters with networks that train on at these values.

    The predicted change of the validation loss is `L_V(w(lambda + d)) - L_V(w(lambda))`. For the actual change copies
    of the module train their base weights for some steps without perturbation, one at `lambda` and one at each
    `lambda + d`. All begin with the effective weights at `lambda` and with a new optimiser, and see the same batches
    and random numbers, so that the shift is all that differs. The response stands for weights that have adapted: too
    few steps show less than it predicts. A whole number acts rounded, so that a shift which rounds to the same number
    changes nothing.

    All copies are in memory together, `2 * names * shifts + 1` of them; where memory is short, name fewer
    hyperparameters. The module and the global random generators stay as they are. Seed them before the call, as with
    `lightning.seed_everything`, for other batches and random numbers.

    Args:
        module: an `STNModule` with a converted network; needs no Trainer.
        train_loader: yields training batches, which pass through the module's batch-transfer hooks.
        valid_loader: yields validation batches, as for `sweep`.
        names: hyperparameters; None for all numbers.
        shift: distance in unconstrained units, or several; each is gone up and down.
        steps: number of training batches of each copy.
        optimizer: builds an optimiser from the list of base weights; None for that of `configure_optimizers`, at its
            initial learning rate.
        gradient_clip_val: largest norm of the gradient; None for no clipping.
        batches: largest number of validation batches to read; None for all.

    Returns:
        Predicted and actual changes, with `correlation`, `slope`, `plot()` and a table.

    Raises:
        TypeError: as for `sweep`, or `optimizer` builds no optimiser.
        KeyError: as for `sweep`.
        ValueError: as for `sweep`, or `configure_optimizers` returns several optimisers.
    """
    owner = require_module("response_fit", module)
    names = resolve_names("response_fit", owner.hyperparameters, names)
    points = [(name, value) for name in names for value in _signed(shift)]
    _check_training(steps, gradient_clip_val)
    build = partial(copy_shifted, "response_fit", owner, factory=optimizer, clip=gradient_clip_val)
    random = random_state()
    try:
        with evaluating(owner):
            data = read_batches("response_fit", owner, valid_loader, batches)
            losses = data.losses(owner, _samples(owner, points))
        copies = [build(None, 0.0), *(build(name, value) for name, value in points)]
        train_side_by_side("response_fit", owner, copies, train_loader, steps)
        trained = torch.cat([_loss(one.module, data) for one in copies])
    finally:
        set_random_state(random)
    predicted, actual = losses[1:] - losses[0], trained[1:] - trained[0]
    shifts = torch.tensor([value for _, value in points], dtype=torch.float64, device="cpu")
    own = tuple(name for name, _ in points)
    return ResponseFit(own, shifts, predicted, actual, losses[0].item(), trained[0].item())


def _samples(module: Any, points: Sequence[tuple[str, float]]) -> Tensor:
    """The current hyperparameters, then those with one of them shifted, `[1 + points, h]`, unconstrained units."""
    names = list(dict.fromkeys(name for name, _ in points))
    offsets = torch.zeros(1 + len(points), len(names), dtype=torch.float64, device="cpu")
    for row, (name, value) in enumerate(points, 1):
        offsets[row, names.index(name)] = value
    return shifted(module, names, offsets)


def _loss(module: Any, data: Batches) -> Tensor:
    """The validation loss of a trained copy, `[1]`, float64 on the CPU."""
    with evaluating(module):
        return data.losses(module, _samples(module, ()))


def _signed(shift: Any) -> list[float]:
    """Every distance down and up.

    Raises:
        ValueError: there is none, or one is not a positive number.
    """
    shifts = list(shift) if isinstance(shift, Sequence) and not isinstance(shift, str) else [shift]
    if not shifts or not all(is_number(value) and value > 0 for value in shifts):
        raise ValueError(
            f"response_fit: expected shift to be a positive number in unconstrained units, or several, got {shift!r}; "
            "0.5 suits most."
        )
    return [sign * float(value) for value in shifts for sign in (-1, 1)]


def _check_training(steps: Any, clip: Any) -> None:
    if not is_whole(steps, 1):
        raise ValueError(f"response_fit: expected steps to be a whole number of at least 1, got {steps!r}.")
    if clip is not None and not (is_number(clip) and clip > 0):
        raise ValueError(f"response_fit: expected gradient_clip_val to be a positive number, or None, got {clip!r}.")
