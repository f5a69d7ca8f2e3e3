"""An analysis leaves no trace in the module, its Trainer and the random generators, also where it raises."""

import random
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from analysis.networks import LitMlp, batches
from support import LitSmall, fit, loader, trainer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_stn import STNCallback
from lightning_stn.analysis import importance, response_fit, sweep, sweep_pair

DATA = batches(4, 4, 3)
SHUFFLED = DataLoader(TensorDataset(*(torch.cat(column) for column in zip(*DATA, strict=True))), 4, shuffle=True)

ANALYSES = {
    "sweep": lambda module: sweep(module, SHUFFLED, points=3),
    "sweep_pair": lambda module: sweep_pair(module, SHUFFLED, ("rate", "noise"), points=2),
    "importance": lambda module: importance(module, SHUFFLED, points=2),
    "response_fit": lambda module: response_fit(module, SHUFFLED, SHUFFLED, "rate", steps=4),
}
every_analysis = pytest.mark.parametrize("analyse", ANALYSES.values(), ids=ANALYSES)


class LitWatched(LitMlp):
    """Counts with a metric, draws from every generator, and raises in the evaluation `raises`."""

    raises = -1

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.evaluations = 0

    def validation_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.mean.update(random.random() + numpy.random.rand() + torch.rand(()))
        self.evaluations += 1
        if self.evaluations == self.raises:
            raise ZeroDivisionError
        assert not self.training
        return super().validation_loss(batch, batch_idx)


def traces(module: LitWatched) -> list[Any]:
    """All that an analysis must not change, as values that can be compared."""
    hyperparameters = module.hyperparameters
    state = [*module.state_dict().values(), hyperparameters.unconstrained, module.mean.mean_value, module.mean.weight]
    modes = [inner.training for inner in module.modules()]
    generators = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    runs = (id(hyperparameters.current_pass), module.runs_for, hyperparameters.centred, torch.is_grad_enabled())
    grads = [parameter.grad for parameter in module.parameters()]
    return [[tensor.tolist() for tensor in state], modes, generators, runs, grads]


@every_analysis
@pytest.mark.parametrize("raises", [-1, 1, 5], ids=["to the end", "first evaluation raises", "fifth evaluation raises"])
def test_analysis_leaves_module_and_generators_as_they_were(analyse, raises):
    module = LitWatched()
    module.raises = raises
    module.train()
    module.net[1].eval()
    before = traces(module)
    if raises < 0:
        analyse(module)
        assert module.evaluations > 5
    else:
        with pytest.raises(ZeroDivisionError):
            analyse(module)
    assert traces(module) == before


@every_analysis
def test_analysis_of_a_shuffled_loader_gives_the_same_twice(analyse):
    module = LitMlp()
    assert str(analyse(module)) == str(analyse(module))


def test_sweep_after_a_fit_starts_from_the_validation_loss_of_the_trainer():
    module = LitSmall()
    run, _ = fit(module)
    data = loader(20, seed=1)
    (metrics,) = run.validate(module, data, verbose=False)
    modes = [inner.training for inner in module.modules()]
    assert module.sweep(data, points=2).loss == pytest.approx(metrics["val_loss"], rel=1e-5)
    assert [inner.training for inner in module.modules()] == modes


class LitDoubling(LitSmall):
    """Doubles inputs on the device while the Trainer trains, as augmentation in this hook does."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (2 * batch[0], batch[1]) if self.trainer.training else batch


class SweepsWhileTraining(L.Callback):
    """Sweeps at the end of every training epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        loss = pl_module.sweep(loader(16, seed=1), points=3).loss
        assert loss == pytest.approx(trainer.callback_metrics["val_loss"].item(), rel=1e-5)
        assert trainer.training


def test_sweep_within_a_fit_evaluates_as_validation_does_and_does_not_change_the_run():
    ends = []
    for callbacks in ([], [SweepsWhileTraining()]):
        torch.manual_seed(0)
        module = LitDoubling()
        stn = STNCallback(train_steps=2, valid_steps=1, warmup=0, lr=0.05, seed=1)
        trainer(stn, *callbacks).fit(module, loader(24), loader(16, seed=1))
        ends.append(module.state_dict())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_batches_of_copies_that_train_pass_through_the_hooks_of_training():
    class LitRecording(LitDoubling):
        def training_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append(batch[0])
            return super().training_loss(batch, batch_idx)

    module, seen = LitRecording(), []
    fit(module)
    seen.clear()
    response_fit(module, loader(24), loader(16, seed=1), "noise", steps=1)
    (inputs, _), *_ = loader(24)
    assert len(seen) == 3
    torch.testing.assert_close(seen[0], 2 * inputs)
    assert not module.trainer.training


class Doubling(L.LightningDataModule):
    """Doubles the inputs of every batch once it is on the device."""

    def train_dataloader(self) -> Any:
        return loader(24)

    def val_dataloader(self) -> Any:
        return loader(16, seed=1)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return 2 * batch[0], batch[1]


def test_batches_pass_through_the_hooks_of_the_datamodule():
    module, data = LitSmall(), Doubling()
    run = trainer(STNCallback(train_steps=2, valid_steps=1, warmup=0, lr=0.05, seed=1))
    run.fit(module, datamodule=data)
    (metrics,) = run.validate(module, datamodule=data, verbose=False)
    assert module.sweep(data.val_dataloader(), points=2).loss == pytest.approx(metrics["val_loss"], rel=1e-5)
    found = response_fit(module, loader(24), data.val_dataloader(), "noise", steps=3)
    assert found.loss == pytest.approx(metrics["val_loss"], rel=1e-5)
