"""An exception anywhere in a run: the run resumed from its checkpoint ends bit for bit as one without interruption."""

import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from callback.interrupted import Bomb, Interrupted, Optimizer, assert_resumes, interrupt, run, uninterrupted
from callback.test_resume import BATCHES, EPOCHS, assert_same
from support import METHODS
from torch import Tensor

from lightning_stn import WeightStep
from lightning_stn.methods import SharedAdam

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),  # Lightning: untrue
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:A resumed run keeps the settings of its checkpoint"),
]


OF_A_HYPERPARAMETER_STEP = [
    "validation loss of hyperparameter step 0",
    "validation loss of hyperparameter step 1",
    "data of a hyperparameter step",
]
OF_AN_EPOCH = [
    "validation loss of evaluation batch 0",
    "validation loss of evaluation batch 2",
    "hook before a validation",
    "hook after a validation",
    "logger of a validation",
    *(
        f"hook {order} the callback's, {when}"
        for order in ("before", "behind")
        for when in ("before an epoch", "after a validation", "after an epoch")
    ),
]
OF_A_BATCH = [
    "training loss",
    "training loss, after the network",
    "training step, after the weight step",
    "data",
    "transfer of the next batch",
    "hook of the module before a batch",
    "hook of the module after a batch",
    "hook before the optimiser's step",
    "optimiser's step",
    "logger",
    *(
        f"hook {order} the callback's, {when}"
        for order in ("before", "behind")
        for when in ("before a batch", "after a batch")
    ),
]
PLACES = {
    **dict.fromkeys(OF_A_BATCH, (0, 3, 5, 6, 10, 11)),
    **dict.fromkeys(OF_A_HYPERPARAMETER_STEP, (3, 5, 9, 11)),
    **dict.fromkeys(OF_AN_EPOCH, (5, 11)),
}
"""Places with the batches in which the exception comes; 5 and 11 are the last of their epochs."""

MANY: dict[str, dict[str, Any]] = {
    "delta-stn": {"stn": METHODS["delta-stn"]},
    "automatic": {"automatic": True},
    "automatic delta-stn": {"stn": METHODS["delta-stn"], "automatic": True},
    "max_steps": {"max_epochs": -1, "max_steps": BATCHES * EPOCHS},
    "a row per example": {"stn": {"perturb": "example"}},
    "uncentred": {"stn": METHODS["uncentred"]},
}


@pytest.mark.parametrize("place", PLACES)
def test_run_interrupted_anywhere_resumes_bit_for_bit(tmp_path: Path, place: str) -> None:
    assert_resumes(tmp_path, place, PLACES[place][1:3] if len(PLACES[place]) > 2 else PLACES[place][:1])


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", ["", *MANY])
def test_run_of_any_kind_interrupted_anywhere_resumes_bit_for_bit(tmp_path: Path, place: str, case: str) -> None:
    assert_resumes(tmp_path, place, PLACES[place], **MANY.get(case, {}))


class Skips(Interrupted):
    """Skips the rest of an epoch from its fifth batch on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        super().on_train_batch_start(batch, batch_idx)
        return -1 if batch_idx == 4 else None


class Plateau(Interrupted):
    """Its scheduler follows the validation, and lowers the rate after nearly every one."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


@pytest.mark.parametrize(
    ("place", "batch", "options"),
    [
        ("validation loss of evaluation batch 2", 8, {"val_check_interval": 3}),
        ("training loss", 6, {"check_val_every_n_epoch": 2}),
        ("logger", 5, {"check_val_every_n_epoch": 2}),
        ("validation loss of hyperparameter step 1", 7, {"limit_train_batches": 4, "max_epochs": 5}),
        ("transfer of the next batch", 7, {"limit_train_batches": 4, "max_epochs": 5}),
        ("training loss, after the network", 4, {"val_check_interval": 4, "check_val_every_n_epoch": None}),
        ("hook before the callback's, after an epoch", 5, {"kind": Plateau}),
        ("hook before the callback's, before an epoch", 5, {"kind": Plateau, "automatic": True}),
        ("validation loss of evaluation batch 2", 5, {"kind": Plateau}),
        ("logger", 5, {"kind": Plateau}),
        ("hook before the callback's, after an epoch", 4, {"kind": Skips, "max_epochs": 5}),
        ("validation loss of hyperparameter step 1", 8, {"kind": Skips, "max_epochs": 5}),
    ],
)
def test_run_interrupted_around_validation_and_schedulers_resumes_bit_for_bit(
    tmp_path: Path, place: str, batch: int, options: dict[str, Any]
) -> None:
    assert_resumes(tmp_path, place, [batch], **options)


@pytest.mark.parametrize("index", [0, pytest.param(20, marks=pytest.mark.slow), 47])
def test_run_interrupted_in_a_data_worker_resumes_bit_for_bit(tmp_path: Path, index: int) -> None:
    assert_resumes(tmp_path, "worker", [index], workers=2)


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("place", ["training loss, after the network", "hook of the module after a batch"])
def test_gradients_that_accumulate_are_in_the_checkpoint(tmp_path: Path, place: str, automatic: bool) -> None:
    """The second batch of a window of four, and its third one; the last window of an epoch has two."""
    own = {} if automatic else {"stn": {"weight_step": WeightStep(accumulate_grad_batches=4)}}
    options = {"accumulate_grad_batches": 4} if automatic else {}
    assert_resumes(tmp_path, place, [1, 8, 11], automatic=automatic, **own, **options)


