"""Shared by the tests of replays: a schedule, plain modules, and a callback that watches."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from support import CLASSES, loader, trainer
from torch import Tensor, nn

from lightning_stn import Float, Integer, Schedule, ScheduleReplay, regularizers
from lightning_stn.augment import Cutout
from lightning_stn.schedule import Row

BATCHES, EPOCHS = 6, 3
KINDS = {"dropout": Float(0.0, 0.9, init=0.1), "length": Integer(0, 4, init=1)}


def recorded(length: int = BATCHES * EPOCHS) -> Schedule:
    """A schedule with a row for each step, in which both hyperparameters change at every one."""
    schedule = Schedule(KINDS)
    for step in range(length + 1):
        values = {"dropout": round(0.1 + 0.7 * step / length, 6), "length": step % 5}
        schedule.append(Row(step, 0, values, {"dropout": 0.25, "length": 0.5}))
    return schedule


class Plain(L.LightningModule):
    """A module that has no hyperparameters itself."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), *layers, nn.Linear(12, CLASSES))
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class Named(Plain):
    """Regularisers that name hyperparameters."""

    def __init__(self) -> None:
        super().__init__(regularizers.Dropout("dropout"))
        self.cutout = Cutout("length")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((self.cutout(batch[0]), batch[1]), batch_idx)


class Watch(L.Callback):
    """Keeps what `read` returns in each training batch; listed behind the replay."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read, self.seen = read, []  # type: ignore[var-annotated]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.read(pl_module))


def fit(module: L.LightningModule, replay: ScheduleReplay, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    """Train on three batches an epoch for two epochs, by default."""
    run = trainer(replay, *callbacks, **kwargs)
    run.fit(module, loader(24), loader(16, seed=1))
    return run
