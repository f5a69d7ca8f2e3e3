"""A callback whose run can go on exactly: from a checkpoint, and from where an exception ended it."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_stn.callback.bar import BarValues
from lightning_stn.callback.interruption import Bookmark, Place
from lightning_stn.callback.progress import epoch_is_over, epochs_processed
from lightning_stn.callback.resume import RunState, Surroundings
from lightning_stn.manual_optimization import MetricSteps, WeightStep


class InterruptibleCallback(Callback, ABC):
    """The part of a callback that adds the surroundings of a run to its checkpoints, also after an exception.

    It also keeps the values on the progress bar until the run is over.

    A subclass calls `_begin` for a new run, sets a bookmark when training starts, moves it after each batch, validation
    and epoch, and calls `_go_back` on an exception.
    """

    _bar: BarValues | None = None

    def _release_bar(self) -> None:
        if self._bar is not None:
            self._bar.release()
            self._bar = None

    def _begin(self) -> None:
        """Forget an earlier run."""
        self._metric_steps = MetricSteps()
        self._bookmark: Bookmark | None = None
        self._interruption: Place | None = None

    @property
    @abstractmethod
    def _weight_step(self) -> WeightStep:
        """How the weights step in manual optimisation."""

    @abstractmethod
    def _count_interrupted(self, module: LightningModule) -> None:
        """Count the batch that an exception ended after its weight step."""

    def _inexact(self) -> str:
        """Why the run cannot go on exactly from now, in words, beside the reasons of `Bookmark.inexact`."""
        return ""

    def _set_bookmark(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin to keep the last place from which the run can go on."""
        self._bookmark = Bookmark(trainer, module, self._weight_step)

    def _go_back(self, trainer: Trainer, module: LightningModule) -> None:
        """Return to the last place from which the run can go on, before a checkpoint is written."""
        bookmark = self._bookmark
        if bookmark is None:
            return
        inexact = bookmark.inexact(trainer) or self._inexact()
        if bookmark.weights_have_moved(trainer):
            self._count_interrupted(module)
        if module.automatic_optimization and epoch_is_over(trainer):
            self._metric_steps.leave_to_lightning()
        place = bookmark.go_back(trainer)
        if epochs_processed(trainer) > bookmark.epoch and trainer.is_last_batch:
            self._metric_steps.note_epoch(bookmark.epoch)  # its end, with the hooks, is not repeated
        self._interruption = place._replace(inexact=inexact or place.inexact)
        if self._interruption.inexact:
            rank_zero_info(f"A run that is resumed from here will not be exact: {self._interruption.inexact}.")
        self._bookmark = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation after a batch is over."""
        if self._bookmark is not None and trainer.state.fn == TrainerFn.FITTING:
            self._bookmark.place(trainer, validated=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the surroundings of the run to the state that Lightning has put into the checkpoint."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state and "surroundings" not in state:
            place = self._interruption if trainer.interrupted else None
            if place is None:
                place = Place.here(trainer, pl_module, self._weight_step)
            RunState.add_surroundings(state, Surroundings.take(trainer, place))

    def _warn_of_absence(self, checkpoint: dict[str, Any], consequence: str) -> None:
        """Warn that a run is resumed from a checkpoint which holds no state of this callback."""
        if checkpoint.get("global_step", 0):
            rank_zero_warn(
                f"The checkpoint holds no state of {self.state_key}, but of {sorted(checkpoint.get('callbacks', {}))}. "
                f"{consequence} For an exact run, resume with the callback that wrote the checkpoint, by the name of "
                "its class."
            )
