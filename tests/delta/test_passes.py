"""The passes of a Delta-STN weight step: gradients, hyperparameters, batch statistics; and whole runs."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from delta.cases import (
    Checkpointed,
    InParts,
    WithoutForwardMode,
    X,
    Y,
    base_and_response,
    by_loop,
    plain_forward,
    tuned,
)
from support import LitSmall, fit, loader, small_net, trainer
from torch import Tensor

from lightning_stn import STN, DeltaSTN, Float, HyperparameterSet, Scales, STNCallback
from lightning_stn.binding import bind_weight_phase, unbind
from lightning_stn.methods.base import recentre
from lightning_stn.methods.delta import base_pass, response_pass, shared_pass
from lightning_stn.passes import Pass
from lightning_stn.regularizers import Dropout

DIRECT = {"method": DeltaSTN(linearize=False)}
DELTA = {"method": "delta-stn"}
SHARED = {"method": DeltaSTN(passes=1)}
UNCENTRED = {"method": STN(centred=False)}
all_fits = pytest.mark.parametrize("settings", [DELTA, SHARED, DIRECT], ids=["linearised", "shared", "direct"])


def callback(**settings: Any) -> STNCallback:
    return STNCallback(**{"train_steps": 2, "valid_steps": 1, "warmup": 0, "lr": 0.05, "seed": 1, **settings})


@pytest.mark.parametrize("rows", [1, 5])
def test_recentring_keeps_the_outputs(rows: int) -> None:
    net, hyperparameters = tuned()
    samples = hyperparameters.sample(rows, torch.Generator().manual_seed(0))
    before = copy.deepcopy(net.state_dict())

    def outputs() -> list[Tensor]:
        bind_weight_phase(hyperparameters, samples)
        at_sample = net(X)
        unbind(hyperparameters)
        return [at_sample, net(X)]

    expected = outputs()
    recentre(net, hyperparameters, True)
    assert not torch.equal(net[0].weight, before["0.weight"])  # type: ignore[index, union-attr, arg-type]
    torch.testing.assert_close(outputs(), expected, rtol=1e-6, atol=1e-7)  # lambda is float32
    recentre(net, hyperparameters, False)
    torch.testing.assert_close(outputs(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(net.state_dict(), before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("linear", [True, False])
def test_base_pass_and_response_pass_give_the_gradients_of_their_losses(linear: bool) -> None:
    """One backward pass for both losses against one for each, with the response loss from a loop over examples."""
    net, hyperparameters = tuned()
    recentre(net, hyperparameters, True)
    base, response = base_and_response(net)
    samples = hyperparameters.sample(len(X), torch.Generator().manual_seed(0))
    bind_weight_phase(hyperparameters, samples)
    with response_pass(net, hyperparameters, linear=linear):
        response_loss = F.cross_entropy(net(X), Y)
    with base_pass(hyperparameters):
        base_loss = F.cross_entropy(net(X), Y)
    unbind(hyperparameters)
    found = torch.autograd.grad(base_loss + response_loss, [*base, *response])
    by_hand = F.cross_entropy(by_loop(net, samples - hyperparameters.unconstrained, linear=linear), Y)
    expected = [
        *torch.autograd.grad(F.cross_entropy(plain_forward(net), Y), base),
        *torch.autograd.grad(by_hand, response),
    ]
    torch.testing.assert_close(found, tuple(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 5])
def test_shared_pass_gives_base_and_response_the_gradient_at_the_linearised_prediction(rows: int) -> None:
    """The base weights get the vjp of the base network with the gradient at that prediction."""
    net, hyperparameters = tuned()
    recentre(net, hyperparameters, True)
    base, response = base_and_response(net)
    samples = hyperparameters.sample(rows, torch.Generator().manual_seed(0))
    bind_weight_phase(hyperparameters, samples)
    with shared_pass(hyperparameters):
        loss = F.cross_entropy(net(X), Y)
    unbind(hyperparameters)
    found = torch.autograd.grad(loss, [*base, *response])

    predictions = by_loop(net, (samples - hyperparameters.unconstrained).expand(len(X), -1), linear=True)
    by_hand = F.cross_entropy(predictions, Y)
    leaf = predictions.detach().requires_grad_()
    (at_prediction,) = torch.autograd.grad(F.cross_entropy(leaf, Y), leaf)
    expected = [
        *torch.autograd.grad(plain_forward(net), base, at_prediction),
        *torch.autograd.grad(by_hand, response),
    ]
    torch.testing.assert_close(loss, by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, tuple(expected), rtol=1e-10, atol=1e-10)


def test_regularisers_act_at_the_current_hyperparameters_in_the_base_pass() -> None:
    hyperparameters = HyperparameterSet({"rate": Float(0.0, 0.9, init=0.3)})
    drop = Dropout("rate")
    drop.attach(hyperparameters)
    bind_weight_phase(hyperparameters, torch.full((2, 1), 50.0))
    with base_pass(hyperparameters):
        kept = drop(torch.ones(2, 20_000)) != 0
        assert hyperparameters["rate"].tolist() == pytest.approx([0.3, 0.3])
    assert kept.float().mean(1).tolist() == pytest.approx([0.7, 0.7], abs=0.02)
    assert hyperparameters["rate"].tolist() == pytest.approx([0.9, 0.9])
    unbind(hyperparameters)


def test_primal_and_tangent_have_the_same_dropout_mask() -> None:
    """The linearised prediction equals central differences of the network with the mask of the same seed."""
    net, hyperparameters = tuned(dropout=0.3)
    recentre(net, hyperparameters, True)
    sample = hyperparameters.sample(len(X), torch.Generator().manual_seed(0))
    bind_weight_phase(hyperparameters, sample)
    torch.manual_seed(7)
    with response_pass(net, hyperparameters, linear=True):
        found = net(X)
    values = hyperparameters.current_pass.values
    step, outputs = 1e-5, []
    for sign in (0, 1, -1):
        shift = sign * step * (sample - hyperparameters.unconstrained).double()
        bind_weight_phase(hyperparameters, hyperparameters.unconstrained + shift)
        hyperparameters.current_pass = replace(hyperparameters.current_pass, values=values)
        torch.manual_seed(7)
        outputs.append(net(X))
    unbind(hyperparameters)
    expected = outputs[0] + (outputs[1] - outputs[2]) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert (found - outputs[0]).abs().max() > 1e-2


@all_fits
def test_batch_statistics_are_updated_once_a_step_as_in_the_base_network(settings: dict[str, Any]) -> None:
    """With constant base weights and without noise they equal those of the plain network on the same batches."""

    class ConstantWeights(LitSmall):
        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-30)

    torch.manual_seed(0)
    module = ConstantWeights(dropout=None)
    with pytest.warns(UserWarning, match="Nothing read"):
        fit(module, callback(**settings), max_epochs=1)
    plain = copy.deepcopy(module.export()).train()
    plain[2].reset_running_stats()  # type: ignore[index, operator]
    for x, _ in loader(24):
        plain(x)
    for name, buffer in plain[2].named_buffers():  # type: ignore[index]
        torch.testing.assert_close(module.net[2].get_buffer(name), buffer)  # type: ignore[index]
    assert module.net[2].num_batches_tracked == 3  # type: ignore[index]


@all_fits
@pytest.mark.parametrize("perturb", ["example", "batch"])
def test_manual_and_automatic_optimization_give_the_same_run(settings: dict[str, Any], perturb: str) -> None:
    finals = []
    for automatic in (False, True):
        L.seed_everything(0, verbose=False)
        module = LitSmall()
        module.automatic_optimization = automatic
        _, stn = fit(module, callback(perturb=perturb, **settings))
        finals.append((module.state_dict(), stn.schedule.rows))
    torch.testing.assert_close(finals[0][0], finals[1][0], rtol=0, atol=0)
    assert finals[0][1] == finals[1][1]


def test_recorded_and_returned_training_loss_is_that_of_the_base_weights() -> None:
    losses: list[float] = []
    returned: list[float] = []
    kinds: list[str] = []

    class Recording(LitSmall):
        def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_loss(batch, batch_idx)
            kinds.append(self.runs_for)
            self.log("mine", loss, on_step=True, on_epoch=False)
            if self.runs_for == "weights":
                losses.append(loss.item())
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            returned.append(outputs["loss"].item())
            assert self.trainer.callback_metrics["mine"].item() == losses[-1]
            super().on_train_batch_end(outputs, batch, batch_idx)

    fit(Recording(), callback(**DELTA))
    assert returned == losses
    assert kinds == ["response", "weights"] * 6


@all_fits
def test_fit_changes_all_state_and_the_network_exports(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = LitSmall()
    before = copy.deepcopy(module.state_dict())
    _, stn = fit(module, callback(scales=Scales(tune=True), **settings))
    assert module.hyperparameters.centred
    constant = ("hyperparameters.gate_scale", "hyperparameters.export_for_a_plain_network")
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]) == (key in constant), key
    x = next(iter(loader(8)))[0]
    module.eval()
    torch.testing.assert_close(module.export()(x), module.net(x))
    assert [type(m) for m in module.export().modules()] == [type(m) for m in small_net().modules()]
    assert stn.schedule.rows[-1].step == 6


def test_checkpoint_of_either_method_restores_whether_the_response_is_centred(tmp_path: Path) -> None:
    x = next(iter(loader(8)))[0]
    for settings in (DELTA, UNCENTRED):
        module = LitSmall()
        run, _ = fit(module, callback(**settings))
        run.save_checkpoint(tmp_path / "saved.ckpt")
        loaded = LitSmall.load_from_checkpoint(tmp_path / "saved.ckpt")
        assert loaded.hyperparameters.centred == (settings == DELTA)
        torch.testing.assert_close(loaded.eval().net(x), module.eval().net(x))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("first", "then"), [({}, DELTA), (UNCENTRED, DELTA), (DELTA, {}), (DELTA, UNCENTRED)])
def test_resumed_run_continues_with_the_other_method(
    tmp_path: Path, first: dict[str, Any], then: dict[str, Any]
) -> None:
    """It starts with the outputs of the saved network: the response is recentred, not reset."""
    module = LitSmall()
    run, _ = fit(module, callback(**first))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    x = next(iter(loader(8)))[0]
    expected = module.eval().net(x)
    seen: list[Tensor] = []

    class RecordsFirstOutput(LitSmall):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if not seen:
                self.eval()
                with self.hyperparameters.running(Pass()):
                    seen.append(self.net(x))
                self.train()

    resumed = RecordsFirstOutput()
    stn = callback(**then, on_resume_use=["method"])
    trainer(stn, max_epochs=3).fit(resumed, loader(24), loader(16, seed=1), ckpt_path=tmp_path / "saved.ckpt")
    torch.testing.assert_close(seen[0], expected)
    assert resumed.hyperparameters.centred == (then != UNCENTRED)
    assert stn.state_dict()["settings"]["method"]["name"] == ("delta-stn" if then == DELTA else "stn")


@pytest.mark.filterwarnings("ignore:Nothing read the hyperparameters")
@pytest.mark.parametrize(
    ("build", "settings", "error", "message"),
    [
        (InParts, DELTA, ValueError, r"calls parts of a converted network.*linearize=False"),
        (WithoutForwardMode, DELTA, NotImplementedError, r"no forward-mode derivative.*linearize=False"),
        (Checkpointed, DIRECT, RuntimeError, "computed again in the backward pass.*method='stn'"),
    ],
)
def test_fit_refuses_networks_that_delta_stn_cannot_train(
    build: Any, settings: dict[str, Any], error: Any, message: str
) -> None:
    module = build()
    with pytest.raises(error, match=message):
        fit(module, callback(**settings))
    assert module.hyperparameters.current_pass.sample is None
    assert not module.hyperparameters.current_pass.tangent
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(child._forward_hooks for child in module.modules())


@pytest.mark.filterwarnings("ignore:Nothing read the hyperparameters")
@pytest.mark.parametrize("build", [InParts, WithoutForwardMode])
def test_networks_that_cannot_be_linearised_train_without_linearisation(build: Any) -> None:
    module = build()
    fit(module, callback(**DIRECT))
    assert module.hyperparameters.unconstrained.isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("settings", [DELTA, DIRECT], ids=["linearised", "direct"])
def test_compiled_network_trains_as_the_eager_one(settings: dict[str, Any]) -> None:
    states = []
    for compiled in (False, True):
        L.seed_everything(0, verbose=False)
        module = LitSmall()
        if compiled:
            module.net.compile(backend="aot_eager")
        fit(module, callback(perturb="batch", **settings), max_epochs=1)
        states.append(module.state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)


def test_weights_response_and_gates_have_separate_learning_rates() -> None:
    module = LitSmall()
    recentre(module, module.hyperparameters, True)
    groups = module.parameter_groups(0.1, response_lr=0.2)
    variance = module.hyperparameters.scale.square().sum().item()
    assert [group["lr"] for group in groups] == [0.1, 0.2, pytest.approx(0.1 / max(1.0, variance))]
    names = {id(p): name for name, p in module.named_parameters()}
    kinds = [{_kind(names[id(p)]) for p in group["params"]} for group in groups]
    assert kinds == [{"weight"}, {"response"}, {"gate"}]
    assert sum(len(group["params"]) for group in groups) == len(names)


def _kind(name: str) -> str:
    last = name.rpartition(".")[2]
    return "gate" if last.endswith("_gate") else "response" if last.startswith("response_") else "weight"
