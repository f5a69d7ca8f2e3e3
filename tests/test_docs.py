"""The code on the pages of `docs/` runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import pytest
import torch
from pages import DOCS, DOCS_PAGES, Block, blocks, check_shell
from support import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import Float, Hyperparameter, Schedule, STNCallback, STNModule
from lightning_stn.layers import registry
from lightning_stn.regularizers import registry as tunables
from lightning_stn.schedule import Row

QUIET = "enable_progress_bar=False, accelerator='cpu'"

Names = dict[str, Any]


def digits(n: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    return TensorDataset(torch.rand(n, 1, 8, 8, generator=generator) * labels[:, None, None, None] / 9, labels)


def data(n: int = 48) -> DataLoader[Any]:
    return DataLoader(digits(n), 16)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 10))


def run(module: L.LightningModule, **settings: Any) -> STNCallback:
    """Train for six batches with a hyperparameter step after each."""
    stn = STNCallback(train_steps=1, warmup=0, lr=0.1, seed=1, **settings)
    trainer(stn).fit(module, data(), data())
    return stn


def moves(schedule: Schedule) -> bool:
    """Whether every real number has moved."""
    first, last = schedule.rows[0].values, schedule.rows[-1].values
    return all(first[name] != last[name] for name, kind in schedule.specifications.items() if isinstance(kind, Float))


class MyLinear(nn.Module):
    """`nn.Linear`, but not a subclass of it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, input: Tensor) -> Tensor:
        return my_product(input, self.weight) + self.bias

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]


def my_product(input: Tensor, weight: Tensor) -> Tensor:
    return input @ weight.T


class MyDropPath(nn.Module):
    """Stochastic depth, but not torchvision's."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob


class Residual(nn.Module):
    """A branch that is dropped, and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.drop_path, self.readout = MyLinear(64, 64), MyDropPath(0.2), MyLinear(64, 10)

    def forward(self, input: Tensor) -> Tensor:
        input = input.flatten(1)
        output: Tensor = self.readout(input + self.drop_path(self.branch(input).tanh()))
        return output


class LitDigits(STNModule):
    """A network with two hyperparameters."""

    def __init__(self, net: nn.Module | None = None, **rates: str) -> None:
        super().__init__(hyperparameters={"dropout": Float(0.0, 0.9), "noise": Float(0.0, 1.0)})
        if net is not None:
            self.net = self.convert(net, **rates)  # type: ignore[arg-type]

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        noise = self.hyperparameters["noise"].reshape(-1, 1, 1, 1)
        return nn.functional.cross_entropy(self.net(batch[0] + noise * torch.randn_like(batch[0])), batch[1])

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class LitNoise(LitDigits):
    """A network with one hyperparameter, which it reads itself."""

    def __init__(self, net: nn.Module) -> None:
        STNModule.__init__(self, hyperparameters={"noise": Float(0.0, 1.0)})
        self.net = self.convert(net)

    training_loss = LitDigits.validation_loss


def begin_index(folder: Path) -> Names:
    return {}


def end_index(names: Names) -> None:
    schedule = names["stn"].schedule
    assert moves(schedule)
    assert schedule.warmup == 12 + 4
    assert Schedule.load("lightning_logs/version_0/schedule.json") == schedule
    assert Path("schedule.png").stat().st_size > 10_000


def begin_your_module(folder: Path) -> Names:
    return {"train_set": digits(640), "valid_data": data()}


def end_your_module(names: Names) -> None:
    assert moves(names["stn"].schedule)
    assert names["stn"].schedule.rows[-1].step == 2 * names["trainer"].num_training_batches  # resumed after one epoch
    assert names["module"].hparams == {"width": 128, "lr": 1e-3}
    assert {"train_loss", "val_loss", "val_accuracy"} <= set(names["trainer"].callback_metrics)
    assert {type(layer).__module__.partition(".")[0] for layer in names["net"].modules()} == {"torch"}
    images = digits().tensors[0]
    plain, module = names["plain"].eval().net(images), names["module"].eval().net(images)
    torch.testing.assert_close(plain, module)


def begin_choosing(folder: Path) -> Names:
    return {"train_set": digits()}


def end_choosing(names: Names) -> None:
    assert moves(run(names["LitImages"](perceptron())).schedule)
    assert moves(run(names["LitImages"](perceptron()), perturb="example").schedule)
    assert moves(run(names["LitSharp"](perceptron())).schedule)
    module: Any = LitNoise(names["net"])
    assert moves(run(module, perturb="example").schedule)
    assert type(module.export()[1]) is nn.Identity
    torch.testing.assert_close(names["MultiplicativeNoise"](0.0)(torch.ones(2, 3)), torch.ones(2, 3))


def begin_reading(folder: Path) -> Names:
    module = LitDigits(perceptron(), dropout="dropout")
    stn = run(module)
    Path("lightning_logs/version_0").mkdir(parents=True)
    stn.schedule.save("lightning_logs/version_0/schedule.json")
    replayed = Schedule({"dropout": Float(0.0, 0.9)})
    for step, rate in ((0, 0.1), (6, 0.4)):
        replayed.append(Row(step, 0, {"dropout": rate}, {"dropout": 0.5}))
    replayed.save("schedule.json")
    names = {"L": L, "stn": stn, "module": module, "train_data": data(), "valid_data": data()}
    return {**names, "plain_module": PlainDigits()}


