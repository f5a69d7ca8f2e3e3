"""Metrics of each logger, read back from its files, and the folder of `schedule.json`."""

import csv
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from support import LitSmall, fit, random_gates
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lightning_stn import Categorical, Schedule, STNCallback

NAMES = ["dropout", "noise", "length"]
STEPS = [0, 2, 4, 6]

Curve = list[tuple[int, float]]


class Remembers(Logger):
    """Keeps metrics in memory; has neither a folder nor a version."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int | None, Mapping[str, float]]] = []

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.points.append((step, dict(metrics)))


class SharedFolder(Remembers):
    """Has one folder for all runs, as the loggers of online services do."""

    name, version = "project", "run7"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = str(folder)

    @property
    def save_dir(self) -> str:
        return self._folder


def train(*loggers: Logger, module: LitSmall | None = None, **kwargs: Any) -> tuple[L.Trainer, STNCallback]:
    """Train on six batches in two epochs, with a record after every second batch."""
    torch.manual_seed(0)
    module = module or LitSmall()
    random_gates(module, 0.1)
    return fit(module, **{"logger": list(loggers), "log_every_n_steps": 2, **kwargs})


def events(folder: str) -> EventAccumulator:
    accumulator = EventAccumulator(folder, size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def from_tensorboard(logger: TensorBoardLogger, name: str) -> Curve:
    return [(point.step, point.value) for point in events(logger.log_dir).Scalars(f"stn/value/{name}")]


def from_csv(logger: CSVLogger, name: str) -> Curve:
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        cells = [(row["step"], row[f"stn/value/{name}"]) for row in csv.DictReader(file)]
    return [(int(step), float(value)) for step, value in cells if value]


def from_memory(logger: Remembers, name: str) -> Curve:
    tag = f"stn/value/{name}"
    return [(step, metrics[tag]) for step, metrics in logger.points if tag in metrics and step is not None]


def assert_same(curve: Curve, callback: STNCallback, name: str) -> None:
    rows = callback.schedule.rows
    assert [step for step, _ in curve] == [row.step for row in rows] == STEPS
    assert [value for _, value in curve] == pytest.approx([row.values[name] for row in rows], rel=1e-6)


def test_several_loggers_record_the_same_curve(tmp_path: Path) -> None:
    tensorboard, table = TensorBoardLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")
    memory = Remembers()
    _, callback = train(memory, table, tensorboard)
    assert callback.schedule.rows[-1].values != callback.schedule.rows[0].values
    for name in NAMES:
        for curve in (from_memory(memory, name), from_csv(table, name), from_tensorboard(tensorboard, name)):
            assert_same(curve, callback, name)


def test_schedule_is_written_to_the_first_logger_with_a_folder(tmp_path: Path) -> None:
    _, callback = train(Remembers(), CSVLogger(tmp_path, name="a"), TensorBoardLogger(tmp_path, name="b"))
    (path,) = tmp_path.rglob("schedule.json")
    assert path.relative_to(tmp_path) == Path("a/version_0/schedule.json")
    assert Schedule.load(path) == callback.schedule


def test_schedule_is_written_beside_the_checkpoints_if_all_runs_share_a_log_folder(tmp_path: Path) -> None:
    trainer, callback = train(SharedFolder(tmp_path), enable_checkpointing=True)
    (path,) = tmp_path.rglob("schedule.json")
    assert path.relative_to(tmp_path) == Path("project/run7/schedule.json")
    assert trainer.checkpoint_callback is not None
    assert path.parent == Path(trainer.checkpoint_callback.dirpath).parent  # type: ignore[attr-defined]
    assert Schedule.load(path) == callback.schedule


@pytest.mark.parametrize("logger", [False, [], Remembers()])
def test_run_without_a_log_folder_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: Any) -> None:
    monkeypatch.chdir(tmp_path)
    _, callback = train(logger=logger)
    assert [row.step for row in callback.schedule.rows] == STEPS
    assert list(tmp_path.iterdir()) == []


def test_schedule_is_written_to_the_default_logger(tmp_path: Path) -> None:
    trainer, callback = train(logger=True, default_root_dir=tmp_path)
    assert isinstance(trainer.logger, TensorBoardLogger)
    assert Schedule.load(tmp_path / "lightning_logs" / "version_0" / "schedule.json") == callback.schedule


def test_fast_dev_run_writes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(TensorBoardLogger(tmp_path), CSVLogger(tmp_path), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


class Logs(LitSmall):
    """Logs its training loss itself."""

    def training_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_loss(batch, batch_idx)
        self.log("own", loss)
        return loss


def test_metrics_logged_by_the_module_reach_the_logger(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer, _ = train(logger, module=Logs())
    scalars = events(logger.log_dir)
    assert len(scalars.Scalars("own")) == 3
    assert len(scalars.Scalars("val_loss")) == 2
    assert scalars.Scalars("val_loss")[-1].value == pytest.approx(trainer.callback_metrics["val_loss"].item())


def summary(logger: TensorBoardLogger) -> tuple[dict[str, Any], list[str]]:
    """Contents of TensorBoard's HPARAMS tab for a run: its hyperparameters, and the tags of its metrics."""
    written = events(logger.log_dir).PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(written[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(written[metadata.EXPERIMENT_TAG])
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    return values, [info.name.tag for info in experiment.metric_infos]


class LitChoice(LitSmall):
    def __init__(self) -> None:
        numbers = dict(LitSmall().hyperparameters.specifications)
        super().__init__({**numbers, "op": Categorical(["none", "mirror"], init="mirror")})

    def training_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        assert len(self.hyperparameters["op"]) == len(batch[0])
        return super().training_loss(batch, batch_idx)


def test_tensorboard_hparams_hold_initial_values_and_final_metrics(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    stn = STNCallback(2, 1, warmup=0, perturb="example", lr=0.05, seed=1)
    _, callback = train(logger, module=LitChoice(), callback=stn)
    starts, metrics = summary(logger)
    assert starts == {"stn/init/dropout": 0.05, "stn/init/noise": 0.1, "stn/init/length": 2, "stn/init/op": "mirror"}
    assert metrics == ["val_loss", "stn/valid_loss", "stn/train_loss", *(f"stn/value/{n}" for n in [*NAMES, "op"])]
    scalars = events(logger.log_dir)
    assert set(metrics) <= set(scalars.Tags()["scalars"])
    assert_same(from_tensorboard(logger, "dropout"), callback, "dropout")  # and no further points


class Saves(LitSmall):
    """Logs `hparams` and a metric itself, as Lightning's documentation shows."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()

    def on_train_start(self) -> None:
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(dict(self.hparams), {"own_metric": 0.0})


def test_hparams_logged_by_the_module_take_precedence(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
    train(logger, CSVLogger(tmp_path, name="table"), module=Saves())
    assert summary(logger) == ({"width": 3.0}, ["own_metric"])


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DIR", str(tmp_path)), ("CONSOLE", "off")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.chdir(tmp_path)
    yield module
    module.teardown()


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of an offline run's file: blocks of 32 KiB, made of parts with a header of 7 bytes each."""
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def from_wandb(folder: Path, name: str) -> Curve:
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("*.wandb")
    curve = []
    for data in wandb_records(path.read_bytes()):
        items = Record.FromString(data).history.item
        row = {item.key or "/".join(item.nested_key): item.value_json for item in items}
        if f"stn/value/{name}" in row:
            curve.append((int(row["trainer/global_step"]), float(row[f"stn/value/{name}"])))
    return curve


def test_wandb_records_the_curve_offline(tmp_path: Path, wandb: Any) -> None:
    logger = WandbLogger(project="digits", offline=True)
    table = CSVLogger(tmp_path, name="table")
    _, callback = train(logger, table)
    wandb.finish()
    for name in NAMES:
        assert_same(from_wandb(tmp_path, name), callback, name)
        assert_same(from_csv(table, name), callback, name)
    (path,) = tmp_path.rglob("schedule.json")
    assert path.relative_to(tmp_path) == Path("digits", str(logger.version), "schedule.json")
    assert Schedule.load(path) == callback.schedule
