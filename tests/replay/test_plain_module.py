"""Regularisers and augmentations of a plain LightningModule that name hyperparameters."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from replay.cases import KINDS, Named, Plain, Watch, fit, recorded
from support import loader, trainer
from torch import nn

from lightning_stn import Float, Gaussian, Schedule, ScheduleReplay, WeightStep, export, regularizers
from lightning_stn.augment import Cutout, GaussianNoise
from lightning_stn.binding import BoundModule
from lightning_stn.schedule import Row


def losses(module: Plain, *args: Any, **kwargs: Any) -> list[float]:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.3, 0.3)
    fit(module, *args, **kwargs)
    return [float(loss) for loss in module.losses]


class Constant(Plain):
    def __init__(self) -> None:
        super().__init__(regularizers.Dropout(0.3))
        self.cutout = Cutout(2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((self.cutout(batch[0]), batch[1]), batch_idx)


def test_replayed_constants_train_as_regularisers_with_these_constants() -> None:
    nothing = ScheduleReplay({"unused": 0.0}, attributes={"unused": "unused"})
    constant = Constant()
    constant.unused = 1.0
    expected = losses(constant, nothing)
    assert losses(Named(), ScheduleReplay({"dropout": 0.3, "length": 2})) == expected
    assert losses(Named(), ScheduleReplay({"dropout": 0.31, "length": 2})) != expected


def test_regularisers_have_the_values_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = recorded(6)
    seen = []

    def read(module: Named) -> Any:
        hyperparameters = module.cutout.hyperparameters
        assert hyperparameters is not None
        seen.append({name: hyperparameters[name] for name in ("dropout", "length")})

    fit(Named(), ScheduleReplay(schedule), Watch(read))
    for values, row in zip(seen, schedule.rows, strict=False):
        assert {name: value.dtype for name, value in values.items()} == {
            "dropout": torch.float32,
            "length": torch.int64,
        }
        assert torch.equal(values["dropout"], torch.tensor(row.values["dropout"]))
        assert values["length"] == row.values["length"]


def test_module_gets_neither_parameters_nor_state_and_is_detached_after_the_run() -> None:
    module = Named()
    before = list(module.state_dict()), [id(parameter) for parameter in module.parameters()], attributes(module)
    fit(module, ScheduleReplay(recorded(6)))
    assert (list(module.state_dict()), [id(p) for p in module.parameters()], attributes(module)) == before
    assert all(part.hyperparameters is None for part in module.modules() if isinstance(part, BoundModule))
    module.train()
    with pytest.raises(RuntimeError, match="belongs to no HyperparameterSet"):
        module.cutout(torch.zeros(1, 1, 6, 6))


def attributes(module: nn.Module) -> set[str]:
    return set(vars(module)) - {"_hparams"}  # which Lightning makes when it is asked for


class Fails(Named):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise KeyError("interrupted")


def test_module_is_detached_and_trains_again_after_an_exception() -> None:
    module = Fails()
    before = attributes(module)
    with pytest.raises(KeyError, match="interrupted"):
        fit(module, ScheduleReplay(recorded(6)))
    assert module.training
    assert attributes(module) == before
    assert all(part.hyperparameters is None for part in module.modules() if isinstance(part, BoundModule))


class Sees(Named):
    """Compares outputs of the network in training and evaluation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert torch.equal(self.cutout(batch[0]), batch[0])
        assert torch.equal(self.net(batch[0]), self.net(batch[0]))

    test_step = validation_step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert not torch.equal(self.net(batch[0]), self.net(batch[0]))
        return super().training_step(batch, batch_idx)


def test_regularisers_act_in_training_alone() -> None:
    replay, module = ScheduleReplay({"dropout": 0.5, "length": 3}), Sees()
    run = fit(module, replay, num_sanity_val_steps=1)
    run.validate(module, loader(16, seed=1), verbose=False)
    run.test(module, loader(16, seed=1), verbose=False)


