"""Dropout with a rate of its own for each example."""

from typing import ClassVar, Literal

from torch import Tensor, nn
from torchvision.ops import StochasticDepth  # type: ignore[import-untyped]

from lightning_stn import functional
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.regularizer import Regularizer


class TunedDropout(Regularizer):
    """Zeroes entries with a probability that hyperparameters set, example by example, and rescales the rest.

    Args:
        p: a hyperparameter's name, or a constant rate in [0, 1].

    Shape:
        `[n, *]` to the same shape.

    Raises:
        ValueError: a constant rate outside [0, 1], or an input without a row for each example.
    """

    ranges: ClassVar = {"p": (0.0, 1.0)}
    plain: ClassVar[type[nn.Module]]
    """The layer of torch or torchvision that this one is in place of."""
    shared: ClassVar[tuple[int, ...]] = ()
    """Dimensions that share one draw."""

    p: str | float

    def __init__(self, p: str | float) -> None:
        nn.Module.__init__(self)
        self.p = self.checked("p", p)
        self.inplace = False

    def forward(self, input: Tensor) -> Tensor:
        """Drop, in the weight phase; otherwise return the input."""
        if not self.active:
            return input
        self.check_input(input)
        return functional.dropout(input, self.strength("p"), self.shared)

    def check_input(self, input: Tensor) -> None:
        """Refuse what could not be dropped from as asked.

        Raises:
            ValueError: the input is not floating point, or a draw that its channels share would reach the examples.
        """
        name, shape = type(self).__name__, list(input.shape)
        if not (input.is_floating_point() or input.is_complex()):
            raise ValueError(f"{name}: expected a floating point input, got {input.dtype}; convert it before.")
        if self.shared and input.dim() != 2 + len(self.shared):
            raise ValueError(
                f"{name}: expected a batch [n, c, ...] with {2 + len(self.shared)} dimensions, got shape {shape}; use "
                "the dropout of the right number of dimensions, or add the one that is missing."
            )

    @classmethod
    def adopt(cls, module: nn.Module, p: str, hyperparameters: HyperparameterSet) -> None:
        """Turn a plain dropout into this tuned one in place."""
        module.__class__ = cls
        assert isinstance(module, TunedDropout)
        module.p = p
        module.attach(hyperparameters)

    def make_plain(self) -> nn.Module:
        """The plain layer at the current rate, this very module."""
        self.p = self.current_strength("p")
        self.detach()
        self.__class__ = self.plain  # type: ignore[assignment]
        return self


class Dropout(TunedDropout, nn.Dropout):  # type: ignore[misc]
    """`nn.Dropout` with a tuned rate: every element has its own draw."""

    plain = nn.Dropout


class Dropout1d(TunedDropout, nn.Dropout1d):  # type: ignore[misc]
    """`nn.Dropout1d` with a tuned rate: whole channels of `[n, c, length]`."""

    plain = nn.Dropout1d

    shared = (-1,)


class Dropout2d(TunedDropout, nn.Dropout2d):  # type: ignore[misc]
    """`nn.Dropout2d` with a tuned rate: whole channels of `[n, c, height, width]`."""

    plain = nn.Dropout2d

    shared = (-2, -1)


class Dropout3d(TunedDropout, nn.Dropout3d):  # type: ignore[misc]
    """`nn.Dropout3d` with a tuned rate: whole channels of `[n, c, depth, height, width]`."""

    plain = nn.Dropout3d

    shared = (-3, -2, -1)


class AlphaDropout(TunedDropout, nn.AlphaDropout):  # type: ignore[misc]
    """`nn.AlphaDropout` with a tuned rate, for networks of SELU units."""

    plain = nn.AlphaDropout

    def forward(self, input: Tensor) -> Tensor:
        """Drop, in the weight phase; otherwise return the input."""
        return functional.alpha_dropout(input, self.strength("p")) if self.active else input


class DropPath(TunedDropout, StochasticDepth):  # type: ignore[misc]
    """Stochastic depth with a tuned rate: leaves out a residual branch, Huang et al. (2016), arXiv:1603.09382.

    Args:
        p: a hyperparameter's name, or a constant rate in [0, 1].
        mode: "row" draws for each example, "batch" once for all, which needs a rate that the batch shares.
        share: the rate is `share * p`, so that one hyperparameter can serve branches of different depth.

    Raises:
        ValueError: a constant rate or a share outside [0, 1], an unknown mode, or rates for each example in "batch".
    """

    plain = StochasticDepth
    share: float = 1.0

    def __init__(self, p: str | float, mode: Literal["row", "batch"] = "row", share: float = 1.0) -> None:
        super().__init__(p)
        if mode not in ("row", "batch"):
            raise ValueError(f"DropPath: expected mode='row' or mode='batch', got {mode!r}.")
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"DropPath: expected share to lie in [0, 1], got {share!r}.")
        self.mode = mode
        self.share = share

    def forward(self, input: Tensor) -> Tensor:
        """Leave the branch out, in the weight phase; otherwise return the input."""
        if not self.active:
            return input
        rate = self.strength("p") if self.mode == "row" else self.shared_strength("p")
        return functional.dropout(input, rate * self.share, range(self.mode == "row", input.dim()))

    def current_strength(self, name: str) -> float:
        """The branch's own rate at the current hyperparameters."""
        return super().current_strength(name) * self.share


_TUNED: dict[type[nn.Module], type[TunedDropout]] = {
    kind.plain: kind for kind in (Dropout, Dropout1d, Dropout2d, Dropout3d, AlphaDropout)
}


def tuned_dropout(plain: type[nn.Module]) -> type[TunedDropout] | None:
    """The tuned counterpart of exactly this type of torch's dropouts, or None."""
    return _TUNED.get(plain)
