"""The code of the README runs, under each method and both ways to perturb; its commands, links and figures exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from pages import DOCS, ROOT, blocks, check_shell
from support import each_setting, loader
from torch import Tensor, nn

from lightning_stn import Float, Schedule, STNCallback, STNModule

README = ROOT / "README.md"
QUICK_START, OWN_MODULE = (block.code for block in blocks(README, "python"))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(autouse=True)
def _without_display() -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")


def shortened(code: str, epochs: int, short: int) -> str:
    """The code with another number of epochs, its callback with the names `settings`."""
    for text, new in (
        (f"max_epochs={epochs}", f"max_epochs={short}, enable_progress_bar=False, accelerator='cpu'"),
        ("STNCallback()", "STNCallback(**settings)"),
    ):
        assert code.count(text) == 1
        code = code.replace(text, new)
    return code


@each_setting
def test_quick_start_tunes_and_draws_its_schedule(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For six epochs: one beyond the warm-up."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"settings": {**settings, "lr": 0.1}}
    exec(shortened(QUICK_START, 80, 6), names)
    schedule = names["stn"].schedule
    assert all(
        schedule.rows[0].values[name] != schedule.rows[-1].values[name]
        for name, specification in schedule.specifications.items()
        if isinstance(specification, Float)
    )
    assert Schedule.load("lightning_logs/version_0/schedule.json") == schedule
    assert Path("schedule.png").stat().st_size > 10_000


def test_quick_start_is_that_of_the_first_page_of_the_docs() -> None:
    (page,) = blocks(DOCS / "index.md", "python")
    assert ast.dump(ast.parse(QUICK_START)) == ast.dump(ast.parse(page.code))  # comments and layout may differ


class YourLitModule(L.LightningModule):
    """As a user may have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: nn.Module = nn.Sequential(
            nn.Flatten(), nn.Linear(36, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 3)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def names_of_own_module(module: type[YourLitModule], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        **{"L": L, "F": F, "Float": Float, "STNModule": STNModule, "STNCallback": STNCallback},
        **{"ModelCheckpoint": ModelCheckpoint, "YourLitModule": module},
        **{"train_data": loader(24), "valid_data": loader(16, seed=1)},
        "settings": {**settings, "train_steps": 1, "warmup": 0, "lr": 0.05, "seed": 1},
    }


def test_own_module_that_was_cut_off_goes_on_with_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    class Starts(YourLitModule):
        def on_train_start(self) -> None:
            starts.append(self.trainer.global_step)

    monkeypatch.chdir(tmp_path)
    exec(shortened(OWN_MODULE, 20, 2), names_of_own_module(Starts, {}))
    goes_on = OWN_MODULE.replace("valid_data)", 'valid_data, ckpt_path="last")')
    exec(shortened(goes_on, 20, 3), names := names_of_own_module(Starts, {}))
    assert starts == [0, 6]
    assert names["stn"].schedule.rows[-1].step == 9


@each_setting
def test_own_module_is_tuned_loaded_and_exported(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of_own_module(YourLitModule, settings)
    exec(shortened(OWN_MODULE, 20, 2), names)
    assert {"train_loss", "val_loss"} <= set(names["trainer"].callback_metrics)
    rows, module = names["stn"].schedule.rows, names["module"]
    assert rows[0].values["dropout"] != rows[-1].values["dropout"]
    assert module.hparams == {"width": 128}
    assert module.hyperparameters.values()["dropout"] in [pytest.approx(row.values["dropout"]) for row in rows]
    assert {type(layer).__module__.partition(".")[0] for layer in names["net"].modules()} == {"torch"}
    plain, images = YourLitModule(128).eval(), next(iter(loader(8)))[0]
    plain.net.load_state_dict(names["net"].state_dict())
    torch.testing.assert_close(plain.net(images), module.eval().net(images))


def test_commands_name_files_and_extras_that_exist() -> None:
    for block in blocks(README, "sh"):
        check_shell(block.code)


def test_readme_is_short_and_every_fence_is_tested() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert text.count("```") == 2 * len(blocks(README))
    assert {block.language for block in blocks(README)} == {"python", "sh"}


def test_links_are_absolute_and_lead_to_files_and_sections_that_exist() -> None:
    text = README.read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text.replace("\n", " "))
    here = [re.sub(r".*?/(?:blob/main|lightning-stn/main)/", "", t) for t in targets if "lightning-stn" in t]
    assert len(here) > 5
    assert all((ROOT / path).exists() for path in here)
    sections = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    assert all(t.startswith("https://") or t.removeprefix("#") in sections for t in targets)
