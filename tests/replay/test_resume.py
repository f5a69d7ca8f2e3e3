"""Interrupted replays, resumed from a checkpoint, compared bit for bit with replays without interruption."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from callback.test_resume import assert_equal_states
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from replay.cases import BATCHES, EPOCHS, KINDS, Named, Plain, recorded
from replay.test_stn_module import AutomaticPlateau, Plateau, Tuned
from support import images, loader, trainer
from torch import Tensor, nn

from lightning_stn import Gaussian, ResumableLoader, ScheduleReplay, STNCallback, WeightStep

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),  # Lightning: untrue
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


class Save(L.Callback):
    """Writes a checkpoint after a training batch of the run, and interrupts it two batches later."""

    def __init__(self, folder: Path, after: int) -> None:
        self.folder, self.after = folder, after

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        batches = trainer.fit_loop.total_batch_idx + 1
        if batches == self.after:
            trainer.save_checkpoint(self.folder / "saved.ckpt")
        if batches == self.after + 2:
            raise KeyError("interrupted")


class Bomb(L.Callback):
    """Interrupts a run in a hook, in one of its batches."""

    def __init__(self, hook: str, batch: int) -> None:
        self.batch = batch
        setattr(self, hook, self._raise)

    def _raise(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise KeyError("interrupted")


class Draws(Plain):
    """torch's own dropout, whose rate is an attribute."""

    def __init__(self) -> None:
        super().__init__(nn.Dropout(0.5))


class Fails(Named):
    """Interrupts a run within a training batch, after random draws and before the weight step."""

    batch = -1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.fit_loop.total_batch_idx == self.batch:
            raise KeyError("interrupted")
        return loss


class Run(NamedTuple):
    module: Any
    replay: ScheduleReplay
    trainer: L.Trainer
    seen: list[Any]


def train(
    kind: Callable[[], Any],
    replay: ScheduleReplay,
    callbacks: Sequence[L.Callback] = (),
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    **settings: Any,
) -> Run:
    L.seed_everything(seed, verbose=False)
    module = kind()
    seen: list[Any] = []
    watch = L.pytorch.callbacks.LambdaCallback(on_train_batch_start=lambda *_: seen.append(replay.values))
    keeps = any(isinstance(callback, OnExceptionCheckpoint) for callback in callbacks)
    run = trainer(replay, watch, *callbacks, **{"max_epochs": EPOCHS, "enable_checkpointing": keeps, **settings})
    run.fit(module, ResumableLoader(images(8 * BATCHES), 8), loader(16, seed=1), ckpt_path=checkpoint)
    return Run(module, replay, run, seen)


def assert_same(resumed: Run, whole: Run) -> None:
    assert_equal_states(resumed.module.state_dict(), whole.module.state_dict())
    for ours, theirs in zip(resumed.trainer.optimizers, whole.trainer.optimizers, strict=True):
        assert_equal_states(ours.state_dict(), theirs.state_dict())
    for ours, theirs in zip(resumed.trainer.lr_scheduler_configs, whole.trainer.lr_scheduler_configs, strict=True):
        assert_equal_states(ours.scheduler.state_dict(), theirs.scheduler.state_dict())
    assert_equal_states(resumed.replay.state_dict(), whole.replay.state_dict())
    assert resumed.replay.state_dict()["batches"] == len(whole.seen) == BATCHES * EPOCHS
    assert 0 < len(resumed.seen) < len(whole.seen)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]


def schedule(**settings: Any) -> ScheduleReplay:
    return ScheduleReplay(recorded(2 * BATCHES * EPOCHS), **settings)


def noisy() -> ScheduleReplay:
    return ScheduleReplay(KINDS, noise=Gaussian(), seed=3)


def attribute() -> ScheduleReplay:
    return schedule(attributes={"net.3.p": "dropout", "net.3.inplace_": "length"})


class Marked(Draws):
    def __init__(self) -> None:
        super().__init__()
        self.net[3].inplace_ = 0  # type: ignore[assignment]


