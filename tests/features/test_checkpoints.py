"""Checkpoints: when they are written, the state of one step in them, and the settings of a resumed run."""

from dataclasses import asdict, is_dataclass
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from features.runs import MODES, Traced, callback, train
from lightning.pytorch.callbacks import ModelCheckpoint
from support import LitSmall, images, loader, trainer
from torch import Tensor

from lightning_stn import Float, Integer, ResumableLoader, Scales, STNCallback, WeightStep

pytestmark = pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")

BATCHES = 5
AT_ONCE = timedelta(microseconds=1)  # Lightning before 2.5.5 took zero for None
SAVERS: dict[str, tuple[dict[str, Any], dict[str, Any], list[int]]] = {
    "every third step": ({"every_n_train_steps": 3, "save_top_k": -1}, {}, [3, 6, 9, 12, 15]),
    "every second step, accumulation": (
        {"every_n_train_steps": 2, "save_top_k": -1},
        {"accumulate_grad_batches": 2},
        [2, 4, 6, 8],
    ),
    "every second step, by a metric": (
        {"every_n_train_steps": 2, "monitor": "val_loss", "save_top_k": -1},
        {},
        [6, 8, 10, 12, 14],  # steps two and four precede the first validation, after step five
    ),
    "by time": ({"train_time_interval": AT_ONCE, "save_top_k": -1}, {}, list(range(1, 16))),
    "by time, accumulation": (
        {"train_time_interval": AT_ONCE, "save_top_k": -1},
        {"accumulate_grad_batches": 2},
        list(range(1, 10)),
    ),
    "every second epoch": ({"every_n_epochs": 2, "save_top_k": -1}, {}, [10]),
    "at the end of every validation": (
        {"save_on_train_epoch_end": False, "save_top_k": -1},
        {"val_check_interval": 2},
        [2, 4, 7, 9, 12, 14],
    ),
    "the best two": ({"monitor": "val_loss", "save_top_k": 2, "mode": "max"}, {}, [5, 10]),
    "the largest value": ({"monitor": "length", "mode": "max"}, {}, [5]),
    "the last": ({}, {}, [15]),
}


class Logs(Traced):
    """Logs a hyperparameter, so that a callback can monitor it."""

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("length", self.hyperparameters["length"].float())
        return super().validation_loss(batch, batch_idx)


@pytest.mark.parametrize("automatic", MODES)
@pytest.mark.parametrize("case", SAVERS)
@pytest.mark.filterwarnings("ignore:`ModelCheckpoint.monitor='val_loss'.` could not find")  # Lightning 2.5 warns
def test_checkpoint_is_written_when_due_with_the_values_of_its_step(tmp_path: Path, case: str, automatic: bool) -> None:
    """Every checkpoint holds the hyperparameters and scales that the schedule has for its step."""
    settings, others, expected = SAVERS[case]
    L.seed_everything(3, verbose=False)
    module = Logs(automatic)
    clip = {name: others[name] for name in others if name.startswith("accumulate")}
    stn = callback(weight_step=WeightStep(**({} if automatic else clip)))
    rest = others if automatic else {name: others[name] for name in others if name not in clip}
    saver = ModelCheckpoint(tmp_path, "{step}", save_last=True, **settings)
    train(module, saver, stn=stn, max_epochs=3, enable_checkpointing=True, **rest)
    written = {int(path.stem.removeprefix("step=")): path for path in tmp_path.glob("step=*.ckpt")}
    assert sorted(written) == expected
    rows = {row.step: row for row in stn.schedule.rows}
    for path in (*written.values(), Path(saver.last_model_path)):
        checkpoint = torch.load(path, weights_only=True)
        state = next(value for key, value in checkpoint["callbacks"].items() if "STNCallback" in key)
        row = rows[state["clock"]["batches"]]
        other = Traced()
        other.load_state_dict(checkpoint["state_dict"])
        assert other.hyperparameters.values() == row.values
        assert other.hyperparameters.scale.tolist() == pytest.approx(list(row.scales.values()))
        assert state["record"]["rows"][-1][0] == row.step


