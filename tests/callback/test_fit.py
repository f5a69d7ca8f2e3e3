"""Real runs of the Trainer: phases, counters, which tensors change in which phase, resume."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from support import AfterEpoch, LitSmall, fit, images, loader, random_gates, response_layers, small_net, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_stn import STN, Float, PhaseSchedule, Scales, STNCallback, STNModule, Warmup, WeightStep
from lightning_stn.binding import bind
from lightning_stn.callback.stream import ValidationStream
from lightning_stn.layers import ResponseLayer
from lightning_stn.phases import UNKNOWN_LENGTH


def callback(**kwargs: Any) -> STNCallback:
    return STNCallback(**{"train_steps": 2, "valid_steps": 1, "warmup": 0, "lr": 0.05, "seed": 1, **kwargs})


class Existing(L.LightningModule):
    """A LightningModule without self-tuning."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 3))

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("my_train_loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("my_val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Tuned(STNModule, Existing):
    def __init__(self) -> None:
        super().__init__(width=8, hyperparameters={"dropout": Float(0.0, 0.9, init=0.1)})
        self.convert(self.net, dropout="dropout")

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("not_in_the_hyperparameter_phase", loss)
        return loss


class Automatic(LitSmall):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True


@pytest.mark.parametrize("kind", [LitSmall, Automatic])
@pytest.mark.parametrize(
    "schedule", [PhaseSchedule(2, 1, 0), PhaseSchedule(1, 2, 1), PhaseSchedule(3, 1, Warmup(2, "steps"))]
)
def test_losses_alternate_as_the_schedule_says(kind: type[LitSmall], schedule: PhaseSchedule) -> None:
    module = kind()
    phases = {
        "train_steps": schedule.train_steps,
        "valid_steps": schedule.valid_steps,
        "warmup": schedule.warmup,
    }
    fit(module, callback(**phases), max_epochs=3, limit_val_batches=1)
    expected = [event.phase.value.replace("warm-up", "weight") for event in schedule.trace(3, 3)]
    assert [event for event in module.events if event != "evaluation"] == expected


@pytest.mark.parametrize("kind", [LitSmall, Automatic])
def test_global_step_counts_weight_steps(kind: type[LitSmall]) -> None:
    module = kind()
    run, _ = fit(module, callback(train_steps=1, valid_steps=3), max_epochs=2)
    assert run.global_step == module.events.count("weight") == 6


@pytest.mark.parametrize("kind", [LitSmall, Automatic])
def test_max_steps_limits_weight_steps(kind: type[LitSmall]) -> None:
    module = kind()
    run, _ = fit(module, callback(train_steps=1, valid_steps=2), max_epochs=-1, max_steps=5)
    assert run.global_step == module.events.count("weight") == 5


def test_warmup_changes_no_hyperparameter() -> None:
    module = LitSmall()
    before = module.hyperparameters.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    with pytest.warns(UserWarning, match="ends before its first hyperparameter step"):
        fit(module, callback(warmup=2, lr=None), max_epochs=2)
    before |= {"centred": torch.tensor(True), "gate_scale": torch.tensor(0.5)}  # how the method counts the response
    assert all(torch.equal(before[key], value) for key, value in module.hyperparameters.state_dict().items())


def test_run_changes_hyperparameters_scales_weights_and_response_weights() -> None:
    module = LitSmall()
    random_gates(module, 0.1)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, callback(scales=Scales(tune=True)), max_epochs=2)
    unmoved = [name for name, p in module.named_parameters() if torch.equal(p, before[name])]
    assert unmoved == []


def test_fixed_scales_do_not_change_and_need_one_row() -> None:
    rows = []

    class Watch(LitSmall):
        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            rows.append(len(self.hyperparameters.bound_sample()))
            return super().validation_loss(batch, batch_idx)

    module = random_gates(Watch(), 0.1)
    assert isinstance(module, Watch)
    start = module.hyperparameters.unconstrained.clone()
    run = trainer(callback(), max_epochs=1)
    run.fit(module, loader(24), loader(16, seed=1))
    assert set(rows) == {1}
    torch.testing.assert_close(module.hyperparameters.scale, torch.full((3,), 0.5))
    assert not torch.equal(module.hyperparameters.unconstrained, start)


