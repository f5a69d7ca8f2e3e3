"""Values of hyperparameters on the Trainer's progress bar."""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar

from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.specifications import Value

MOST = 5
"""Values that fit on a bar; of more hyperparameters the first are shown."""


class BarValues:
    """Shows values on the progress bar, which asks for them when it refreshes.

    The values reach neither `trainer.callback_metrics` nor a logger, and cost nothing without a bar.

    Args:
        trainer: the Trainer, with or without a bar.
        values: returns the values now, natural units, by name; a `Categorical` as its choice.
    """

    def __init__(self, trainer: Trainer, values: Callable[[], Mapping[str, Value]]) -> None:
        self._values = values
        self._bar: ProgressBar | None = trainer.progress_bar_callback
        if self._bar is not None:
            self._before = self._bar.__dict__.get("get_metrics")  # where somebody else shows values in the same way
            self._metrics = self._bar.get_metrics
            self._bar.get_metrics = self._get_metrics  # type: ignore[method-assign]

    def release(self) -> None:
        """Leave the bar as it was."""
        if self._bar is not None:
            if self._before is None:
                del self._bar.__dict__["get_metrics"]
            else:
                self._bar.__dict__["get_metrics"] = self._before
            self._bar = None

    def _get_metrics(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**self._metrics(*args, **kwargs), **dict(islice(self._values().items(), MOST))}


class CurrentValues:
    """The first of the current values of a set, computed again when they have changed.

    Args:
        hyperparameters: the set.
    """

    def __init__(self, hyperparameters: HyperparameterSet) -> None:
        self._hyperparameters = hyperparameters
        self._shown = dict(list(hyperparameters.specifications.items())[:MOST])
        self._version: int | None = None
        self._values: dict[str, Value] = {}

    def __call__(self) -> dict[str, Value]:
        """The values, natural units, by name."""
        unconstrained = self._hyperparameters.unconstrained
        if self._version != unconstrained._version:
            self._version = unconstrained._version
            entries = unconstrained.cpu().double()
            self._values = {
                name: specification.value(entries[self._hyperparameters.slices[name]])
                for name, specification in self._shown.items()
            }
        return self._values