@pytest.mark.parametrize("automatic", MODES)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.skipif(
    "save_on_exception" not in signature(ModelCheckpoint).parameters, reason="Lightning has it from 2.5.3 on"
)
def test_run_resumes_from_a_checkpoint_written_on_an_exception(tmp_path: Path, automatic: bool) -> None:
    class Fails(Traced):
        def training_loss(self, batch: Any, batch_idx: int) -> Any:
            if len(self.rates) == 8:
                raise ZeroDivisionError
            return super().training_loss(batch, batch_idx)

    saver = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=100)
    module = Fails(automatic)
    with pytest.raises(ZeroDivisionError):
        train(module, saver, enable_checkpointing=True)
    (written,) = tmp_path.glob("*.ckpt")
    resumed, stn = Traced(automatic), callback()
    run = trainer(stn, max_epochs=2)
    with pytest.warns(UserWarning, match="ended before the epoch ended"):
        run.fit(resumed, loader(40), loader(16, seed=1), ckpt_path=written)
    assert [row.step for row in stn.schedule.rows] == list(range(2 * BATCHES + 1))


@pytest.mark.parametrize("automatic", MODES)
def test_best_checkpoint_holds_the_state_of_one_step(tmp_path: Path, automatic: bool) -> None:
    """Weights, hyperparameters and scales, restored by hand, by the Trainer, and in an exported network."""
    states = []

    class Keep(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            states.append({key: value.clone() for key, value in pl_module.state_dict().items()})

    L.seed_everything(3, verbose=False)
    module, stn = Traced(automatic), callback(scales=Scales(tune=True))
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")  # the best epoch is the first, not the last
    run = train(module, Keep(), saver, stn=stn, max_epochs=3, enable_checkpointing=True)
    assert not torch.equal(states[0]["hyperparameters.unconstrained"], states[2]["hyperparameters.unconstrained"])
    assert not torch.equal(states[0]["hyperparameters.raw_scale"], states[2]["hyperparameters.raw_scale"])
    loaded = Traced.load_from_checkpoint(saver.best_model_path)
    assert all(torch.equal(value, states[0][key]) for key, value in loaded.state_dict().items())
    (score,) = run.validate(module, loader(16, seed=1), ckpt_path="best", verbose=False)
    assert score["val_loss"] == pytest.approx(float(saver.best_model_score or 0.0))
    assert module.hyperparameters.values() == stn.schedule.at(5) != stn.schedule.at(15)
    plain = loaded.export().eval()
    x, y = images(16, seed=1)[:]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(plain(x), y)
    assert loss.item() == pytest.approx(score["val_loss"], rel=1e-5)


def resume(
    folder: Path, checkpoint: Path | None, epochs: int = 4, module: LitSmall | None = None, **settings: Any
) -> tuple[LitSmall, STNCallback]:
    """Train with scales that are tuned, so that their settings can be resumed too."""
    L.seed_everything(3, verbose=False)
    module, stn = module or LitSmall(), callback(**{"scales": Scales(tune=True), **settings})
    run = trainer(stn, max_epochs=epochs)
    run.fit(module, ResumableLoader(images(8 * BATCHES), 8), loader(16, seed=1), ckpt_path=checkpoint)
    if checkpoint is None:
        run.save_checkpoint(folder / "two.ckpt")
    return module, stn


class Two(NamedTuple):
    """A run of two epochs, its checkpoint, and the run resumed from it for two more."""

    module: LitSmall
    checkpoint: Path
    expected: LitSmall
    stn: STNCallback


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder = tmp_path_factory.mktemp("two")
    module, _ = resume(folder, None, epochs=2)
    return Two(module, folder / "two.ckpt", *resume(folder, folder / "two.ckpt"))


CHANGES: dict[str, Any] = {
    "lr": 0.2,
    "train_steps": 1,
    "scales": Scales(tune=False, entropy_weight=50.0),
    "perturb": "example",
    "anneal": False,
    "weight_step": WeightStep(gradient_clip_val=0.01),
    "seed": 7,
}


def plain(setting: Any) -> Any:
    """A setting as a checkpoint holds it."""
    return asdict(setting) if is_dataclass(setting) else setting  # type: ignore[arg-type]


def test_resumed_run_keeps_its_settings_and_warns(two: Two) -> None:
    with pytest.warns(UserWarning, match="A resumed run keeps the settings of its checkpoint") as caught:
        module, stn = resume(two.checkpoint.parent, two.checkpoint, **CHANGES)
    (message,) = [str(w.message) for w in caught if "keeps the settings" in str(w.message)]
    for name, value in CHANGES.items():
        kept = getattr(callback()._arguments, name)
        if not is_dataclass(value):
            assert f"{name}={value!r} (it stays {kept!r})" in message
    assert "scales.tune=False (it stays True), scales.entropy_weight=50.0 (it stays 0.001)" in message
    assert "weight_step.gradient_clip_val=0.01 (it stays None)" in message
    assert "on_resume_use=[...]" in message
    assert stn.state_dict()["settings"] == two.stn.state_dict()["settings"]
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in two.expected.state_dict().items())


