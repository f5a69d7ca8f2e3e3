"""Replays that LightningCLI builds from a configuration file."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from replay.cases import Named, recorded
from test_cli import Data

from lightning_stn import Categorical, Float, Gaussian, ScheduleReplay, Sinusoid, WeightStep

pytest.importorskip("jsonargparse")
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # raised by Lightning's calls, some at its import

from lightning.pytorch.cli import LightningCLI

RATE = {"class_path": "lightning_stn.Float", "init_args": {"low": 0.0, "high": 0.9, "init": 0.3}}


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cli"])  # hides pytest's arguments


def cli(folder: Path, arguments: dict[str, Any], *command: str, **kwargs: Any) -> ScheduleReplay:
    callback = {"class_path": "lightning_stn.ScheduleReplay", "init_args": arguments}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0, **quiet, "callbacks": [callback]}
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump({"seed_everything": 0, "trainer": settings}))
    run = LightningCLI(Named, Data, args=[*command, "--config", str(path)], save_config_callback=None, **kwargs)
    (replay,) = (callback for callback in run.trainer.callbacks if isinstance(callback, ScheduleReplay))
    return replay


def test_cli_trains_at_a_stored_schedule(tmp_path: Path) -> None:
    recorded(6).save(tmp_path / "schedule.json")
    arguments = {"values": str(tmp_path / "schedule.json"), "stretch": False, "interpolation": "linear"}
    replay = cli(tmp_path, arguments, "fit")
    assert replay.values == recorded(6).final
    assert (replay._policy.stretch, replay._policy.interpolation) == (False, "linear")


def test_cli_builds_constants_specifications_and_noise(tmp_path: Path) -> None:
    operation = {"class_path": "lightning_stn.Categorical", "init_args": {"choices": ["a", "b"], "init": "b"}}
    arguments = {
        "values": {"dropout": RATE, "operation": operation},
        "noise": {"class_path": "lightning_stn.Sinusoid", "init_args": {"period": 12}},
        "attributes": {"net.3.p": "dropout"},
        "weight_step": {"gradient_clip_val": 0.5},
        "seed": 4,
    }
    replay = cli(tmp_path, arguments, run=False)
    policy = replay._policy
    assert policy.specifications == {"dropout": Float(0.0, 0.9, init=0.3), "operation": Categorical(["a", "b"], "b")}
    assert (policy.noise, policy.seed) == (Sinusoid(period=12), 4)
    assert (replay._paths, replay._step) == ({"net.3.p": "dropout"}, WeightStep(0.5))


@pytest.mark.parametrize("value", [0.3, 2, "b"])
def test_cli_keeps_the_type_of_a_constant(tmp_path: Path, value: Any) -> None:
    replay = cli(tmp_path, {"values": {"one": value}}, run=False)
    assert replay._policy.constants == {"one": value}
    assert type(replay._policy.constants["one"]) is type(value)


@pytest.mark.parametrize(("period", "kind"), [(12, int), (0.25, float)])
def test_cli_tells_a_period_in_batches_from_a_share(tmp_path: Path, period: float, kind: type) -> None:
    noise = {"class_path": "lightning_stn.Sinusoid", "init_args": {"amplitude": 0.5, "period": period}}
    replay = cli(tmp_path, {"values": {"dropout": RATE}, "noise": noise}, run=False)
    assert isinstance(replay._policy.noise, Sinusoid)
    assert type(replay._policy.noise.period) is kind


def test_cli_reads_the_final_row(tmp_path: Path) -> None:
    recorded(6).save(tmp_path / "schedule.json")
    noise = {"class_path": "lightning_stn.Gaussian"}
    replay = cli(tmp_path, {"values": str(tmp_path / "schedule.json"), "final": True, "noise": noise}, run=False)
    assert replay._policy.constants == recorded(6).final
    assert replay._policy.noise == Gaussian()
