"""Dropouts and stochastic depth with tuned rates, a rate for each example."""

from typing import ClassVar, Literal

from torch import Tensor, nn
from torchvision.ops import StochasticDepth  # type: ignore[import-untyped]

from lightning_stn import functional
from lightning_stn.arguments import is_number
from lightning_stn.regularizers.registry import Tunable, register_by_name, register_tunable


class TunedDropout(Tunable):
    """Zeroes entries at a tuned rate, with a draw for each example, and rescales the others.

    Args:
        p: a hyperparameter's name, or a constant rate in [0, 1].

    Shape:
        `[n, *]` to the same shape.

    Raises:
        ValueError: a constant rate outside [0, 1], or an input whose rows are not the examples.
    """

    shared: ClassVar[tuple[int, ...]] = ()
    """Dimensions that share one draw."""

    p: str | float

    def __init__(self, p: str | float) -> None:
        nn.Module.__init__(self)
        setattr(self, self.rate_name(), self.checked(self.rate_name(), p))
        self.inplace = False

    def forward(self, input: Tensor) -> Tensor:
        """Drop entries in the weight phase; otherwise return the input."""
        if not self.active:
            return input
        self.check_input(input)
        return functional.dropout(input, self.tuned_rate(), self.shared)

    def check_input(self, input: Tensor) -> None:
        """Check that the input can be dropped from.

        Raises:
            ValueError: the input is not floating point, or has not the dimensions of a batch of whole channels.
        """
        name, shape = type(self).__name__, list(input.shape)
        if not (input.is_floating_point() or input.is_complex()):
            raise ValueError(f"{name}: expected a floating point input, got {input.dtype}; convert it first.")
        if self.shared and input.dim() != 2 + len(self.shared):
            raise ValueError(
                f"{name}: expected a batch [n, c, ...] with {2 + len(self.shared)} dimensions, got shape {shape}; use "
                "the dropout of the right number of dimensions, or add the missing dimension."
            )


@register_tunable(nn.Dropout, "dropout")
class Dropout(TunedDropout, nn.Dropout):  # type: ignore[misc]
    """`nn.Dropout` with a tuned rate: a draw for every element."""

    plain_type = nn.Dropout


@register_tunable(nn.Dropout1d, "dropout")
class Dropout1d(TunedDropout, nn.Dropout1d):  # type: ignore[misc]
    """`nn.Dropout1d` with a tuned rate: a draw for every channel of `[n, c, length]`."""

    plain_type = nn.Dropout1d
    shared = (-1,)


@register_tunable(nn.Dropout2d, "dropout")
class Dropout2d(TunedDropout, nn.Dropout2d):  # type: ignore[misc]
    """`nn.Dropout2d` with a tuned rate: a draw for every channel of `[n, c, height, width]`."""

    plain_type = nn.Dropout2d
    shared = (-2, -1)


@register_tunable(nn.Dropout3d, "dropout")
class Dropout3d(TunedDropout, nn.Dropout3d):  # type: ignore[misc]
    """`nn.Dropout3d` with a tuned rate: a draw for every channel of `[n, c, depth, height, width]`."""

    plain_type = nn.Dropout3d
    shared = (-3, -2, -1)


@register_tunable(nn.AlphaDropout, "dropout")
class AlphaDropout(TunedDropout, nn.AlphaDropout):  # type: ignore[misc]
    """`nn.AlphaDropout` with a tuned rate, for networks of SELU units."""

    plain_type = nn.AlphaDropout

    def forward(self, input: Tensor) -> Tensor:
        """Drop entries in the weight phase; otherwise return the input."""
        return functional.alpha_dropout(input, self.tuned_rate()) if self.active else input


class TunedDropPath(TunedDropout):
    """Stochastic depth with a tuned rate: drops a residual branch, Huang et al. (2016), arXiv:1603.09382.

    Branches that share a hyperparameter keep the ratios of their rates.
    """

    proportional = True
    mode: str = "row"
    """Whether each example has a draw, "row", or the batch has one, "batch"."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop the branch in the weight phase; otherwise return the input."""
        if not self.active:
            return input
        by_row = self.mode == "row"
        return functional.dropout(input, self.tuned_rate(shared=not by_row), range(by_row, input.dim()))


@register_tunable(StochasticDepth, "drop_path")
class DropPath(TunedDropPath, StochasticDepth):  # type: ignore[misc]
    """torchvision's `StochasticDepth` with a tuned rate; see `TunedDropPath`.

    Args:
        p: a hyperparameter's name, or a constant rate in [0, 1].
        mode: "row" draws for each example, "batch" draws once and needs a rate that the batch shares.
        share: the rate is `share * p`, so that branches of different depth can share a hyperparameter.

    Raises:
        ValueError: a constant rate or a share outside [0, 1], an unknown mode, or a rate for each example in "batch".
    """

    plain_type = StochasticDepth

    def __init__(self, p: str | float, mode: Literal["row", "batch"] = "row", share: float = 1.0) -> None:
        super().__init__(p)
        if mode not in ("row", "batch"):
            raise ValueError(f"DropPath: expected mode='row' or mode='batch', got {mode!r}.")
        if not is_number(share) or not 0 <= share <= 1:
            raise ValueError(f"DropPath: expected share to lie in [0, 1], got {share!r}.")
        self.mode = mode
        self.share = share


register_by_name(r"timm\.layers\.drop\.DropPath", "drop_path", TunedDropPath, "drop_prob")
register_by_name(r"transformers\.models\..*\.\w*DropPath", "drop_path", TunedDropPath, "drop_prob")
