"""`ScheduleReplay`: stored values of hyperparameters drive a run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_stn.binding import BoundModule, unbind
from lightning_stn.callback.bar import BarValues
from lightning_stn.callback.checkpointed_replay import CheckpointedReplay
from lightning_stn.callback.checks import WeightProgress, check_optimizers
from lightning_stn.callback.frozen_response import FrozenResponse
from lightning_stn.callback.modes import restore_modes
from lightning_stn.callback.progress import end_validation
from lightning_stn.callback.readers import Readers
from lightning_stn.callback.replay_checks import check_paths, check_run
from lightning_stn.callback.run_length import run_length
from lightning_stn.manual_optimization import SchedulerSettings, WeightStep, explain
from lightning_stn.methods.base import recentre
from lightning_stn.module import STNModule
from lightning_stn.policies import Noise, Policy
from lightning_stn.schedule import Interpolation, Schedule
from lightning_stn.specifications import Hyperparameter


class ScheduleReplay(CheckpointedReplay):
    """Drives a run by stored values of hyperparameters: a schedule, its last row, or constants.

    What reads the values:

    - An `STNModule`, trained by this callback instead of `STNCallback`: layers compute with their base weights,
      response weights and gates are frozen for the run, and regularisers act at the values. A response that counts from
      zero is counted from the current hyperparameters first, so that base weights alone compute what the network does.
    - Regularisers and augmentations of any other LightningModule that name hyperparameters, such as
      `regularizers.Dropout("dropout")`. From start to end of training they act as torch's layers do, in training mode.
    - Attributes of any module, by `attributes`. They are set before each training batch and keep the last values; with
      `strategy="ddp_spawn"` they change in the processes that `fit` starts alone.

    A schedule is read at the number of finished training batches, as it was recorded; for a run of another length, at
    the share of the run that is over. Values in force are logged under `stn/value/<name>`, every
    `Trainer(log_every_n_steps)` steps; of a choice its index.

    A run is resumed from a checkpoint as with `STNCallback`: exactly with a `ResumableLoader`. Gradients that a module
    accumulates in its manual optimisation are not saved.

    Args:
        values: a `Schedule`; the path of a stored one, JSON or CSV; or constants by name, natural units. A
            specification in the place of a constant stands for its `init`, and tells noise the range.
        final: whether to replay the last row of the schedule alone, as constants.
        attributes: path from the module to an attribute, to name of the hyperparameter, as in
            `{"net.drop.p": "dropout", "augment.transforms.0.p": "flip"}`.
        noise: `Gaussian(...)`, `Sinusoid(...)` or another `Noise`, added in unconstrained units; None for none. It
            needs ranges: those of an `STNModule`, of a schedule in JSON, or of specifications.
        stretch: whether a schedule is read by the share of the run; otherwise by the number of batches, and from its
            last step on the last row.
        interpolation: "step" for the last row up to a step, "linear" for the line between rows; see `Schedule.at`.
        weight_step: clipping and accumulation for an `STNModule` in manual optimisation.
        seed: of the noise.

    Raises:
        ValueError: an argument is out of its range, or a hyperparameter cannot have its values.
        TypeError: `values` or `attributes` has a wrong type.

    Example:
        >>> from lightning_stn import Float, Gaussian
        >>> replay = ScheduleReplay({"dropout": 0.3}, attributes={"net.drop.p": "dropout"})
        >>> noisy = ScheduleReplay({"dropout": Float(0.0, 0.9, init=0.3)}, noise=Gaussian(0.5))
    """

    def __init__(
        self,
        values: str | Path | Mapping[str, int | float | str | Hyperparameter] | Schedule,
        *,
        final: bool = False,
        attributes: Mapping[str, str] | None = None,
        noise: Noise | None = None,
        stretch: bool = True,
        interpolation: Interpolation = "step",
        weight_step: WeightStep = WeightStep(),
        seed: int = 0,
    ) -> None:
        settings = {"noise": noise, "stretch": stretch, "interpolation": interpolation, "seed": seed}
        self._policy = Policy.of(values, final=final, **settings)
        self._paths = check_paths(attributes)
        if not isinstance(weight_step, WeightStep):
            raise ValueError(f"ScheduleReplay: expected weight_step to be WeightStep(...), got {weight_step!r}.")
        super().__init__(weight_step)
        self._schedulers = SchedulerSettings()
        self._response: FrozenResponse | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check module and Trainer, attach what the module holds, and freeze a response until `teardown`."""
        if stage != "fit":
            return
        check_run(trainer, pl_module, self._step, ScheduleReplay)
        if trainer.global_step == 0:
            self._begin()
        self._readers = Readers(pl_module, self._policy, self._paths, self._step, trainer.strategy.root_device)
        if isinstance(pl_module, STNModule):
            self._response = FrozenResponse(pl_module)
            if not pl_module.automatic_optimization:
                self._schedulers.watch(pl_module, self._step)
        if any(isinstance(module, BoundModule) for module in pl_module.modules()):
            self._attach(pl_module, complete=False)  # Lightning's Tuner trains before `on_fit_start`.

    def _attach(self, module: LightningModule, *, complete: bool) -> None:
        assert self._readers is not None
        if isinstance(module, STNModule):
            module.hyperparameters.unshare()
            recentre(module, module.hyperparameters, True)
        if self._readers.attach(complete=complete):
            self._readers.enter(0, noise=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach what the hooks `setup` and `configure_model` of the module have built, and look up attributes."""
        self._attach(pl_module, complete=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue where a checkpoint left off, and put the values of the next batch in force."""
        if isinstance(pl_module, STNModule):
            if not pl_module.automatic_optimization:
                self._schedulers.restore(trainer)
            check_optimizers(trainer, pl_module)
            recentre(pl_module, pl_module.hyperparameters, True)
            self._weights = WeightProgress(trainer)
        self._resolve(trainer)
        surroundings = self._resume(trainer)
        self._enter()
        surroundings.give_back_metrics(trainer)
        surroundings.give_back_gradients(pl_module)
        self._log(trainer)
        surroundings.give_back_streams(trainer)
        self._starts = True
        self._bar = BarValues(trainer, lambda: self.values)
        self._set_bookmark(trainer, pl_module)
        self._restored = None  # until here a checkpoint would hold the state that was loaded
        end_validation(trainer)

    def _resolve(self, trainer: Trainer) -> None:
        """Replay over the length of this run."""
        assert self._readers is not None
        length = run_length(trainer, self._step)
        if math.isinf(length) and self._policy.changes_with_length:
            rank_zero_warn(
                "ScheduleReplay: the length of this run is not known, so the schedule is replayed by the number of "
                f"training batches, {self._policy.recorded_length} in all; give Trainer(max_epochs=...) and a loader "
                "with a length, or max_steps, or say so with ScheduleReplay(stretch=False)."
            )
        self._readers.begin(length)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedulers that waited for the epoch's end, and follow training data that the Trainer reloads."""
        self._metric_steps.take(pl_module)
        if self._bookmark is not None:
            self._bookmark.follow_reload(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Step the schedulers that waited for validation, and bind the values of a weight step."""
        self._metric_steps.take(pl_module)
        if isinstance(pl_module, STNModule):
            pl_module._stn_stepped = False
            pl_module._stn_perturb(batch)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip the weights' gradient of an `STNModule`; here a gradient scaler has already been undone."""
        if isinstance(pl_module, STNModule):
            self._step.clip(pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and put the values of the next one in force."""
        if isinstance(pl_module, STNModule):
            unbind(pl_module.hyperparameters)
        if self._starts:
            self._starts = False
            self._warn_unread()
        self._count(pl_module, batch_idx)
        if isinstance(pl_module, STNModule):
            self._weights.check(trainer, pl_module, self._batches)
        self._enter()
        if self._axis.is_due(trainer):
            self._log(trainer)
        assert self._bookmark is not None
        self._bookmark.place(trainer)

    def _warn_unread(self) -> None:
        """Warn of values that nothing has read in the first training batch of this `fit`."""
        assert self._readers is not None
        if unread := self._readers.unread():
            rank_zero_warn(
                f"ScheduleReplay: nothing reads {unread}, so these values change nothing; name them in regularisers or "
                "augmentations, or set attributes by ScheduleReplay(attributes={...})."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedulers that follow a metric of the epoch; unbind the values of an epoch that ended early."""
        if isinstance(pl_module, STNModule):
            unbind(pl_module.hyperparameters)
        self._metric_steps.finish_epoch(pl_module)
        if self._bookmark is not None:
            self._bookmark.place(trainer, validated=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last values without noise, and log them."""
        if self._bookmark is not None:
            self._bookmark.release()
            self._bookmark = None
        self._metric_steps.take(pl_module)
        self._enter(noise=False)
        self._log(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach what reads the values, and let the response train again."""
        if stage == "fit":
            self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Go back to where the run can go on, and leave the module as `teardown` does."""
        restore_modes(trainer, pl_module)
        if isinstance(pl_module, STNModule):
            explain(exception, pl_module)
        if trainer.state.fn == TrainerFn.FITTING:
            self._go_back(trainer, pl_module)
            self._release(pl_module)

    def _release(self, module: LightningModule) -> None:
        self._release_bar()
        self._schedulers.release(module)
        if self._response is not None:
            self._response.release()
            self._response = None
        if self._readers is not None:
            self._readers.detach()