class PlainDigits(L.LightningModule):
    """A plain module with a dropout at the place that the page names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def end_reading(names: Names) -> None:
    final = names["stn"].schedule.final
    assert names["schedule"].final == final
    assert Schedule.load("schedule.csv").final == final
    assert names["plain_module"].net[1].p == 0.4
    assert len(names["fit"].table()) == 4
    assert {row["hyperparameter"] for row in names["ranking"].table()} == {"dropout", "noise"}


def begin_networks(folder: Path) -> Names:
    names = {"MyLinear": MyLinear, "my_product": my_product, "MyDropPath": MyDropPath}
    return {**names, "nn": nn, "self": LitDigits()}


def end_networks(names: Names) -> None:
    assert type(names["net"][1]) is nn.LayerNorm
    module: Any = LitDigits(Residual(), drop_path="dropout")
    assert type(module.net.branch) is names["ResponseMyLinear"]
    assert type(module.net.drop_path) is names["TunedMyDropPath"]
    assert moves(run(module, perturb="example").schedule)
    exported: Any = module.export()
    assert exported.drop_path.drop_prob == module.hyperparameters.values()["dropout"]


def begin_methods(folder: Path) -> Names:
    return {}


def end_methods(names: Names) -> None:
    trainer(names["stn"]).fit(LitDigits(perceptron(), dropout="dropout"), data(), data())
    assert len(names["stn"].schedule.rows) == 7


RUN: dict[str, tuple[Callable[[Path], Names], Callable[[Names], None], list[tuple[str, str]]]] = {
    "index.md": (begin_index, end_index, [("max_epochs=80", f"max_epochs=6, {QUIET}")]),
    "your-module.md": (
        begin_your_module,
        end_your_module,
        [("max_epochs=20", f"max_epochs=1, {QUIET}"), ("max_epochs=20", f"max_epochs=2, {QUIET}")],
    ),
    "choosing.md": (begin_choosing, end_choosing, []),
    "reading-a-run.md": (
        begin_reading,
        end_reading,
        [
            ("max_epochs=50", f"max_epochs=2, logger=False, enable_checkpointing=False, {QUIET}"),
            ("response_fit(module, train_data, valid_data)", "response_fit(module, train_data, valid_data, steps=2)"),
        ],
    ),
    "networks.md": (begin_networks, end_networks, []),
    "methods.md": (begin_methods, end_methods, []),
}
"""Of each page with code: what it begins with, what it must end in, and what makes it short, first places first."""


def test_every_page_with_code_is_run_and_every_fence_is_a_block() -> None:
    assert set(RUN) == {page for page in DOCS_PAGES if blocks(DOCS / page, "python")}
    for page in DOCS_PAGES:
        found = blocks(DOCS / page)
        assert (DOCS / page).read_text().count("```") == 2 * len(found)
        assert {block.language for block in found} <= {"python", "sh", "yaml", "text"}


@pytest.mark.filterwarnings("ignore:.*GPU available but not used")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a resumed run has another folder
@pytest.mark.parametrize("page", RUN)
def test_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_RESPONSES", dict(registry._RESPONSES))
    monkeypatch.setattr(tunables, "_TUNABLE", dict(tunables._TUNABLE))
    matplotlib.use("Agg")
    begin, end, replacements = RUN[page]
    code = "\n".join(block.code for block in blocks(DOCS / page, "python"))
    for text, short in replacements:
        assert text in code
        code = code.replace(text, short, 1)
    L.seed_everything(0, verbose=False)
    names = begin(tmp_path)
    exec(compile(code, page, "exec"), names)
    end(names)
    matplotlib.pyplot.close("all")


COMMANDS = [block for page in DOCS_PAGES for block in blocks(DOCS / page, "sh")]


@pytest.mark.parametrize("block", COMMANDS, ids=[block.code.splitlines()[0][:60] for block in COMMANDS])
def test_shell_commands_name_files_and_extras_that_exist(block: Block) -> None:
    check_shell(block.code)


def test_configuration_of_a_page_builds_hyperparameters_and_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # raised by Lightning's calls, some at its import
    monkeypatch.setattr("sys.argv", ["cli"])  # hides pytest's arguments
    from lightning.pytorch.cli import LightningCLI

    class Configured(LitDigits):
        def __init__(self, hyperparameters: dict[str, Hyperparameter]) -> None:
            STNModule.__init__(self, hyperparameters=hyperparameters)

    (block,) = blocks(DOCS / "your-module.md", "yaml")
    (tmp_path / "run.yaml").write_text(block.code)
    arguments = ["--config", str(tmp_path / "run.yaml"), "--trainer.accelerator=cpu", "--trainer.logger=false"]
    cli = LightningCLI(Configured, run=False, args=arguments, save_config_callback=None, seed_everything_default=0)
    assert cli.model.hyperparameters.values() == {"dropout": 0.05}
    assert any(isinstance(callback, STNCallback) for callback in cli.trainer.callbacks)