class AfterBackward(Interrupted):
    """Runs into the bomb when a backward pass has added to the gradients."""

    def on_after_backward(self) -> None:
        self.bomb.here("after backward")


class WithOthers(Interrupted):
    """Reads a batch of several loaders."""

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_loss(batch["images"], batch_idx)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("place", ["training loss", "hook of the module after a batch"])
def test_batches_that_lightning_reads_ahead_are_read_again(tmp_path: Path, place: str) -> None:
    assert_resumes(tmp_path, place, [0, 3, 5, 6], kind=WithOthers, ahead=True)


@pytest.mark.parametrize("place", ["validation loss of hyperparameter step 1", "training loss, after the network"])
def test_resumed_run_that_is_interrupted_again_resumes_bit_for_bit(tmp_path: Path, place: str) -> None:
    interrupt(tmp_path / "first", Bomb(place, 5))
    for folder, other in (("first", "second"), ("second", "third")):
        interrupt(tmp_path / other, Bomb(place, 7), checkpoint=tmp_path / folder / "on_exception.ckpt", seed=7)
    resumed = run(tmp_path / "last", checkpoint=tmp_path / "third" / "on_exception.ckpt", seed=9)
    assert_same(*resumed, *uninterrupted(tmp_path, {}))


class HalfWay(Optimizer):
    """Runs into the bomb when it has changed the first weight."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1e-3)
        self.bomb.here("half a step")
        return super().step(closure)


class StepsHalfWay(Interrupted):
    def configure_optimizers(self) -> Any:
        optimizer = HalfWay(self.parameters(), lr=0.01)
        optimizer.bomb = self.bomb
        return optimizer


class Scheduled(Interrupted):
    """Runs into the bomb between the optimiser's step and that of its scheduler, or behind both."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.bomb.here("scheduler")
        super().lr_scheduler_step(scheduler, metric)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


WeightAveraging: Any = getattr(L.pytorch.callbacks, "WeightAveraging", None)
AVERAGES = pytest.mark.skipif(WeightAveraging is None, reason="Lightning has it from 2.6 on")


class OwnOptimizer(SharedAdam):
    """A hyperparameter optimiser that fails after its third step."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        OwnOptimizer.steps += 1
        if OwnOptimizer.steps == 3:
            raise KeyError("interrupted")


@pytest.mark.parametrize(
    ("place", "reason", "options"),
    [
        ("half a step", "the exception came while HalfWay changed the weights", {"kind": StepsHalfWay}),
        ("scheduler", "the exception came before the learning-rate schedulers stepped", {"kind": Scheduled}),
        (
            "",
            "the exception came while a hyperparameter step changed hyperparameters or weights",
            {"stn": {"optimizer": OwnOptimizer}},
        ),
        (
            "after backward",
            "the exception came after a backward pass had added to the gradients of earlier batches",
            {"kind": AfterBackward, "stn": {"weight_step": WeightStep(accumulate_grad_batches=4)}},
        ),
        pytest.param(
            "validation loss of hyperparameter step 1",
            "the weights of the last batch may not have been averaged",
            {"others": [WeightAveraging]},
            marks=AVERAGES,
        ),
        pytest.param(
            "validation loss of evaluation batch 1",
            "the weights were exchanged for their average",
            {"others": [WeightAveraging]},
            marks=AVERAGES,
        ),
    ],
)
def test_run_that_cannot_be_resumed_exactly_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, reason: str, options: dict[str, Any]
) -> None:
    """There is no copy of weights and optimiser states from before a step, and hooks of others are not repeated.

    No batch is repeated or left out.
    """
    OwnOptimizer.steps = 0
    with caplog.at_level("INFO"), pytest.raises(KeyError, match="interrupted"):
        run(tmp_path / "first", Bomb(place or "nowhere", 5 if "evaluation" in place else 7), **options)
    assert f"A run that is resumed from here will not be exact: {reason}" in caplog.text
    with pytest.warns(UserWarning, match=f"When the checkpoint was written, {reason}") as caught:
        _, stn = run(tmp_path / "second", checkpoint=tmp_path / "first" / "on_exception.ckpt", **options)
    assert len([w for w in caught if "When the checkpoint was written" in str(w.message)]) == 1
    assert stn.state_dict()["clock"]["batches"] == BATCHES * EPOCHS


def test_exception_behind_optimiser_and_scheduler_is_resumed_exactly(tmp_path: Path) -> None:
    assert_resumes(tmp_path, "training step, after the weight step", [7], kind=Scheduled)


def test_interrupt_from_the_keyboard_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    class Pressed(Bomb):
        def here(self, place: str) -> None:
            try:
                super().here(place)
            except KeyError:
                raise KeyboardInterrupt from None

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            run(tmp_path / "first", Pressed("training loss, after the network", 7))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    resumed = run(tmp_path / "second", checkpoint=tmp_path / "first" / "on_exception.ckpt", seed=9)
    assert_same(*resumed, *uninterrupted(tmp_path, {}))