@pytest.mark.parametrize("name", CHANGES)
def test_resumed_run_uses_a_named_setting(two: Two, name: str) -> None:
    """There is no warning about it; other settings keep their values, and the run differs from there on."""
    module, stn = resume(two.checkpoint.parent, two.checkpoint, **{name: CHANGES[name]}, on_resume_use=[name])
    settings = stn.state_dict()["settings"]
    saved = torch.load(two.checkpoint, weights_only=True)["callbacks"]["STNCallback"]["settings"]
    assert settings == {**saved, name: plain(CHANGES[name])}
    assert any(not torch.equal(value, module.state_dict()[key]) for key, value in two.expected.state_dict().items())
    assert stn.schedule.rows[: 2 * BATCHES + 1] == two.stn.schedule.rows[: 2 * BATCHES + 1]


def test_named_learning_rate_keeps_the_optimizer_state(two: Two) -> None:
    _, stn = resume(two.checkpoint.parent, two.checkpoint, lr=0.2, on_resume_use=["lr"])
    state = stn.state_dict()["optimizer"]["optimizer"]
    assert [group["initial_lr"] for group in state["param_groups"]] == [0.2, 0.05]
    assert state["state"][0]["step"] == 10  # five in each half of the run


def test_named_phase_length_applies_from_the_resumed_step(two: Two) -> None:
    _, stn = resume(two.checkpoint.parent, two.checkpoint, train_steps=1, on_resume_use="train_steps")
    clock = stn.state_dict()["clock"]
    assert (clock["batches"], clock["weight_steps"], clock["hyperparameter_steps"]) == (20, 20, 5 + 10)


@pytest.mark.parametrize("tuned", [True, False])
def test_named_scale_setting_fixes_or_tunes_scales_from_the_resumed_step(tmp_path: Path, tuned: bool) -> None:
    resume(tmp_path, None, epochs=2, scales=Scales(tune=not tuned))
    checkpoint = tmp_path / "two.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]["hyperparameters.raw_scale"]
    module, stn = resume(tmp_path, checkpoint, scales=Scales(tune=tuned), on_resume_use=["scales"])
    assert torch.equal(module.hyperparameters.raw_scale, saved) is not tuned
    assert len(stn.state_dict()["optimizer"]["optimizer"]["param_groups"]) == 1 + tuned


def test_named_larger_entropy_weight_widens_the_scales_from_the_resumed_step(two: Two) -> None:
    """On average, since the default optimiser gives all scales one step length."""
    module, _ = resume(
        two.checkpoint.parent, two.checkpoint, scales=Scales(tune=True, entropy_weight=50.0), on_resume_use=["scales"]
    )
    assert module.hyperparameters.scale.mean() > two.expected.hyperparameters.scale.mean()


