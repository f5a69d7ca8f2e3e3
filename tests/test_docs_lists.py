"""The lists on the pages of `docs/` are those of the package: tags, messages, names, the reference."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from pages import DOCS, DOCS_PAGES, ROOT, first_cells, section
from support import LitSmall, loader, trainer
from torch import Tensor

from lightning_stn import Categorical, Float, Integer, Scales, STNCallback, STNModule
from lightning_stn.collisions import public_names

RUN = DOCS / "reading-a-run.md"


class LitEveryKind(LitSmall):
    """A hyperparameter of each kind, and one validation loss that is not finite."""

    def __init__(self) -> None:
        super().__init__(
            {
                "dropout": Float(0.0, 0.9),
                "noise": Float(0.0, None, init=0.1),
                "length": Integer(0, 4),
                "operation": Categorical(["none", "mirror"], init="none"),
            }
        )

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        options = torch.stack([images, images.flip(-1)])
        images = options[self.hyperparameters["operation"], torch.arange(len(images))]
        return super().training_loss((images, labels), batch_idx)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().validation_loss(batch, batch_idx)
        return loss * float("nan") if self.runs_for == "hyperparameters" and batch_idx == 5 else loss


def test_tags_on_the_page_are_those_that_a_run_logs(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version=0)
    stn = STNCallback(train_steps=1, warmup=0, lr=0.05, seed=1, scales=Scales(tune=True))
    with pytest.warns(UserWarning, match="A hypergradient is not finite"):
        trainer(stn, logger=logger, max_epochs=20).fit(LitEveryKind(), loader(24), loader(16, seed=1))
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    names = "|".join(stn.schedule.names)
    logged = {re.sub(rf"/(?:{names})(?=/|$)", "/<name>", tag) for tag in header if tag.startswith("stn/")}
    logged = {re.sub(r"/(?:none|mirror)$", "/<choice>", tag) for tag in logged}
    shown = [tag for cell in first_cells(section(RUN, "## Tags")) for tag in re.findall(r"`(.+?)`", cell)]
    assert len(shown) == len(set(shown))
    assert set(shown) == logged


WARN = ("warn", "rank_zero_warn", "rank_zero_info", "_warn_once")
"""Functions that show a message."""


def pattern_of(node: ast.AST) -> str:
    """A literal as text, with `…` for what a run fills in; empty for what is no literal."""
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern_of(part) or "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def literals(node: ast.AST) -> list[str]:
    return [pattern for inner in ast.walk(node) if (pattern := pattern_of(inner))]


FUNCTIONS = [
    node
    for path in sorted((ROOT / "lightning_stn").rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
]


def shown_messages() -> list[list[str]]:
    """What does not vary of each message and sentence on the page."""
    text = section(RUN, "## The report") + section(RUN, "## Messages")
    codes = [code for cell in first_cells(text) for code in re.findall(r"`(.+?)`", cell)]
    return [[part.strip(" .:,") for part in code.split("…") if part.strip(" .:,")] for code in codes]


def is_shown(message: str) -> bool:
    return any(all(part in message for part in parts) for parts in shown_messages())


@pytest.mark.parametrize("parts", shown_messages(), ids=lambda parts: parts[0][:40])
def test_message_on_the_page_is_one_of_the_package(parts: list[str]) -> None:
    texts = ["\n".join(literals(function)) for function in FUNCTIONS]
    assert any(all(part in text for part in parts) for text in texts)


def warnings_of(function: ast.FunctionDef) -> Iterator[list[str]]:
    """Of each message that a function shows, the literals that it may consist of."""
    for call in ast.walk(function):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", getattr(call.func, "id", "")) in WARN:
            own = [text for argument in call.args if len(text := pattern_of(argument)) > 30]
            if own:
                yield own if is_shown(own[0]) or not own[0].startswith("…") else literals(function)


@pytest.mark.parametrize(
    "candidates", [one for function in FUNCTIONS for one in warnings_of(function)], ids=lambda texts: texts[0][:40]
)
def test_every_warning_of_the_package_is_on_the_page(candidates: list[str]) -> None:
    assert any(map(is_shown, candidates))


def test_names_on_the_page_are_those_that_a_module_may_not_use() -> None:
    text = section(DOCS / "your-module.md", "## Names").split("An error says")[0]
    assert set(re.findall(r"`(\w+)`", text)) == {"STNModule", *public_names(STNModule, L.LightningModule)}


PACKAGES = ["", ".analysis", ".augment", ".callback", ".layers", ".methods", ".policies", ".regularizers", ".schedule"]
REFERENCE = [
    name
    for page in DOCS_PAGES
    if page.startswith("api/")
    for name in re.findall(r"^::: ([\w.]+)$", (DOCS / page).read_text(), re.MULTILINE)
]


def found(path: str) -> Any:
    """The object that a name stands for."""
    package, _, name = path.rpartition(".")
    return getattr(importlib.import_module(package), name)


def test_reference_names_modules_where_no_object_is_meant() -> None:
    modules = {name for name in REFERENCE if is_module(name)}  # `lightning_stn.export` is one, and hides the function
    assert modules <= {f"lightning_stn{package}" for package in PACKAGES}


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_reference_names_each_object_once() -> None:
    assert len(REFERENCE) == len(set(REFERENCE))
    documented = [found(name) for name in REFERENCE]
    assert len({id(one) for one in documented}) == len(documented)


@pytest.mark.parametrize("package", PACKAGES)
def test_reference_has_every_public_name(package: str) -> None:
    module = importlib.import_module(f"lightning_stn{package}")
    documented = {id(found(name)) for name in REFERENCE}
    assert [name for name in module.__all__ if id(getattr(module, name)) not in documented] == []