@pytest.mark.parametrize(("perturb", "rows"), [("example", 8), ("batch", 1)])
def test_sample_in_the_weight_phase_has_one_row_or_one_per_example(perturb: str, rows: int) -> None:
    seen = set()

    class Watch(LitSmall):
        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            if self.runs_for == "weights":  # as in the check of the rows
                seen.add(tuple(self.hyperparameters.bound_sample().shape))
            return super().training_loss(batch, batch_idx)

    fit(Watch(), callback(perturb=perturb))
    assert seen == {(rows, 3)}


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training")
@pytest.mark.parametrize("centred", [True, False])
def test_hyperparameter_phase_changes_only_hyperparameters_and_base_weights_of_a_centred_response(
    centred: bool,
) -> None:
    """Compares weights, gradients, batch statistics, modes and the Trainer's stage before and after every phase."""
    snapshots = []

    def snapshot(module: LitSmall, state: Any) -> tuple[Any, ...]:
        names = ("hyperparameters.unconstrained", "hyperparameters.raw_scale")
        tensors = {key: value.clone() for key, value in module.state_dict().items() if key not in names}
        gradients = [name for name, p in module.named_parameters() if p.grad is not None]
        return tensors, gradients, [m.training for m in module.modules()], state

    class Spy(STNCallback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            before = snapshot(pl_module, trainer.state.stage)
            super().on_train_batch_end(trainer, pl_module, *args)
            snapshots.append((before, snapshot(pl_module, trainer.state.stage)))

    module = LitSmall()
    random_gates(module, 0.1)
    module.net[7].eval()  # type: ignore[index]
    fit(module, Spy(train_steps=1, warmup=0, lr=0.05, method=STN(centred=centred)), max_epochs=1)
    base = {f"net.{place}.{name}" for place in (0, 5, 8) for name in ("weight", "bias")}
    assert len(snapshots) == 3
    for (tensors, *rest), (tensors_after, *rest_after) in snapshots:
        assert rest == rest_after
        assert rest[0] == []
        changed = {key for key, value in tensors.items() if not torch.equal(value, tensors_after[key])}
        assert changed == (base if centred else set())


def test_module_and_trainer_are_in_validation_mode_in_the_hyperparameter_phase() -> None:
    seen = []

    class Watch(LitSmall):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append(self.trainer.training)
            return batch

        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            assert not self.training
            assert not any(module.training for module in self.net.modules())
            assert torch.equal(self.cutout(self.noise(batch[0])), batch[0])
            return super().validation_loss(batch, batch_idx)

    fit(Watch(), callback(train_steps=1), max_epochs=1, limit_val_batches=1)
    assert seen == [True, False] * 3 + [False]


def test_exception_in_the_weight_phase_unbinds_the_sample() -> None:
    class Fails(LitSmall):
        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            raise ZeroDivisionError

    module = Fails()
    with pytest.raises(ZeroDivisionError):
        fit(module)
    assert module.hyperparameters.current_pass.sample is None
    assert module.hyperparameters.current_pass.values is None


def test_exception_in_the_hyperparameter_phase_restores_modes_and_unbinds_the_sample() -> None:
    class Fails(LitSmall):
        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            raise ZeroDivisionError

    module = Fails()
    with pytest.raises(ZeroDivisionError):
        fit(module)
    assert module.net.training
    assert module.hyperparameters.current_pass.sample is None
    assert all(parameter.grad is None for parameter in module.hyperparameters.parameters())


def test_existing_module_is_tuned_with_stn_module_as_first_base() -> None:
    module = Tuned()
    start = module.hyperparameters.values()["dropout"]
    run, _ = fit(module, max_epochs=4)
    assert {"my_train_loss", "my_val_loss"} <= set(run.callback_metrics)
    assert "not_in_the_hyperparameter_phase" not in run.callback_metrics
    assert "val_loss" not in run.callback_metrics
    assert module.hyperparameters.values()["dropout"] != start
    assert run.global_step == 12


def test_validation_and_test_losses_are_logged() -> None:
    module = LitSmall()
    run, _ = fit(module)
    assert "val_loss" in run.callback_metrics
    (results,) = run.test(module, loader(16, seed=2), verbose=False)
    x, y = loader(16, batch_size=16, seed=2).dataset[:]
    assert results["test_loss"] == pytest.approx(F.cross_entropy(module.eval().net(x), y).item(), rel=1e-5)


def test_automatic_and_manual_optimization_give_the_same_run() -> None:
    finals = []
    for kind in (LitSmall, Automatic):
        L.seed_everything(3, verbose=False)
        module = kind()
        fit(module, max_epochs=3)
        finals.append(module.state_dict())
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])


