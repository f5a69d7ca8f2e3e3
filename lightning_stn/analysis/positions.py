"""Where an analysis evaluates a module: hyperparameters by name, and samples around the current ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_stn.arguments import is_number, is_whole
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.specifications import Hyperparameter


@dataclass(frozen=True, eq=False)
class Swept:
    """One hyperparameter around its current value.

    Args:
        name: its name.
        unit: name of its natural unit; "" where there is none.
        value: the current value, natural units; of a whole number before rounding.
        scale: the perturbation scale, unconstrained units.
        values: natural units at the offsets of the analysis, `[p]`, float64; of a whole number before rounding.
    """

    name: str
    unit: str
    value: float
    scale: float
    values: Tensor

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


def resolve_names(reader: str, hyperparameters: HyperparameterSet, names: Any) -> tuple[str, ...]:
    """The hyperparameters to analyse.

    Args:
        reader: name of the function, for error messages.
        hyperparameters: the set.
        names: their names, or one name; None for all numbers. A choice has no value between two others: it is left out.

    Raises:
        TypeError: `names` is neither a name nor a sequence of names.
        KeyError: a name is unknown; the message lists the names.
        ValueError: there is no name, a name is given twice, or one is no number with a single entry.
    """
    specifications = hyperparameters.specifications
    if names is None:
        names = [name for name, specification in specifications.items() if specification.has_place]
        if not names:
            raise ValueError(f"{reader}: expected a hyperparameter that is a number, got only {list(specifications)}.")
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{reader}: expected names to be a list of names, got {names!r}; None takes all numbers.")
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"{reader}: expected names to be different hyperparameters, got {list(names)}; name each once."
        )
    for name in names:
        hyperparameters.require(name, reader)
        if not specifications[name].has_place:
            raise ValueError(
                f"{reader}: expected names of numbers, got {name!r}, a {type(specifications[name]).__name__}; leave it "
                "out, since only a number with one unconstrained entry can be shifted."
            )
    return tuple(names)


def spread(reader: str, points: Any, width: Any) -> Tensor:
    """Offsets from `-width` to `width`, `[points]`, unconstrained units, float64.

    Raises:
        ValueError: there are fewer than two points, or the width is not a positive number.
    """
    if not is_whole(points, 2):
        raise ValueError(
            f"{reader}: expected points to be a whole number of at least 2, got {points!r}; give for instance 5."
        )
    if not (is_number(width) and width > 0):
        raise ValueError(
            f"{reader}: expected width to be a positive number in unconstrained units, got {width!r}; 2.0 suits most."
        )
    return torch.linspace(-width, width, points, dtype=torch.float64, device="cpu")


def swept_at(hyperparameters: HyperparameterSet, names: Sequence[str], offsets: Tensor) -> tuple[Swept, ...]:
    """The hyperparameters of these names at offsets `[p]`, or `[names, p]`, unconstrained units."""
    current, scales = hyperparameters.unconstrained.cpu().double(), hyperparameters.scale.cpu().double()
    found = []
    for name, own in zip(names, offsets.expand(len(names), -1), strict=True):
        specification, entry = hyperparameters.specifications[name], hyperparameters.slices[name].start
        value = _natural(specification, current[entry : entry + 1]).item()
        values = _natural(specification, current[entry] + own)
        found.append(Swept(name, specification.unit, value, scales[entry].item(), values))
    return tuple(found)


def _natural(specification: Hyperparameter, entries: Tensor) -> Tensor:
    """Natural units of entries `[p]`, before rounding, float64."""
    values: list[float] = []
    for entry in entries.unsqueeze(-1):
        unrounded = specification.unrounded(entry)
        values.append(float(specification.value(entry)) if unrounded is None else unrounded)
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def shifted(module: Any, names: Sequence[str], offsets: Tensor) -> Tensor:
    """Samples at offsets from the current hyperparameters.

    Args:
        module: the module; a network in float64 gets samples in float64.
        names: of the hyperparameters that are shifted.
        offsets: `[p, names]`, unconstrained units.

    Returns:
        `[p, h]`, unconstrained units, on the device of the hyperparameters.
    """
    hyperparameters: HyperparameterSet = module.hyperparameters
    precise = any(parameter.dtype == torch.float64 for parameter in module.parameters())
    samples = hyperparameters.unconstrained.cpu().double().repeat(len(offsets), 1)
    for column, name in enumerate(names):
        samples[:, hyperparameters.slices[name].start] += offsets[:, column]
    return samples.to(hyperparameters.unconstrained.device, torch.float64 if precise else torch.float32)


def one_by_one(module: Any, names: Sequence[str], offsets: Tensor) -> Tensor:
    """Samples in which one hyperparameter is shifted and the others are held.

    Args:
        module: the module.
        names: of the hyperparameters.
        offsets: `[names, p]`, unconstrained units.

    Returns:
        `[1 + names * p, h]`: the current hyperparameters, then all points of the first name, and so on.
    """
    count, points = offsets.shape
    table = torch.zeros(1 + count * points, count, dtype=torch.float64, device="cpu")
    for column, own in enumerate(offsets):
        table[1 + column * points : 1 + (column + 1) * points, column] = own
    return shifted(module, names, table)
