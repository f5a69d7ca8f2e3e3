"""Every code block of the README runs, under each method and both ways to perturb."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import pytest
import torch
import torch.nn.functional as F
from support import loader, response_layers, trainer
from torch import Tensor, nn
from torchvision.ops import StochasticDepth  # type: ignore[import-untyped]

from lightning_stn import DeltaSTN, Float, Schedule, ScheduleReplay, STNCallback, STNModule
from lightning_stn.layers import registry
from lightning_stn.regularizers import registry as tunables
from lightning_stn.schedule import Row

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)

QUICK_START = "class LitDigits(STNModule):"
SCHEDULE = 'Schedule.load("lightning_logs/version_0/schedule.json")'
EXISTING_MODULE = "class Tuned(STNModule, YourLitModule):"
PLAIN_NETWORK = 'Tuned.load_from_checkpoint("tuned.ckpt").export()'
OWN_LAYER = "@register_response(MyLinear)"
OWN_DROP_PATH = "@register_tunable(MyDropPath, "
INSTALL = 'pip install -e ".[examples]"'
EVIDENCE = "python examples/evidence/report.py"
COMMAND_LINE = "python examples/digits_cli.py fit"
ANALYSIS = "module.sweep(valid_data)"
REPLAY = 'ScheduleReplay("schedule.json", '
RUN_HERE = [QUICK_START, SCHEDULE, ANALYSIS, REPLAY, EXISTING_MODULE, PLAIN_NETWORK, OWN_LAYER, OWN_DROP_PATH]
RUN_HERE += [INSTALL, EVIDENCE, COMMAND_LINE]
"""A line of each block that a test below runs."""

METHODS: dict[str, dict[str, Any]] = {
    "stn": {},
    "delta-stn": {"method": "delta-stn"},
    "delta-stn, not linearised": {"method": DeltaSTN(linearize=False)},
}

each_setting = pytest.mark.parametrize(
    "settings",
    [{**settings, "perturb": perturb} for settings in METHODS.values() for perturb in ("example", "batch")],
    ids=[f"{method}, {perturb}" for method in METHODS for perturb in ("example", "batch")],
)


def block(line: str) -> str:
    (code,) = [code for _, code in BLOCKS if line in code]
    return str(code)


@pytest.mark.parametrize("code", [code for _, code in BLOCKS], ids=[f"block {n}" for n in range(1, 1 + len(BLOCKS))])
def test_every_block_is_run_by_a_test(code: str) -> None:
    assert [line in code for line in RUN_HERE].count(True) == 1


def test_every_fence_is_a_block_in_a_language_that_is_tested() -> None:
    assert (ROOT / "README.md").read_text().count("```") == 2 * len(BLOCKS) == 2 * len(RUN_HERE)
    assert {language for language, _ in BLOCKS} == {"python", "sh"}


def moved(schedule: Schedule) -> bool:
    return all(schedule.rows[0].values[name] != schedule.rows[-1].values[name] for name in schedule.names)


@pytest.mark.filterwarnings("ignore:.*GPU available but not used")
@each_setting
def test_quick_start_runs_and_tunes(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For six epochs: one beyond the warm-up."""
    monkeypatch.chdir(tmp_path)
    code = block(QUICK_START).replace("max_epochs=50", "max_epochs=6, enable_progress_bar=False")
    code = code.replace("STNCallback()", "STNCallback(**settings)")
    assert "max_epochs=6" in code
    assert "**settings" in code
    names: dict[str, Any] = {"settings": {**settings, "lr": 0.1}}
    exec(code, names)
    (path,) = tmp_path.rglob("schedule.json")
    schedule = Schedule.load(path)
    assert schedule.names == ("dropout", "cutout_length")
    assert len(schedule.rows) == 7
    assert schedule.rows[0].values["dropout"] != schedule.rows[-1].values["dropout"]
    matplotlib.use("Agg")
    exec(block(SCHEDULE), names := {"Schedule": Schedule})
    assert names["schedule"] == schedule
    assert Schedule.load("schedule.csv").final == schedule.final


