"""Interrupted runs, resumed from a checkpoint, compared bit for bit with uninterrupted runs."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from support import METHODS, LitSmall, every_method, images, loader, trainer

from lightning_stn import Categorical, Float, Hyperparameter, Integer, ResumableLoader, Scales, STNCallback, WeightStep

pytestmark = [
    pytest.mark.filterwarnings("ignore:A resumed run keeps the settings of its checkpoint"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:The learning-rate scheduler ReduceLROnPlateau follows 'val_loss'"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
BATCHES, EPOCHS = 6, 3


class Adam(LitSmall):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class Automatic(Adam):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True


def following(interval: str, base: type[Adam] = Adam, **settings: Any) -> type[Adam]:
    """A module whose scheduler follows a metric and lowers the rate at nearly every step."""

    class Plateau(base):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            (optimizer,), _ = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.1)
            settings_ = {"scheduler": scheduler, "monitor": "val_loss", "interval": interval, **settings}
            return {"optimizer": optimizer, "lr_scheduler": settings_}

    return Plateau


class ByStep(Adam):
    def configure_optimizers(self) -> Any:
        (optimizer,), _ = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BATCHES * EPOCHS)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 2}]


class OneCycle(Adam):
    """Reads the length of the run, for which Lightning builds the loaders before it restores their state."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Gates(Adam):
    def __init__(self) -> None:
        super().__init__(response="gates")


class Double(Adam):
    """Converted to float64 before Lightning does it: checkpoints are loaded earlier, and would be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.double()


class Stop(L.Callback):
    """Raises before a training batch, or kills the process with SIGKILL."""

    def __init__(self, batch: int, kill: bool) -> None:
        self.batch = batch
        self.kill = kill

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("interrupted")


def run(
    folder: Path,
    every: int,
    *callbacks: L.Callback,
    options: dict[str, Any],
    checkpoint: Path | None = None,
    seed: int = 0,
) -> tuple[LitSmall, STNCallback]:
    """Train with a checkpoint every `every` weight steps, or at the times that `options["keep"]` gives."""
    L.seed_everything(seed, verbose=False)
    settings = {
        "kind": Adam,
        "workers": 0,
        "accumulate": 1,
        "precision": "32-true",
        "stn": {},
        "trainer": {},
        "keep": {},
        "callbacks": list,
        "plugins": list,
        **options,
    }
    module = settings["kind"]()
    weight_step = WeightStep(accumulate_grad_batches=settings["accumulate"])
    stn = STNCallback(2, 1, warmup=0, lr=0.05, seed=seed, **{"weight_step": weight_step, **settings["stn"]})
    keep = ModelCheckpoint(folder, "{step}", save_top_k=-1, **(settings["keep"] or {"every_n_train_steps": every}))
    fit = trainer(
        stn,
        *settings["callbacks"](),
        *callbacks,
        keep,
        enable_checkpointing=True,
        plugins=settings["plugins"](),
        precision=settings["precision"],
        log_every_n_steps=1,
        **{"max_epochs": EPOCHS, **settings["trainer"]},
    )
    train = ResumableLoader(images(8 * BATCHES), 8, num_workers=settings["workers"])
    fit.fit(module, train, loader(16, seed=1), ckpt_path=checkpoint)
    return module, stn


def assert_equal_states(ours: Any, theirs: Any, place: str = "") -> None:
    """Compare nested dictionaries and lists: tensors bit for bit, everything else by `==`."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), place
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), place
        for key in theirs:
            assert_equal_states(ours[key], theirs[key], f"{place}/{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), place
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal_states(mine, other, f"{place}/{index}")
    else:
        assert ours == theirs, place


def assert_resumes(folder: Path, save_at: int, stop_at: int, options: dict[str, Any]) -> None:
    whole, whole_stn = run(folder / "whole", 1000, options=options)
    with pytest.raises(KeyError, match="interrupted"):
        run(folder / "first", save_at, Stop(stop_at, kill=False), options=options)
    saved = folder / "first" / f"step={save_at}.ckpt"
    resumed, resumed_stn = run(folder / "second", 1000, options=options, checkpoint=saved, seed=99)
    assert_same(resumed, resumed_stn, whole, whole_stn)


def assert_same(resumed: LitSmall, resumed_stn: STNCallback, whole: LitSmall, whole_stn: STNCallback) -> None:
    assert_equal_states(resumed.state_dict(), whole.state_dict())
    assert_equal_states(resumed_stn.state_dict(), whole_stn.state_dict())
    assert_equal_states(
        [optimizer.state_dict() for optimizer in resumed.trainer.optimizers],
        [optimizer.state_dict() for optimizer in whole.trainer.optimizers],
    )
    assert_equal_states(
        [config.scheduler.state_dict() for config in resumed.trainer.lr_scheduler_configs],
        [config.scheduler.state_dict() for config in whole.trainer.lr_scheduler_configs],
    )
    assert_equal_states(resumed.trainer.precision_plugin.state_dict(), whole.trainer.precision_plugin.state_dict())
    batches = whole_stn.state_dict()["clock"]["batches"]
    assert batches >= 16
    steps = [row.step for row in resumed_stn.schedule.rows]
    assert steps == [row.step for row in whole_stn.schedule.rows]
    assert len(steps) > 4
    assert (steps[0], steps[-1]) == (0, batches)


AT_VALIDATION = {"save_on_train_epoch_end": False}
AT_EPOCH_END = {"save_on_train_epoch_end": True}
OFTEN = {"val_check_interval": 3}


def half(**scaler: Any) -> Callable[[], list[Any]]:
    """fp16 on a CPU; `precision="16-mixed"` would be bfloat16 there."""
    return lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))]


CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "middle of an epoch": (8, 10, {}),
    "first batch": (1, 3, {}),
    "last batch of an epoch": (6, 8, {}),
    "last batch of an epoch, stopped much later": (6, 15, {}),
    "first batch of an epoch": (7, 9, {}),
    "last batch but one": (17, 17, {}),
    "between the two weight steps of a phase": (9, 11, {}),
    "workers": (8, 10, {"workers": 2}),
    "workers, last batch of an epoch": (6, 8, {"workers": 2}),
    "accumulation": (4, 10, {"accumulate": 2}),
    "automatic optimisation": (8, 10, {"kind": Automatic}),
    "automatic optimisation, last batch": (12, 14, {"kind": Automatic}),
    "bf16-mixed": (8, 10, {"precision": "bf16-mixed"}),
    "float64": (8, 10, {"precision": "64-true", "kind": Double}),
    "bf16-true": (8, 10, {"precision": "bf16-true"}),
    "16-true": (  # float16 rounds Adam's eps to zero; with a shared row the response of Delta-STN diverges here
        *(8, 10),
        {"precision": "16-true", "kind": LitSmall, "stn": {"perturb": "example"}},
    ),
    "a row per example": (8, 10, {"stn": {"perturb": "example"}}),
    "gates alone": (8, 10, {"kind": Gates}),
    "tuned scales": (8, 10, {"stn": {"scales": Scales(tune=True)}}),
    "constant rates": (8, 10, {"stn": {"anneal": False}}),
    "SGD of the hyperparameters": (8, 10, {"stn": {"optimizer": torch.optim.SGD}}),
    "Adam of the hyperparameters": (8, 10, {"stn": {"optimizer": torch.optim.Adam}}),
    "validation within epochs": (8, 10, {"trainer": {"val_check_interval": 3}}),
    "max_steps": (8, 10, {"trainer": {"max_epochs": -1, "max_steps": BATCHES * EPOCHS}}),
    "clipping": (8, 10, {"stn": {"weight_step": WeightStep(gradient_clip_val=0.1)}}),
    "written after validation": (6, 8, {"keep": AT_VALIDATION}),
    "written after validation within an epoch": (9, 11, {"keep": AT_VALIDATION, "trainer": OFTEN}),
    "written at the end of an epoch": (12, 14, {"keep": AT_EPOCH_END}),
    "fewer batches": (6, 8, {"trainer": {"limit_train_batches": 4, "max_epochs": 4}}),
    "fewer batches, last of an epoch": (8, 10, {"trainer": {"limit_train_batches": 4, "max_epochs": 4}}),
    "fewer batches, written at the end of an epoch": (
        *(8, 10),
        {"trainer": {"limit_train_batches": 4, "max_epochs": 4}, "keep": AT_EPOCH_END},
    ),
    "written by time": (8, 10, {"keep": {"train_time_interval": timedelta(microseconds=1)}}),
    "scheduler by step": (8, 10, {"kind": ByStep}),
    "scheduler by step, accumulation": (4, 10, {"kind": ByStep, "accumulate": 2}),
    "plateau": (8, 14, {"kind": following("epoch")}),
    "plateau, written after validation": (6, 8, {"kind": following("epoch"), "keep": AT_VALIDATION}),
    "plateau, written at the end of an epoch": (6, 8, {"kind": following("epoch"), "keep": AT_EPOCH_END}),
    "plateau by step": (8, 10, {"kind": following("step", strict=False), "trainer": OFTEN}),
    "plateau by step, written after validation": (
        *(9, 11),
        {"kind": following("step", frequency=3), "trainer": OFTEN, "keep": AT_VALIDATION},
    ),
    "plateau by step, last batch of an epoch, written after validation": (
        *(12, 14),
        {"kind": following("step", frequency=3), "trainer": OFTEN, "keep": AT_VALIDATION},
    ),
    "automatic plateau": (8, 14, {"kind": following("epoch", Automatic)}),
    "automatic plateau, written after validation": (
        *(6, 8),
        {"kind": following("epoch", Automatic), "keep": AT_VALIDATION},
    ),
    "automatic plateau, written at the end of an epoch": (
        *(6, 8),
        {"kind": following("epoch", Automatic), "keep": AT_EPOCH_END},
    ),
    "fp16": (8, 10, {"plugins": half(), "precision": None}),
    "fp16, scale growing": (8, 10, {"plugins": half(growth_interval=3), "precision": None}),
    "fp16, scale too large": (2, 4, {"plugins": half(init_scale=2.0**20), "precision": None}),
    "one-cycle scheduler": (8, 10, {"kind": OneCycle}),
    "one-cycle scheduler, written at the end of an epoch": (6, 8, {"kind": OneCycle, "keep": AT_EPOCH_END}),
    "automatic optimisation, written at the end of an epoch": (12, 14, {"kind": Automatic, "keep": AT_EPOCH_END}),
    "workers, written at the end of an epoch": (6, 8, {"workers": 2, "keep": AT_EPOCH_END}),
    "max_steps, written at the end of an epoch": (
        *(6, 8),
        {"trainer": {"max_epochs": -1, "max_steps": BATCHES * EPOCHS}, "keep": AT_EPOCH_END},
    ),
}


