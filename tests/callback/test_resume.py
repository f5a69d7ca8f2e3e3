"""Runs that were interrupted and resumed from a checkpoint, bit for bit against a run that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import LitSmall, images, loader, trainer

from lightning_stn import ResumableLoader, STNCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:A resumed run keeps the settings of its checkpoint"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
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


class OneCycle(Adam):
    """Asks for the length of the run, for which Lightning builds the loaders before it restores them."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Double(Adam):
    """In float64 before Lightning makes it so: a checkpoint is loaded before that, and would be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.double()


class Stop(L.Callback):
    """Raises behind a training batch, or kills the process as nobody can prevent."""

    def __init__(self, batch: int, kill: bool) -> None:
        self.batch = batch
        self.kill = kill

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch * BATCHES + batch_idx == self.batch:
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
    """Train with a checkpoint after every so many weight steps, or when the options say."""
    L.seed_everything(seed, verbose=False)
    settings = {
        "kind": Adam,
        "workers": 0,
        "accumulate": 1,
        "precision": "32-true",
        "stn": {},
        "trainer": {},
        "keep": {"every_n_train_steps": every},
        **options,
    }
    module = settings["kind"]()
    stn = STNCallback(
        2, 1, warmup_epochs=0, lr=0.05, seed=seed, accumulate_grad_batches=settings["accumulate"], **settings["stn"]
    )
    keep = ModelCheckpoint(folder, "{step}", save_top_k=-1, **settings["keep"])
    fit = trainer(
        stn,
        *callbacks,
        keep,
        enable_checkpointing=True,
        precision=settings["precision"],
        log_every_n_steps=1,
        **{"max_epochs": EPOCHS, **settings["trainer"]},
    )
    train = ResumableLoader(images(8 * BATCHES), 8, num_workers=settings["workers"])
    fit.fit(module, train, loader(16, seed=1), ckpt_path=checkpoint)
    return module, stn


def assert_equal_states(ours: Any, theirs: Any, place: str = "") -> None:
    """Tensors bit by bit, everything else by `==`, through dictionaries and lists."""
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
    assert [row.step for row in resumed_stn.schedule.rows] == list(range(BATCHES * EPOCHS + 1))


CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "middle of an epoch": (8, 10, {}),
    "first batch": (1, 3, {}),
    "last batch of an epoch": (6, 8, {}),
    "last batch of an epoch, long before": (6, 15, {}),
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
    "one row for the batch": (8, 10, {"stn": {"perturb": "batch"}}),
    "fixed scales": (8, 10, {"stn": {"tune_scales": False}}),
    "SGD of the hyperparameters": (8, 10, {"stn": {"optimizer": torch.optim.SGD}}),
    "validation within epochs": (8, 10, {"trainer": {"val_check_interval": 3}}),
    "max_steps": (8, 10, {"trainer": {"max_epochs": -1, "max_steps": BATCHES * EPOCHS}}),
    "clipping": (8, 10, {"stn": {"gradient_clip_val": 0.1}}),
    "length of the run": (8, 10, {"kind": OneCycle}),
    "end of an epoch": (6, 8, {"keep": {}}),
    "end of an epoch, automatic optimisation": (12, 14, {"keep": {}, "kind": Automatic}),
    "end of an epoch, workers": (6, 8, {"keep": {}, "workers": 2}),
    "end of an epoch, max_steps": (6, 8, {"keep": {}, "trainer": {"max_epochs": -1, "max_steps": BATCHES * EPOCHS}}),
    "behind validation": (6, 8, {"keep": {"save_on_train_epoch_end": False}}),
    "behind validation within epochs": (9, 11, {"keep": {"monitor": "val_loss"}, "trainer": {"val_check_interval": 3}}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_continues_bit_for_bit(tmp_path: Path, case: str) -> None:
    save_at, stop_at, options = CASES[case]
    assert_resumes(tmp_path, save_at, stop_at, options)


@pytest.mark.parametrize("save_at", [6, 8])
def test_a_killed_process_continues_bit_for_bit(tmp_path: Path, save_at: int) -> None:
    """SIGKILL behind the next batch but one: the checkpoint and what is written of the schedule are whole."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from callback.test_resume import Stop, run\n"
        "run(Path(sys.argv[2]), int(sys.argv[3]), Stop(int(sys.argv[3]) + 2, kill=True), options={})\n"
    )
    tests = str(Path(__file__).parents[1])
    ended = subprocess.run([sys.executable, "-c", code, tests, str(tmp_path / "first"), str(save_at)], check=False)
    assert ended.returncode == -signal.SIGKILL
    whole, whole_stn = run(tmp_path / "whole", 1000, options={})
    saved = tmp_path / "first" / f"step={save_at}.ckpt"
    resumed, resumed_stn = run(tmp_path / "second", 1000, options={}, checkpoint=saved, seed=99)
    assert_same(resumed, resumed_stn, whole, whole_stn)


def test_the_comparison_notices_a_difference(tmp_path: Path) -> None:
    """Another seed gives another run."""
    runs = [run(tmp_path / str(seed), 1000, options={}, seed=seed) for seed in (0, 1)]
    with pytest.raises(AssertionError):
        assert_same(*runs[0], *runs[1])
