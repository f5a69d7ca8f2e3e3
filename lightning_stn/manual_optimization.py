"""Learning-rate schedulers in manual optimisation: what Lightning drops of their configuration is kept."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_stn.module import STNModule

_DROPPED = ("monitor", "reduce_on_plateau", "strict")
"""Keys of a scheduler's dictionary that Lightning ignores in manual optimisation, with a warning."""


class SchedulerSettings:
    """Remembers what `configure_optimizers` says of metrics, and hands it to Lightning's configurations."""

    def __init__(self) -> None:
        self._settings: dict[int, dict[str, Any]] = {}
        self._watching = False
        self._assigned: Any = None

    def watch(self, module: STNModule) -> None:
        """Look at what `configure_optimizers` returns when the strategy calls it."""
        own = module.__dict__
        self._assigned = own.get("configure_optimizers")  # As LightningCLI does.
        configure = module.configure_optimizers

        def configure_optimizers() -> Any:
            self.release(module)
            return self._without_dropped(configure())

        own["configure_optimizers"] = configure_optimizers
        self._watching = True

    def release(self, module: STNModule) -> None:
        """Look no more; the strategy has called, or will not."""
        if self._watching:
            own = module.__dict__
            own.pop("configure_optimizers")
            if self._assigned is not None:
                own["configure_optimizers"] = self._assigned
            self._watching, self._assigned = False, None

    def restore(self, trainer: Trainer) -> None:
        """Give the configurations back what was dropped.

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
    """When the schedulers that follow a metric step: as late as Lightning does it, behind validation and its logs.

    What is due when a checkpoint is written is saved with it, so that a resumed run makes up for it. Lightning itself
    forgets it there, and leaves those of an epoch out of the whole epoch in which a run was resumed; in automatic
    optimisation, where they are Lightning's to step, the latter are made up for, too.
    """

    def __init__(self) -> None:
        self._due: list[tuple[str, int]] = []
        self._forgotten = False

    def finish_batch(self, module: STNModule, batch_idx: int) -> None:
        """Those of a batch are due, unless its gradients only accumulate."""
        settings = module.weight_step_settings
        assert settings is not None
        whole = (batch_idx + 1) % settings.accumulate_grad_batches == 0 or module.trainer.is_last_batch
        if whole and not module.automatic_optimization:
            self._due.append(("step", batch_idx))

    def finish_epoch(self, module: STNModule) -> None:
        """Those of an epoch are due, unless it was broken off."""
        self.settle(module)
        trainer = module.trainer
        if trainer.is_last_batch:
            self._due.append(("epoch", trainer.current_epoch))
        self._forgotten |= trainer.fit_loop.restarting
        if not (module.automatic_optimization or _logs_later(module)):
            self.settle(module)

    def settle(self, module: STNModule) -> None:
        """Step what is due, and Lightning does not."""
        due, self._due = self._due, []
        if self._forgotten or not module.automatic_optimization:
            for interval, index in due:
                module.step_schedulers(interval, index, on_metric=True)
        self._forgotten = False

    def state_dict(self) -> list[list[Any]]:
        """Interval and index of what is due."""
        return [list(one) for one in self._due]

    def load_state_dict(self, state: list[list[Any]]) -> None:
        """Make up for what was due."""
        self._due = [(interval, index) for interval, index in state]
        self._forgotten = bool(state)


def _logs_later(module: LightningModule) -> bool:
    """Whether the module may log a metric of the epoch when the callbacks are done with it."""
    return is_overridden("on_train_epoch_end", module)