@every_method
@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_continues_bit_for_bit(tmp_path: Path, case: str, method: str) -> None:
    save_at, stop_at, options = CASES[case]
    assert_resumes(tmp_path, save_at, stop_at, with_method(method, options))


def with_method(method: str, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "stn": {**options.get("stn", {}), **METHODS[method]}}


@every_method
@pytest.mark.parametrize("save_at", [6, pytest.param(8, marks=pytest.mark.slow)])
def test_a_killed_process_continues_bit_for_bit(tmp_path: Path, save_at: int, method: str) -> None:
    """SIGKILL two batches after the checkpoint: the checkpoint and the schedule file are complete."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from callback.test_resume import Stop, run, with_method\n"
        "folder, save_at, options = Path(sys.argv[2]), int(sys.argv[3]), with_method(sys.argv[4], {})\n"
        "run(folder, save_at, Stop(save_at + 2, kill=True), options=options)\n"
    )
    tests = str(Path(__file__).parents[1])
    arguments = [tests, str(tmp_path / "first"), str(save_at), method]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], check=False)
    assert ended.returncode == -signal.SIGKILL
    options = with_method(method, {})
    whole, whole_stn = run(tmp_path / "whole", 1000, options=options)
    saved = tmp_path / "first" / f"step={save_at}.ckpt"
    resumed, resumed_stn = run(tmp_path / "second", 1000, options=options, checkpoint=saved, seed=99)
    assert_same(resumed, resumed_stn, whole, whole_stn)


def test_comparison_detects_a_run_with_another_seed(tmp_path: Path) -> None:
    runs = [run(tmp_path / str(seed), 1000, options={}, seed=seed) for seed in (0, 1)]
    with pytest.raises(AssertionError):
        assert_same(*runs[0], *runs[1])


class Saving(LitSmall):
    """Saves its arguments, specifications among them, as many modules do."""

    def __init__(self, hyperparameters: dict[str, Hyperparameter], rate: float = 0.05) -> None:
        self.save_hyperparameters()
        super().__init__(hyperparameters)


def test_load_from_checkpoint_restores_saved_specifications(tmp_path: Path) -> None:
    specifications: dict[str, Hyperparameter] = {
        "dropout": Float(0.0, 0.9, init=0.05),
        "noise": Float(0.0, None, init=0.1, log=False),
        "length": Integer(0, 4, init=2),
        "kind": Categorical(["a", "b"], init="b"),
    }
    module = Saving(specifications)
    assert module.hyperparameters.values()["length"] == 2  # fills the caches
    stn = STNCallback(train_steps=2, warmup=0, seed=1)
    fit = trainer(stn, max_epochs=1)
    with pytest.warns(UserWarning, match="Nothing read"):
        fit.fit(module, loader(16), loader(16, seed=1))
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = Saving.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert loaded.hyperparameters.specifications == specifications
    assert loaded.hyperparameters.values() == module.hyperparameters.values()
