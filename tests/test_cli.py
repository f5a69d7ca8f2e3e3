"""Runs of LightningCLI, configured by a YAML file."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from support import LitSmall, loader, random_gates, trainer
from torch.utils.data import DataLoader

from lightning_stn import Categorical, Float, Hyperparameter, Integer, PhaseSchedule, Schedule, STNCallback, Warmup

pytest.importorskip("jsonargparse")
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # raised by Lightning's calls, some at its import

from lightning.pytorch.cli import LightningCLI

EXAMPLES = Path(__file__).parents[1] / "examples"

SPECIFICATIONS = {
    "dropout": {"class_path": "lightning_stn.Float", "init_args": {"low": 0.0, "high": 0.9, "init": 0.05}},
    "noise": {"class_path": "lightning_stn.Float", "init_args": {"low": 0.0, "high": None, "init": 0.1}},
    "length": {"class_path": "lightning_stn.Integer", "init_args": {"low": 0, "high": 4, "init": 2}},
}
CALLBACK = {"warmup": 0, "lr": 0.05, "seed": 1}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.5}}


class Configured(LitSmall):
    """Leaves the optimiser to the configuration."""

    configure_optimizers = L.LightningModule.configure_optimizers

    def __init__(self, hyperparameters: dict[str, Hyperparameter], gates: float = 0.1) -> None:
        super().__init__(dict(hyperparameters))
        random_gates(self.net, gates)


class Automatic(Configured):
    def __init__(self, hyperparameters: dict[str, Hyperparameter]) -> None:
        super().__init__(hyperparameters)
        self.automatic_optimization = True


class ByHand(LitSmall):
    """The configuration below, written in Python."""

    def __init__(self) -> None:
        super().__init__()
        random_gates(self.net, 0.1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader(24, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(16, seed=1)


class Rates(L.Callback):
    """Records the learning rate of the weights in each epoch."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cli"])  # hides pytest's arguments


def config(
    folder: Path,
    *,
    specifications: dict[str, Any] = SPECIFICATIONS,
    callback: dict[str, Any] = CALLBACK,
    seed: int | bool = 3,
    **others: Any,
) -> str:
    """Write a configuration file; return its path."""
    settings = {
        "seed_everything": seed,
        "model": {"hyperparameters": specifications},
        "optimizer": SGD,
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(folder),
            "max_epochs": 3,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "lightning_stn.STNCallback", "init_args": callback}],
        },
    }
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump({**settings, **others}, sort_keys=False))
    return str(path)


def cli(*args: str, module: type[L.LightningModule] = Configured, **kwargs: Any) -> LightningCLI:
    return LightningCLI(module, Data, args=list(args), **kwargs)


def fit(path: str, *args: str, **kwargs: Any) -> LightningCLI:
    return cli("fit", "--config", path, *args, **kwargs)


def callback_of(run: LightningCLI) -> STNCallback:
    (callback,) = (callback for callback in run.trainer.callbacks if isinstance(callback, STNCallback))
    return callback


def test_cli_builds_every_kind_of_hyperparameter(tmp_path: Path) -> None:
    specifications = {
        **SPECIFICATIONS,
        "decay": {
            "class_path": "lightning_stn.Float",
            "init_args": {"low": 1e-6, "high": 0.1, "init": 1e-4, "log": True, "perturb": "batch", "scale": 0.3},
        },
        "op": {"class_path": "lightning_stn.Categorical", "init_args": {"choices": ["none", "mirror"], "init": "none"}},
    }
    run = cli("--config", config(tmp_path, specifications=specifications), run=False)
    assert run.model.hyperparameters.specifications == {
        "dropout": Float(0.0, 0.9, init=0.05),
        "noise": Float(0.0, None, init=0.1),
        "length": Integer(0, 4, init=2),
        "decay": Float(1e-6, 0.1, init=1e-4, log=True, perturb="batch", scale=0.3),
        "op": Categorical(["none", "mirror"], init="none"),
    }


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ({"low": 0, "high": 4, "init": 1}, "Hyperparameter"),  # ambiguous: an Integer or a Float
        ({"class_path": "lightning_stn.Float", "init_args": {"low": 0.0, "hi": 1.0}}, "hi"),
        ({"class_path": "torch.nn.Linear"}, "torch.nn.Linear"),
    ],
)
def test_cli_refuses_an_invalid_hyperparameter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], specification: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit):
        cli("--config", config(tmp_path, specifications={"dropout": specification}), run=False)
    error = capsys.readouterr().err
    assert "model.hyperparameters" in error
    assert message in error


def test_cli_refuses_a_start_out_of_range(tmp_path: Path) -> None:
    specification = {"class_path": "lightning_stn.Float", "init_args": {"low": 0.0, "high": 1.0, "init": 1.5}}
    with pytest.raises(ValueError, match="expected init strictly between low and high"):
        cli("--config", config(tmp_path, specifications={"dropout": specification}), run=False)


