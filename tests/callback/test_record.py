"""Files that a run writes, read back."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support import LitSmall, fit, loader, random_gates, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_stn import Categorical, Schedule, STNCallback, WeightStep
from lightning_stn.callback.record import Mean
from lightning_stn.functional import choice_probabilities

NAMES = ["dropout", "noise", "length"]
TAGS = {
    *(f"stn/{kind}/{name}" for kind in ("value", "scale", "hypergrad", "place") for name in NAMES),
    *(f"stn/value_{kind}/{name}" for kind in ("lower", "upper") for name in NAMES),
    "stn/value_unrounded/length",
    "stn/entropy",
    "stn/lr",
    "stn/train_loss",
    "stn/valid_loss",
}


@pytest.fixture
def run(tmp_path: Path) -> tuple[LitSmall, STNCallback, Path]:
    """Nine training batches in three epochs; a hyperparameter step after every second, a record after every third."""
    torch.manual_seed(0)
    module = LitSmall()
    random_gates(module, 0.1)
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    _, callback = fit(module, logger=logger, max_epochs=3, log_every_n_steps=3)
    return module, callback, Path(logger.log_dir)


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_event_file_has_every_tag_at_every_record(run: tuple[LitSmall, STNCallback, Path]) -> None:
    accumulator = events(run[2])
    tags = {tag for tag in accumulator.Tags()["scalars"] if tag.startswith("stn/")}
    assert tags == TAGS
    steps = {tag: [event.step for event in accumulator.Scalars(tag)] for tag in tags}
    for tag in tags:
        starts_later = tag.startswith("stn/hypergrad") or tag.endswith("_loss")
        assert steps[tag] == ([3, 6, 9] if starts_later else [0, 3, 6, 9]), tag


def test_custom_scalars_layout_names_existing_tags(run: tuple[LitSmall, STNCallback, Path]) -> None:
    accumulator = events(run[2])
    layout = layout_pb2.Layout()
    layout.ParseFromString(accumulator.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert len(accumulator.Tensors("custom_scalars__config__")) == 1
    (category,) = layout.category
    schedules, *bands = category.chart
    matched = {tag for tag in TAGS for pattern in schedules.multiline.tag if re.match(pattern, tag)}
    assert matched == {f"stn/place/{name}" for name in NAMES}
    series = [chart.margin.series[0] for chart in bands]
    assert [one.value for one in series] == [f"stn/value/{name}" for name in NAMES]
    assert {tag for one in series for tag in (one.value, one.lower, one.upper)} <= TAGS


def test_schedule_file_agrees_with_the_event_file(run: tuple[LitSmall, STNCallback, Path]) -> None:
    module, callback, folder = run
    accumulator = events(folder)
    document = json.loads((folder / "schedule.json").read_text())
    rows = [dict(zip(document["columns"], cells, strict=True)) for cells in document["rows"]]
    assert [row["step"] for row in rows] == [0, 3, 6, 9]
    assert [row["epoch"] for row in rows] == [0, 0, 1, 2]
    assert document["warmup"] == 2
    for column, tag in (("train_loss", "stn/train_loss"), ("valid_loss", "stn/valid_loss")):
        assert [row[column] for row in rows][1:] == pytest.approx([event.value for event in accumulator.Scalars(tag)])
        assert rows[0][column] is None
    unrounded = [event.value for event in accumulator.Scalars("stn/value_unrounded/length")]
    assert [row["length.unrounded"] for row in rows] == pytest.approx(unrounded, rel=1e-6)
    for name in NAMES:
        for kind, column in (("value", name), ("scale", f"{name}_scale")):
            logged = [event.value for event in accumulator.Scalars(f"stn/{kind}/{name}")]
            assert [row[column] for row in rows] == pytest.approx(logged, rel=1e-6)
    assert Schedule.load(folder / "schedule.json") == callback.schedule
    assert callback.schedule.rows[-1].values == module.hyperparameters.values()


def test_band_reaches_one_scale_to_each_side_in_natural_units(run: tuple[LitSmall, STNCallback, Path]) -> None:
    module, _, folder = run
    accumulator = events(folder)
    centre, scale = module.hyperparameters.unconstrained, module.hyperparameters.scale
    for kind, sign in (("value_lower", -1), ("value_upper", 1)):
        expected = 0.9 * torch.sigmoid(centre[0] + sign * scale[0])
        assert accumulator.Scalars(f"stn/{kind}/dropout")[-1].value == pytest.approx(expected.item(), rel=1e-5)
    assert accumulator.Scalars("stn/entropy")[-1].value == pytest.approx(module.hyperparameters.entropy().item())


def test_logged_losses_are_means_since_the_last_record(tmp_path: Path) -> None:
    losses: list[float] = []

    class Watch(LitSmall):
        def training_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_loss(batch, batch_idx)
            losses.append(loss.item())
            return loss

    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    fit(Watch(), logger=logger, max_epochs=3, log_every_n_steps=3)
    logged = [event.value for event in events(Path(logger.log_dir)).Scalars("stn/train_loss")]
    assert logged == pytest.approx([sum(losses[i : i + 3]) / 3 for i in (0, 3, 6)])


class Logs(LitSmall):
    """Logs a further curve; five batches in an epoch, of which every second and the last complete a step."""

    def __init__(self, automatic: bool) -> None:
        super().__init__()
        self.automatic_optimization = automatic

    def training_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_loss(batch, batch_idx)
        self.log("own", loss)
        return loss


def accumulating(automatic: bool, **settings: Any) -> tuple[STNCallback, dict[str, Any]]:
    """A callback and the Trainer's arguments that accumulate two batches."""
    callback = STNCallback(
        train_steps=1, warmup=0, seed=1, weight_step=WeightStep(accumulate_grad_batches=1 if automatic else 2)
    )
    return callback, {"n": 40, "max_epochs": 2, **({"accumulate_grad_batches": 2} if automatic else {}), **settings}


