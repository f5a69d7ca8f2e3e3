"""Everything that a checkpoint holds of a run beside the module: taken and given back in one place."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_stn.callback.interruption import Place
from lightning_stn.callback.loaders import load_loader_states, loader_states
from lightning_stn.callback.saved_state import VERSION
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.methods import HyperparameterOptimizer
from lightning_stn.randomness import set_random_state


class Stateful(Protocol):
    """A part of a run whose state a checkpoint holds."""

    def state_dict(self) -> Any:
        """The state, as tensors and plain values."""

    def load_state_dict(self, state: Any) -> None:
        """Continue from a saved state."""


@dataclass(frozen=True)
class Surroundings:
    """The state around a run that Lightning does not restore. The defaults restore nothing.

    Args:
        generators: states of torch's, NumPy's and Python's generators, by rank; empty for a rank whose are not known.
        metrics: values logged last, for schedulers and callbacks that follow a metric.
        loaders: states of the training loaders that are `ResumableLoader`s, the same on all ranks. Lightning saves
            them too, but does not restore them at the end of an epoch, nor where the loaders were built early, as by
            `trainer.estimated_stepping_batches` (2.6).
        gradients: of the weights, by name, accumulated over batches whose weight step is still to come.
        inexact: why a run that goes on from here is not the one without interruption; empty where it is.
    """

    generators: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    loaders: list[dict[str, int]] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    inexact: str = ""

    @classmethod
    def take(cls, trainer: Trainer, place: Place) -> "Surroundings":
        """The state now; every rank has to call it, except after an exception.

        Args:
            trainer: the Trainer of the run.
            place: where the run goes on.

        An exception may have stopped this rank alone. The others would never answer, so that no checkpoint would be
        written; it then holds the generators of this rank only.
        """
        generators: list[dict[str, Any]] = [{} for _ in range(trainer.world_size)]
        generators[trainer.global_rank] = place.generators.state_dict()
        if trainer.world_size > 1 and not trainer.interrupted:
            torch.distributed.all_gather_object(generators, generators[trainer.global_rank])
        metrics = {name: metric.cpu() for name, metric in trainer.callback_metrics.items()}
        return cls(generators, metrics, loader_states(trainer), place.gradients, place.inexact)

    def give_back_metrics(self, trainer: Trainer) -> None:
        """Restore the metrics that have not been logged anew."""
        for name, metric in self.metrics.items():
            trainer.callback_metrics.setdefault(name, metric.to(trainer.strategy.root_device))

    def give_back_gradients(self, module: nn.Module) -> None:
        """Restore gradients that were accumulated."""
        for name, parameter in module.named_parameters():
            if name in self.gradients:
                parameter.grad = self.gradients[name].to(parameter.device)

    def give_back_streams(self, trainer: Trainer) -> None:
        """Restore training loaders, if their number is that of this run, and generators; warn where these are lost."""
        if self.inexact:
            warnings.warn(
                f"When the checkpoint was written, {self.inexact}. The resumed run is therefore not the one without "
                "interruption; for an exact run, resume from an earlier checkpoint.",
                stacklevel=2,
            )
        load_loader_states(trainer, self.loaders)
        rank, ranks = trainer.global_rank, len(self.generators)
        if ranks == trainer.world_size and self.generators[rank]:
            set_random_state(self.generators[rank])
        elif ranks == trainer.world_size:
            _warn_of_lost_generators(
                f"was written after an exception, when rank {rank} could not be asked for its random generators"
            )
        elif ranks and trainer.is_global_zero:
            _warn_of_lost_generators(
                f"holds the random generators of {ranks} processes, but this run has {trainer.world_size}"
            )


@dataclass(frozen=True)
class RunState:
    """A run as a value: its settings, what its hyperparameters mean, the states of its parts, its surroundings.

    Args:
        settings: `Settings.state_dict` of the run.
        signature: `HyperparameterSet.signature` of the run.
        parts: states of the parts, by name.
        surroundings: those of the run; the defaults where they are not known.
    """

    settings: dict[str, Any]
    signature: dict[str, str]
    parts: dict[str, Any]
    surroundings: Surroundings = field(default_factory=Surroundings)

    @classmethod
    def take(
        cls, settings: dict[str, Any], hyperparameters: HyperparameterSet, parts: Mapping[str, Stateful]
    ) -> "RunState":
        """The state of the parts now, without the surroundings."""
        return cls(settings, hyperparameters.signature, {name: part.state_dict() for name, part in parts.items()})

    def give_back(
        self, hyperparameters: HyperparameterSet, parts: Mapping[str, Stateful], rates: Mapping[str, float]
    ) -> None:
        """Continue the parts from their states.

        Args:
            hyperparameters: the set of the run that continues.
            parts: by name; parts that are left out begin anew.
            rates: learning rates of the hyperparameter optimiser to use instead of the saved ones, by name.

        Raises:
            ValueError: the saved hyperparameters mean something else, or the state is of another optimiser.
        """
        hyperparameters.require_signature(self.signature)
        for name, part in parts.items():
            part.load_state_dict(self.parts[name])
        optimizer = parts.get("optimizer")
        if isinstance(optimizer, HyperparameterOptimizer):
            for name, rate in rates.items():
                if name in optimizer.rates:
                    optimizer.set_rate(name, rate)

    def state_dict(self) -> dict[str, Any]:
        """One flat dictionary: the settings, the signature, the parts, and the surroundings if they are known."""
        state = {"version": VERSION, "settings": self.settings, "hyperparameters": self.signature, **self.parts}
        if self.surroundings.generators:
            state |= {_SURROUNDINGS: vars(self.surroundings)}
        return state

    @staticmethod
    def add_surroundings(state: dict[str, Any], surroundings: Surroundings) -> None:
        """Add the surroundings of a run to its `state_dict`."""
        state[_SURROUNDINGS] = vars(surroundings)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "RunState":
        """The value that a `state_dict` was taken of."""
        parts = dict(state)
        settings, signature = parts.pop("settings"), parts.pop("hyperparameters")
        for name in ("version", "digest"):
            parts.pop(name, None)
        return cls(settings, signature, parts=parts, surroundings=Surroundings(**parts.pop(_SURROUNDINGS, {})))


_SURROUNDINGS = "surroundings"


def _warn_of_lost_generators(reason: str) -> None:
    warnings.warn(
        f"The checkpoint {reason}. They begin anew, so that dropout and other random draws are not those of one run "
        "without interruption. For an exact run, resume from a checkpoint that was written in training, on as many "
        "processes.",
        stacklevel=2,
    )