def test_cli_sets_every_argument_of_the_callback(tmp_path: Path) -> None:
    arguments = {
        "train_steps": 3,
        "valid_steps": 2,
        "warmup": {"length": 4, "unit": "steps"},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}},
        "lr": 0.1,
        "anneal": False,
        "scales": {"tune": True, "lr": 0.2, "entropy_weight": 0.01},
        "method": {"class_path": "lightning_stn.DeltaSTN", "init_args": {"linearize": False, "passes": 2}},
        "perturb": "example",
        "dataloader": None,
        "weight_step": {
            "gradient_clip_val": 1.0,
            "gradient_clip_algorithm": "value",
            "accumulate_grad_batches": 2,
        },
        "seed": 5,
        "on_resume_use": ["lr"],
    }
    assert set(arguments) == set(inspect.signature(STNCallback).parameters)
    run = fit(config(tmp_path, callback=arguments))
    saved = yaml.safe_load((Path(run.trainer.log_dir) / "config.yaml").read_text())
    ((_, written),) = (entry.values() for entry in saved["trainer"]["callbacks"])
    assert written.pop("optimizer")["init_args"]["momentum"] == 0.9
    assert written == {name: value for name, value in arguments.items() if name != "optimizer"}
    assert callback_of(run).phases == PhaseSchedule(3, 2, Warmup(4, "steps"))
    settings = callback_of(run).state_dict()["settings"]
    assert settings.pop("method") == {"name": "delta-stn", "linearize": False, "passes": 2}
    assert settings.items() <= arguments.items()
    assert run.trainer.global_step == 6  # nine batches in three epochs, two to a step


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("torch.optim.SGD", {"lr": 0.05, "momentum": 0.0}),
        ({"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}, {"lr": 0.05, "momentum": 0.9}),
        ({"class_path": "torch.optim.Adam", "init_args": {"betas": [0.5, 0.9]}}, {"lr": 0.05, "betas": (0.5, 0.9)}),
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 7.0}}, {"lr": 0.05, "momentum": 0.0}),
    ],
)
def test_cli_builds_the_optimiser_of_the_hyperparameters(
    tmp_path: Path, optimizer: Any, expected: dict[str, Any]
) -> None:
    settings = {**CALLBACK, "anneal": False, "scales": {"tune": True}, "optimizer": optimizer}
    run = fit(config(tmp_path, callback=settings))
    lambdas, scales = callback_of(run).state_dict()["optimizer"]["optimizer"]["param_groups"]
    for group in (lambdas, scales):
        assert {name: group[name] for name in expected} == expected


def test_configured_run_equals_the_run_written_in_python(tmp_path: Path) -> None:
    scheduler = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
    run = fit(config(tmp_path, lr_scheduler=scheduler))
    L.seed_everything(3, workers=True)
    module, callback = ByHand(), STNCallback(**CALLBACK)
    trainer(callback, max_epochs=3).fit(module, datamodule=Data())
    torch.testing.assert_close(run.model.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert callback_of(run).schedule == callback.schedule
    assert callback.schedule.rows[-1].values != callback.schedule.rows[0].values


@pytest.mark.filterwarnings("ignore:This run of .* training batches ends before its first hyperparameter step")
def test_weight_optimiser_trains_response_weights_but_not_hyperparameters(tmp_path: Path) -> None:
    """Warm-up only, with a weight decay that would change every parameter of the optimiser."""
    run = fit(config(tmp_path, callback={**CALLBACK, "warmup": 3}))
    L.seed_everything(3, workers=True)
    start = Configured(run.model.hyperparameters.specifications).state_dict()
    moved = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, start[name])}
    weights = {name for name in start if not name.startswith("hyperparameters.")}
    coordinates = {"hyperparameters.centred", "hyperparameters.gate_scale"}  # how the method counts the response
    assert moved == weights | coordinates
    assert any("response" in name for name in moved)


@pytest.mark.parametrize("module", [Configured, Automatic])
@pytest.mark.parametrize(
    "scheduler",
    [
        {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
        {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}},
    ],
)
def test_the_scheduler_steps_once_an_epoch(
    tmp_path: Path, module: type[L.LightningModule], scheduler: dict[str, Any]
) -> None:
    rates = Rates()
    run = fit(config(tmp_path, lr_scheduler=scheduler), module=module, trainer_defaults={"callbacks": rates})
    assert rates.rates == [0.05, 0.025, 0.0125]
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == 0.00625


@pytest.mark.parametrize("seed", [3, True])
def test_the_saved_configuration_repeats_the_run(tmp_path: Path, seed: int | bool) -> None:
    """Also if Lightning draws the seed, which it then saves."""
    first = fit(config(tmp_path, seed=seed, callback={"warmup": 0, "optimizer": "torch.optim.SGD"}))
    second = fit(str(Path(first.trainer.log_dir) / "config.yaml"))
    folders = [Path(run.trainer.log_dir) for run in (first, second)]
    assert folders[0] != folders[1]
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)
    written = [(folder / "schedule.json").read_text() for folder in folders]
    assert written[0] == written[1]
    assert len(json.loads(written[0])["rows"]) == 10
    assert (folders[0] / "config.yaml").read_text() == (folders[1] / "config.yaml").read_text()


def test_digits_example_runs(tmp_path: Path) -> None:
    """The README's command, for six epochs: one beyond the warm-up."""
    command = [sys.executable, str(EXAMPLES / "digits_cli.py"), "fit", "--config", str(EXAMPLES / "digits.yaml")]
    subprocess.run([*command, "--trainer.max_epochs=6"], cwd=tmp_path, check=True, capture_output=True)
    (path,) = tmp_path.rglob("schedule.json")
    schedule = Schedule.load(path)
    assert schedule.names == ("dropout", "noise", "cutout")
    assert schedule.rows[-1].values["dropout"] != schedule.rows[0].values["dropout"]
    assert (path.parent / "config.yaml").exists()