@pytest.mark.parametrize(("automatic", "last"), [(True, 6), (False, 10)])
def test_all_curves_have_one_axis_when_gradients_accumulate(automatic: bool, last: int, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    callback, settings = accumulating(automatic, logger=logger)
    fit(Logs(automatic), callback, **settings)
    accumulator = events(Path(logger.log_dir))
    own, val_loss, noise = (
        [event.step for event in accumulator.Scalars(tag)] for tag in ("own", "val_loss", "stn/value/noise")
    )
    # Lightning logs during a step, this package after it.
    assert (own, val_loss, noise) == ([*range(last)], [last // 2 - 1, last - 1], [*range(last + 1)])
    rows = [row.step for row in callback.schedule.rows]
    assert rows == ([0, 2, 4, 5, 7, 9, 10] if automatic else [*range(11)])


def test_log_every_n_steps_means_the_same_for_all_curves_when_gradients_accumulate(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    callback, settings = accumulating(True, logger=logger, log_every_n_steps=3)
    fit(Logs(True), callback, **settings)
    accumulator = events(Path(logger.log_dir))
    assert [event.step for event in accumulator.Scalars("own")] == [2, 5]
    assert [event.step for event in accumulator.Scalars("stn/value/noise")] == [0, 3, 6]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_resumed_run_goes_on_along_the_axis_when_gradients_accumulate(tmp_path: Path) -> None:
    steps = []
    for version, checkpoint in enumerate([None, tmp_path / "half.ckpt"]):
        logger = TensorBoardLogger(tmp_path, name="run", version=version)
        callback, settings = accumulating(True, logger=logger)
        run = trainer(callback, **{key: value for key, value in settings.items() if key != "n"})
        if checkpoint is None:
            run.fit_loop.max_epochs = 1
        run.fit(Logs(True), loader(40), loader(16, seed=1), ckpt_path=checkpoint)
        if checkpoint is None:
            run.save_checkpoint(tmp_path / "half.ckpt")
        steps += [event.step for event in events(Path(logger.log_dir)).Scalars("stn/value/noise")]
    assert steps == [0, 1, 2, 3, 4, 5, 6]


def test_last_values_are_recorded_at_any_log_interval(tmp_path: Path) -> None:
    module = LitSmall()
    _, callback = fit(module, log_every_n_steps=50)
    assert [row.step for row in callback.schedule.rows] == [0, 6]
    assert callback.schedule.rows[-1].values == module.hyperparameters.values()


def test_csv_logger_records_values_and_schedule(tmp_path: Path) -> None:
    module = LitSmall()
    logger = CSVLogger(tmp_path, name="run", version=0)
    fit(module, logger=logger)
    assert Schedule.load(Path(logger.log_dir) / "schedule.json").rows[-1].values == module.hyperparameters.values()
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        logged = [row["stn/value/dropout"] for row in csv.DictReader(file) if row["stn/value/dropout"]]
    assert float(logged[-1]) == pytest.approx(module.hyperparameters.values()["dropout"])


def test_several_loggers_share_one_schedule_file(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="a", version=0), CSVLogger(tmp_path, name="b", version=0)]
    fit(LitSmall(), logger=loggers)
    assert [path.parent.parent.name for path in tmp_path.rglob("schedule.json")] == ["a"]
    assert events(Path(loggers[0].log_dir)).Scalars("stn/value/dropout")


def test_run_without_a_logger_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, callback = fit(LitSmall(), default_root_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(callback.schedule.rows) == 7


def test_failed_run_keeps_its_schedule_rows(tmp_path: Path) -> None:
    class Fails(LitSmall):
        def training_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if len(self.events) > 4:
                raise ZeroDivisionError
            return super().training_loss(batch, batch_idx)

    logger = CSVLogger(tmp_path, name="run", version=0)
    with pytest.raises(ZeroDivisionError):
        fit(Fails(), logger=logger)
    assert [row.step for row in Schedule.load(Path(logger.log_dir) / "schedule.json").rows] == [0, 1, 2, 3]


def test_mean_averages_since_the_last_pop() -> None:
    mean = Mean()
    assert mean.pop() is None
    for value in (1.0, 2.0, 6.0):
        mean.update(torch.tensor(value))
    assert mean.pop() == torch.tensor(3.0)
    assert mean.pop() is None


CHOICES = ("as is", "mirror(1.0)", "a+b/c")


class LitChoice(LitSmall):
    """The three numeric hyperparameters, and a choice of an operation on the images."""

    def __init__(self) -> None:
        numbers = dict(LitSmall().hyperparameters.specifications)
        super().__init__({"op": Categorical(CHOICES, init="mirror(1.0)"), **numbers})

    def training_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        operated = torch.stack([images, images.flip(-1), -images])
        chosen = operated[self.hyperparameters["op"], torch.arange(len(images))]
        return super().training_loss((chosen, labels), batch_idx)


@pytest.fixture
def choice_run(tmp_path: Path) -> tuple[LitChoice, STNCallback, Path]:
    torch.manual_seed(0)
    module = LitChoice()
    random_gates(module, 0.1)
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    _, callback = fit(module, logger=logger, max_epochs=3, log_every_n_steps=3)
    return module, callback, Path(logger.log_dir)


def test_event_file_has_tags_for_every_choice(choice_run: tuple[LitChoice, STNCallback, Path]) -> None:
    module, _, folder = choice_run
    accumulator = events(folder)
    tags = {tag for tag in accumulator.Tags()["scalars"] if tag.startswith("stn/")}
    each = {f"stn/{kind}/op/{choice}" for kind in ("scale", "hypergrad", "probability") for choice in CHOICES}
    assert tags == TAGS | each | {"stn/value/op"}
    index = CHOICES.index(str(module.hyperparameters.values()["op"]))
    assert accumulator.Scalars("stn/value/op")[-1].value == index
    entries = module.hyperparameters.unconstrained[:3].detach(), module.hyperparameters.scale[:3].detach()
    logged = [accumulator.Scalars(f"stn/probability/op/{choice}")[-1].value for choice in CHOICES]
    assert logged == pytest.approx(choice_probabilities(*entries).tolist(), rel=1e-5)
    logged = [accumulator.Scalars(f"stn/scale/op/{choice}")[-1].value for choice in CHOICES]
    assert logged == pytest.approx(entries[1].tolist(), rel=1e-6)


def test_custom_scalars_layout_shows_the_probabilities_of_choices(
    choice_run: tuple[LitChoice, STNCallback, Path],
) -> None:
    accumulator = events(choice_run[2])
    layout = layout_pb2.Layout()
    layout.ParseFromString(accumulator.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (category,) = layout.category
    schedules, choice, *bands = category.chart
    assert [chart.title for chart in category.chart] == ["place in the range", "op", *NAMES]
    shown = [[tag for tag in accumulator.Tags()["scalars"] if re.match(p, tag)] for p in choice.multiline.tag]
    assert shown == [[f"stn/probability/op/{one}"] for one in CHOICES]
    assert len(schedules.multiline.tag) == 3
    assert all(chart.HasField("margin") for chart in bands)


def test_schedule_stores_a_choice_as_text(choice_run: tuple[LitChoice, STNCallback, Path]) -> None:
    module, callback, folder = choice_run
    loaded = Schedule.load(folder / "schedule.json")
    assert loaded == callback.schedule
    assert loaded.rows[0].values["op"] == "mirror(1.0)"
    assert loaded.rows[-1].values == module.hyperparameters.values()
    assert list(loaded.rows[0].scales) == [*(f"op_{choice}" for choice in CHOICES), *NAMES]


def test_choice_is_restored_from_a_checkpoint(choice_run: tuple[LitChoice, STNCallback, Path], tmp_path: Path) -> None:
    module, callback, _ = choice_run
    torch.save([module.state_dict(), callback.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other, continued = LitChoice(), STNCallback(train_steps=2, valid_steps=1, warmup=0, lr=0.05, seed=1)
    other.load_state_dict(weights)
    continued.load_state_dict(state)
    fit(other, continued, max_epochs=1, log_every_n_steps=3)
    assert continued.schedule.rows[: len(callback.schedule.rows)] == callback.schedule.rows
    assert continued.schedule.rows[-1].step > callback.schedule.rows[-1].step
    assert other.hyperparameters.unconstrained.shape == (6,)