def test_accumulation_and_clipping_equal_those_of_lightning() -> None:
    finals = []
    for kind, ours, theirs in (
        (LitSmall, {"weight_step": WeightStep(0.1, accumulate_grad_batches=2)}, {}),
        (Automatic, {}, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
    ):
        L.seed_everything(3, verbose=False)
        module = kind()
        run, _ = fit(module, callback(**ours), max_epochs=2, **theirs)
        assert run.global_step == 4
        finals.append(module.state_dict())
    for key, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][key])


@pytest.mark.parametrize(
    "build",
    [
        lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1, 0.5), "interval": "epoch"},
        lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1, 0.5), "interval": "step", "frequency": 2},
    ],
)
def test_schedulers_step_as_in_automatic_optimization(build: Any) -> None:
    rates = []
    for kind in (LitSmall, Automatic):

        class Scheduled(kind):  # type: ignore[misc, valid-type]
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                return {"optimizer": optimizer, "lr_scheduler": build(optimizer)}

            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                rates[-1].append(self.trainer.optimizers[0].param_groups[0]["lr"])

        rates.append([])
        L.seed_everything(3, verbose=False)
        fit(Scheduled(), max_epochs=4)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1


def test_two_optimizers_both_step() -> None:
    class Two(LitSmall):
        def configure_optimizers(self) -> Any:
            groups = self.net[0].parameters(), [*self.net[5].parameters(), *self.net[8].parameters()]  # type: ignore[index, union-attr]
            return [torch.optim.SGD(group, lr=0.05) for group in groups]

    module = Two()
    random_gates(module, 0.1)
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    fit(module, max_epochs=1)
    assert not any(torch.equal(p, before[name]) for name, p in module.net.named_parameters())


