"""State beside weights and hyperparameters that a resumed run continues: records, warnings, summaries, gradients."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support import LitSmall, images, loader, trainer
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor

from lightning_stn import ResumableLoader, STNCallback
from lightning_stn.callback.watch import PATIENCE

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


def run(
    module: LitSmall, *callbacks: L.Callback, batches: int = 8, checkpoint: Path | None = None, **settings: Any
) -> L.Trainer:
    """Train on eight batches an epoch, with a hyperparameter step after each."""
    L.seed_everything(3, verbose=False)
    stn = STNCallback(1, 1, 0, lr=0.05, seed=1, perturb="batch")  # one row, at which weights can be frozen
    fit = trainer(stn, *callbacks, max_epochs=-1, max_steps=batches, **settings)
    fit.fit(module, ResumableLoader(images(64), 8, seed=2), loader(16, seed=1), ckpt_path=checkpoint)
    return fit


def metrics(folder: Path, tag: str) -> dict[int, str]:
    """Values of one metric by step, as text, from the file of a CSVLogger."""
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    step, column = header.index("step"), header.index(tag)
    return {int(row[step]): row[column] for row in rows if row[column]}


@pytest.mark.parametrize("tag", ["stn/valid_loss", "stn/train_loss", "stn/hypergrad/dropout"])
def test_run_resumed_between_two_records_logs_means_over_all_steps_since_the_first(tmp_path: Path, tag: str) -> None:
    options = {"log_every_n_steps": 5, "enable_checkpointing": True}
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=7, save_top_k=-1)
    run(LitSmall(), saver, batches=10, logger=CSVLogger(tmp_path, version="whole"), **options)
    resumed = CSVLogger(tmp_path, version="resumed")
    run(LitSmall(), batches=10, checkpoint=tmp_path / "saved/step=7.ckpt", logger=resumed, **options)
    whole = metrics(tmp_path / "lightning_logs/whole", tag)
    assert whole.keys() == {5, 10}
    assert metrics(tmp_path / "lightning_logs/resumed", tag)[10] == whole[10]


class WithoutFiniteLoss(LitSmall):
    """Its validation loss is not finite from some hyperparameter step on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().validation_loss(batch, batch_idx)
        return loss * float("nan") if torch.is_grad_enabled() and batch_idx >= self.first else loss


def test_resumed_run_stops_after_as_many_skipped_steps_as_one_run_and_warns_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="hypergradient is not finite"):
        first = run(WithoutFiniteLoss(first=3), batches=3 + PATIENCE // 2)
    first.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.warns(UserWarning, match="in a row had no finite") as caught:
        resumed = run(WithoutFiniteLoss(first=3), batches=1000, checkpoint=tmp_path / "saved.ckpt")
    assert resumed.global_step == 3 + PATIENCE
    assert not [w for w in caught if "is not finite, so" in str(w.message)]


def test_resumed_run_does_not_repeat_a_warning_of_a_bound(tmp_path: Path) -> None:
    class AtBound(LitSmall):
        def on_train_batch_end(self, *args: Any) -> None:
            self.hyperparameters.unconstrained[0] = -20.0
            super().on_train_batch_end(*args)

    options = {"log_every_n_steps": 1}
    with pytest.warns(UserWarning, match="'dropout' has arrived at its bound 0"):
        first = run(AtBound(), batches=4, **options)
    first.save_checkpoint(tmp_path / "saved.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The hyperparameter")
        run(AtBound(), batches=6, checkpoint=tmp_path / "saved.ckpt", **options)


def summaries(folder: Path) -> int:
    """Number of summaries for the tab HPARAMS in all event files of a folder."""
    tag = "_hparams_/session_start_info"
    return sum(
        value.tag == tag
        for path in folder.glob("events*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    )


@pytest.mark.parametrize(("version", "count"), [("same", 1), ("other", 2)])
def test_resumed_run_writes_the_hparams_summary_once_into_each_folder(tmp_path: Path, version: str, count: int) -> None:
    def logger(version: str) -> TensorBoardLogger:
        return TensorBoardLogger(tmp_path, name="", version=version, default_hp_metric=False)

    first = run(LitSmall(), batches=8, logger=logger("same"), log_every_n_steps=4)
    first.save_checkpoint(tmp_path / "eight.ckpt")
    run(LitSmall(), batches=16, checkpoint=tmp_path / "eight.ckpt", logger=logger(version), log_every_n_steps=4)
    assert sum(summaries(folder) for folder in {tmp_path / "same", tmp_path / version}) == count


class WithGradientPenalty(LitSmall):
    """Its validation loss differentiates the network, so that weights cannot be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        if not torch.is_grad_enabled():
            return super().validation_loss(batch, batch_idx)
        self.calls.append(batch_idx)
        x, y = batch
        x = x.clone().requires_grad_()
        loss = super().validation_loss((x, y), batch_idx)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + gradient.square().mean()


def test_resumed_run_knows_that_weights_cannot_be_frozen(tmp_path: Path) -> None:
    module = WithGradientPenalty()
    run(module, batches=4).save_checkpoint(tmp_path / "saved.ckpt")
    assert module.calls == [0, 0, 1, 2, 3]
    resumed = WithGradientPenalty()
    run(resumed, batches=6, checkpoint=tmp_path / "saved.ckpt")
    assert resumed.calls == [4, 5]


def test_watch_warns_of_both_bounds_of_one_hyperparameter() -> None:
    places = iter([-20.0, -20.0, 20.0, 20.0])

    class Wandering(LitSmall):
        def on_train_batch_end(self, *args: Any) -> None:
            self.hyperparameters.unconstrained[0] = next(places)
            super().on_train_batch_end(*args)

    with pytest.warns(UserWarning, match="has arrived at its bound") as caught:
        run(Wandering(), batches=4, log_every_n_steps=1)
    told = [str(w.message) for w in caught if "has arrived at its bound" in str(w.message)]
    assert ["bound 0 " in told[0], "bound 0.9 " in told[1], len(told)] == [True, True, 2]


def test_failed_resume_keeps_the_state_that_was_loaded(tmp_path: Path) -> None:
    run(LitSmall(), batches=4).save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]["STNCallback"]
    stn = STNCallback(1, 1, 0, lr=0.05, seed=1, perturb="batch", optimizer=torch.optim.SGD)
    fit = trainer(stn, max_epochs=2)
    with pytest.raises(ValueError, match="has SGD"):
        fit.fit(LitSmall(), loader(64), loader(16, seed=1), ckpt_path=tmp_path / "saved.ckpt")
    assert stn.state_dict()["clock"] == saved["clock"]
    assert stn.state_dict()["optimizer"]["class"] == saved["optimizer"]["class"] == "SharedAdam"