class YourLitModule(L.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net: nn.Module = nn.Sequential(
            nn.Flatten(), nn.Linear(36, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 3)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("my_val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def tuned(module: STNModule, settings: dict[str, Any]) -> STNCallback:
    """Train a module on three batches of made-up images an epoch."""
    callback = STNCallback(train_steps=1, warmup=0, lr=0.05, seed=1, **settings)
    run = trainer(callback)
    run.fit(module, loader(24), loader(16, seed=1))
    assert run.global_step == 6
    return callback


@each_setting
def test_existing_module_is_tuned_and_exported(settings: dict[str, Any]) -> None:
    names: dict[str, Any] = {
        **{"STNModule": STNModule, "Float": Float, "F": F},
        **{"YourLitModule": YourLitModule, "your_arguments": {"width": 8}},
    }
    exec(block(EXISTING_MODULE), names)
    module = names["Tuned"]()
    assert moved(tuned(module, settings).schedule)
    assert {"train_loss", "my_val_loss"} <= set(module.trainer.callback_metrics)
    assert [type(layer).__module__.partition(".")[0] for layer in module.export().modules()] == ["torch"] * 6


@pytest.mark.filterwarnings("ignore:.*GPU available but not used")
def test_trained_module_answers_the_questions() -> None:
    names: dict[str, Any] = {
        **{"STNModule": STNModule, "Float": Float, "F": F},
        **{"YourLitModule": YourLitModule, "your_arguments": {"width": 8}},
    }
    exec(block(EXISTING_MODULE), names)
    module = names["Tuned"]()
    tuned(module, {})
    code = block(ANALYSIS).replace("train_data, valid_data)", "train_data, valid_data, steps=2)")
    assert "steps=2" in code
    exec(code, {"module": module, "train_data": loader(24), "valid_data": loader(16, seed=1)})


class Plain(YourLitModule):
    """With a dropout at the place that the README names."""

    def __init__(self) -> None:
        super().__init__(4)
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_schedule_is_replayed_in_a_plain_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = Schedule({"dropout": Float(0.0, 0.9)})
    for step, rate in ((0, 0.1), (75, 0.3), (150, 0.4)):
        schedule.append(Row(step, 0, {"dropout": rate}, {"dropout": 0.5}))
    schedule.save("schedule.json")
    quiet = "max_epochs=50, logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator='cpu'"
    code = block(REPLAY).replace("max_epochs=50", quiet)
    assert quiet in code
    names = {"L": L, "ScheduleReplay": ScheduleReplay, "plain_module": Plain(), "train_data": loader(24)}
    exec(code, names)
    assert names["trainer"].global_step == 150
    assert names["plain_module"].net[1].p == 0.4
    assert names["replay"].values == {"dropout": 0.4}


def test_network_of_a_tuned_checkpoint_loads_into_the_plain_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        **{"STNModule": STNModule, "Float": Float, "F": F},
        **{"YourLitModule": YourLitModule, "your_arguments": {"width": 8}, "plain": YourLitModule(8).eval()},
    }
    exec(block(EXISTING_MODULE), names)
    module = names["Tuned"]()
    tuned(module, {})
    module.trainer.save_checkpoint("tuned.ckpt")
    exec(block(PLAIN_NETWORK), names)
    images = next(iter(loader(8)))[0]
    torch.testing.assert_close(names["plain"].net(images), module.eval().net(images))


class MyLinear(nn.Module):
    """`nn.Linear`, but not a subclass of it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        return my_product(input, self.weight) + self.bias


def my_product(input: Tensor, weight: Tensor) -> Tensor:
    return input @ weight.T


class LitLayers(STNModule):
    """A regularised network of two layers of one type."""

    def __init__(self, layer: type[MyLinear] | type[nn.Linear]) -> None:
        super().__init__(hyperparameters={"noise": Float(0.0, None, init=0.1)})
        torch.manual_seed(0)
        self.net = self.convert(nn.Sequential(nn.Flatten(), layer(36, 8), nn.ReLU(), layer(8, 3)))

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        strength = self.hyperparameters["noise"].reshape(-1, 1, 1, 1)
        return F.cross_entropy(self.net(images + strength * torch.ones_like(images)), labels)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@each_setting
def test_registered_layer_trains_as_torch_s(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RESPONSES", dict(registry._RESPONSES))
    names: dict[str, Any] = {"MyLinear": MyLinear, "my_product": my_product}
    exec(block(OWN_LAYER), names)
    ours, theirs = LitLayers(MyLinear), LitLayers(nn.Linear)
    assert [type(layer) for layer in response_layers(ours.net)] == [names["ResponseMyLinear"]] * 2
    assert moved(tuned(ours, settings).schedule)
    tuned(theirs, settings)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-6)
    assert all(
        layer.gate_weights("weight").any() and layer.gate_weights("bias").any() for layer in response_layers(ours.net)
    )
    assert [type(layer) for layer in ours.export().modules()][2:] == [MyLinear, nn.ReLU, MyLinear]


class MyDropPath(nn.Module):
    """Stochastic depth, but not torchvision's."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob


class Branches(nn.Module):
    """A residual branch that is dropped, and a readout.

    Args:
        drop_path: the module that drops the branch.
    """

    def __init__(self, drop_path: nn.Module) -> None:
        super().__init__()
        self.branch, self.drop_path, self.readout = nn.Linear(36, 36), drop_path, nn.Linear(36, 3)

    def forward(self, input: Tensor) -> Tensor:
        input = input.flatten(1)
        output: Tensor = self.readout(input + self.drop_path(self.branch(input).tanh()))
        return output


class LitBranches(STNModule):
    """A network whose branch is dropped at a tuned rate."""

    def __init__(self, drop_path: nn.Module) -> None:
        super().__init__(hyperparameters={"rate": Float(0.0, 0.9, init=0.2)})
        torch.manual_seed(0)
        self.net = self.convert(Branches(drop_path), drop_path="rate")

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@each_setting
def test_registered_drop_path_trains_as_torchvision_s(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunables, "_TUNABLE", dict(tunables._TUNABLE))
    names: dict[str, Any] = {"MyDropPath": MyDropPath}
    exec(block(OWN_DROP_PATH), names)
    ours = LitBranches(MyDropPath(0.2))
    assert type(ours.net.drop_path) is names["TunedMyDropPath"]
    assert moved(tuned(ours, settings).schedule)
    theirs = LitBranches(StochasticDepth(0.2, "row"))
    tuned(theirs, settings)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    exported: Any = ours.export()
    assert type(exported.drop_path) is MyDropPath
    assert exported.drop_path.drop_prob == ours.hyperparameters.values()["rate"]


@pytest.mark.parametrize("line", [INSTALL, EVIDENCE, COMMAND_LINE])
def test_shell_commands_are_well_formed_and_name_files_and_extras_that_exist(line: str) -> None:
    code = block(line)
    subprocess.run(["sh", "-n"], input=code, text=True, check=True)
    assert all((ROOT / path).exists() for path in re.findall(r"\b(?:examples|tests)/[\w./]+", code))
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(re.findall(r'"\.\[(\w+)\]"', code)) <= set(extras)


def test_readme_command_line_runs(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    program, *arguments = block(COMMAND_LINE).split()
    assert program == "python"
    command = [sys.executable, *arguments, "--trainer.fast_dev_run=1", f"--trainer.default_root_dir={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
