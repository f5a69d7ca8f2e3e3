"""Dropouts for sequences, with a rate for each example."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_stn import functional
from lightning_stn.arguments import require_bool
from lightning_stn.regularizer import Regularizer


class LockedDropout(Regularizer):
    """Drops the same units at every time step, Gal and Ghahramani (2016), arXiv:1512.05287.

    Args:
        p: a hyperparameter's name, or a constant rate in [0, 1].
        batch_first: whether the input is `[n, t, *]`; otherwise it is `[t, n, *]`.

    Shape:
        `[n, t, *]` or `[t, n, *]` to the same shape.

    Raises:
        ValueError: a constant rate is outside [0, 1], or the input has fewer than two dimensions.
    """

    ranges: ClassVar = {"p": (0.0, 1.0)}

    def __init__(self, p: str | float, *, batch_first: bool = True) -> None:
        super().__init__()
        self.p = self.checked("p", p)
        self.batch_first = require_bool(type(self).__name__, "batch_first", batch_first)

    def forward(self, input: Tensor) -> Tensor:
        """Drop units in the weight phase; otherwise return the input."""
        if input.dim() < 2:
            raise ValueError(
                f"LockedDropout: expected a batch of sequences [n, t, ...], got shape {list(input.shape)}; keep the "
                "batch and time dimensions."
            )
        if not self.active:
            return input
        if self.batch_first:
            return functional.dropout(input, self.strength("p"), shared=[1])
        return functional.dropout(input.transpose(0, 1), self.strength("p"), shared=[1]).transpose(0, 1)


class EmbeddingDropout(Regularizer):
    """An embedding that drops whole words: in each example, every occurrence of a word or none.

    Gal and Ghahramani (2016), section 4.2.

    Args:
        embedding: the wrapped embedding, such as an `nn.Embedding`; call it through this module.
        p: a hyperparameter's name, or a constant rate in [0, 1].
        batch_first: whether the words are `[n, t]`; otherwise they are `[t, n]`.

    Shape:
        words `[n, t]` or `[t, n]` to the output of the embedding, `[n, t, d]` or `[t, n, d]`.

    Raises:
        ValueError: a constant rate is outside [0, 1], `embedding` is not a module, or the words have another shape.
    """

    ranges: ClassVar = {"p": (0.0, 1.0)}

    def __init__(self, embedding: nn.Module, p: str | float, *, batch_first: bool = True) -> None:
        super().__init__()
        if not isinstance(embedding, nn.Module):
            raise ValueError(
                f"EmbeddingDropout: expected embedding to be an nn.Module, got {type(embedding).__name__}; pass the "
                "nn.Embedding itself."
            )
        self.embedding = embedding
        self.p = self.checked("p", p)
        self.batch_first = require_bool(type(self).__name__, "batch_first", batch_first)

    def forward(self, words: Tensor) -> Tensor:
        """Embed the words; drop some of them in the weight phase."""
        if words.dim() != 2:
            raise ValueError(
                f"EmbeddingDropout: expected words [n, t], got shape {list(words.shape)}; keep the batch and time "
                "dimensions."
            )
        embedded: Tensor = self.embedding(words)
        if not self.active:
            return embedded
        present, position = words.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        if not self.batch_first:
            position = position.t()
        rate = functional.align(torch.as_tensor(self.strength("p"), device=words.device), position)
        mask = functional.keep_mask([len(position), len(present)], rate, words.device).gather(1, position)
        if not self.batch_first:
            mask = mask.t()
        return embedded * mask.unsqueeze(-1).to(embedded.dtype)

    def make_plain(self) -> nn.Module:
        """The wrapped embedding."""
        return self.embedding
