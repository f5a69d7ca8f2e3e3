"""Methods that users write: one class, known by its name."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support import LitSmall, fit, loader, trainer
from torch import Tensor, nn

from lightning_stn import HyperparameterSet, Method, STNCallback
from lightning_stn.methods import Rates, base, resolve_method


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))


def define_weighted() -> type[Method]:
    @dataclass(frozen=True)
    class Weighted(Method):
        """STN whose objective is the training loss times a factor."""

        factor: float = 0.5

        name = "weighted"
        centred = False
        rates = Rates(travel=1.0, smallest=0.01, largest=0.01, unknown=0.01)

        def objective(
            self, root: nn.Module, hyperparameters: HyperparameterSet, loss: Callable[[], Tensor]
        ) -> tuple[Tensor, Tensor]:
            value = loss()
            return value, self.factor * value

    return Weighted


@pytest.mark.parametrize("automatic", [False, True])
def test_custom_method_trains_resumes_and_is_known_by_name(tmp_path, automatic: bool) -> None:
    weighted = define_weighted()
    assert resolve_method("weighted") == weighted()
    module = LitSmall()
    module.automatic_optimization = automatic
    callback = STNCallback(1, 1, 0, method=weighted(factor=0.25), seed=1)  # type: ignore[call-arg]
    run, stn = fit(module, callback, max_epochs=1)
    assert stn.state_dict()["settings"]["method"] == {"name": "weighted", "factor": 0.25}
    assert stn.state_dict()["settings"]["lr"] == 0.01
    run.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = STNCallback(1, 1, 0, method="weighted", seed=1)
    other = LitSmall()
    other.automatic_optimization = automatic
    with pytest.warns(UserWarning, match=r"method\.factor=0\.5 \(it stays 0\.25\)"):
        trainer(resumed, max_epochs=2).fit(other, loader(24), loader(16), ckpt_path=tmp_path / "saved.ckpt")
    assert resumed._settings.method == weighted(factor=0.25)  # type: ignore[call-arg]


def test_method_refuses_a_name_that_is_taken() -> None:
    with pytest.raises(ValueError, match="method name 'stn' belongs to STN; choose another name"):

        class Mine(Method):
            name = "stn"

    assert type(resolve_method("stn")).__name__ == "STN"


def test_method_can_be_defined_again_under_its_name() -> None:
    define_weighted()
    again = define_weighted()
    assert type(resolve_method("weighted")) is again


def test_callback_refuses_a_method_that_is_not_a_frozen_dataclass() -> None:
    class Loose(define_weighted()):  # type: ignore[misc]
        name = "loose"

    with pytest.raises(ValueError, match=r"Loose: expected a frozen dataclass.*@dataclass\(frozen=True\)"):
        STNCallback(method=Loose())


def test_callback_refuses_a_method_without_rates() -> None:
    @dataclass(frozen=True)
    class WithoutRates(Method):
        name = "without_rates"
        centred = False

        def objective(
            self, root: nn.Module, hyperparameters: HyperparameterSet, loss: Callable[[], Tensor]
        ) -> tuple[Tensor, Tensor]:
            return loss(), loss()

    with pytest.raises(ValueError, match="WithoutRates: expected the class attributes name and rates, got no rates"):
        STNCallback(method=WithoutRates())


def test_method_refuses_an_unknown_setting() -> None:
    with pytest.raises(
        ValueError, match=r"DeltaSTN: expected settings among \['linearize', 'passes'\], got \['pases'\]"
    ):
        STNCallback(method={"name": "delta-stn", "pases": 1})  # type: ignore[arg-type]


def test_resumed_run_ignores_settings_that_no_longer_exist(tmp_path) -> None:
    run, _ = fit(LitSmall(), STNCallback(1, 1, 0, seed=1), max_epochs=1)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    checkpoint = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["STNCallback"]
    settings = state["settings"]
    del state["version"], state["digest"]  # as it was before there were any
    settings["of_another_version"] = settings["scales"]["of_another_version"] = 1
    torch.save(checkpoint, tmp_path / "saved.ckpt")
    stn = STNCallback(1, 1, 0, seed=1)
    trainer(stn, max_epochs=2).fit(LitSmall(), loader(24), loader(16), ckpt_path=tmp_path / "saved.ckpt")
    assert stn.state_dict()["clock"]["batches"] == 6