class InTransfer(Plain):
    """Augments where Lightning moves a batch to its device, before the training step."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = GaussianNoise("noise")
        self.changed: list[bool] = []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            x = self.noise(batch[0])
            self.changed.append(not torch.equal(x, batch[0]))
            return x, batch[1]
        return batch


def test_augmentation_acts_in_the_transfer_hook() -> None:
    module = InTransfer()
    fit(module, ScheduleReplay({"noise": 0.3}))
    assert module.changed == [True] * 6


class Late(Plain):
    """Builds its network in the last hook before the strategy wraps it."""

    def configure_model(self) -> None:
        self.net.insert(3, regularizers.Dropout("dropout"))


def test_regularisers_built_in_configure_model_are_attached() -> None:
    module = Late()
    fit(module, ScheduleReplay({"dropout": 0.5}))
    assert losses(Late(), ScheduleReplay({"dropout": 0.5})) != losses(Late(), ScheduleReplay({"dropout": 0.0}))


class ByHand(Named):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Automatic(Named):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_module_that_optimises_by_hand_trains_as_one_that_does_not() -> None:
    assert losses(ByHand(), ScheduleReplay(recorded(6))) == losses(Automatic(), ScheduleReplay(recorded(6)))


def test_every_unknown_name_is_listed_before_training() -> None:
    class Unknown(Named):
        def __init__(self) -> None:
            super().__init__()
            self.noise = GaussianNoise("noize")

    module = Unknown()
    with pytest.raises(
        ValueError,
        match=r"(?s)Dropout 'net.3' reads the hyperparameter 'dropout'.*GaussianNoise 'noise' reads.*'noize'",
    ):
        fit(module, ScheduleReplay({"length": 2}))
    assert not module.losses


def test_range_that_a_strength_cannot_have_is_refused() -> None:
    wide = Schedule({"dropout": Float(0.0, None, init=0.3), "length": KINDS["length"]})
    wide.append(Row(0, 0, {"dropout": 0.3, "length": 1}, {"dropout": 0.5, "length": 0.5}))
    with pytest.raises(ValueError, match=r"expected p in \[0, 1\], but the hyperparameter 'dropout'"):
        fit(Named(), ScheduleReplay(wide))


@pytest.mark.parametrize("value", [1.5, "high"])
def test_constant_that_a_strength_cannot_have_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"'dropout'"):
        fit(Named(), ScheduleReplay({"dropout": value, "length": 1}))


def test_noise_around_constants_without_ranges_is_refused_before_training() -> None:
    module = Named()
    with pytest.raises(ValueError, match=r"expected ranges for noise"):
        fit(module, ScheduleReplay({"dropout": 0.3, "length": 1}, noise=Gaussian(0.3)))
    assert not module.losses


def test_weight_step_is_refused_for_a_module_without_manual_optimisation() -> None:
    with pytest.raises(ValueError, match=r"expected weight_step for an STNModule in manual optimisation alone"):
        fit(Named(), ScheduleReplay(recorded(), weight_step=WeightStep(gradient_clip_val=1.0)))


def test_learning_rate_finder_trains_at_the_first_values() -> None:
    class Tuned(Automatic):
        lr = 0.01

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    replay, module = ScheduleReplay(recorded(6)), Tuned()
    run = trainer(replay, enable_checkpointing=True)
    Tuner(run).lr_find(module, loader(24), loader(16, seed=1), num_training=5)
    assert len(module.losses) == 5


def test_network_is_exported_while_attached() -> None:
    class Exports(L.Callback):
        net: nn.Module

        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.net = export(pl_module.net)

    exports = Exports()
    fit(Named(), ScheduleReplay(recorded(6)), exports)
    dropout = exports.net[3]
    assert type(dropout) is nn.Dropout
    assert dropout.p == pytest.approx(recorded(6).final["dropout"])
