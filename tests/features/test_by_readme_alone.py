"""Modules that know nothing of this package, with self-tuning in front of them as the README says, and no more."""

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from callback.test_resume import Stop, assert_same
from features.foreign_modules import BATCH, CASES, Case
from lightning.pytorch.callbacks import ModelCheckpoint
from support import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stn import ResumableLoader, STNCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
EPOCHS, BATCHES = 3, 6


class Rates(L.Callback):
    """The learning rate of every batch."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class Run(NamedTuple):
    """A tuned module after its training, and what the run left behind."""

    case: Case
    module: Any
    stn: STNCallback
    best: ModelCheckpoint
    rates: list[float]


def held_out(case: Case, seed: int = 2) -> DataLoader[Any]:
    return DataLoader(case.data(2 * BATCH, seed), BATCH, **case.settings)


def fit(case: Case, module: L.LightningModule, *callbacks: L.Callback, ckpt_path: str | None = None) -> list[float]:
    """Train; returns the learning rate of every batch."""
    rates = Rates()
    fitting = trainer(rates, *callbacks, max_epochs=EPOCHS, enable_checkpointing=len(callbacks) > 0)
    train_data = ResumableLoader(case.data(BATCHES * BATCH, seed=1), BATCH, **case.settings)
    fitting.fit(module, train_data, held_out(case), ckpt_path=ckpt_path)
    return rates.rates


def run(case: Case, folder: Path, *callbacks: L.Callback, seed: int = 0, ckpt_path: str | None = None) -> Run:
    """Train with the defaults of the README, and a checkpoint every four batches beside the best one."""
    L.seed_everything(seed, verbose=False)
    module = case.tuned(**case.arguments)
    stn, best = STNCallback(), ModelCheckpoint(folder, monitor="val_loss")
    last = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=0, save_last=True)
    return Run(case, module, stn, best, fit(case, module, stn, best, last, *callbacks, ckpt_path=ckpt_path))


WHOLE: dict[str, Run] = {}


@pytest.fixture(params=CASES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of each module that nothing interrupts; its tests share it, and leave it as it is."""
    if request.param not in WHOLE:
        WHOLE[request.param] = run(CASES[request.param], tmp_path_factory.mktemp("whole"))
    return WHOLE[request.param]


def outputs(module: Any, case: Case) -> Tensor:
    """Of `forward` in eval mode, for examples that no run has seen."""
    batch = next(iter(held_out(case, seed=7)))
    modes = {part: part.training for part in module.modules()}
    with torch.no_grad():
        logits: Tensor = module.eval()(batch if isinstance(batch, dict) else batch[0])
    for part, training in modes.items():
        part.training = training
    return logits


def test_foreign_module_tunes_its_hyperparameters_with_all_defaults(whole: Run) -> None:
    rows = whole.stn.schedule.rows
    assert rows[0].values.keys() == whole.case.hyperparameters
    assert all(value != rows[-1].values[name] for name, value in rows[0].values.items())
    assert whole.module.trainer.global_step == EPOCHS * BATCHES


def test_foreign_module_logs_its_own_metrics(whole: Run) -> None:
    assert whole.module.trainer.callback_metrics.keys() >= whole.case.metrics


def test_scheduler_of_a_foreign_module_steps_as_in_a_plain_run(whole: Run) -> None:
    plain = whole.case.plain(**whole.case.arguments)
    rates = fit(whole.case, plain)
    for module in (whole.module, plain):
        (config,) = module.trainer.lr_scheduler_configs
        assert config.scheduler.last_epoch == whole.case.scheduler_steps
    assert len(set(whole.rates)) > 1
    if not config.reduce_on_plateau:  # which follows the losses of its run
        assert whole.rates == rates


def test_foreign_module_cut_off_within_an_epoch_resumes_bit_for_bit(whole: Run, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="interrupted"):
        run(whole.case, tmp_path, Stop(10, kill=False))
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == BATCHES + 2
    resumed = run(whole.case, tmp_path, seed=99, ckpt_path="last")
    assert len(resumed.rates) == len(whole.rates) - BATCHES - 2
    assert_same(resumed.module, resumed.stn, whole.module, whole.stn)
    assert resumed.stn.schedule == whole.stn.schedule
    assert torch.equal(outputs(resumed.module, whole.case), outputs(whole.module, whole.case))


def test_checkpoint_of_a_tuned_foreign_module_loads_with_its_arguments(whole: Run, tmp_path: Path) -> None:
    path = tmp_path / "end.ckpt"
    whole.module.trainer.save_checkpoint(path)
    loaded = whole.case.tuned.load_from_checkpoint(path)
    assert torch.equal(outputs(loaded, whole.case), outputs(whole.module, whole.case))
    assert loaded.hyperparameters.values() == whole.stn.schedule.final
    assert loaded.hparams == whole.case.plain(**whole.case.arguments).hparams
    assert loaded.hparams.items() >= whole.case.arguments.items()


def test_best_checkpoint_of_a_tuned_foreign_module_validates_and_tests(whole: Run) -> None:
    assert whole.best.best_model_score is not None
    loaded = whole.case.tuned.load_from_checkpoint(whole.best.best_model_path)
    (validated,) = trainer().validate(loaded, held_out(whole.case), verbose=False)
    assert validated["val_loss"] == pytest.approx(whole.best.best_model_score.item(), rel=1e-6)
    (tested,) = trainer().test(loaded, held_out(whole.case, seed=3), verbose=False)
    assert tested.keys() == whole.case.test_metrics


def test_export_of_a_tuned_foreign_module_is_plain_and_computes_the_same(whole: Run) -> None:
    exported = {part: whole.module.export(getattr(whole.module, part)) for part in whole.case.parts}
    kinds = {type(layer) for net in exported.values() for layer in net.modules()}
    assert {kind.__module__.partition(".")[0] for kind in kinds} <= {"torch", "torchvision"}
    with_weights, with_networks = (whole.case.plain(**whole.case.arguments) for _ in range(2))
    for part, net in exported.items():
        assert type(net) is type(getattr(with_weights, part))
        getattr(with_weights, part).load_state_dict(net.state_dict())
        setattr(with_networks, part, net)
    for plain in (with_weights, with_networks):
        torch.testing.assert_close(outputs(plain, whole.case), outputs(whole.module, whole.case))
    rates = [layer.p for layer in with_networks.modules() if isinstance(layer, nn.Dropout)]
    assert rates
    assert all(rate in map(pytest.approx, whole.stn.schedule.final.values()) for rate in rates)
