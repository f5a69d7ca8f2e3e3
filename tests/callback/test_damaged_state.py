"""Damaged, older and foreign states: refused before anything is loaded, in words."""

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import LitSmall, images, loader, trainer
from torch import Tensor

from lightning_stn import ResumableLoader, STNCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
SAVED, END = 6, 8
Path_ = tuple[Any, ...]
"""Keys that lead from a checkpoint to one of its leaves."""


class Run(NamedTuple):
    """A run of eight batches, and its checkpoint after the sixth."""

    module: LitSmall
    stn: STNCallback
    checkpoint: dict[str, Any]


def train(
    folder: Path,
    checkpoint: dict[str, Any] | None = None,
    stn: STNCallback | None = None,
    module: LitSmall | None = None,
    train: ResumableLoader | None = None,
    others: tuple[L.Callback, ...] = (),
) -> tuple[LitSmall, STNCallback]:
    L.seed_everything(3, verbose=False)
    module, stn = module or LitSmall(), stn or STNCallback(1, 1, 0, lr=0.05, seed=1)
    path = None
    if checkpoint is not None:
        path = folder / "damaged.ckpt"
        torch.save(checkpoint, path)
    fit = trainer(stn, *others, max_epochs=2, enable_checkpointing=bool(others))
    data = train or ResumableLoader(images(8 * END // 2), 8)
    fit.fit(module, data, loader(16, seed=1), ckpt_path=path)
    return module, stn


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("saved")
    module, stn = train(folder, others=(ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED, save_top_k=-1),))
    return Run(module, stn, torch.load(folder / f"step={SAVED}.ckpt", weights_only=True))


STATE = ("callbacks", "STNCallback")


def leaves(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Paths to everything that holds nothing else; of many rows and many numbers of a list the first and the last."""
    if isinstance(value, dict) and value:
        for key, one in value.items():
            yield from leaves(one, (*path, key))
    elif isinstance(value, list | tuple) and value:
        for index in sorted({0, len(value) - 1}) if len(value) > 8 else range(len(value)):
            yield from leaves(value[index], (*path, index))
    else:
        yield path


def at(checkpoint: Any, path: Path_) -> Any:
    for key in path:
        checkpoint = checkpoint[key]
    return checkpoint


def put(checkpoint: Any, path: Path_, value: Any) -> Any:
    """A checkpoint with another value at this place, or without the place if the value is `DELETED`."""
    key, *rest = path
    changed = list(checkpoint) if isinstance(checkpoint, list | tuple) else dict(checkpoint)
    if not rest and value is DELETED:
        del changed[key]
    else:
        changed[key] = put(changed[key], tuple(rest), value) if rest else value
    return tuple(changed) if isinstance(checkpoint, tuple) else changed


REFUSED = "Nothing has been loaded|load another checkpoint|load it into a module with the hyperparameters that"
DELETED = object()
CORRUPTIONS: dict[str, Callable[[Any], Any]] = {
    "deleted": lambda value: DELETED,
    "another type": lambda value: 1.5 if isinstance(value, str) else "text",
    "NaN": lambda value: filled(value, float("nan")),
    "minus one": lambda value: filled(value, -1),
    "huge": lambda value: filled(value, 1e30),
    "huge and whole": lambda value: filled(value, 10**30),
    "another shape": lambda value: torch.zeros(7, 2),
}


def filled(value: Any, number: float) -> Any:
    """The number, in a tensor if the value is one."""
    if not isinstance(value, Tensor):
        return number
    return torch.full_like(value, float(number), dtype=value.dtype if value.is_floating_point() else torch.float32)


def places(checkpoint: dict[str, Any]) -> list[Path_]:
    """All leaves of the callback's state, and of the state of the hyperparameters."""
    hyperparameters = [("state_dict", key) for key in checkpoint["state_dict"] if key.startswith("hyperparameters.")]
    return [*((*STATE, *path) for path in leaves(at(checkpoint, STATE))), *hyperparameters]


def assert_refused(folder: Path, checkpoint: dict[str, Any], message: str, **settings: Any) -> None:
    """Resuming raises, and neither module nor callback hold anything of the checkpoint."""
    torch.manual_seed(0)
    module, stn = LitSmall(), STNCallback(1, 1, 0, lr=0.05, seed=1)
    before = copy.deepcopy(module.state_dict())
    before |= {"hyperparameters.centred": torch.tensor(True), "hyperparameters.gate_scale": torch.tensor(0.5)}  # STN's
    with pytest.raises(ValueError, match=message):
        train(folder, checkpoint, stn, module, **settings)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert stn.state_dict() == {}


def test_checkpoint_as_it_was_saved_resumes(saved: Run, tmp_path: Path) -> None:
    module, stn = train(tmp_path, saved.checkpoint)
    assert all(torch.equal(value, saved.module.state_dict()[key]) for key, value in module.state_dict().items())
    assert stn.schedule.rows == saved.stn.schedule.rows


def test_every_leaf_of_a_state_is_refused_if_it_is_corrupted(saved: Run, tmp_path: Path) -> None:
    """One corruption for each leaf, in turns; the slow run has all of them."""
    found = places(saved.checkpoint)
    assert len(found) > 80
    for path, corrupt in zip(found, itertools.cycle(CORRUPTIONS.values()), strict=False):
        damaged = put(saved.checkpoint, path, corrupt(at(saved.checkpoint, path)))
        assert_refused(tmp_path, damaged, REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_corruption_of_every_leaf_is_refused(saved: Run, tmp_path: Path, corruption: str) -> None:
    for path in places(saved.checkpoint):
        damaged = put(saved.checkpoint, path, CORRUPTIONS[corruption](at(saved.checkpoint, path)))
        assert_refused(tmp_path, damaged, REFUSED)


def older(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint as it was written before states had a version."""
    for path in (
        ("version",),
        ("digest",),
        ("clock", "due"),
        ("clock", "epoch"),
        ("stream", "before"),
        ("record", "steps"),
        ("record", "completes"),
        ("surroundings", "gradients"),
        ("surroundings", "inexact"),
    ):
        checkpoint = put(checkpoint, (*STATE, *path), DELETED)
    return checkpoint


def test_state_without_a_version_resumes_as_one_with_it(saved: Run, tmp_path: Path) -> None:
    module, stn = train(tmp_path, older(saved.checkpoint))
    assert all(torch.equal(value, saved.module.state_dict()[key]) for key, value in module.state_dict().items())
    assert stn.schedule.rows == saved.stn.schedule.rows


def test_state_of_a_later_version_is_refused(saved: Run, tmp_path: Path) -> None:
    later = put(saved.checkpoint, (*STATE, "version"), 1000)
    assert_refused(tmp_path, later, "has version 1000, but this lightning_stn knows versions up to .*that wrote it")


@pytest.mark.parametrize("value", [-1, float("nan"), 1e30, 10**30, "4", None, True])
@pytest.mark.parametrize("place", ["clock.batches", "watch.skipped", "statistics.count", "clock.hyperparameter_steps"])
def test_count_that_is_none_is_named_without_a_digest(saved: Run, tmp_path: Path, place: str, value: Any) -> None:
    damaged = put(older(saved.checkpoint), (*STATE, *place.split(".")), value)
    assert_refused(tmp_path, damaged, rf"{place}: expected a whole number of at least 0, got .*Nothing has been loaded")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("watch",), DELETED, "watch: expected an entry, got none"),
        (("record", "rows"), DELETED, r"record\.rows: expected an entry, got none"),
        (("record", "rows", 1, 2), float("nan"), r"record\.rows\.1: .*got nan"),
        (("record", "rows", 1, 0), 0, r"record\.rows\.1: Expected a step after 0, got 0"),
        (("settings", "train_steps"), -1, "settings: expected the settings of a run.*train_steps"),
        (("clock", "weight_steps"), 7, "clock.weight_steps: expected at most the 6 batches, got 7"),
        (
            ("statistics", "moments", 0),
            torch.full((3,), torch.nan),
            r"moments\.0: expected a tensor of finite",
        ),
        (
            ("statistics", "moments", 0),
            torch.zeros(4),
            r"moments: expected shapes .*got \[\[4\], \[3, 3\]\]",
        ),
        (("more",), 1, "more: expected no such entry"),
    ],
)
def test_damage_is_named_without_a_digest(saved: Run, tmp_path: Path, place: Path_, value: Any, message: str) -> None:
    assert_refused(tmp_path, put(older(saved.checkpoint), (*STATE, *place), value), message)


@pytest.mark.parametrize("name", ["unconstrained", "raw_scale"])
def test_hyperparameters_that_are_not_finite_are_refused_wherever_they_are_loaded(
    saved: Run, tmp_path: Path, name: str
) -> None:
    path = ("state_dict", f"hyperparameters.{name}")
    damaged = put(saved.checkpoint, path, torch.full((3,), torch.nan))
    message = rf"hyperparameters\.{name}: expected finite numbers, got \[nan, nan, nan\]"
    assert_refused(tmp_path, damaged, message)
    torch.save(damaged, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match=message):
        LitSmall.load_from_checkpoint(tmp_path / "damaged.ckpt")
    with pytest.raises(RuntimeError, match=message):
        LitSmall().load_state_dict(damaged["state_dict"])


class Renamed(STNCallback):
    """Another class than the one that wrote the checkpoint."""


def test_absent_state_is_told_of(saved: Run, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"holds no state of Renamed, but of \[.*'STNCallback'\].*begin anew"):
        _, stn = train(tmp_path, saved.checkpoint, Renamed(1, 1, 0, lr=0.05, seed=1))
    assert stn.schedule.rows[0].step == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: ResumableLoader(images(40), 8), "examples 32, not 40"),
        (lambda: ResumableLoader(images(32), 4), "batches 4, not 8 and batch_size 8, not 4"),
        (lambda: ResumableLoader(images(32), 8, shuffle=False), "shuffle 1, not 0"),
    ],
    ids=["data", "batch size", "order"],
)
def test_resume_refuses_another_training_loader(
    saved: Run, tmp_path: Path, other: Callable[[], ResumableLoader], message: str
) -> None:
    assert_refused(tmp_path, saved.checkpoint, f"ResumableLoader: the run was started with {message}", train=other())


class Quiet(LitSmall):
    """Has a hook that does not call `super()`."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        pass


def test_damaged_state_is_refused_past_a_hook_of_the_module(saved: Run, tmp_path: Path) -> None:
    damaged = put(saved.checkpoint, (*STATE, "clock", "batches"), -1)
    stn = STNCallback(1, 1, 0, lr=0.05, seed=1)
    with pytest.raises(ValueError, match=r"clock\.batches: expected a whole number"):
        train(tmp_path, damaged, stn, Quiet())
    assert stn.state_dict() == {}
