"""Dropout with a rate of its own for each example."""

from typing import ClassVar

from torch import Tensor, nn

from lightning_stn import functional
from lightning_stn.binding import Regularizer


class _TunedDropout(Regularizer):
    """Zeroes entries with a probability that hyperparameters set, example by example, and rescales the rest.

    Args:
        p: a hyperparameter's name, or a constant rate in [0, 1].

    Shape:
        `[n, *]` to the same shape.

    Raises:
        ValueError: a constant rate outside [0, 1], or an input without a row for each example.
    """

    strengths = ("p",)
    plain: ClassVar[type[nn.Module]]
    shared_dims: ClassVar[int] = 0
    """How many trailing dimensions share one draw."""

    def __init__(self, p: str | float) -> None:
        nn.Module.__init__(self)
        if not isinstance(p, str) and not 0 <= p <= 1:
            raise ValueError(f"{type(self).__name__}: expected p to be a name or a rate in [0, 1], got {p!r}.")
        self.p = p
        self.inplace = False

    def forward(self, input: Tensor) -> Tensor:
        """Drop, in the weight phase; otherwise return the input."""
        if not self.active:
            return input
        return functional.dropout(input, self.strength("p"), self.shared_dims)

    def make_plain(self) -> nn.Module:
        """Torch's dropout at the current rate, this very module."""
        self.p = self.current_strength("p")
        self.detach()
        self.__class__ = self.plain  # type: ignore[assignment]
        return self


class Dropout(_TunedDropout, nn.Dropout):  # type: ignore[misc]
    """`nn.Dropout` with a tuned rate: every element has its own draw."""

    plain = nn.Dropout


class Dropout1d(_TunedDropout, nn.Dropout1d):  # type: ignore[misc]
    """`nn.Dropout1d` with a tuned rate: whole channels of `[n, c, length]`."""

    plain = nn.Dropout1d

    shared_dims = 1


class Dropout2d(_TunedDropout, nn.Dropout2d):  # type: ignore[misc]
    """`nn.Dropout2d` with a tuned rate: whole channels of `[n, c, height, width]`."""

    plain = nn.Dropout2d

    shared_dims = 2


class Dropout3d(_TunedDropout, nn.Dropout3d):  # type: ignore[misc]
    """`nn.Dropout3d` with a tuned rate: whole channels of `[n, c, depth, height, width]`."""

    plain = nn.Dropout3d

    shared_dims = 3


_TUNED: dict[type[nn.Module], type[_TunedDropout]] = {
    kind.plain: kind for kind in (Dropout, Dropout1d, Dropout2d, Dropout3d)
}


def tuned_dropout(plain: type[nn.Module]) -> type[Regularizer] | None:
    """The tuned counterpart of exactly this type of dropout, or None."""
    return _TUNED.get(plain)
