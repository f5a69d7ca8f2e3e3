"""Constants of a replay, and whether hyperparameters can have the values that are replayed."""

from collections.abc import Mapping, Sequence

import torch

from lightning_stn.arguments import is_number
from lightning_stn.schedule.unspecified import Unspecified
from lightning_stn.specifications import Hyperparameter, Value

READER = "ScheduleReplay"
"""Begins error messages."""

Constants = Mapping[str, Value | Hyperparameter]
"""Values in natural units by name; a specification stands for its `init`, and tells the range."""


def read_constants(values: Constants) -> tuple[dict[str, Value], dict[str, Hyperparameter]]:
    """Constants and specifications by name.

    Raises:
        ValueError: there are none, or one is neither a number, nor a choice, nor a specification.
    """
    wrong = {
        name: value
        for name, value in values.items()
        if not isinstance(name, str) or not (is_number(value) or isinstance(value, str | Hyperparameter))
    }
    if wrong or not values:
        raise ValueError(
            f"{READER}: expected values to give a finite number, a choice or a specification for each name, got "
            f"{wrong or 'no name'}; write for instance {{'dropout': 0.3}}."
        )
    specifications: dict[str, Hyperparameter] = {}
    constants: dict[str, Value] = {}
    for name, value in values.items():
        if isinstance(value, Hyperparameter):
            specifications[name], constants[name] = value, value.init
        else:
            constants[name] = value
            if not isinstance(value, str):
                specifications[name] = Unspecified(init=value, low=value, high=value)
    return constants, specifications


def misfit(name: str, specification: Hyperparameter, values: Sequence[Value]) -> str:
    """Why a hyperparameter cannot have one of these values, in words; empty if it can have all."""
    for value in _extremes(values):
        if isinstance(value, str) == specification.is_number:
            return f"{name}={value!r}: {specification!r} is {'a number' if specification.is_number else 'a choice'}"
        if specification.is_rounded and not float(value).is_integer():
            return f"{name}={value!r}: {specification!r} is a whole number"
        try:
            specification.entries(value)
        except ValueError as error:
            return f"{name}={value!r}: {error}"
    return ""


def _extremes(values: Sequence[Value]) -> list[Value]:
    """Every choice; of numbers the smallest, the largest, and one that is not whole, if there is one."""
    choices: list[Value] = [value for value in dict.fromkeys(values) if isinstance(value, str)]
    numbers = [value for value in values if not isinstance(value, str)]
    broken = [value for value in numbers if not float(value).is_integer()][:1]
    return [*choices, min(numbers), max(numbers), *broken] if numbers else choices


def typed(specification: Hyperparameter | None, value: Value) -> Value:
    """A constant as the type that the hyperparameter's values have: a `Float` is never an int."""
    if specification is None or isinstance(specification, Unspecified) or isinstance(value, str):
        return value
    entries = torch.tensor(specification.entries(value), dtype=torch.float64, device="cpu").float().double()
    return type(specification.value(entries))(value)
