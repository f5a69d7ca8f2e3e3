"""WikiText-2 for the tasks that read it: words as numbers.

The validation split serves as training text; the test split is cut into a validation and a test part.
"""

from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

UNKNOWN = 0
"""Number of every word outside the vocabulary."""


class Texts(NamedTuple):
    """Numbers of the words of three texts, each `[t]`, int64."""

    train: Tensor
    valid: Tensor
    test: Tensor


def _words(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [word for line in lines if line.strip() for word in [*line.split(), "<eos>"]]


@cache
def _numbers(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """Both splits as numbers below `size`: the most frequent words of the first split, and `UNKNOWN`."""
    first, second = _words(folder / "valid.txt"), _words(folder / "test.txt")
    frequent = [word for word, _ in Counter(first).most_common() if word != "<unk>"][: size - 1]
    vocabulary = {word: number for number, word in enumerate(frequent, start=UNKNOWN + 1)}
    as_numbers = [torch.tensor([vocabulary.get(word, UNKNOWN) for word in text]) for text in (first, second)]
    return as_numbers[0], as_numbers[1]


def log_frequencies(folder: Path, size: int) -> Tensor:
    """Logarithm of each word's share of the first split, `[size]`."""
    first, _ = _numbers(folder, size)
    return (first.bincount(minlength=size) / len(first)).log()


def read(folder: Path, size: int, train: int, valid: int, test: int, seed: int) -> Texts:
    """Passages of the two splits.

    Args:
        folder: holds `valid.txt` and `test.txt`.
        size: of the vocabulary, `UNKNOWN` included.
        train: words of the training text, which begins at a place that the seed draws.
        valid: words of the validation text.
        test: words of the test text, which follows the validation text.
        seed: draws the training text.
    """
    first, second = _numbers(folder, size)
    begin = int(torch.randint(len(first), (), generator=torch.Generator().manual_seed(seed)))
    return Texts(first.roll(-begin)[:train], second[:valid], second[valid : valid + test])
