"""Observers of a run: learning-rate monitor, progress bars, device statistics, profilers."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from features.runs import MODES, Traced, callback, train
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from support import LitSmall, loader, trainer
from torch.optim import lr_scheduler

from lightning_stn import Scales

SECTION = "[STNCallback]hyperparameter_step"


def logged(folder: Path, column: str) -> dict[int, float]:
    """A column of the only metrics file below a folder, by step."""
    (file,) = folder.rglob("metrics.csv")
    with open(file, newline="") as lines:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(lines) if row.get(column)}


@pytest.mark.parametrize("automatic", MODES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_learning_rates_of_weights_hyperparameters_and_scales_are_logged(
    tmp_path: Path, interval: str, first: bool, automatic: bool
) -> None:
    """For either order of the two callbacks."""

    def configure(optimizer: Any) -> Any:
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    module, monitor = Traced(automatic, configure), LearningRateMonitor(interval)
    stn = callback(anneal=False, scales=Scales(tune=True, lr=0.02))
    callbacks = [monitor, stn] if first else [stn, monitor]
    run = trainer(*callbacks, max_epochs=4, logger=CSVLogger(tmp_path))
    run.fit(module, loader(40), loader(16, seed=1))
    rates = module.rates if interval == "step" else module.rates[::5]
    assert len(set(rates)) > 2
    assert list(logged(tmp_path, "lr-Steps").values()) == pytest.approx(rates)
    steps = range(0, 21)
    assert logged(tmp_path, "stn/lr") == dict.fromkeys(steps, 0.05)
    assert logged(tmp_path, "stn/scale_lr") == dict.fromkeys(steps, 0.02)


def test_default_learning_rate_is_logged(tmp_path: Path) -> None:
    module = LitSmall()
    train(module, stn=callback(lr=None, anneal=False), max_epochs=2, logger=CSVLogger(tmp_path))
    assert set(logged(tmp_path, "stn/lr").values()) == {0.1}
    assert logged(tmp_path, "stn/scale_lr") == {}


def test_tqdm_progress_bar_shows_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    module = LitSmall()
    train(module, TQDMProgressBar(refresh_rate=1), enable_progress_bar=True)
    last = capsys.readouterr().out[-300:]
    for name, value in module.hyperparameters.values().items():
        text = str(value) if isinstance(value, int) else f"{value:#.3g}"
        assert f"{name}={text}"[: len(name) + 6] in last


def test_rich_progress_bar_shows_the_values() -> None:
    pytest.importorskip("rich")
    screen = io.StringIO()
    bar = RichProgressBar(refresh_rate=1, console_kwargs={"file": screen, "force_terminal": True, "width": 250})
    module = LitSmall()
    train(module, bar, enable_progress_bar=True)
    last = screen.getvalue()[-3000:]
    for name, value in module.hyperparameters.values().items():
        assert f"{name}: {float(value):.3f}" in last


def test_device_statistics_are_logged_beside_the_hyperparameters(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    train(LitSmall(), DeviceStatsMonitor(cpu_stats=True), max_epochs=1, logger=CSVLogger(tmp_path))
    (file,) = tmp_path.rglob("metrics.csv")
    columns = file.read_text().splitlines()[0].split(",")
    for hook in ("on_train_batch_start", "on_train_batch_end"):
        assert f"DeviceStatsMonitor.{hook}/cpu_percent" in columns
    assert "stn/value/dropout" in columns


@pytest.mark.parametrize("automatic", MODES)
def test_simple_profiler_has_a_section_for_the_hyperparameter_step(tmp_path: Path, automatic: bool) -> None:
    module, profiler = Traced(automatic), SimpleProfiler(dirpath=tmp_path, filename="profile")
    run = train(module, max_epochs=2, profiler=profiler)
    durations = profiler.recorded_durations
    assert len(durations[SECTION]) == module.events.count("hyperparameter") == 5
    assert all(duration > 0 for duration in durations[SECTION])
    whole = durations["[Callback]STNCallback.on_train_batch_end"]
    assert sum(durations[SECTION]) < sum(whole)
    assert len(whole) == 10
    weight_steps = "[LightningModule]Traced.optimizer_step" if automatic else "optimizer_step"
    assert len(durations[weight_steps]) == run.global_step == 10
    assert SECTION in (tmp_path / "fit-profile.txt").read_text()


def test_advanced_profiler_has_a_section_for_the_hyperparameter_step(tmp_path: Path) -> None:
    train(LitSmall(), max_epochs=1, profiler=AdvancedProfiler(dirpath=tmp_path, filename="profile"))
    _, _, section = (tmp_path / "fit-profile.txt").read_text().partition(SECTION)
    assert "hyperparameter_phase.py" in section
