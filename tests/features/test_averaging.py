"""Weight averaging leaves the hyperparameters out: checkpoints and the final module hold the current ones."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from callback.test_resume import AT_EPOCH_END, AT_VALIDATION, Adam, Automatic, assert_resumes
from features.runs import MODES, Traced, callback, train
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from support import images, loader, random_gates, trainer
from torch import Tensor

from lightning_stn import Scales

pytestmark = [
    pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="this Lightning has no such callback"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:A resumed run keeps the settings of its checkpoint"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
DECAY = 0.8


def average(kind: str, **settings: Any) -> L.Callback:
    """A callback that averages the weights."""
    chosen = {"ema": lambda: callbacks.EMAWeightAveraging(decay=DECAY, **settings), "mean": callbacks.WeightAveraging}
    built: L.Callback = chosen[kind]()
    return built


class Trail(L.Callback):
    """Records the state after every batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.states.append({key: value.clone() for key, value in pl_module.state_dict().items()})


def expected_average(kind: str, states: list[dict[str, Tensor]], name: str) -> Tensor:
    """Average of a tensor over the states, which begin after the first step."""
    result = states[0][name].double()
    for count, state in enumerate(states[1:], start=2):
        share = 1 - DECAY if kind == "ema" else 1 / count
        result = result + share * (state[name].double() - result)
    return result.float()


@pytest.mark.parametrize("automatic", MODES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_weights_are_averaged_and_hyperparameters_are_not(
    tmp_path: Path, kind: str, first: bool, automatic: bool
) -> None:
    """At the end, and in checkpoints written after batches, after validation and at the ends of epochs.

    Before `STNCallback` in the list, the average takes the weights before the hyperparameter step, which moves the base
    weights; behind it, the weights after that step.
    """
    L.seed_everything(3, verbose=False)
    module, stn, trail, averaging_trail = Traced(automatic), callback(scales=Scales(tune=True)), Trail(), Trail()
    random_gates(module, 0.1)
    savers = [
        ModelCheckpoint(tmp_path / "batch", "{step}", every_n_train_steps=4, save_top_k=-1),
        ModelCheckpoint(tmp_path / "validation", "{step}", "val_loss", save_on_train_epoch_end=False, save_top_k=-1),
        ModelCheckpoint(tmp_path / "epoch", "{step}", save_on_train_epoch_end=True, save_top_k=-1),
    ]
    others = [stn, trail, *savers]
    averaging = [average(kind), averaging_trail]
    run = trainer(*([*averaging, *others] if first else [*others, *averaging]), enable_checkpointing=True)
    run.fit(module, loader(40), loader(16, seed=1))

    def check(state: dict[str, Tensor], step: int, averaged: bool) -> None:
        now = trail.states[step - 1]
        for name, value in state.items():
            if name.startswith("hyperparameters.") or not averaged:
                assert torch.equal(value, now[name]), name
            elif value.is_floating_point():
                expected = expected_average(kind, averaging_trail.states[:step], name)
                torch.testing.assert_close(value, expected, msg=name)
                assert not torch.equal(value, now[name]), name

    assert not torch.equal(trail.states[3]["hyperparameters.raw_scale"], trail.states[9]["hyperparameters.raw_scale"])
    saved = sorted(tmp_path.rglob("*.ckpt"))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in saved) == [
        *("batch/step=4.ckpt", "batch/step=8.ckpt"),
        *("epoch/step=10.ckpt", "epoch/step=5.ckpt"),
        *("validation/step=10.ckpt", "validation/step=5.ckpt"),
    ]
    for path in saved:
        checkpoint, step = torch.load(path, weights_only=True), int(path.stem.removeprefix("step="))
        check(checkpoint["state_dict"], step, averaged=True)
        check(checkpoint["current_model_state"], step, averaged=False)
    check(module.state_dict(), 10, averaged=True)
    assert module.hyperparameters.values() == stn.schedule.rows[-1].values


def test_validation_uses_averaged_weights_at_the_current_hyperparameters() -> None:
    module, stn, trail = Traced(), callback(), Trail()
    random_gates(module, 0.1)
    logged = []

    class Keep(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            logged.append(float(trainer.callback_metrics["val_loss"]))

    train(module, average("ema"), trail, Keep(), stn=stn)
    x, y = images(16, seed=1)[:]
    for step, loss in zip((5, 10), logged, strict=True):
        other = Traced()
        state = {
            name: value if name.startswith("hyper") else expected_average("ema", trail.states[:step], name)
            for name, value in trail.states[step - 1].items()
        }
        other.load_state_dict(state)
        with torch.no_grad():
            losses = [
                F.cross_entropy(other.eval().net(part), labels)
                for part, labels in zip(x.split(8), y.split(8), strict=True)
            ]
        assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", [Adam, Automatic])
@pytest.mark.parametrize(
    ("save_at", "keep"),
    [(8, {}), (6, AT_VALIDATION), (12, AT_EPOCH_END)],
    ids=["middle of an epoch", "after validation", "end of an epoch"],
)
@pytest.mark.parametrize("averaging", ["ema", "mean"])
def test_resumed_run_continues_the_average(
    tmp_path: Path, averaging: str, save_at: int, keep: dict[str, Any], kind: type[Adam]
) -> None:
    """Bit for bit, including the average that the module ends with."""
    options: dict[str, Any] = {"callbacks": lambda: [average(averaging)], "keep": keep, "kind": kind}
    assert_resumes(tmp_path, save_at, save_at + 2, options)


def test_fit_refuses_stochastic_weight_averaging_with_the_reason() -> None:
    message = "does not support StochasticWeightAveraging: it ends with an epoch.*EMAWeightAveraging, which average"
    with pytest.raises(NotImplementedError, match=message):
        train(Traced(), StochasticWeightAveraging(swa_lrs=0.01))
