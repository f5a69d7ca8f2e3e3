"""A kind of hyperparameter defined outside the package works everywhere: the package asks it, and never its type."""

import csv
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from support import LitSmall, loader, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn

from lightning_stn import Float, Hyperparameter, HyperparameterSet, Schedule, STNCallback, convert
from lightning_stn.augment import Cutout
from lightning_stn.binding import attach_all
from lightning_stn.callback.watch import Watch
from lightning_stn.specifications import Chart, Perturb


@dataclass(frozen=True)
class Power(Hyperparameter):
    """The number `2 ** (octave + fine)`: two unconstrained entries."""

    init: float
    _: KW_ONLY
    scale: float = 0.5
    perturb: Perturb = "example"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("octave", "fine")

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, float("inf")

    def unconstrained_init(self) -> list[float]:
        return [torch.tensor(self.init).log2().item(), 0.0]

    def read(self, unconstrained: Tensor) -> Tensor:
        return unconstrained.sum(-1).exp2()

    def to_python(self, value: Tensor) -> float:
        return float(value)

    def bound_reached(self, unconstrained: Any) -> float | None:
        return 0.0 if sum(unconstrained) < -20 else None


@dataclass(frozen=True)
class Switch(Hyperparameter):
    """A string, "off" or "on"."""

    init: str
    _: KW_ONLY
    scale: float = 0.5
    perturb: Perturb = "example"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("off", "on")

    @property
    def bounds(self) -> None:
        return None

    def unconstrained_init(self) -> list[float]:
        return [float(self.init == part) for part in self.parts]

    def read(self, unconstrained: Tensor) -> Tensor:
        return (unconstrained[..., 1] > unconstrained[..., 0]).long()

    def to_python(self, value: Tensor) -> str:
        return self.parts[int(value)]

    def curves(self, name: str, values: Tensor, unconstrained: Tensor, scale: Tensor) -> dict[str, float]:
        margin = (unconstrained[1] - unconstrained[0]).item()
        return {f"value/{name}": self.read(unconstrained).item(), f"margin/{name}": margin}

    def chart(self, name: str) -> Chart:
        return Chart("Multiline", [f"margin/{name}"])


KINDS: dict[str, Hyperparameter] = {"noise": Power(0.25), "flip": Switch("on"), "length": Float(0.0, 4.0, init=2.0)}
LABELS = ("noise/octave", "noise/fine", "flip/off", "flip/on", "length")


class LitKinds(LitSmall):
    def __init__(self, specifications: dict[str, Hyperparameter] = KINDS) -> None:
        super().__init__(specifications, dropout=None)
        self.save_hyperparameters()

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        index = self.hyperparameters["flip"]
        flipped = torch.stack([images, images.flip(-1)])[index, torch.arange(len(images))]
        return super().training_loss((flipped, labels), batch_idx)


