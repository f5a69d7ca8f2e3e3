"""WikiText-2 for the tasks that read it: words as numbers.

The validation split serves as training text. The articles of the test split serve in turn as validation and test text,
each with its first words only, so that both texts cover many subjects.
"""

import re
from collections import Counter
from collections.abc import Iterator
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


def _articles(path: Path) -> Iterator[list[str]]:
    """The words of each article, with `<eos>` after each line that is not empty."""
    text = path.read_text(encoding="utf-8")
    for article in re.split(r"\n(?= = [^=]+ = *\n)", text):  # an article begins with the heading " = Title = "
        words = [word for line in article.splitlines() if line.strip() for word in [*line.split(), "<eos>"]]
        if words:
            yield words


@cache
def _numbers(folder: Path, size: int) -> tuple[Tensor, list[Tensor]]:
    """The training split and the articles of the other one, as numbers below `size`.

    The most frequent words of the training split have a number; all others are `UNKNOWN`.
    """
    first = [word for article in _articles(folder / "valid.txt") for word in article]
    frequent = [word for word, _ in Counter(first).most_common() if word != "<unk>"][: size - 1]
    vocabulary = {word: number for number, word in enumerate(frequent, start=UNKNOWN + 1)}

    def numbers(words: list[str]) -> Tensor:
        return torch.tensor([vocabulary.get(word, UNKNOWN) for word in words])

    return numbers(first), [numbers(article) for article in _articles(folder / "test.txt")]


def log_frequencies(folder: Path, size: int) -> Tensor:
    """Logarithm of each word's share of the training split, `[size]`."""
    words, _ = _numbers(folder, size)
    return (words.bincount(minlength=size) / len(words)).log()


def read(folder: Path, size: int, train: int, valid: int, test: int, seed: int) -> Texts:
    """Training, validation and test text.

    Args:
        folder: holds `valid.txt` and `test.txt`.
        size: of the vocabulary, `UNKNOWN` included.
        train: words of the training text, which begins at a place that the seed draws.
        valid: words of the validation text, at most.
        test: words of the test text, at most.
        seed: draws the training text.
    """
    words, articles = _numbers(folder, size)
    begin = int(torch.randint(len(words), (), generator=torch.Generator().manual_seed(seed)))
    return Texts(words.roll(-begin)[:train], _beginnings(articles[::2], valid), _beginnings(articles[1::2], test))


def _beginnings(articles: list[Tensor], words: int) -> Tensor:
    """The first words of each article, equally many of each that is long enough."""
    each = words // len(articles)
    return torch.cat([article[:each] for article in articles])
