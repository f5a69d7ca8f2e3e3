"""Shared by tests of runs that an exception interrupts: a bomb, and a run with many places where it can go off."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from callback.test_resume import BATCHES, EPOCHS, Adam, assert_same
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from support import images, trainer
from torch import Tensor
from torch.utils.data import Dataset

from lightning_stn import ResumableLoader, STNCallback


class Bomb:
    """Raises once, at a place and in a training batch of the whole run, counted from 0.

    Args:
        place: its name; None for a run that nothing interrupts.
        batch: in which the exception comes, or the last one before it.
    """

    def __init__(self, place: str | None = None, batch: int = 0) -> None:
        self.place, self.batch = place, batch
        self.module: L.LightningModule | None = None
        self.gone_off = False

    def here(self, place: str) -> None:
        if place != self.place or self.gone_off or self.module is None:
            return
        if self.module.trainer.fit_loop.total_batch_idx == self.batch:
            self.gone_off = True
            raise KeyError("interrupted")


class Interrupted(Adam):
    """Runs into the bomb in its losses and hooks."""

    def __init__(self, bomb: Bomb, automatic: bool) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.bomb = bomb
        bomb.module = self

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        self.bomb.here("training step, after the weight step")
        return outputs

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        self.bomb.here("training loss")
        loss = super().training_loss(batch, batch_idx)
        self.bomb.here("training loss, after the network")
        return loss

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().validation_loss(batch, batch_idx)
        if not torch.is_grad_enabled():
            torch.rand(1)  # as metrics that draw a subset do
            self.bomb.here(f"validation loss of evaluation batch {batch_idx}")
        else:
            self.bomb.here(f"validation loss of hyperparameter step {batch_idx % 2}")
        return loss

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if self.trainer.training and torch.is_grad_enabled():
            self.bomb.here("transfer of the next batch")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.bomb.here("hook of the module before a batch")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.bomb.here("hook before the optimiser's step")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.bomb.here("hook of the module after a batch")

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.bomb.here("hook before a validation")

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.bomb.here("hook after a validation")

    def configure_optimizers(self) -> Any:
        optimizer = Optimizer(self.parameters(), lr=0.01)
        optimizer.bomb = self.bomb
        return optimizer


class Optimizer(torch.optim.Adam):
    """Runs into the bomb before it changes anything."""

    bomb: Bomb

    def step(self, closure: Any = None) -> Any:
        if closure is None:
            self.bomb.here("optimiser's step")
            return super().step()

        def closure_() -> Any:
            loss = closure()
            self.bomb.here("optimiser's step")
            return loss

        return super().step(closure_)


class Hooks(L.Callback):
    """Runs into the bomb in the hooks of a callback, listed before or behind `STNCallback`."""

    def __init__(self, bomb: Bomb, order: str) -> None:
        self.bomb, self.order = bomb, order

    def on_train_epoch_start(self, *_: Any) -> None:
        self.bomb.here(f"hook {self.order} the callback's, before an epoch")

    def on_train_batch_start(self, *_: Any) -> None:
        self.bomb.here(f"hook {self.order} the callback's, before a batch")

    def on_train_batch_end(self, *_: Any) -> None:
        self.bomb.here(f"hook {self.order} the callback's, after a batch")

    def on_validation_end(self, *_: Any) -> None:
        self.bomb.here(f"hook {self.order} the callback's, after a validation")

    def on_train_epoch_end(self, *_: Any) -> None:
        self.bomb.here(f"hook {self.order} the callback's, after an epoch")


class Logger(CSVLogger):
    """Runs into the bomb where hyperparameters or Lightning's metrics are logged."""

    def __init__(self, bomb: Bomb, folder: Path) -> None:
        super().__init__(folder)
        self.bomb = bomb

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self.bomb.here("logger" if any(name.startswith("stn/") for name in metrics) else "logger of a validation")


class Data(Dataset[Any]):
    """Runs into the bomb where an example of the next batch is read."""

    def __init__(self, bomb: Bomb, draws: bool) -> None:
        self.images, self.bomb, self.draws = images(8 * BATCHES), bomb, draws

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        x, y = self.images[index]
        if self.draws:
            x = x + 0.1 * torch.randn(())
        self.bomb.here("data")
        if self.bomb.place == "worker" and index == self.bomb.batch:
            raise KeyError("interrupted")
        return x, y


class Stream(Dataset[Any]):
    """Runs into the bomb where a hyperparameter step reads an example."""

    def __init__(self, bomb: Bomb) -> None:
        self.images, self.bomb = images(16, seed=1), bomb

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        if torch.is_grad_enabled():
            self.bomb.here("data of a hyperparameter step")
        return self.images[index]


class Unsized:
    """Batches without a length or a state, beside which Lightning reads every loader one batch ahead."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(BATCHES))


def run(
    folder: Path,
    bomb: Bomb | None = None,
    *,
    checkpoint: Path | None = None,
    seed: int = 0,
    kind: type[Interrupted] = Interrupted,
    automatic: bool = False,
    ahead: bool = False,
    others: Sequence[type[L.Callback]] = (),
    workers: int = 0,
    stn: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Interrupted, STNCallback]:
    """Train; with a bomb, a checkpoint is written on the exception."""
    L.seed_everything(seed, verbose=False)
    bomb = bomb or Bomb()
    module = kind(bomb, automatic)
    callback = STNCallback(2, 2, warmup=0, lr=0.05, seed=seed, **(stn or {}))
    fit = trainer(
        Hooks(bomb, "before"),
        callback,
        Hooks(bomb, "behind"),
        *(other() for other in others),
        *([OnExceptionCheckpoint(folder)] if bomb.place else []),
        logger=Logger(bomb, folder),
        enable_checkpointing=True,
        **{"max_epochs": EPOCHS, **settings},
    )
    train: Any = ResumableLoader(Data(bomb, draws=not workers), 8, num_workers=workers)
    if ahead:
        train = CombinedLoader({"images": train, "others": Unsized()}, "min_size")
    fit.fit(module, train, torch.utils.data.DataLoader(Stream(bomb), 4), ckpt_path=checkpoint)
    return module, callback


def assert_resumes(folder: Path, place: str, batches: Sequence[int], **options: Any) -> None:
    """Interrupt a run in each of these batches, resume it from the checkpoint, and compare its end."""
    whole = uninterrupted(folder, options)
    for batch in batches:
        interrupt(folder / str(batch), Bomb(place, batch), **options)
        saved = folder / str(batch) / "on_exception.ckpt"
        assert_same(*run(folder / "resumed", checkpoint=saved, seed=9, **options), *whole)


def interrupt(folder: Path, bomb: Bomb, **options: Any) -> None:
    with pytest.raises(KeyError, match="interrupted"):
        run(folder, bomb, **options)
    assert bomb.gone_off or bomb.place == "worker"


WHOLE: dict[str, tuple[Interrupted, STNCallback]] = {}


def uninterrupted(folder: Path, options: dict[str, Any]) -> tuple[Interrupted, STNCallback]:
    """The run without interruption, once for each set of options."""
    key = repr(sorted(options.items()))
    if key not in WHOLE:
        WHOLE[key] = run(folder / "whole", **options)
    return WHOLE[key]
