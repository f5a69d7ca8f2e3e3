"""Learning-rate schedulers in manual optimisation: what Lightning drops of their configuration is kept."""

from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_stn.module import STNModule

_DROPPED = ("monitor", "reduce_on_plateau", "strict")
"""Keys of a scheduler's dictionary that Lightning ignores in manual optimisation, with a warning."""


class SchedulerSettings:
    """Remembers what `configure_optimizers` says of metrics, and hands it to Lightning's configurations."""

    def __init__(self) -> None:
        self._settings: dict[int, dict[str, Any]] = {}

    def watch(self, module: STNModule) -> None:
        """Look at what `configure_optimizers` returns when the strategy calls it."""
        own = module.__dict__
        assigned = own.get("configure_optimizers")  # As LightningCLI does.
        configure = module.configure_optimizers

        def configure_optimizers() -> Any:
            own.pop("configure_optimizers")
            if assigned is not None:
                own["configure_optimizers"] = assigned
            return self._without_dropped(configure())

        own["configure_optimizers"] = configure_optimizers

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
