"""What a callback saves of its run, and how it goes on from there."""

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_stn.callback.hyperparameter_phase import HyperparameterPhase
from lightning_stn.callback.interruptible import InterruptibleCallback
from lightning_stn.callback.loaders import check_loader_states
from lightning_stn.callback.record import Recorder
from lightning_stn.callback.resume import RunState, Stateful, Surroundings
from lightning_stn.callback.saved_state import check_state, migrated, sign
from lightning_stn.callback.settings import Settings
from lightning_stn.checkpoint import PREFIX, saved_hyperparameters
from lightning_stn.manual_optimization import WeightStep
from lightning_stn.module import STNModule
from lightning_stn.phases import PhaseClock


class CheckpointedCallback(InterruptibleCallback):
    """The part of `STNCallback` that saves a run, resumes it, and returns after an exception to where it can go on.

    Args:
        arguments: settings of a new run.
        on_resume_use: names of what a resumed run takes from the arguments.
    """

    _phase: HyperparameterPhase
    _recorder: Recorder

    def __init__(self, arguments: Settings, on_resume_use: frozenset[str]) -> None:
        self._arguments = arguments
        self._on_resume_use = on_resume_use
        self._begin()

    def _begin(self) -> None:
        """Forget an earlier run."""
        super()._begin()
        self._settings = self._arguments
        self._clock = PhaseClock(self._settings.phases)
        self._restored: RunState | None = None
        self.__dict__.pop("_recorder", None)

    @abstractmethod
    def _count(self, module: STNModule, loss: torch.Tensor | None, batch_idx: int) -> None:
        """Count a training batch whose weight step has been taken."""

    def _resume(self, module: STNModule) -> Surroundings:
        """Continue from a checkpoint, if there is one; returns the surroundings, which are given back later."""
        restored = self._restored
        if restored is None:
            return Surroundings()
        use = self._on_resume_use
        parts = self._parts()
        if use & {"hyperparameters", "optimizer", "scales"}:
            del parts["optimizer"]
        assert self._settings.lr is not None
        restored.give_back(module.hyperparameters, parts, {"lr": self._settings.lr} if "lr" in use else {})
        if "hyperparameters" in use:
            module.hyperparameters.reset_parameters()
        return restored.surroundings

    def _parts(self) -> dict[str, Stateful]:
        """The parts of the run whose states a checkpoint holds, by name."""
        return {
            "clock": self._clock,
            "optimizer": self._phase.optimizer,
            "stream": self._phase.stream,
            "watch": self._phase.watch,
            "statistics": self._phase.statistics,
            "record": self._recorder,
            "metric_steps": self._metric_steps,
        }

    @property
    def _weight_step(self) -> WeightStep:
        return self._settings.weight_step

    def _count_interrupted(self, module: LightningModule) -> None:
        assert isinstance(module, STNModule)
        self._count(module, module._stn_last_loss, module.trainer.fit_loop.batch_idx)

    def _inexact(self) -> str:
        return self._phase.inexact

    def state_dict(self) -> dict[str, Any]:
        """The state of the run so far, without its surroundings; see `RunState`."""
        if self._restored is not None:
            return self._restored.state_dict()
        if not hasattr(self, "_recorder"):
            return {}
        hyperparameters = self._recorder.hyperparameters
        return RunState.take(self._settings.state_dict(), hyperparameters, self._parts()).state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the settings now, and all other state when training starts."""
        if not state_dict:
            return
        self._restored = RunState.from_state(migrated(state_dict))
        self._settings, message = self._settings.resumed(self._restored.settings, self._on_resume_use)
        if message:
            rank_zero_warn(message)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the surroundings of the run to the state that Lightning has put into the checkpoint."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state:
            assert isinstance(pl_module, STNModule)
            sign(state, pl_module.hyperparameters.state_dict(prefix=PREFIX))

    def check_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint from which the run cannot be resumed; Lightning has loaded nothing of it.

        Raises:
            ValueError: the state of this callback, or of a `ResumableLoader` that `trainer.fit` was given, is damaged,
                or belongs to something else.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None:
            self._warn_of_absence(
                checkpoint,
                "Weights and hyperparameters are those of the checkpoint; phases, the hyperparameter optimiser, the "
                "order of the validation data and the schedule begin anew.",
            )
            return
        assert isinstance(module, STNModule)
        check_state(state, module.hyperparameters, saved_hyperparameters(module.hyperparameters, checkpoint))
        check_loader_states(trainer, migrated(state)["surroundings"]["loaders"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint also where the module has a hook of this name that does not call `super()`."""
        if trainer.training and self.state_key in checkpoint["callbacks"]:
            self.check_checkpoint(trainer, pl_module, checkpoint)