def test_resume_refuses_another_optimizer_unless_it_is_named(two: Two) -> None:
    with pytest.raises(
        ValueError, match=r"of class SharedAdam, but this STNCallback has SGD.*on_resume_use=\['optimizer'\]"
    ):
        resume(two.checkpoint.parent, two.checkpoint, optimizer=torch.optim.SGD)
    starts = []

    class Start(LitSmall):
        def on_train_start(self) -> None:
            starts.append(self.hyperparameters.unconstrained.clone())

    _, stn = resume(
        two.checkpoint.parent, two.checkpoint, module=Start(), optimizer=torch.optim.SGD, on_resume_use=["optimizer"]
    )
    assert torch.equal(starts[0], two.module.hyperparameters.unconstrained)
    assert stn.state_dict()["optimizer"]["class"] == "SGD"


def test_named_optimizer_starts_with_an_empty_state(two: Two) -> None:
    _, stn = resume(two.checkpoint.parent, two.checkpoint, on_resume_use=["optimizer"])
    assert stn.state_dict()["optimizer"]["optimizer"]["state"][0]["step"] == 5


def test_named_hyperparameters_return_to_their_start(two: Two) -> None:
    """The weights are those of the checkpoint."""
    starts = []

    class Start(LitSmall):
        def on_train_start(self) -> None:
            starts.append({key: value.clone() for key, value in self.state_dict().items()})

    _, stn = resume(two.checkpoint.parent, two.checkpoint, module=Start(), on_resume_use=["hyperparameters"])
    fresh = LitSmall().hyperparameters
    assert torch.equal(starts[0].pop("hyperparameters.unconstrained"), fresh.unconstrained)
    assert torch.equal(starts[0].pop("hyperparameters.raw_scale"), fresh.raw_scale)
    assert all(torch.equal(value, two.module.state_dict()[key]) for key, value in starts[0].items())
    assert stn.state_dict()["optimizer"]["optimizer"]["state"][0]["step"] == 5


SPECIFICATIONS = dict(LitSmall().hyperparameters.specifications)


@pytest.mark.parametrize(
    "others",
    [
        {"rate" if name == "dropout" else name: one for name, one in SPECIFICATIONS.items()},
        {name: SPECIFICATIONS[name] for name in ("noise", "dropout", "length")},
        {**SPECIFICATIONS, "dropout": Float(0.0, 0.8, init=0.05)},
        {**SPECIFICATIONS, "length": Integer(0, 5, init=2)},
        {**SPECIFICATIONS, "noise": Float(0.0, None, init=0.1, log=True)},
    ],
    ids=["name", "order", "range", "range of integers", "log"],
)
def test_resume_refuses_other_hyperparameters(two: Two, others: dict[str, Any]) -> None:
    module = LitSmall(others, dropout="dropout" if "dropout" in others else "rate")
    with pytest.raises(ValueError, match=r"The checkpoint was saved with the hyperparameters.*but this module has"):
        resume(two.checkpoint.parent, two.checkpoint, module=module)


def test_resume_refuses_additional_hyperparameters(two: Two) -> None:
    module = LitSmall({**SPECIFICATIONS, "more": Float(0.0, 1.0, init=0.5)})
    with pytest.raises(
        ValueError, match=r"The checkpoint was saved with the hyperparameters.*but this module has.*'more'"
    ):
        resume(two.checkpoint.parent, two.checkpoint, module=module)


def test_resume_ignores_other_start_values(two: Two) -> None:
    other = LitSmall({**SPECIFICATIONS, "dropout": Float(0.0, 0.9, init=0.5, scale=0.1)})
    module, _ = resume(two.checkpoint.parent, two.checkpoint, module=other)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in two.expected.state_dict().items())


@pytest.mark.parametrize("names", [["learning_rate"], "lt", ["lr", "dataloader"]])
def test_callback_refuses_to_override_an_unknown_setting_and_lists_the_known(names: Any) -> None:
    with pytest.raises(
        ValueError, match=r"expected on_resume_use to name some of \['train_steps', .*'hyperparameters'\]"
    ):
        STNCallback(on_resume_use=names)
