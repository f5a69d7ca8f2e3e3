"""Reads the values of many hyperparameters in few calls."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_stn.specifications import Hyperparameter, ReadTogether


class _Family(NamedTuple):
    """Hyperparameters that are read in one go: their names, their entries, and what reads them."""

    names: list[str]
    entries: slice | list[int]
    read: ReadTogether


class Reader:
    """Reads all hyperparameters of a set; those of one family in one go.

    Args:
        specifications: by name.
        slices: entries of each hyperparameter, by name.
    """

    def __init__(self, specifications: Mapping[str, Hyperparameter], slices: Mapping[str, slice]) -> None:
        self._names = list(specifications)
        self._alone = {name: (one, slices[name]) for name, one in specifications.items() if one.family is None}
        families: dict[object, list[str]] = {}
        for name, specification in specifications.items():
            if specification.family is not None:
                families.setdefault(specification.family, []).append(name)
        self._families = [
            _Family(
                names,
                _as_slice([slices[name].start for name in names]),
                specifications[names[0]].read_together([specifications[name] for name in names]),
            )
            for names in families.values()
        ]

    def read(self, unconstrained: Tensor) -> dict[str, Tensor]:
        """Values in natural units by name, `[...]`, at entries `[..., h]`, unconstrained units."""
        values = {name: one.read(unconstrained[..., own]) for name, (one, own) in self._alone.items()}
        for names, entries, read in self._families:
            values |= zip(names, read(unconstrained[..., entries]).unbind(-1), strict=True)
        return {name: values[name] for name in self._names}


def _as_slice(entries: Sequence[int]) -> slice | list[int]:
    """Entries as a slice where they follow one another, which costs no copy."""
    first, last = entries[0], entries[-1] + 1
    return slice(first, last) if list(entries) == list(range(first, last)) else list(entries)
