"""An `STNModule` that trains at replayed values, without response and perturbation."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import FSDPStrategy
from replay.cases import Plain, Watch, fit, recorded
from strategies.test_strategies import Disguise
from support import CLASSES, LitSmall, loader, random_gates, response_layers, trainer
from torch import Tensor, nn

from lightning_stn import Float, Gaussian, Integer, ScheduleReplay, STNCallback, STNModule, WeightStep, regularizers
from lightning_stn.augment import Cutout

KINDS = {"dropout": Float(0.0, 0.9, init=0.05), "length": Integer(0, 4, init=0)}


def net(dropout: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), dropout, nn.Linear(12, CLASSES)
    )


class Tuned(STNModule):
    """A converted network, and an augmentation."""

    automatic = False

    def __init__(self) -> None:
        super().__init__(hyperparameters=KINDS)
        self.automatic_optimization = self.automatic
        self.cutout = Cutout("length")
        torch.manual_seed(5)
        self.net = net(nn.Dropout(0.5))
        self.build()
        self.losses: list[Tensor] = []

    def build(self) -> None:
        self.net = self.convert(self.net, dropout="dropout")

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(self.cutout(batch[0])), batch[1])
        self.losses.append(loss.detach())
        return loss

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return optimizers(self.parameters())


def optimizers(parameters: Iterable[nn.Parameter]) -> Any:
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Constant(Plain):
    """The plain network at constants; Lightning takes its steps."""

    def __init__(self, dropout: float, length: int) -> None:
        super().__init__()
        self.cutout = Cutout(length)
        torch.manual_seed(5)
        self.net = net(regularizers.Dropout(dropout))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((self.cutout(batch[0]), batch[1]), batch_idx)

    def configure_optimizers(self) -> Any:
        return optimizers(self.parameters())


class Automatic(Tuned):
    automatic = True


class Late(Tuned):
    """Converts in the last hook before the strategy wraps the module."""

    def build(self) -> None:
        pass

    def configure_model(self) -> None:
        super().build()


class InSetup(Tuned):
    """Converts in the hook that follows those of the callbacks."""

    def build(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        super().build()


def base_weights(module: STNModule) -> dict[str, Tensor]:
    return {
        name: value for name, value in module.net.state_dict().items() if "response" not in name and "gate" not in name
    }


class Seed(L.Callback):
    """Seeds behind everything that draws while a module is built."""

    def on_train_start(self, *_: Any) -> None:
        torch.manual_seed(7)


def train_plain(dropout: float, length: int, **kwargs: Any) -> Constant:
    plain = Constant(dropout, length)
    trainer(Seed(), **kwargs).fit(plain, loader(24), loader(16, seed=1))
    return plain


@pytest.mark.parametrize("kind", [Tuned, Automatic, Late, InSetup])
def test_module_with_silent_gates_trains_bit_for_bit_as_the_plain_network(kind: type[Tuned]) -> None:
    plain, tuned = train_plain(0.3, 2), kind()
    fit(tuned, ScheduleReplay({"dropout": 0.3, "length": 2}), Seed())
    torch.testing.assert_close(tuned.losses, plain.losses, rtol=0, atol=0)
    torch.testing.assert_close(base_weights(tuned), dict(plain.net.state_dict()), rtol=0, atol=0)
    assert tuned.hyperparameters.values() == {"dropout": 0.3, "length": 2}
    torch.testing.assert_close(dict(tuned.export().state_dict()), dict(plain.net.state_dict()), rtol=0, atol=0)


def test_clipping_accumulation_and_schedulers_equal_those_of_lightning() -> None:
    plain, tuned = train_plain(0.3, 2, accumulate_grad_batches=2, gradient_clip_val=0.05), Tuned()
    step = WeightStep(accumulate_grad_batches=2, gradient_clip_val=0.05)
    fit(tuned, ScheduleReplay({"dropout": 0.3, "length": 2}, weight_step=step), Seed())
    torch.testing.assert_close(base_weights(tuned), dict(plain.net.state_dict()), rtol=0, atol=0)
    rates = [run.trainer.optimizers[0].param_groups[0]["lr"] for run in (plain, tuned)]
    assert rates == [pytest.approx(0.025)] * 2


class Plateau(Tuned):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class AutomaticPlateau(Plateau):
    automatic = True


def test_scheduler_that_follows_a_metric_steps_as_in_automatic_optimisation() -> None:
    rates = []
    for kind in (Plateau, AutomaticPlateau):
        run = fit(kind(), ScheduleReplay({"dropout": 0.3, "length": 2}), Seed(), max_epochs=4)
        rates.append(run.optimizers[0].param_groups[0]["lr"])
    assert rates[0] == rates[1] < 0.1


@pytest.mark.parametrize("kind", [Tuned, Late, InSetup])
def test_response_is_frozen_during_the_run_and_trains_afterwards(kind: type[Tuned]) -> None:
    def response(module: Tuned) -> list[nn.Parameter]:
        return [p for layer in response_layers(module.net) for p in layer.response_parameters()]

    module = kind()
    frozen = Watch(lambda module: [not p.requires_grad for p in response(module)])
    values = Watch(lambda module: [p.detach().clone() for p in response(module)])
    fit(module, ScheduleReplay({"dropout": 0.3, "length": 2}), frozen, values)
    assert all(frozen.seen[0])
    assert all(map(all, frozen.seen))
    assert all(p.requires_grad and p.grad is None for p in response(module))
    torch.testing.assert_close([p.detach() for p in response(module)], values.seen[0], rtol=0, atol=0)
    assert not {"setup", "configure_model"} & set(vars(module))


def test_response_without_zero_gates_stays_as_it_is() -> None:
    module = Tuned()
    random_gates(module.net, 0.3)
    response = [p for layer in response_layers(module.net) for p in layer.response_parameters()]
    before = [p.detach().clone() for p in response]
    fit(module, ScheduleReplay({"dropout": 0.3, "length": 2}))
    torch.testing.assert_close([p.detach() for p in response], before, rtol=0, atol=0)


def test_module_trains_with_stn_callback_after_a_replay_and_raises_without_a_callback() -> None:
    module = Tuned()
    fit(module, ScheduleReplay({"dropout": 0.3, "length": 2}))
    with pytest.raises(RuntimeError, match="trains without its callback"):
        trainer().fit(module, loader(24), loader(16, seed=1))
    trainer(STNCallback(train_steps=1, warmup=0, lr=0.1)).fit(module, loader(24), loader(16, seed=1))
    assert module.hyperparameters.values()["dropout"] != 0.3


def test_response_trains_again_after_an_exception() -> None:
    class Fails(Tuned):
        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            raise KeyError("interrupted")

    module = Fails()
    with pytest.raises(KeyError, match="interrupted"):
        fit(module, ScheduleReplay({"dropout": 0.3, "length": 2}))
    assert all(p.requires_grad for p in module.parameters())
    assert module.training
    assert module.hyperparameters.current_pass.values is None


def uncentred() -> tuple[Tuned, Tensor, Tensor]:
    """A module whose response counts from zero, with what its network computes for some images."""
    module = random_gates(Tuned(), 0.3)
    assert isinstance(module, Tuned)
    inputs = torch.randn(5, 1, 6, 6)
    assert not module.hyperparameters.centred
    return module, inputs, module.eval().net(inputs).detach()


class Stands(Tuned):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_replay_starts_from_what_a_response_that_counts_from_zero_computes() -> None:
    module, inputs, expected = uncentred()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    fit(module.train(), ScheduleReplay({"dropout": 0.8, "length": 4}))
    torch.testing.assert_close(module.eval().net(inputs), expected)
    assert not torch.equal(module.net[0].bias, Tuned().net[0].bias)


def test_replay_starts_from_a_checkpoint_of_a_response_that_counts_from_zero(tmp_path: Any) -> None:
    saved, inputs, expected = uncentred()
    trainer().strategy.connect(saved)
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    module = Stands()
    module.load_state_dict(torch.load(tmp_path / "weights.pt"))
    fit(module, ScheduleReplay({"dropout": 0.8, "length": 4}))
    torch.testing.assert_close(module.eval().net(inputs), expected)


def test_regularisers_act_at_noisy_values_around_the_current_hyperparameters() -> None:
    replay, module = ScheduleReplay({"dropout": 0.3, "length": 2}, noise=Gaussian(0.4)), Tuned()
    watch = Watch(lambda module: (replay.values, module.hyperparameters.values()))
    fit(module, replay, watch)
    inside = Watch(lambda module: float(module.hyperparameters["dropout"]))
    module = Tuned()
    fit(module, replay, inside)
    assert [current for _, current in watch.seen] == [{"dropout": 0.3, "length": 2}] * 6
    assert len({values["dropout"] for values, _ in watch.seen}) == 6
    assert inside.seen == pytest.approx([values["dropout"] for values, _ in watch.seen])
    assert module.hyperparameters.values() == replay.values == {"dropout": 0.3, "length": 2}


def test_csv_without_ranges_takes_those_of_the_module(tmp_path: Any) -> None:
    recorded(6).save(tmp_path / "schedule.csv")
    replay = ScheduleReplay(tmp_path / "schedule.csv", noise=Gaussian(), interpolation="linear")
    watch = Watch(lambda module: (replay.values, module.hyperparameters.values()))
    fit(Tuned(), replay, watch)
    assert [current for _, current in watch.seen] == [row.values for row in recorded(6).rows[:6]]
    assert all(0 < values["dropout"] < 0.9 and values["length"] in range(5) for values, _ in watch.seen)


def test_validation_and_test_need_no_replay_and_change_nothing() -> None:
    module = Tuned()
    run = trainer(ScheduleReplay({"dropout": 0.3, "length": 2}))
    run.validate(module, loader(16, seed=1), verbose=False)
    run.test(module, loader(16, seed=1), verbose=False)
    assert module.hyperparameters.values() == {"dropout": 0.05, "length": 0}
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_module_needs_no_validation_loader() -> None:
    module = Tuned()
    trainer(ScheduleReplay({"dropout": 0.3, "length": 2}), limit_val_batches=0).fit(module, loader(24))
    assert len(module.losses) == 6


def test_tuning_and_replay_together_are_refused() -> None:
    for both in (STNCallback(), ScheduleReplay({"rate": 0.3})), (ScheduleReplay({"rate": 0.3}), STNCallback()):
        with pytest.raises(ValueError, match=r"Expected STNCallback, which tunes, or ScheduleReplay.*got both"):
            trainer(*both).fit(Tuned(), loader(24), loader(16, seed=1))


def test_hyperparameters_without_a_value_are_listed() -> None:
    with pytest.raises(ValueError, match=r"(?s)got none for \['dropout', 'length'\]; add them.*\{'dropout': 0\.05"):
        fit(Tuned(), ScheduleReplay({"rate": 0.3}))


def test_values_beyond_the_ranges_of_the_module_are_listed() -> None:
    with pytest.raises(ValueError, match=r"(?s)dropout=0\.95.*length=9"):
        fit(Tuned(), ScheduleReplay({"dropout": 0.95, "length": 9}))


def test_every_name_without_a_reader_is_listed() -> None:
    with pytest.warns(UserWarning, match=r"nothing reads \['droput', 'rate'\]"):
        fit(Tuned(), ScheduleReplay({"dropout": 0.3, "length": 1, "droput": 0.3, "rate": 1}))


def test_weight_step_beside_automatic_optimisation_is_refused() -> None:
    replay = ScheduleReplay({"dropout": 0.3, "length": 1}, weight_step=WeightStep(gradient_clip_val=1.0))
    with pytest.raises(ValueError, match=r"expected weight_step for an STNModule in manual optimisation"):
        fit(Automatic(), replay)


def test_strategy_that_flattens_parameters_is_refused_by_the_name_of_the_callback() -> None:
    replay = ScheduleReplay({"dropout": 0.3, "length": 1})
    with pytest.raises(NotImplementedError, match=r"^ScheduleReplay does not support FSDPStrategy"):
        trainer(Disguise(FSDPStrategy), replay).fit(Tuned(), loader(24), loader(16, seed=1))


def test_schedule_of_an_stn_run_is_replayed_with_all_its_kinds() -> None:
    stn = STNCallback(train_steps=1, warmup=0, lr=0.1, seed=1)
    trainer(stn).fit(LitSmall(), loader(24), loader(16, seed=1))
    module = LitSmall()
    fit(module, ScheduleReplay(stn.schedule, final=True))
    assert module.hyperparameters.values() == stn.schedule.final