@pytest.mark.parametrize(("perturb", "tune_scales"), list(itertools.product(["example", "batch"], [True, False])))
def test_resume_continues_phases_stream_optimizer_and_schedule(tmp_path: Path, perturb: str, tune_scales: bool) -> None:
    """Only the callback draws random numbers, so that the run must continue bit for bit."""
    options = {"perturb": perturb, "scales": Scales(tune=tune_scales), "train_steps": 2, "optimizer": torch.optim.Adam}

    class NoDraws(LitSmall):
        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x * self.hyperparameters["gain"].reshape(-1, 1, 1, 1)), y)

    def build() -> LitSmall:
        torch.manual_seed(0)
        module = NoDraws({"gain": Float(0.0, None, init=1.0)}, dropout=None)
        module.noise = module.cutout = nn.Identity()  # type: ignore[assignment]
        return module

    whole = build()
    _, whole_callback = fit(whole, callback(**options), max_epochs=4)
    half, stop = build(), AfterEpoch(2)
    run = trainer(callback(**options), stop, max_epochs=4)
    run.fit(half, loader(24), loader(16, seed=1))
    run.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    resumed, resumed_callback = build(), callback(**{**options, "seed": 77})
    run = trainer(resumed_callback, max_epochs=4)
    with pytest.warns(UserWarning, match=r"keeps the settings of its checkpoint.*: seed=77 \(it stays 1\)"):
        run.fit(resumed, loader(24), loader(16, seed=1), ckpt_path=tmp_path / "half.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert resumed_callback.state_dict()["stream"] == whole_callback.state_dict()["stream"]
    assert resumed_callback.state_dict()["clock"] == whole_callback.state_dict()["clock"]
    steps = [row.step for row in whole_callback.schedule.rows]
    assert [row.step for row in resumed_callback.schedule.rows] == steps == list(range(13))
    assert resumed_callback.schedule.rows[-1] == whole_callback.schedule.rows[-1]


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_checkpoint_holds_the_hyperparameters_of_its_step(tmp_path: Path) -> None:
    module = LitSmall()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    run = trainer(cb := callback(train_steps=1), saver, max_epochs=2, enable_checkpointing=True)
    run.fit(module, loader(24), loader(16, seed=1))
    for step in (2, 4, 6):
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        other = LitSmall()
        other.load_state_dict(state)
        assert other.hyperparameters.values() == cb.schedule.rows[step].values


def test_fast_dev_run_includes_a_hyperparameter_step() -> None:
    module = LitSmall()
    fit(module, STNCallback(), fast_dev_run=True)
    assert module.events == ["weight", "hyperparameter", "evaluation"]


@pytest.mark.parametrize("source", ["argument", "module", "datamodule", "loader"])
def test_tuning_batches_come_from_argument_hook_or_validation_loader(source: str) -> None:
    sizes = set()

    class Watch(LitSmall):
        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            if torch.is_grad_enabled():
                sizes.add(len(batch[1]))
            return super().validation_loss(batch, batch_idx)

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(24)

        def val_dataloader(self) -> Any:
            return loader(16, batch_size=8)

        if source == "datamodule":

            def tuning_dataloader(self) -> Any:
                return loader(16, batch_size=4)

    module = Watch()
    if source == "module":
        module.tuning_dataloader = lambda: loader(16, batch_size=4)  # type: ignore[attr-defined]
    dataloader = loader(16, batch_size=4) if source == "argument" else None
    trainer(callback(dataloader=dataloader), max_epochs=1).fit(module, datamodule=Data())
    assert sizes == {8 if source == "loader" else 4}


def test_validation_loader_is_found_before_the_first_validation() -> None:
    module = LitSmall()
    fit(module, max_epochs=2, check_val_every_n_epoch=2)
    assert module.events.count("hyperparameter") == 3


def test_default_learning_rate_depends_on_the_length_of_the_run() -> None:
    rates = {}
    for epochs in (40, 400):
        cb = callback(lr=None, train_steps=1)

        class Stop(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
                trainer.should_stop = True

        run = trainer(cb, Stop(), max_epochs=epochs, min_steps=1)
        run.fit(LitSmall(), loader(24), loader(16, seed=1))
        groups = cb.state_dict()["optimizer"]["optimizer"]["param_groups"]
        rates[epochs] = [group["initial_lr"] for group in groups]
    assert rates[40] == [pytest.approx(9 / 120)]
    assert rates[400] == [pytest.approx(9 / 1200)]


def test_run_of_unknown_length_has_a_default_learning_rate() -> None:
    cb = callback(lr=None)
    run = trainer(cb, AfterEpoch(1), max_epochs=-1)
    run.fit(LitSmall(), loader(24), loader(16, seed=1))
    assert cb.state_dict()["optimizer"]["optimizer"]["param_groups"][0]["lr"] == 1e-2


class Unsized(IterableDataset[tuple[Tensor, Tensor]]):
    """Three batches of eight examples, whose number is not known."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(images(24))


@pytest.mark.parametrize(
    ("epochs", "warmup", "hyperparameter_steps"),
    [(20, Warmup(2, "epochs"), 1), (-1, Warmup(UNKNOWN_LENGTH, "steps"), 0)],
)
def test_default_warmup_of_a_run_of_unknown_length_is_a_share_of_its_epochs_or_a_number_of_batches(
    epochs: int, warmup: Warmup, hyperparameter_steps: int
) -> None:
    """The run ends after its third epoch."""
    module, stn = LitSmall(), STNCallback(train_steps=2)
    run = trainer(stn, AfterEpoch(3), max_epochs=epochs, limit_val_batches=1)
    run.fit(module, DataLoader(Unsized(), batch_size=8), loader(16, seed=1))
    assert stn.phases.warmup == warmup
    assert module.events.count("weight") == 9
    assert module.events.count("hyperparameter") == hyperparameter_steps


def test_same_seed_gives_the_same_schedule_for_any_number_of_workers() -> None:
    schedules = []
    for workers in (0, 2):
        L.seed_everything(3, verbose=False)
        cb = STNCallback(train_steps=1, warmup=0, lr=0.05)
        run = trainer(cb, max_epochs=2)
        run.fit(LitSmall(), loader(24, num_workers=workers), loader(16, seed=1, num_workers=workers))
        schedules.append(cb.schedule)
    assert schedules[0] == schedules[1]


def test_fit_warns_once_of_unread_hyperparameters() -> None:
    read = dict(LitSmall().hyperparameters.specifications)
    module = LitSmall({**read, "idle": Float(0.0, 1.0, init=0.5)})
    with pytest.warns(UserWarning, match=r"Nothing read the hyperparameters \['idle'\]") as record:
        fit(module)
    assert len([w for w in record if "Nothing read" in str(w.message)]) == 1


def test_conversion_covers_every_layer_of_the_small_network() -> None:
    assert len(list(response_layers(LitSmall()))) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in small_net()) == 3


@pytest.mark.parametrize("loop", ["validate", "test", "fit"])
def test_evaluation_builds_effective_weights_once_per_loop(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = LitSmall()
    random_gates(module, 0.1)
    STN(centred=False).prepare(module, module.hyperparameters)
    builds = []
    effective = ResponseLayer._effective

    def count(layer: ResponseLayer, name: str, sample: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            builds.append(layer)
        return effective(layer, name, sample)

    monkeypatch.setattr(ResponseLayer, "_effective", count)
    if loop == "fit":
        fit(module, callback(method=STN(centred=False)), max_epochs=2)
    else:
        for _ in range(2):
            getattr(trainer(), loop)(module, loader(16), verbose=False)
            module.net[0].weight.data.mul_(2.0)  # type: ignore[index, union-attr, operator]
    assert len(builds) == 2 * 3 * 2  # weight and bias of each layer
    assert module.hyperparameters.current_pass.effective is None


def test_evaluation_uses_weights_changed_between_loops() -> None:
    module = LitSmall()
    random_gates(module, 0.1)
    (first,) = trainer().validate(module, loader(16), verbose=False)
    for parameter in module.net.parameters():
        parameter.data.zero_()
    (second,) = trainer().validate(module, loader(16), verbose=False)
    assert second["val_loss"] == pytest.approx(math.log(3)) != first["val_loss"]


def test_hypergradient_of_a_gradient_penalty_is_exact() -> None:
    """The first step equals a step along the hypergradient that autograd computes directly."""

    class Penalised(LitSmall):
        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            if not torch.is_grad_enabled():
                return super().validation_loss(batch, batch_idx)
            x = batch[0].detach().requires_grad_()
            loss = F.cross_entropy(self.net(x), batch[1])
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            return loss + gradient.square().sum()

    module = Penalised()
    random_gates(module, 0.1)
    start = module.hyperparameters.unconstrained.detach().clone()
    stn = callback(scales=Scales(tune=False), train_steps=1, optimizer=torch.optim.SGD)
    fit(module, stn, n=8, max_epochs=1, limit_val_batches=1)
    stepped = module.hyperparameters.unconstrained.detach().clone()
    batch = next(ValidationStream(loader(16, seed=1), seed=1))
    sample = start.unsqueeze(0).requires_grad_()
    module.eval()
    with bind(module.hyperparameters, sample):
        (gradient,) = torch.autograd.grad(module.validation_loss(batch, 0), sample)
    torch.testing.assert_close(stepped, start - 0.05 * gradient[0])
