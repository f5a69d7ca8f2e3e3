"""Arguments of the Trainer that set the order of a run, in manual and in automatic optimisation."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from features.runs import MODES, Traced, assert_equal_weights, callback, in_both_modes, train
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from support import images, lightning_before, loader, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import Schedule

SHORT = {"weight": "w", "hyperparameter": "h", "evaluation": "v"}


def story(module: Traced) -> str:
    """Order of the losses, one letter each: weight, hyperparameter, validation loop."""
    return "".join(SHORT[event] for event in module.events)


@pytest.mark.parametrize("automatic", MODES)
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"fast_dev_run": 2}, "whwhvv"),
        ({"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 1}, "wwhwv"),
        ({"max_epochs": 2, "limit_train_batches": 0.4, "limit_val_batches": 0.5}, "wwhvwwhv"),
        ({"max_epochs": 1, "val_check_interval": 2}, "wwhvvwwhvvw"),
        ({"max_epochs": 1, "val_check_interval": 0.4, "limit_val_batches": 1}, "wwhvwwhvw"),
        (
            {"max_epochs": 2, "val_check_interval": 4, "check_val_every_n_epoch": None, "limit_val_batches": 1},
            "wwhwwhvwwhwwhvwwh",
        ),
        ({"max_epochs": 2, "check_val_every_n_epoch": 2}, "wwhwwhwwhwwhwwhvv"),
        ({"max_epochs": 1, "num_sanity_val_steps": 2}, "vvwwhwwhwvv"),
        ({"max_epochs": -1, "max_steps": 3, "limit_val_batches": 1}, "wwhw"),
        ({"max_epochs": -1, "max_steps": 3, "accumulate_grad_batches": 2, "limit_val_batches": 1}, "wwhwwhwv"),
        ({"max_epochs": 1, "overfit_batches": 2}, "wwhvv"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_trainer_flags_give_the_expected_order_of_losses(
    settings: dict[str, Any], expected: str, automatic: bool
) -> None:
    module = Traced(automatic)
    train(module, **settings)
    assert story(module) == expected


def test_fast_dev_run_writes_no_csv_files(tmp_path: Path) -> None:
    train(Traced(), fast_dev_run=1, logger=CSVLogger(tmp_path), default_root_dir=tmp_path)
    assert list(tmp_path.rglob("*.csv")) == []


@pytest.mark.parametrize("automatic", MODES)
def test_sanity_steps_do_not_change_the_run(automatic: bool) -> None:
    modules = []
    for steps in (0, 2):
        L.seed_everything(3, verbose=False)
        modules.append(Traced(automatic))
        train(modules[-1], num_sanity_val_steps=steps)
    assert story(modules[1]) == "vv" + story(modules[0])
    assert_equal_weights(*modules)


def test_limit_val_batches_does_not_limit_tuning() -> None:
    """With one validation batch, and with `overfit_batches=1`."""
    seen: dict[str, set[float]] = {}

    class Watch(Traced):
        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            kind = "tuning" if torch.is_grad_enabled() else "validation"
            seen.setdefault(kind, set()).update(batch[0].sum((1, 2, 3)).tolist())
            return super().validation_loss(batch, batch_idx)

    for settings in ({"limit_val_batches": 1}, {"overfit_batches": 1}):
        seen.clear()
        train(Watch(), **settings, max_epochs=10)
        assert (len(seen["tuning"]), len(seen["validation"])) == (16, 8)


@pytest.mark.parametrize("automatic", MODES)
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_overfit_batches_repeats_the_same_batches(automatic: bool) -> None:
    seen = []

    class Watch(Traced):
        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch[0].sum().item())
            return super().training_loss(batch, batch_idx)

    run = trainer(callback(), overfit_batches=2, max_epochs=3)
    run.fit(Watch(automatic), loader(40, shuffle=True), loader(16, seed=1))
    assert len(seen) == 6
    assert seen[:2] == seen[2:4] == seen[4:]


class Numbered(L.LightningDataModule):
    """Fills the images of every loader with the number of times that it was built."""

    def __init__(self, tuning: bool) -> None:
        super().__init__()
        self.calls = {"train": 0, "val": 0, "tuning": 0}
        if tuning:
            self.tuning_dataloader = lambda: self.numbered("tuning", 16)

    def numbered(self, kind: str, n: int) -> Any:
        self.calls[kind] += 1
        return DataLoader(TensorDataset(images(n)[:][0] * 0 + self.calls[kind], images(n)[:][1]), batch_size=8)

    def train_dataloader(self) -> Any:
        return self.numbered("train", 32)

    def val_dataloader(self) -> Any:
        return self.numbered("val", 16)


@pytest.mark.parametrize("tuning", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_validation_stream_follows_reloaded_loaders(every: int, tuning: bool) -> None:
    seen: dict[str, list[set[int]]] = {kind: [set() for _ in range(4)] for kind in ("train", "val", "tuning")}

    class Watch(Traced):
        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            seen["train"][self.current_epoch].add(int(batch[0].mean()))
            return super().training_loss((batch[0] * 0, batch[1]), batch_idx)

        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            kind = "tuning" if torch.is_grad_enabled() else "val"
            seen[kind][self.current_epoch].add(int(batch[0].mean()))
            return super().validation_loss((batch[0] * 0, batch[1]), batch_idx)

    data = Numbered(tuning)
    run = trainer(callback(), max_epochs=4, reload_dataloaders_every_n_epochs=every)
    run.fit(Watch(), datamodule=data)
    expected = [{1 + epoch // every} for epoch in range(4)]
    assert seen == {"train": expected, "val": expected, "tuning": expected}
    assert data.calls["val"] == 4 // every


@pytest.mark.parametrize("automatic", MODES)
def test_early_stopping_waits_for_min_epochs(automatic: bool) -> None:
    """The criterion is satisfied after the second epoch."""
    stopped = {}
    for least in (None, 4):
        module = Traced(automatic)
        stop = EarlyStopping("val_loss", min_delta=100.0, patience=1)
        run = train(module, stop, max_epochs=9, min_epochs=least)
        assert stop.wait_count >= 1
        stopped[least] = run.current_epoch
        assert module.hyperparameters.current_pass.sample is None
    assert stopped == {None: 2, 4: 4}


@pytest.mark.parametrize("automatic", MODES)
def test_early_stopping_can_monitor_a_hyperparameter(automatic: bool) -> None:
    class Logs(Traced):
        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("dropout", self.hyperparameters["dropout"])
            return super().validation_loss(batch, batch_idx)

    module = Logs(automatic)
    start = module.hyperparameters.values()["dropout"]
    stop = EarlyStopping("dropout", mode="max", stopping_threshold=start + 0.01, patience=10**6)
    down = EarlyStopping("dropout", mode="min", stopping_threshold=start - 0.01, patience=10**6)
    run = train(module, stop, down, max_epochs=60)
    assert 1 < run.current_epoch < 60
    assert abs(module.hyperparameters.values()["dropout"] - start) > 0.01


@pytest.mark.parametrize("automatic", MODES)
@pytest.mark.parametrize("how", ["max_time", "timer", "timer by epoch"])
def test_run_stops_when_its_time_is_up(tmp_path: Path, how: str, automatic: bool) -> None:
    L.seed_everything(3, verbose=False)
    module, stn = Traced(automatic, lambda o: torch.optim.Adam(o.param_groups[0]["params"], lr=1e-3)), callback(lr=1e-3)
    limit = timedelta(seconds=0.4)
    timer = Timer(limit, interval="epoch" if "epoch" in how else "step")
    callbacks, settings = ([], {"max_time": limit}) if how == "max_time" else ([timer], {})
    run = train(module, *callbacks, stn=stn, max_epochs=10**6, logger=CSVLogger(tmp_path, version=0), **settings)  # type: ignore[arg-type]
    batches = module.events.count("weight")
    assert 0 < batches < 10**4
    assert module.events.count("hyperparameter") == batches // 2
    if "epoch" in how:
        assert batches % 5 == 0
    if callbacks:
        assert timer.time_elapsed("train") >= limit.total_seconds()
    (written,) = Path(run.log_dir or "").glob("schedule.json")
    assert Schedule.load(written) == stn.schedule
    assert stn.schedule.rows[-1].step == batches


class Spoiled(Traced):
    """One of its losses is finite but has a gradient of NaN."""

    def __init__(self, automatic: bool, phase: str) -> None:
        super().__init__(automatic)
        self.phase = phase

    def spoil(self, loss: Tensor, phase: str) -> Tensor:
        return loss + (loss - loss).sqrt() * 0 if phase == self.phase and torch.is_grad_enabled() else loss

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return self.spoil(super().training_loss(batch, batch_idx), "weight")

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return self.spoil(super().validation_loss(batch, batch_idx), "hyperparameter")


@pytest.mark.parametrize("automatic", MODES)
@pytest.mark.parametrize("phase", ["weight", "hyperparameter"])
@pytest.mark.filterwarnings("ignore:Error detected in")
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_detect_anomaly_covers_both_phases(phase: str, automatic: bool) -> None:
    module = Spoiled(automatic, phase)
    with pytest.raises(RuntimeError, match="returned nan values"):
        train(module, detect_anomaly=True)
    assert story(module) == {"weight": "w", "hyperparameter": "wwh"}[phase]


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Restore torch's defaults: Lightning enables deterministic algorithms for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("automatic", MODES)
def test_deterministic_algorithms_are_on_in_both_phases(automatic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Lightning would set it and never unset it.
    seen = []

    class Watch(Traced):
        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().training_loss(batch, batch_idx)

        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().validation_loss(batch, batch_idx)

    modules = []
    for _ in range(2):
        L.seed_everything(3, verbose=False)
        modules.append(Watch(automatic))
        train(modules[-1], deterministic=True)
    assert len(seen) > 20
    assert all(seen)
    assert_equal_weights(*modules)


class Tunable(Traced):
    """Has a learning rate and a batch size that the Tuner may set."""

    def __init__(self, automatic: bool) -> None:
        super().__init__(automatic)
        self.lr = 1e-5
        self.batch_size = 2
        self.sizes: list[int] = []

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        self.sizes.append(len(batch[1]))
        assert len(self.hyperparameters.bound_sample()) == len(batch[1])
        return super().training_loss(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return loader(64, self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(16, seed=1)


BY_CALLBACK = pytest.param(
    "callback",
    marks=pytest.mark.skipif(lightning_before("2.5.4"), reason="Lightning does not undo the search"),
)


@pytest.mark.parametrize("automatic", MODES)
@pytest.mark.parametrize("how", ["tuner", BY_CALLBACK])
def test_learning_rate_search_does_not_change_the_run_after_it(tmp_path: Path, how: str, automatic: bool) -> None:
    """Lightning removes the callbacks for the search; the run after it starts from the initial state."""
    L.seed_everything(3, verbose=False)
    module = Tunable(automatic)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    # How the method counts the response:
    before |= {"hyperparameters.centred": torch.tensor(True), "hyperparameters.gate_scale": torch.tensor(0.5)}
    stn, settings = callback(perturb="example"), {"num_training_steps": 25, "max_lr": 1.0, "early_stop_threshold": None}
    finder = LearningRateFinder(**settings)  # type: ignore[arg-type]
    at_start: list[Any] = []

    class Start(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            at_start.append({key: value.clone() for key, value in module.state_dict().items()})
            assert set(module.events) == {"weight"}
            module.events.clear()

    run = trainer(stn, Start(), *([finder] if how == "callback" else []), max_epochs=1, default_root_dir=tmp_path)
    if how == "tuner":
        found = Tuner(run).lr_find(module, num_training=settings.pop("num_training_steps"), **settings)  # type: ignore[arg-type]
    run.fit(module)
    if how == "callback":
        found = finder.optimal_lr
    assert found is not None
    rates = found.results["lr"]
    assert rates[0] == pytest.approx(1e-8)
    assert rates == sorted(rates)
    assert rates[-1] > 0.1
    assert module.lr == found.suggestion() != 1e-5
    assert all(torch.equal(value, before[key]) for key, value in at_start[0].items())
    assert story(module) == "wwh" * 16 + "vv"
    assert run.optimizers[0].param_groups[0]["lr"] == module.lr
    assert [row.step for row in stn.schedule.rows] == list(range(33))


@pytest.mark.parametrize("automatic", MODES)
def test_the_tuner_finds_a_batch_size(tmp_path: Path, automatic: bool) -> None:
    module = Tunable(automatic)
    run = trainer(callback(perturb="example"), max_epochs=1, default_root_dir=tmp_path)
    size = Tuner(run).scale_batch_size(module, steps_per_trial=2, max_trials=3)
    assert size == module.batch_size == (16 if lightning_before("2.6") else 8)  # the next size, or the last one tried
    assert set(module.events) == {"weight"}
    assert {2, 4} <= set(module.sizes)
    module.events.clear()
    run.fit(module)
    assert story(module) == "wwh" * (32 // size) + "vv"


def test_skipped_rest_of_an_epoch_leaves_no_sample_bound() -> None:
    """`on_train_batch_start` may return -1 to skip the rest of the epoch."""

    class Skips(Traced):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 2 else None

    for module in in_both_modes(kind=Skips):
        assert story(module) == "wwh" * 2
        assert module.hyperparameters.current_pass.sample is None
