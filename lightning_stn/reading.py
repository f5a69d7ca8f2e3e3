"""Reads the values of many hyperparameters in few calls."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from torch import Tensor

from lightning_stn.specifications import Hyperparameter, ReadTogether


class _Place(NamedTuple):
    """Where the value of a hyperparameter stands: which reading, and which column of it; None for all of it."""

    reading: int
    column: int | None


class Values(Mapping[str, Tensor]):
    """Values in natural units by name; the tensor of a single one is made when it is asked for.

    Args:
        places: where each value stands, by name.
        readings: of a family `[..., k]`, of a hyperparameter without one `[...]`.
        shared: names of which only the first row counts.
    """

    def __init__(
        self, places: Mapping[str, _Place], readings: Sequence[Tensor], shared: Set[str] = frozenset()
    ) -> None:
        self._places = places
        self._readings = readings
        self._shared = shared

    def __getitem__(self, name: str) -> Tensor:
        """The value of one hyperparameter, `[...]`, without the rows where it is shared."""
        reading, column = self._places[name]
        value = self._readings[reading] if column is None else self._readings[reading].select(-1, column)
        return value[0] if name in self._shared else value

    def __iter__(self) -> Iterator[str]:
        """All names."""
        return iter(self._places)

    def __len__(self) -> int:
        """Number of hyperparameters."""
        return len(self._places)


class Reader:
    """Reads all hyperparameters of a set; those of one family in one go.

    Args:
        specifications: by name.
        slices: entries of each hyperparameter, by name.
    """

    def __init__(self, specifications: Mapping[str, Hyperparameter], slices: Mapping[str, slice]) -> None:
        families: dict[object, list[str]] = {}
        for name, specification in specifications.items():
            families.setdefault(name if specification.family is None else (specification.family,), []).append(name)
        self._readings: list[tuple[slice | list[int], ReadTogether]] = []
        places: dict[str, _Place] = {}
        for number, names in enumerate(families.values()):
            own = [specifications[name] for name in names]
            alone = own[0].family is None
            entries = slices[names[0]] if alone else _as_slice([slices[name].start for name in names])
            self._readings.append((entries, own[0].read if alone else own[0].read_together(own)))
            places |= {name: _Place(number, None if alone else column) for column, name in enumerate(names)}
        self._places = {name: places[name] for name in specifications}
        self._shared = {name for name, specification in specifications.items() if specification.perturb == "batch"}

    def read(self, unconstrained: Tensor) -> Values:
        """Values at entries `[..., h]`, unconstrained units."""
        return Values(self._places, self._read(unconstrained))

    def read_rows(self, unconstrained: Tensor) -> Values:
        """Values at rows `[n, h]`, unconstrained units; of a hyperparameter that a batch shares, of the first row."""
        return Values(self._places, self._read(unconstrained), self._shared)

    def _read(self, unconstrained: Tensor) -> list[Tensor]:
        return [read(unconstrained[..., entries]) for entries, read in self._readings]


def _as_slice(entries: Sequence[int]) -> slice | list[int]:
    """Entries as a slice where they follow one another, which costs no copy."""
    first, last = entries[0], entries[-1] + 1
    return slice(first, last) if list(entries) == list(range(first, last)) else list(entries)