CASES: dict[str, tuple[Callable[[], Any], Callable[[], ScheduleReplay], int, dict[str, Any]]] = {
    "plain module": (Named, schedule, 8, {}),
    "plain module, at the end of an epoch": (Named, schedule, 6, {}),
    "plain module, before the last batch of an epoch": (Named, schedule, 11, {}),
    "noise": (Named, noisy, 8, {}),
    "attributes": (Marked, attribute, 8, {}),
    "accumulated gradients": (Named, schedule, 9, {"accumulate_grad_batches": 4}),
    "STNModule": (Tuned, schedule, 8, {}),
    "STNModule, automatic optimisation": (AutomaticPlateau, schedule, 8, {}),
    "STNModule, scheduler that follows a metric": (Plateau, schedule, 8, {}),
    "STNModule, accumulated gradients": (
        *(Tuned, lambda: schedule(weight_step=WeightStep(accumulate_grad_batches=4)), 9, {}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_replay_continues_bit_for_bit(tmp_path: Path, case: str) -> None:
    kind, replay, after, settings = CASES[case]
    whole = train(kind, replay(), **settings)
    with pytest.raises(KeyError, match="interrupted"):
        train(kind, replay(), [Save(tmp_path, after)], **settings)
    resumed = train(kind, replay(), seed=9, checkpoint=tmp_path / "saved.ckpt", **settings)
    assert_same(resumed, whole)
    assert len(resumed.seen) == BATCHES * EPOCHS - after


def test_comparison_detects_a_run_with_another_seed() -> None:
    with pytest.raises(AssertionError):
        assert_same(train(Named, schedule(), seed=1), train(Named, schedule()))


PLACES = [
    ("on_train_batch_start", 8),
    ("on_before_optimizer_step", 8),
    ("on_train_batch_end", 8),
    ("on_train_batch_end", 5),
    ("on_validation_start", 11),
    ("on_train_epoch_end", 11),
]


@pytest.mark.parametrize("kind", [Named, Tuned])
@pytest.mark.parametrize(("hook", "batch"), PLACES)
def test_replay_that_an_exception_ended_continues_bit_for_bit(
    tmp_path: Path, kind: type[L.LightningModule], hook: str, batch: int
) -> None:
    whole = train(kind, schedule())
    with pytest.raises(KeyError, match="interrupted"):
        train(kind, schedule(), [Bomb(hook, batch), OnExceptionCheckpoint(tmp_path)])
    assert_same(train(kind, schedule(), seed=9, checkpoint=tmp_path / "on_exception.ckpt"), whole)


@pytest.mark.parametrize("batch", [0, 8, 12])
def test_replay_that_an_exception_ended_within_a_batch_continues_bit_for_bit(tmp_path: Path, batch: int) -> None:
    class Failing(Fails):
        pass

    Failing.batch = batch
    whole = train(Fails, schedule())
    with pytest.raises(KeyError, match="interrupted"):
        train(Failing, schedule(), [OnExceptionCheckpoint(tmp_path)])
    resumed = train(Fails, schedule(), seed=9, checkpoint=tmp_path / "on_exception.ckpt")
    assert_equal_states(resumed.module.state_dict(), whole.module.state_dict())
    assert resumed.seen == whole.seen[batch:]


class ByStep(Named):
    """Is interrupted at the end of a weight step, before its scheduler steps."""

    batch = -1

    def configure_optimizers(self) -> Any:
        (optimizer,), (scheduler,) = super().configure_optimizers()
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.trainer.fit_loop.total_batch_idx == self.batch:
            raise KeyError("interrupted")


def test_exception_between_weight_step_and_scheduler_is_told_when_the_run_is_resumed(tmp_path: Path) -> None:
    class Failing(ByStep):
        batch = 8

    with pytest.raises(KeyError, match="interrupted"):
        train(Failing, schedule(), [OnExceptionCheckpoint(tmp_path)])
    with pytest.warns(UserWarning, match=r"came before the learning-rate schedulers stepped\. The resumed run is"):
        run = train(ByStep, schedule(), checkpoint=tmp_path / "on_exception.ckpt")
    assert run.replay.state_dict()["batches"] == BATCHES * EPOCHS


def saved(folder: Path, replay: ScheduleReplay, kind: Callable[[], Any] = Named) -> Path:
    with pytest.raises(KeyError, match="interrupted"):
        train(kind, replay, [Save(folder, 8)])
    return folder / "saved.ckpt"


@pytest.mark.parametrize(
    ("replay", "settings", "message"),
    [
        (ScheduleReplay(recorded(18)), {}, r"differs in values\. From"),
        (schedule(noise=Gaussian(0.1)), {}, r"differs in noise=Gaussian\(scale=0\.1\) \(it was None\)\. From"),
        (schedule(), {"max_epochs": EPOCHS + 1}, r"differs in length=24 \(it was 18\)\. From"),
    ],
)
def test_resumed_run_with_another_replay_says_what_differs(
    tmp_path: Path, replay: ScheduleReplay, settings: dict[str, Any], message: str
) -> None:
    checkpoint = saved(tmp_path, schedule())
    with pytest.warns(UserWarning, match=message):
        train(Named, replay, checkpoint=checkpoint, **settings)


def test_checkpoint_of_a_run_without_replay_goes_on_at_its_batch_with_a_warning(tmp_path: Path) -> None:
    class Other(L.Callback):
        pass

    L.seed_everything(0, verbose=False)
    module, first = Draws(), trainer(Save(tmp_path, 8), max_epochs=EPOCHS)
    with pytest.raises(KeyError, match="interrupted"):
        first.fit(module, ResumableLoader(images(8 * BATCHES), 8), loader(16, seed=1))
    replay = schedule(attributes={"net.3.p": "dropout", "net.1.marked": "length"})

    def marked() -> Draws:
        module = Draws()
        module.net[1].marked = 0  # type: ignore[assignment]
        return module

    with pytest.warns(UserWarning, match=r"holds no state of ScheduleReplay.*goes on at the batch"):
        run = train(marked, replay, checkpoint=tmp_path / "saved.ckpt")
    assert run.seen == [recorded(36).rows[2 * step].values for step in range(8, 18)]


def test_checkpoint_of_a_tuned_run_goes_on_at_its_batch(tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    stn = STNCallback(train_steps=1, warmup=0, lr=0.1)
    with pytest.raises(KeyError, match="interrupted"):
        trainer(stn, Save(tmp_path, 8), max_epochs=EPOCHS).fit(
            Tuned(), ResumableLoader(images(8 * BATCHES), 8), loader(16, seed=1)
        )
    with pytest.warns(UserWarning, match=r"holds no state of ScheduleReplay"):
        run = train(Tuned, schedule(), checkpoint=tmp_path / "saved.ckpt")
    assert run.seen[0] == recorded(36).rows[16].values
    assert run.module.hyperparameters.values() == recorded(36).final


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [("batches", -1, r"damaged: \['batches'\]"), ("signature", None, "damaged"), ("version", 9, "has version 9")],
)
def test_damaged_state_is_refused(tmp_path: Path, entry: str, value: Any, message: str) -> None:
    path = saved(tmp_path, schedule())
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["ScheduleReplay"][entry] = value
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=message):
        train(Named, schedule(), checkpoint=path)
