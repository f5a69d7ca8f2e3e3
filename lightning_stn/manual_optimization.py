"""What exists only because optimisation is manual: the weight step, clipping, accumulation, schedulers, scaler."""

import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_stn.arguments import is_number

ClipAlgorithm = Literal["norm", "value"]

_DROPPED = ("monitor", "reduce_on_plateau", "strict")
"""Keys of a scheduler's dictionary that Lightning ignores in manual optimisation, with a warning."""


@dataclass(frozen=True)
class WeightStep:
    """How a step of the weights is taken in manual optimisation, where the Trainer's own arguments are not available.

    Args:
        gradient_clip_val: largest norm, or largest entry, of the weights' gradient; None for no clipping.
        gradient_clip_algorithm: "norm" or "value".
        accumulate_grad_batches: training batches whose gradients one step averages.

    Raises:
        ValueError: an argument is out of its range.
    """

    gradient_clip_val: float | None = None
    gradient_clip_algorithm: ClipAlgorithm = "norm"
    accumulate_grad_batches: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        limit, accumulate = self.gradient_clip_val, self.accumulate_grad_batches
        if limit is not None and not (is_number(limit) and limit > 0):
            raise ValueError(f"WeightStep: expected gradient_clip_val to be positive, or None, got {limit!r}.")
        if self.gradient_clip_algorithm not in get_args(ClipAlgorithm):
            raise ValueError(
                "WeightStep: expected gradient_clip_algorithm='norm' or gradient_clip_algorithm='value', got "
                f"{self.gradient_clip_algorithm!r}."
            )
        if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
            raise ValueError(
                f"WeightStep: expected accumulate_grad_batches to be a whole number of at least 1, got {accumulate!r}."
            )

    def completes(self, batch_idx: int, is_last_batch: bool) -> bool:
        """Whether a step follows this batch of an epoch, or its gradients only accumulate."""
        return (batch_idx + 1) % self.accumulate_grad_batches == 0 or is_last_batch

    def clip(self, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients that an optimiser is about to use, after a gradient scaler has been undone.

        The module's hook does it, which Lightning calls in automatic optimisation alone.
        """
        if not module.automatic_optimization or self.gradient_clip_val is not None:
            module.configure_gradient_clipping(
                optimizer,
                gradient_clip_val=self.gradient_clip_val,
                gradient_clip_algorithm=self.gradient_clip_algorithm,
            )

    def take(self, module: LightningModule, objective: Tensor, batch_idx: int) -> None:
        """Differentiate the objective and, where the batch completes a step, step optimisers and schedulers."""
        module.manual_backward(objective / self.accumulate_grad_batches)
        is_last_batch = module.trainer.is_last_batch
        if not self.completes(batch_idx, is_last_batch):
            return
        optimizers = module.optimizers()
        _step_all(module, optimizers if isinstance(optimizers, list) else [optimizers], batch_idx)
        step_schedulers(module, "step", batch_idx)
        if is_last_batch:
            step_schedulers(module, "epoch", module.current_epoch)


AUTOMATIC = "set self.automatic_optimization = True after super().__init__(...)"
"""What to do instead, for error messages."""


def check_arguments(module: LightningModule) -> None:
    """Check the Trainer's arguments for clipping and accumulation, which manual optimisation leaves to `WeightStep`.

    Raises:
        ValueError: the Trainer has such an argument.
    """
    trainer = module.trainer
    given: dict[str, Any] = {}
    if (trainer.gradient_clip_val or 0) > 0:
        given["gradient_clip_val"] = trainer.gradient_clip_val
        if trainer.gradient_clip_algorithm is not None:
            given["gradient_clip_algorithm"] = str(trainer.gradient_clip_algorithm.value)
    if trainer.accumulate_grad_batches != 1:
        given["accumulate_grad_batches"] = trainer.accumulate_grad_batches
    if given and not module.automatic_optimization:
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"Expected a Trainer without {' and '.join(given)}, which does nothing in manual optimisation, got "
            f"Trainer({arguments}); write STNCallback(weight_step=WeightStep({arguments})) instead (so for "
            f"ScheduleReplay), or {AUTOMATIC}."
        )


def explain(exception: BaseException, module: LightningModule) -> None:
    """Add our advice to Lightning's own refusal of such an argument, as a note (from Python 3.11 on).

    Lightning refuses first where a module defines `configure_callbacks` without calling that of `STNModule`.
    """
    if isinstance(exception, MisconfigurationException) and hasattr(exception, "add_note"):
        try:
            check_arguments(module)
        except ValueError as own:
            exception.add_note(str(own))


def _step_all(module: LightningModule, optimizers: list[Any], batch_idx: int) -> None:
    """Step the optimisers by the hooks of the module, all at the scale with which their gradients were computed.

    After each of them Lightning updates the scaler of float16; the next would then unscale by another factor.
    """
    scaler = getattr(module.trainer.precision_plugin, "scaler", None) if len(optimizers) > 1 else None
    before, after = scaler and scaler.state_dict(), []
    for optimizer in optimizers:
        if scaler is not None:
            scaler.load_state_dict(before)
        module.optimizer_step(module.current_epoch, batch_idx, optimizer, _no_closure)
        _zero_grad(module, optimizer.optimizer, batch_idx)
        if scaler is not None:
            after.append(scaler.state_dict())
    if scaler is not None:
        scaler.load_state_dict(min(after, key=lambda state: float(state["scale"])))


def _no_closure() -> None:
    """What an optimiser evaluates before it steps: nothing, since the gradients are there."""


def _zero_grad(module: LightningModule, optimizer: torch.optim.Optimizer, batch_idx: int) -> None:
    """Free the gradients by the hooks of callbacks and module, so that the hyperparameter phase has none in memory."""
    trainer = module.trainer
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        callback.on_before_zero_grad(trainer, module, optimizer)
    module.on_before_zero_grad(optimizer)
    module.optimizer_zero_grad(module.current_epoch, batch_idx, optimizer)


def step_schedulers(module: LightningModule, interval: str, index: int, *, on_metric: bool = False) -> None:
    """Step the learning-rate schedulers that are due, which Lightning leaves to manual optimisation.

    Args:
        module: the module that trains.
        interval: "step" or "epoch".
        index: number of the batch in its epoch, or of the epoch.
        on_metric: whether to step the schedulers that follow a metric, or the others.

    Raises:
        RuntimeError: the metric of a scheduler was not logged (unless the scheduler is not `strict`).
    """
    trainer = module.trainer
    for config in trainer.lr_scheduler_configs:
        due = config.interval == interval and (index + 1) % config.frequency == 0
        if not due or config.reduce_on_plateau != on_metric:
            continue
        metric = trainer.callback_metrics.get(config.monitor) if on_metric else None  # type: ignore[arg-type]
        if metric is None and on_metric:
            message = (
                f"The learning-rate scheduler {type(config.scheduler).__name__} follows {config.monitor!r}, which "
                f"was not logged; there are {sorted(trainer.callback_metrics)}."
            )
            if config.strict:
                raise RuntimeError(f"{message} Log it, name another as 'monitor', or set 'strict' to False.")
            warnings.warn(message, stacklevel=2)
            continue
        module.lr_scheduler_step(config.scheduler, metric)


def save_checkpoints_by_time(module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
    """Save checkpoints that are due by time, which Lightning leaves out in manual optimisation."""
    for callback in module.trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            automatic: Any = SimpleNamespace(automatic_optimization=True)
            callback.on_train_batch_end(module.trainer, automatic, outputs, batch, batch_idx)


class SchedulerSettings:
    """Keeps the metric settings of the schedulers that `configure_optimizers` returns, which Lightning drops."""

    def __init__(self) -> None:
        self._settings: dict[int, dict[str, Any]] = {}
        self._watching = False
        self._assigned: Any = None

    def watch(self, module: LightningModule, step: WeightStep) -> None:
        """Wrap `configure_optimizers`, so that the settings are kept when the strategy calls it.

        While it runs the Trainer knows how many batches a step accumulates, as `trainer.estimated_stepping_batches`
        needs it. Lightning refuses a Trainer that knows it from the start.
        """
        own = module.__dict__
        self._assigned = own.get("configure_optimizers")  # LightningCLI assigns it on the instance.
        configure = module.configure_optimizers

        def configure_optimizers() -> Any:
            self.release(module)
            trainer = module.trainer
            own_number, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, step.accumulate_grad_batches
            try:
                return self._without_dropped(configure())
            finally:
                trainer.accumulate_grad_batches = own_number

        own["configure_optimizers"] = configure_optimizers
        self._watching = True

    def release(self, module: LightningModule) -> None:
        """Unwrap `configure_optimizers`, after the strategy has called it or where it will not."""
        if self._watching:
            own = module.__dict__
            own.pop("configure_optimizers")
            if self._assigned is not None:
                own["configure_optimizers"] = self._assigned
            self._watching, self._assigned = False, None

    def restore(self, trainer: Trainer) -> None:
        """Put the settings that Lightning dropped into its configurations.

        Raises:
            ValueError: a scheduler follows a metric that has no name.
        """
        for config in trainer.lr_scheduler_configs:
            settings = self._settings.get(id(config.scheduler), {})
            config.monitor = settings.get("monitor")
            config.strict = settings.get("strict", True)
            plateau = isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            config.reduce_on_plateau = settings.get("reduce_on_plateau", plateau)
            if config.reduce_on_plateau and config.monitor is None:
                raise ValueError(
                    f"{type(config.scheduler).__name__} follows a metric, but configure_optimizers names none; return "
                    "{'optimizer': ..., 'lr_scheduler': {'scheduler': ..., 'monitor': 'val_loss'}}."
                )

    def _without_dropped(self, configuration: Any) -> Any:
        if isinstance(configuration, list | tuple):
            return type(configuration)([self._without_dropped(part) for part in configuration])
        if not isinstance(configuration, dict):
            return configuration
        if "scheduler" in configuration:
            dropped = {key: value for key, value in configuration.items() if key in _DROPPED}
            self._settings[id(configuration["scheduler"])] = dropped
            return {key: value for key, value in configuration.items() if key not in _DROPPED}
        if "lr_scheduler" not in configuration:
            return configuration
        scheduler = configuration["lr_scheduler"]
        if not isinstance(scheduler, dict):
            scheduler = {"scheduler": scheduler}
        if "monitor" in configuration:
            scheduler = {"monitor": configuration["monitor"], **scheduler}
        return {**configuration, "lr_scheduler": self._without_dropped(scheduler)}


class MetricSteps:
    """When schedulers that follow a metric step: as late as in Lightning, after validation and its logs.

    Steps that are due when a checkpoint is written are saved with it, so that a resumed run takes them. Lightning
    forgets them, and leaves those of an epoch out of the whole epoch in which a run was resumed; with automatic
    optimisation, where Lightning takes the steps, the latter are taken here.
    """

    def __init__(self) -> None:
        self._due: list[tuple[str, int]] = []
        self._forgotten = False

    def finish_batch(self, module: LightningModule, step: WeightStep, batch_idx: int) -> None:
        """Note the steps of a batch, unless its gradients only accumulate."""
        if step.completes(batch_idx, module.trainer.is_last_batch) and not module.automatic_optimization:
            self._due.append(("step", batch_idx))

    def finish_epoch(self, module: LightningModule) -> None:
        """Note the steps of an epoch, unless it ended early."""
        self.take(module)
        trainer = module.trainer
        if trainer.is_last_batch:
            self.note_epoch(trainer.current_epoch)
        self._forgotten |= trainer.fit_loop.restarting
        if not (module.automatic_optimization or _logs_later(module)):
            self.take(module)

    def note_epoch(self, epoch: int) -> None:
        """Note the steps of an epoch that is over."""
        self._due.append(("epoch", epoch))

    def leave_to_lightning(self) -> None:
        """Forget the steps that Lightning has taken in automatic optimisation."""
        if not self._forgotten:
            self._due = []

    def take(self, module: LightningModule) -> None:
        """Take the steps that are due, and that Lightning does not take."""
        due, self._due = self._due, []
        if self._forgotten or not module.automatic_optimization:
            for interval, index in due:
                step_schedulers(module, interval, index, on_metric=True)
        self._forgotten = False

    def state_dict(self) -> list[list[Any]]:
        """Interval and index of each step that is due."""
        return [list(one) for one in self._due]

    def load_state_dict(self, state: list[list[Any]]) -> None:
        """Continue from a saved state, whose steps Lightning has forgotten."""
        self._due = [(interval, index) for interval, index in state]
        self._forgotten = bool(state)


def _logs_later(module: LightningModule) -> bool:
    """Whether the module may log a metric of the epoch after the callbacks' hooks."""
    return is_overridden("on_train_epoch_end", module)