def callback() -> STNCallback:
    return STNCallback(train_steps=1, warmup=0, lr=0.05, seed=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[LitKinds, STNCallback, Path]:
    torch.manual_seed(0)
    module, stn = LitKinds(), callback()
    logger = TensorBoardLogger(tmp_path_factory.mktemp("kinds"), name="run", version=0)
    run = trainer(stn, logger=logger, max_epochs=1)
    run.fit(module, loader(24), loader(16, seed=1))
    run.save_checkpoint(Path(logger.log_dir) / "last.ckpt")
    return module, stn, Path(logger.log_dir)


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_a_new_kind_is_tuned(run: tuple[LitKinds, STNCallback, Path]) -> None:
    module, _, _ = run
    hyperparameters = module.hyperparameters
    assert hyperparameters.labels == LABELS
    assert hyperparameters.slices == {"noise": slice(0, 2), "flip": slice(2, 4), "length": slice(4, 5)}
    assert (hyperparameters.unconstrained != LitKinds().hyperparameters.unconstrained).all()
    assert module.net[0].weight_gate.shape[1] == 5
    values = hyperparameters.values()
    assert values["noise"] == pytest.approx(hyperparameters.unconstrained[:2].sum().exp2().item())
    assert values["flip"] in ("off", "on")


def test_a_new_kind_is_in_the_schedule_and_its_file(run: tuple[LitKinds, STNCallback, Path]) -> None:
    module, stn, folder = run
    first, *_, last = stn.schedule.rows
    assert first.values == {"noise": 0.25, "flip": "on", "length": pytest.approx(2.0)}
    assert last.values == module.hyperparameters.values()
    assert tuple(last.scales) == ("noise.octave", "noise.fine", "flip_off", "flip_on", "length")
    assert list(last.scales.values()) == pytest.approx(module.hyperparameters.scale.tolist())
    assert Schedule.load(folder / "schedule.json") == stn.schedule
    stn.schedule.save(folder / "schedule.csv")
    with open(folder / "schedule.csv", newline="") as file:
        assert next(csv.reader(file))[:6] == ["step", "epoch", "noise", "flip", "length", "noise.octave_scale"]


def test_a_new_kind_has_its_tags_and_charts(run: tuple[LitKinds, STNCallback, Path]) -> None:
    module, _, folder = run
    accumulator = events(folder)
    tags = set(accumulator.Tags()["scalars"])
    bands = {f"stn/{kind}/{name}" for kind in ("value", "value_lower", "value_upper") for name in ("noise", "length")}
    entries = {f"stn/{kind}/{label}" for kind in ("scale", "hypergrad") for label in LABELS}
    assert tags >= bands | entries | {"stn/value/flip", "stn/margin/flip"}
    assert "stn/value_lower/flip" not in tags
    logged = [accumulator.Scalars(f"stn/{kind}/noise")[-1].value for kind in ("value", "value_lower", "value_upper")]
    centre, scale = module.hyperparameters.unconstrained[:2].sum(), module.hyperparameters.scale[:2].sum()
    assert logged == pytest.approx([x.exp2().item() for x in (centre, centre - scale, centre + scale)], rel=1e-5)
    layout = layout_pb2.Layout()
    layout.ParseFromString(accumulator.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (category,) = layout.category
    _, noise, flip, length = category.chart
    assert [chart.title for chart in (noise, flip, length)] == ["noise", "flip", "length"]
    assert list(flip.multiline.tag) == ["^stn/margin/flip$"]
    assert noise.HasField("margin")
    assert length.HasField("margin")


def test_a_new_kind_resumes_from_a_checkpoint_loaded_with_weights_only(
    run: tuple[LitKinds, STNCallback, Path],
) -> None:
    module, stn, folder = run
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["specifications"] == KINDS
    resumed, continued = LitKinds(), callback()
    trainer(continued, max_epochs=2).fit(resumed, loader(24), loader(16, seed=1), ckpt_path=folder / "last.ckpt")
    rows = len(stn.schedule.rows)
    assert continued.schedule.rows[:rows] == stn.schedule.rows
    assert continued.schedule.rows[-1].step == 2 * stn.schedule.rows[-1].step
    restarted = {**KINDS, "noise": Power(0.5, scale=0.1)}
    loaded = LitKinds.load_from_checkpoint(folder / "last.ckpt", specifications=restarted)
    assert loaded.hyperparameters.values() == module.hyperparameters.values()


def test_a_run_of_a_new_kind_resumes_with_its_signature_only(run: tuple[LitKinds, STNCallback, Path]) -> None:
    other = LitKinds({**KINDS, "noise": replace(KINDS["noise"], perturb="batch")})  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"saved with the hyperparameters .*Power\(perturb='example'\).*'batch'"):
        trainer(callback()).fit(other, loader(24), loader(16, seed=1), ckpt_path=run[2] / "last.ckpt")


def test_a_module_of_a_new_kind_is_exported(run: tuple[LitKinds, STNCallback, Path]) -> None:
    module, images = run[0].eval(), torch.randn(4, 1, 6, 6)
    net = module.export()
    assert {type(layer).__module__.partition(".")[0] for layer in net.modules()} == {"torch"}
    torch.testing.assert_close(net(images), module.net(images))


def test_regularizers_ask_a_new_kind_for_its_bounds() -> None:
    hyperparameters = HyperparameterSet({"a": Power(0.5), "b": Switch("on")})
    with pytest.raises(ValueError, match=r"expected p in \[0, 1\], but the hyperparameter 'a' is Power"):
        convert(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), hyperparameters, dropout="a")
    with pytest.raises(ValueError, match="expects a number, but the hyperparameter 'b' is a Switch"):
        convert(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), hyperparameters, dropout="b")
    with pytest.raises(ValueError, match="upper bound for the number of holes, but the hyperparameter 'a' is Power"):
        attach_all(Cutout(1, "a"), hyperparameters)


def test_the_watch_asks_a_new_kind_for_the_bound_it_has_reached() -> None:
    hyperparameters = HyperparameterSet({"a": Power(0.5), "b": Switch("on")})
    hyperparameters.unconstrained.fill_(-30.0)
    with pytest.warns(UserWarning, match="'a' has arrived at its bound 0 and") as caught:
        Watch(hyperparameters).look()
    assert len(caught) == 1


def test_a_new_kind_has_its_perturbation_checked() -> None:
    with pytest.raises(ValueError, match=r"Power\(.*expected scale > 0"):
        Power(0.5, scale=-1.0)
