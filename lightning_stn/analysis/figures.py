"""What the figures of all analyses share: matplotlib, colours of the current style, and sizes of texts."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_stn.schedule import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADES = (2, 1)
"""Perturbation scales around the current value that are shaded: the response was trained there."""

MOST_COLOURS = 8
"""Names up to which each has a colour in a scatter plot; of more, so many points have their name beside them."""

_NAME_SIZE = torch.tensor([1.2, 0.08], dtype=torch.float64, device="cpu")
"""Width and height of a name in a figure from -1 to 1."""


def pyplot() -> Any:
    """`matplotlib.pyplot`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to install it.
    """
    return plot.pyplot("plot()")


def text_colour() -> str:
    """Colour of texts in the current style, for marks that must be seen on its background."""
    colour: str = pyplot().rcParams["text.color"]
    return colour


def single(ax: "Axes | None", size: tuple[float, float]) -> "tuple[Figure, Axes]":
    """The given axes and their figure, or a new figure of a size in inches with one."""
    if ax is None:
        figure, axes = pyplot().subplots(figsize=size, layout="constrained")
        return figure, axes
    figure = ax.figure
    return figure, ax  # type: ignore[return-value]


def grid(panels: int) -> tuple[int, int]:
    """Rows and columns of a grid that is wider than high."""
    columns = panels if panels <= 4 else math.ceil(math.sqrt(1.6 * panels))
    return math.ceil(panels / columns), columns


def title(panel: "Axes", text: str, inches: float, size: float) -> None:
    """Set a title that is at most so wide: on two lines, broken behind an underscore, and smaller where it must be.

    Args:
        panel: the axes.
        text: the title.
        inches: largest width.
        size: largest font size in points.
    """
    letter = 0.62 / 72  # width of most letters in inches, for a font size of one point
    breaks = [place for place, sign in enumerate(text, 1) if sign in "_ " and place < len(text)]
    if len(text) * size * letter > inches and breaks:
        middle = min(breaks, key=lambda place: abs(2 * place - len(text)))
        text = f"{text[:middle].rstrip()}\n{text[middle:]}"
    longest = max(map(len, text.split("\n")))
    panel.set_title(text, fontsize=min(size, inches / (letter * max(longest, 1))))


def scatter(axes: "Axes", names: Sequence[str], x: Tensor, y: Tensor, *, up: Tensor) -> None:
    """Draw points as triangles: a colour for each name or, of many, names beside the farthest points.

    Args:
        axes: the axes.
        names: the name of each point.
        x: `[p]`, float64.
        y: `[p]`, float64.
        up: whether the triangle of a point points up, `[p]`.
    """
    different = list(dict.fromkeys(names))
    many = len(different) > MOST_COLOURS
    for number, name in enumerate([""] if many else different):
        own = torch.tensor([many or name == other for other in names], device="cpu")
        for marker, chosen in (("^", own & up), ("v", own & ~up)):
            label = name if marker == "^" and not many else None
            axes.plot(x[chosen].numpy(), y[chosen].numpy(), marker, color=f"C{number}", label=label, ms=7, alpha=0.8)
    for index in _farthest(x, y) if many else []:
        left = bool(x[index] > 0)
        text = axes.annotate(
            names[index],
            (x[index].item(), y[index].item()),
            xytext=(-6 if left else 6, 4),
            textcoords="offset points",
            horizontalalignment="right" if left else "left",
            fontsize="x-small",
        )
        text.set_in_layout(False)


def _farthest(x: Tensor, y: Tensor) -> list[int]:
    """Points that are the farthest from zero, and so far from one another that their names do not overlap."""
    both = torch.stack([x, y]).nan_to_num(0.0, 0.0, 0.0)
    places = (both / both.abs().amax(1, keepdim=True).clamp_min(1e-30)).T
    chosen: list[int] = []
    for index in places.abs().amax(1).argsort(descending=True).tolist():
        near = [other for other in chosen if ((places[index] - places[other]).abs() < _NAME_SIZE).all()]
        if not near and len(chosen) < MOST_COLOURS:
            chosen.append(index)
    return chosen
