"""Runs on two processes, compared with each other and with one process; `worker.py` defines a run."""

import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from callback.test_resume import assert_equal_states
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    Strategy,
)
from strategies.worker import BATCHES, EPOCHS, Lit, dataset, ends, launch
from support import METHODS, LitSmall, lightning_before, loader, trainer
from torch import Tensor

from lightning_stn import Schedule, STNCallback

LAMBDA, RHO = "hyperparameters.unconstrained", "hyperparameters.raw_scale"
DRAWN = {"drawn": True}
RECURRENT = {"module": {"recurrent": True}}
End = dict[str, Any]
STATIC = pytest.param("static", marks=pytest.mark.skipif(lightning_before("2.6"), reason="refused"))
SOME_METHODS = ["stn", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "stn")]
"""Where processes take half a minute to start, other methods than the default are slow."""

FSDP2 = pytest.mark.skipif(torch.__version__ < "2.7", reason="needs CUDA")


@pytest.fixture(scope="module", params=SOME_METHODS)
def method(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of a method."""
    return METHODS[request.param]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, method: dict[str, Any]) -> Path:
    """Runs on one process, with batches twice as large."""
    folder = tmp_path_factory.mktemp("one")
    clipped = {"weight_step": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}}
    jobs: list[dict[str, Any]] = [
        {"name": "plain"},
        *direct(method),
        {"name": "recurrent", **RECURRENT},
        *shared(method),
        {"name": "clipped", **clipped},
    ]
    assert launch(folder, *({"strategy": "one", **method, **job} for job in jobs), ranks=1) == [0]
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, method: dict[str, Any]) -> Path:
    """Runs on two processes."""
    folder = tmp_path_factory.mktemp("two")
    clipped = {"weight_step": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}}
    jobs: list[dict[str, Any]] = [
        {"strategy": "ddp", "name": "ddp"},
        *([] if lightning_before("2.6") else [{"strategy": "static", "name": "static"}]),
        {"strategy": "ddp", "name": "automatic", "module": {"automatic": True}},
        {"strategy": "ddp", "name": "clipped", **clipped},
        {"strategy": "ddp", "name": "example", "module": DRAWN, "every": 20},
        {"strategy": "ddp", "name": "batch", "module": DRAWN, "perturb": "batch"},
        {"strategy": "ddp", "name": "first", "module": DRAWN, "stop": 22, "every": 20},
        {"strategy": "ddp", "name": "resumed", "module": DRAWN, "checkpoint": saved(folder, 20), "seed": 9},
    ]
    assert launch(folder, *({**method, **job} for job in jobs)) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, method: dict[str, Any]) -> Path:
    """Runs on two processes with sharded weights."""
    folder = tmp_path_factory.mktemp("fsdp")
    jobs: list[dict[str, Any]] = [
        {"name": "plain"},
        *direct(method),
        {"name": "recurrent", **RECURRENT},
        *shared(method),
        {"name": "whole", "module": DRAWN},
        {"name": "first", "module": DRAWN, "stop": 22, "every": 20},
        {"name": "resumed", "module": DRAWN, "checkpoint": saved(folder, 20), "seed": 9},
    ]
    assert launch(folder, *({"strategy": "fsdp", **method, **job} for job in jobs)) == [0, 0]
    return folder


def shared(method: dict[str, Any]) -> list[dict[str, Any]]:
    """Delta-STN's run in one pass."""
    return [{"name": "shared", "method": {"name": "delta-stn", "passes": 1}}] if method == METHODS["delta-stn"] else []


def direct(method: dict[str, Any]) -> list[dict[str, Any]]:
    """A run whose response learns on the network's own predictions; STN's run as it is."""
    direct = {"method": {"name": "delta-stn", "linearize": False}} if method == METHODS["delta-stn"] else {}
    return [{"name": "direct", **direct}]


def saved(folder: Path, step: int) -> str:
    return str(folder / "first" / f"step={step}.ckpt")


def assert_equal_to_one_process(ours: list[End], one: End, wrapped: str) -> None:
    for end in ours:
        assert wrapped in end["wrapped"]
        assert len(end["gradients"]) == len(one["gradients"]) > 0
        for gradients, expected in zip(end["gradients"], one["gradients"], strict=True):
            torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(end["gradients"][0], one["gradients"][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(end["state"], one["state"], rtol=0, atol=1e-6)
    for name in (LAMBDA, RHO):
        assert torch.equal(ours[0]["state"][name], ours[1]["state"][name])
    moved = ours[0]["state"][LAMBDA] - Lit().hyperparameters.unconstrained
    assert (moved.abs() > 0.05).all()
    assert ours[0]["callback"]["clock"] == {
        "batches": BATCHES * EPOCHS,
        "weight_steps": BATCHES * EPOCHS,
        "hyperparameter_steps": BATCHES * EPOCHS // 2,
        "due": 0,
        "epoch": EPOCHS - 1,
    }


@pytest.mark.parametrize("name", ["ddp", STATIC, "automatic"])
def test_ddp_equals_one_process_on_the_whole_batch(one: Path, two: Path, name: str) -> None:
    """56 batches with noise by example, in float64: gradients, weights, hyperparameters and scales."""
    (whole,) = ends(one, "plain", ranks=1)
    assert_equal_to_one_process(ends(two, name), whole, "DistributedDataParallel")


def test_clipping_and_accumulation_equal_one_process(one: Path, two: Path) -> None:
    (whole,) = ends(one, "clipped", ranks=1)
    assert len(whole["gradients"]) == BATCHES * EPOCHS // 2
    assert_equal_to_one_process(ends(two, "clipped"), whole, "DistributedDataParallel")


@FSDP2
@pytest.mark.parametrize("name", ["plain", "direct", "recurrent", "shared"])
def test_fsdp2_equals_one_process_on_the_whole_batch(
    one: Path, sharded: Path, method: dict[str, Any], name: str
) -> None:
    if name == "shared" and method != METHODS["delta-stn"]:
        pytest.skip("only Delta-STN has it")
    (whole,) = ends(one, name, ranks=1)
    assert_equal_to_one_process(ends(sharded, name), whole, "DTensor")


@pytest.mark.parametrize(("name", "rows"), [("example", 4), ("batch", 1)])
def test_ranks_draw_different_noise(two: Path, name: str, rows: int) -> None:
    first, second = ends(two, name)
    for ours, theirs in zip(first["samples"], second["samples"], strict=True):
        assert len(ours) == rows
        assert not torch.isclose(ours, theirs).any()
    for key in (LAMBDA, RHO):
        assert torch.equal(first["state"][key], second["state"][key])


def test_only_the_first_rank_writes_the_schedule(two: Path) -> None:
    assert len(Schedule.load(two / "ddp" / "log" / "schedule.json")) == BATCHES * EPOCHS + 1


def test_an_interrupted_run_continues_bit_for_bit(two: Path) -> None:
    assert_same(ends(two, "resumed"), ends(two, "example"))


@FSDP2
def test_an_interrupted_run_of_fsdp2_continues_bit_for_bit(sharded: Path) -> None:
    assert_same(ends(sharded, "resumed"), ends(sharded, "whole"))


@pytest.mark.slow
def test_killed_processes_continue_bit_for_bit(two: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    jobs = {"strategy": "ddp", "module": DRAWN, **method}
    assert launch(tmp_path, {**jobs, "name": "first", "stop": 26, "every": 24, "kill": True}) == [-9, -9]
    assert launch(tmp_path, {**jobs, "name": "resumed", "checkpoint": saved(tmp_path, 24), "seed": 9}) == [0, 0]
    assert_same(ends(tmp_path, "resumed"), ends(two, "example"))


@pytest.mark.slow
def test_rank_that_raises_alone_writes_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    """The generators of the other rank are not in it, and a run that is resumed says so."""
    jobs = {"strategy": "ddp", "module": DRAWN}
    first, second = launch(tmp_path, {**jobs, "name": "first", "stop_one": 12})
    assert second == -signal.SIGKILL
    assert first != 0  # Lightning waits for the other rank, once the checkpoint is written
    checkpoint = str(tmp_path / "first" / "on_exception.ckpt")
    assert launch(tmp_path, {**jobs, "name": "resumed", "checkpoint": checkpoint, "seed": 9}) == [0, 0]
    told = [[text for text in end["warnings"] if "random generators" in text] for end in ends(tmp_path, "resumed")]
    assert not told[0]
    assert len(told[1]) == 1
    assert "when rank 1 could not be asked for its random generators" in told[1][0]
    assert [end["callback"]["clock"]["batches"] for end in ends(tmp_path, "resumed")] == [BATCHES * EPOCHS] * 2


@pytest.mark.slow
def test_run_resumed_on_fewer_processes_says_that_generators_begin_anew(two: Path, tmp_path: Path) -> None:
    job = {"strategy": "one", "name": "alone", "module": DRAWN, "checkpoint": saved(two, 20), "seed": 9}
    assert launch(tmp_path, job, ranks=1) == [0]
    (end,) = ends(tmp_path, "alone", ranks=1)
    told = [text for text in end["warnings"] if "random generators" in text]
    assert len(told) == 1
    assert "holds the random generators of 2 processes, but this run has 1" in told[0]
    assert end["callback"]["clock"]["batches"] == BATCHES * EPOCHS


def assert_same(resumed: list[End], whole: list[End]) -> None:
    for ours, theirs in zip(resumed, whole, strict=True):
        for what in ("state", "callback", "schedule", "optimizers"):
            assert_equal_states(ours[what], theirs[what], what)
        assert len(ours["samples"]) < len(theirs["samples"])
        assert_equal_states(ours["samples"], theirs["samples"][-len(ours["samples"]) :])


def test_a_checkpoint_of_two_ranks_loads_on_one(two: Path) -> None:
    loaded = Lit.load_from_checkpoint(two / "example-end.ckpt")
    expected = ends(two, "example")[0]["state"]
    assert_equal_states(loaded.state_dict(), expected)
    inputs: Tensor = dataset(0).tensors[0]
    assert torch.isfinite(loaded.export()(inputs)).all()


@pytest.mark.slow
def test_started_processes_hand_state_and_schedule_of_ddp_to_the_process_that_called_fit(
    two: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Spawned processes have copies of the callback by pickle, forked ones by the copied memory."""
    jobs = [{"strategy": strategy, "name": strategy, **method} for strategy in ("spawn", "fork")]
    assert launch(tmp_path, *jobs, ranks=1) == [0]
    expected = ends(two, "ddp")[0]
    for job in jobs:
        (end,) = ends(tmp_path, job["name"], ranks=1)
        assert_equal_states(end["state"], expected["state"])
        assert end["schedule"] == expected["schedule"]
        assert end["same schedule"]
        assert len(end["schedule"]) == BATCHES * EPOCHS + 1


class Disguise(L.Callback):
    """Replaces the strategy's class during setup: the real strategies need a GPU, several ranks or another package."""

    def __init__(self, kind: type[Strategy]) -> None:
        self.kind = kind

    def setup(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.original, trainer.strategy.__class__ = type(trainer.strategy), self.kind

    def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.strategy.__class__ = self.original


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FSDPStrategy, r"does not support FSDPStrategy.*ModelParallelStrategy"),
        (DeepSpeedStrategy, r"does not support DeepSpeedStrategy.*strategy='ddp'"),
    ],
)
def test_fit_refuses_unsupported_strategies(kind: type[Strategy], message: str) -> None:
    run = trainer(Disguise(kind), STNCallback(warmup=0))
    with pytest.raises(NotImplementedError, match=message):
        run.fit(LitSmall(), loader(24), loader(16, seed=1))


def test_fit_refuses_a_static_graph_before_lightning_2_6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.__version__", "2.5.6")
    run = trainer(Disguise(DDPStrategy), STNCallback(warmup=0))
    run.strategy._ddp_kwargs = {"static_graph": True}  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match=r"static_graph=True before Lightning 2\.6.*automatic_optimization"):
        run.fit(LitSmall(), loader(24), loader(16, seed=1))
