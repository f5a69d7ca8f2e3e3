"""What a replay saves of its run, and how it goes on from there."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_stn.callback.interruptible import InterruptibleCallback
from lightning_stn.callback.logged_steps import LoggedSteps
from lightning_stn.callback.progress import batch_progress
from lightning_stn.callback.readers import Readers
from lightning_stn.callback.replay_checks import VERSION, check_state, describe_changes
from lightning_stn.callback.resume import Surroundings
from lightning_stn.callback.tensorboard import VALUE
from lightning_stn.manual_optimization import WeightStep
from lightning_stn.specifications import Value


class CheckpointedReplay(InterruptibleCallback):
    """The part of `ScheduleReplay` that knows where a run is, puts values in force, logs and saves them.

    Args:
        step: how the weights of an `STNModule` step in manual optimisation.
    """

    _readers: Readers | None = None

    def __init__(self, step: WeightStep) -> None:
        self._step = step
        self._begin()

    def _begin(self) -> None:
        """Forget an earlier run."""
        super()._begin()
        self._axis = LoggedSteps()
        self._batches = 0
        self._logged = -1  # batches at the last log
        self._restored: dict[str, Any] | None = None
        self._values: dict[str, Value] | None = None
        self._starts = False  # whether no training batch of this `fit` is over

    @property
    def values(self) -> dict[str, Value]:
        """The values in force, natural units by name; after a run the last ones, without noise.

        Raises:
            RuntimeError: training has not started.
        """
        if self._values is None:
            raise RuntimeError("No values are in force yet; they are set while trainer.fit runs.")
        return dict(self._values)

    @property
    def _weight_step(self) -> WeightStep:
        return self._step

    def _resume(self, trainer: Trainer) -> Surroundings:
        """Continue from a checkpoint, if there is one; returns the surroundings, which are given back later."""
        assert self._readers is not None
        state = self._restored
        if state is None:
            if not self._batches:  # the batches of another callback's run, if it is resumed
                self._batches = int(batch_progress(trainer).total.processed)
                self._axis.number = self._batches // trainer.accumulate_grad_batches
            return Surroundings()
        self._batches = self._logged = state["batches"]
        self._axis.load_state_dict(state)
        self._metric_steps.load_state_dict(state["metric_steps"])
        if message := describe_changes(state["signature"], self._readers.policy.signature()):
            rank_zero_warn(message)
        return Surroundings(**state["surroundings"])

    def _enter(self, *, noise: bool = True) -> None:
        """Put the values of the next training batch in force."""
        assert self._readers is not None
        self._values = self._readers.enter(self._batches, noise=noise)

    def _log(self, trainer: Trainer) -> None:
        """Give the values in force to all loggers, once after so many training batches."""
        if self._logged == self._batches:
            return
        self._logged = self._batches
        kinds = self._readers.policy.specifications if self._readers else {}
        numbers = {
            f"{VALUE}/{name}": kinds[name].parts.index(value) if isinstance(value, str) else value
            for name, value in self.values.items()
            if not isinstance(value, str) or name in kinds
        }
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics(numbers, step=self._axis.number)

    def _count(self, module: LightningModule, batch_idx: int) -> None:
        self._axis.count(module.trainer, batch_idx)
        self._batches += 1
        self._metric_steps.finish_batch(module, self._step, batch_idx)
        assert self._bookmark is not None
        self._bookmark.counted = True

    def _count_interrupted(self, module: LightningModule) -> None:
        self._count(module, module.trainer.fit_loop.batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """Position, what is replayed, and steps of schedulers that are due; without the surroundings of the run."""
        if self._restored is not None:
            return self._restored
        if self._values is None or self._readers is None:
            return {}
        return {
            "version": VERSION,
            "batches": self._batches,
            **self._axis.state_dict(),
            "signature": self._readers.policy.signature(),
            "metric_steps": self._metric_steps.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._restored = dict(state_dict) or None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the state of this callback, and warn where there is none.

        Raises:
            ValueError: the state is damaged.
        """
        if not trainer.training:
            return
        state = checkpoint["callbacks"].get(self.state_key)
        if state:
            check_state(state)
        else:
            self._warn_of_absence(checkpoint, "The replay goes on at the batch that the checkpoint counts.")
