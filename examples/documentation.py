"""Real text that is there without a download: paragraphs from the documentation of installed libraries."""

import ast
import importlib.util
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

LIBRARIES = ["matplotlib", "numpy", "scipy", "sklearn", "torch"]
"""The classes; all of these come with the examples."""

GIVEAWAYS = {*LIBRARIES, "scikit", "learn", "pytorch", "pyplot", "np", "plt", "mpl", "tensor", "tensors"}
"""Words that are left out, since they name the library."""

PADDING, UNKNOWN = 0, 1
"""Numbers of the places behind a text, and of every word outside the vocabulary."""

FEWEST_WORDS = 25
"""Words of a paragraph, at least."""


MOST_OF_A_FILE = 8
"""Paragraphs of a file, at most, so that a part has many files."""


def source_files(library: str) -> list[Path]:
    """The Python files of an installed library, without its tests, shuffled in the same way every time."""
    spec = importlib.util.find_spec(library)
    assert spec is not None
    assert spec.origin is not None
    files = sorted(path for path in Path(spec.origin).parent.rglob("*.py") if "test" not in str(path))
    random.Random(0).shuffle(files)
    return files


def paragraphs(path: Path) -> Iterator[str]:
    """The words of each paragraph in the docstrings of a file, in small letters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the library's source
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                words = [word for word in re.findall("[a-z]+", paragraph.lower()) if word not in GIVEAWAYS]
                if len(words) >= FEWEST_WORDS and ">>>" not in paragraph:
                    yield " ".join(words)


@cache
def read_texts(counts: tuple[int, ...]) -> list[list[tuple[str, int]]]:
    """Texts with the number of their library, in parts of different files, so that no text is in two parts.

    Args:
        counts: texts of each library in each part.
    """
    parts: list[list[tuple[str, int]]] = [[] for _ in counts]
    for label, library in enumerate(LIBRARIES):
        files, seen = iter(source_files(library)), set[str]()
        for part, count in zip(parts, counts, strict=True):
            found: list[str] = []
            while len(found) < count and (path := next(files, None)) is not None:
                new = [text for text in dict.fromkeys(paragraphs(path)) if text not in seen]
                found += new[:MOST_OF_A_FILE]
                seen.update(new)
            part += [(text, label) for text in found[:count]]
    return parts


def encode(parts: Sequence[Sequence[tuple[str, int]]], vocabulary: int, length: int) -> list[TensorDataset]:
    """Words as numbers `[n, length]` and labels `[n]`, for each part.

    Args:
        parts: texts and labels; the first part decides which words have a number.
        vocabulary: how many numbers there are, with those of `PADDING` and `UNKNOWN`.
        length: words of a text that are kept.
    """
    counted = Counter(word for text, _ in parts[0] for word in text.split())
    frequent = [word for word, _ in counted.most_common(vocabulary - 2)]
    numbers = {word: number for number, word in enumerate(frequent, start=2)}
    datasets = []
    for part in parts:
        rows = [[numbers.get(word, UNKNOWN) for word in text.split()[:length]] for text, _ in part]
        padded = torch.tensor([row + [PADDING] * (length - len(row)) for row in rows])
        datasets.append(TensorDataset(padded, torch.tensor([label for _, label in part])))
    return datasets
