"""`STNCallback`: joins the phases, the losses of an `STNModule`, and the Trainer."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_stn.binding import attach_all, unbind
from lightning_stn.callback.bar import BarValues, CurrentValues
from lightning_stn.callback.checkpointed import CheckpointedCallback
from lightning_stn.callback.checks import (
    WeightProgress,
    check_network,
    check_optimizers,
    check_trainer,
    is_converted,
    require_stn_module,
    warn_of_untrained_loss,
)
from lightning_stn.callback.hyperparameter_phase import HyperparameterPhase
from lightning_stn.callback.interruption import Bookmark
from lightning_stn.callback.modes import restore_modes, warn_unread
from lightning_stn.callback.progress import end_validation
from lightning_stn.callback.record import Recorder
from lightning_stn.callback.report import report
from lightning_stn.callback.row_check import check_rows
from lightning_stn.callback.run_length import resolve
from lightning_stn.callback.settings import Settings, check_objects, check_on_resume_use
from lightning_stn.callback.text import arguments_text, run_text
from lightning_stn.manual_optimization import SchedulerSettings, WeightStep, explain
from lightning_stn.methods import Method, OptimizerFactory, Scales, SharedAdam
from lightning_stn.module import STNModule
from lightning_stn.phases import Phase, PhaseSchedule, Warmup
from lightning_stn.schedule import Schedule
from lightning_stn.schedule.handover import Handover
from lightning_stn.specifications import Perturb


class STNCallback(CheckpointedCallback):
    """Alternates weight and hyperparameter phases, MacKay et al. (2019), arXiv:1903.03088, Algorithm 1.

    Args:
        train_steps: training batches in a weight phase.
        valid_steps: validation batches in the hyperparameter phase that follows.
        warmup: how long only the weights learn at the start: a whole number of epochs, a float for a share of the run,
            or `Warmup(300, "steps")` for training batches. Where the batches of a run are not known, a share is one of
            its epochs, and 1,000 batches where these are not known either.
        method: how the response is fitted: `STN()`, `DeltaSTN(...)`, another `Method`, or its name, "stn" or
            "delta-stn".
        perturb: "batch" draws a perturbation for each mini-batch and rank, which every module supports and which costs
            little more than plain training; "example" one for each example.
        lr: learning rate of the hyperparameters, unconstrained units per step. None derives it from the run's length:
            for "stn" it is 9 divided by the number of hyperparameter steps, kept between 1e-3 and 1e-1.
        anneal: whether the learning rates of hyperparameters and scales fall to zero along a half cosine, over the
            training batches of the run; they stay constant in a run of unknown length.
        optimizer: builds the hyperparameter optimiser from parameter groups that carry their learning rates; the
            optimiser's default rate is not used.
        scales: how the perturbation scales are tuned.
        weight_step: clipping and accumulation of the weights' gradient in manual optimisation, where the Trainer's
            arguments for them are not available.
        dataloader: validation batches for the hyperparameter phase; None for the hook `tuning_dataloader()` of the
            module or datamodule or, without one, the validation loader.
        seed: fixes perturbations and validation order; None for torch's initial seed.
        on_resume_use: names of arguments that a resumed run takes from this callback; it takes the others from the
            checkpoint. "optimizer" begins with a new state of the hyperparameter optimiser, "hyperparameters" returns
            them to their initial values as well.

    Attributes:
        schedule: the hyperparameters over the run, by training batch; a row every `Trainer(log_every_n_steps)` steps
            that Lightning counts for its loggers, and less often in a run of more than 4,096 of them.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> from lightning import Trainer
        >>> stn = STNCallback(train_steps=5, method="delta-stn")
        >>> trainer = Trainer(max_epochs=50, callbacks=[stn], logger=False)
        >>> stn  # after `trainer.fit`, warm-up and learning rate of the run as well
        STNCallback(train_steps=5, method=DeltaSTN())
    """

    def __init__(
        self,
        train_steps: int = 4,
        valid_steps: int = 1,
        warmup: Warmup | int | float = 0.1,
        *,
        method: Method | str = "stn",
        perturb: Perturb = "batch",
        lr: float | None = None,
        anneal: bool = True,
        optimizer: OptimizerFactory = SharedAdam,
        scales: Scales = Scales(),
        weight_step: WeightStep = WeightStep(),
        dataloader: Iterable[Any] | None = None,
        seed: int | None = None,
        on_resume_use: Sequence[str] = (),
    ) -> None:
        settings = Settings(
            train_steps=train_steps,
            valid_steps=valid_steps,
            warmup=warmup,  # type: ignore[arg-type]
            method=method,  # type: ignore[arg-type]
            perturb=perturb,
            lr=lr,
            anneal=anneal,
            scales=scales,
            weight_step=weight_step,
            seed=seed,
        )
        super().__init__(settings, check_on_resume_use(on_resume_use))
        check_objects(optimizer, dataloader)
        self._factory = optimizer
        self._dataloader = dataloader
        self._schedulers = SchedulerSettings()
        self._handover = Handover()
        self._starts = False  # whether no training batch of this `fit` is over

    @property
    def phases(self) -> PhaseSchedule:
        """When the weights learn and when the hyperparameters do."""
        return self._clock.schedule

    @property
    def schedule(self) -> Schedule:
        """The hyperparameters over the run so far.

        Raises:
            RuntimeError: training has not started.
        """
        if (received := self._handover.receive()) is not None:  # trained in processes that `fit` has started
            return received
        if not hasattr(self, "_recorder"):
            raise RuntimeError("There is no schedule yet; it is recorded while trainer.fit runs.")
        return self._recorder.schedule

    def __repr__(self) -> str:
        """The arguments that differ from their defaults; in a run also what it has derived from its length."""
        given = (self._arguments, self._factory, self._dataloader, self._on_resume_use)
        run = run_text(self._arguments, self._settings)
        return arguments_text(type(self).__name__, STNCallback.__init__, *given) + (f"  # {run}" if run else "")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check module and Trainer, and begin the run, or go on with it."""
        if stage != "fit":
            return
        module = require_stn_module(pl_module)
        check_trainer(trainer, module, self._arguments, STNCallback)
        goes_on = self._restored is not None or (trainer.global_step > 0 and self._records(module))
        earlier = self.state_dict() if goes_on else {}
        self._begin()
        for handover in (self._handover, module._stn_handover):
            handover.forget()
        self.load_state_dict(earlier)
        if is_converted(module):  # Lightning's Tuner trains before `on_fit_start`.
            self._attach(module)
        if not module.automatic_optimization:
            self._schedulers.watch(module, self._settings.weight_step)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a network that was converted after `setup` of the callbacks, and attach what belongs to it."""
        self._attach(_stn(pl_module))

    def _attach(self, module: STNModule) -> None:
        """Check the network, and attach regularisers and augmentations to their hyperparameters."""
        check_network(module, self._settings.perturb)
        attach_all(module, module.hyperparameters)
        module.hyperparameters.unshare()
        self._prepare(module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build what the hyperparameter phase needs, and continue where a checkpoint left off."""
        module = _stn(pl_module)
        if not module.automatic_optimization:
            self._schedulers.restore(trainer)
        check_optimizers(trainer, module)
        self._weights = WeightProgress(trainer)
        self._settings, self._clock.schedule, batches = resolve(trainer, self._settings)
        self._prepare(module)
        self._phase = HyperparameterPhase(trainer, module, self._settings, self._factory, self._dataloader, batches)
        self._recorder = Recorder(module.hyperparameters, self._phase)
        surroundings = self._resume(module)
        for entries in (module.hyperparameters.unconstrained, module.hyperparameters.raw_scale):
            entries.copy_(trainer.strategy.broadcast(entries))
        surroundings.give_back_metrics(trainer)
        surroundings.give_back_gradients(module)
        self._recorder.open(trainer, (self._handover, module._stn_handover))
        module._stn_handover.keep(self._recorder.schedule)
        if not self._recorder.schedule.rows:  # A resumed run records when one run without interruption would.
            self._recorder.record(trainer, self._clock.batches, trainer.current_epoch)
        surroundings.give_back_streams(trainer)
        module.hyperparameters.forget_reads()
        self._starts = True
        self._bar = BarValues(trainer, CurrentValues(module.hyperparameters))
        self._bookmark = Bookmark(trainer, module, self._settings.weight_step)
        self._restored = None  # Until here a checkpoint would hold the state that was loaded.
        if self._clock.batches:
            self._bookmark.counted = True
            self._finish_batch(trainer, module)
            self._bookmark.place(trainer)
        end_validation(trainer)

    def _records(self, module: STNModule) -> bool:
        """Whether an earlier `fit` of this callback trained this module."""
        return hasattr(self, "_recorder") and self._recorder.hyperparameters is module.hyperparameters

    def _prepare(self, module: STNModule) -> None:
        """Bring the module into the state that the method expects."""
        self._settings.method.prepare(module, module.hyperparameters)
        module._stn_phase = self._settings.weight_phase

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedulers that waited for the epoch's end, and follow validation data that the Trainer reloads."""
        self._metric_steps.take(pl_module)
        self._phase.follow_reload(trainer, _stn(pl_module))
        if self._bookmark is not None:
            self._bookmark.follow_reload(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Step the schedulers that waited for validation, and bind the sample of a weight step."""
        self._metric_steps.take(pl_module)
        module = _stn(pl_module)
        module._stn_last_loss, module._stn_stepped = None, False
        module._stn_perturb(batch, self._phase.generator(trainer, Phase.WEIGHT, self._clock.batches))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip the weights' gradient; here a gradient scaler has already been undone."""
        self._phase.watch.look_at_gates(pl_module)
        self._settings.weight_step.clip(pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run the hyperparameter steps that are due, and record."""
        module = _stn(pl_module)
        unbind(module.hyperparameters)
        if self._clock.batches == 0 and self._settings.perturb == "example":
            check_rows(trainer, module, batch, batch_idx)
        if self._starts:
            warn_unread(module)
            warn_of_untrained_loss(module, outputs)
            self._starts = False
        self._count(module, (outputs or {}).get("training_loss", (outputs or {}).get("loss")), batch_idx)
        self._weights.check(trainer, module, self._clock.batches)
        self._finish_batch(trainer, module)
        assert self._bookmark is not None
        self._bookmark.place(trainer)

    def _count(self, module: STNModule, loss: torch.Tensor | None, batch_idx: int) -> None:
        """Count a training batch whose weight step has been taken."""
        trainer = module.trainer
        if loss is not None:  # A training_step that steps by hand may return nothing.
            self._recorder.train_loss.update(loss)
        self._recorder.count(trainer, batch_idx)
        self._clock.finish_batch(trainer.current_epoch)
        self._metric_steps.finish_batch(module, self._settings.weight_step, batch_idx)
        assert self._bookmark is not None
        self._bookmark.counted = True

    def _finish_batch(self, trainer: Trainer, module: STNModule) -> None:
        """Take the hyperparameter steps that are due, and record; a resumed run begins with what is left of a batch."""
        assert self._bookmark is not None
        while self._clock.due:
            profile = trainer.profiler.profile("[STNCallback]hyperparameter_step")  # type: ignore[attr-defined]
            with self._bookmark.hyperparameter_step(), self._phase.stream.reading(), profile:
                self._recorder.update(self._phase.step(trainer, module, self._clock), self._clock.batches)
                self._clock.finish_hyperparameter_step()
            if self._phase.watch.gives_up:
                trainer.should_stop = True
        if self._recorder.is_due(trainer):
            self._recorder.record(trainer, self._clock.batches, self._clock.epoch)
            self._phase.watch.look()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedulers that follow a metric of the epoch; unbind the sample of an epoch that ended early."""
        unbind(_stn(pl_module).hyperparameters)
        self._metric_steps.finish_epoch(pl_module)
        if self._bookmark is not None:
            self._bookmark.place(trainer, validated=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the final hyperparameters."""
        if self._bookmark is not None:
            self._bookmark.release()
            self._bookmark = None
        self._metric_steps.take(pl_module)
        self._recorder.record(trainer, self._clock.batches, trainer.current_epoch, final=True)
        self._recorder.close()
        if trainer.progress_bar_callback is not None:
            rank_zero_info(report(self._recorder, self._phase.statistics))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Clear the settings of the weight phase, so that a later `fit` without this callback raises."""
        if stage == "fit":
            _stn(pl_module)._stn_phase = None
            self._release_bar()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Go back to where the run can go on; unbind the sample, drop cached weights, leave eval mode, close files."""
        restore_modes(trainer, pl_module)
        if isinstance(pl_module, STNModule):
            explain(exception, pl_module)
            self._go_back(trainer, pl_module)
            pl_module._stn_phase = None
            self._schedulers.release(pl_module)
            unbind(pl_module.hyperparameters)
        self._release_bar()
        if hasattr(self, "_recorder"):
            self._recorder.close()


def _stn(module: LightningModule) -> STNModule:
    assert isinstance(module, STNModule)
    return module
