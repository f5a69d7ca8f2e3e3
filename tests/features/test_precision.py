"""Every precision of the Trainer: the network computes in it, the hyperparameters stay in float32."""

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from features.runs import MODES, Traced, callback, flat, train
from lightning.pytorch.plugins import MixedPrecision
from support import METHODS, every_method, loader, random_gates, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import STN, DeltaSTN, Float, Integer, Scales, STNCallback, STNModule
from lightning_stn.augment import (
    ColorJitter,
    CutMix,
    Cutout,
    GaussianNoise,
    InputScale,
    MixUp,
    RandomAffine,
    RandomErasing,
    RandomHorizontalFlip,
)
from lightning_stn.regularizers import (
    ActivationPenalty,
    Dropout,
    EmbeddingDropout,
    L2Penalty,
    LabelSmoothing,
    LockedDropout,
    TemporalActivationPenalty,
    WeightDrop,
)

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
WEIGHTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
ACTIVATIONS = {**WEIGHTS, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
TOLERANCE = {"32-true": 0.0, "64-true": 1e-5, "16-mixed": 0.02, "16-true": 0.02}
"""Largest relative error of a hypergradient against float32; 8% in bfloat16."""


def half_on_cpu(**scaler: Any) -> dict[str, Any]:
    """fp16 with a scaler; on a CPU the argument `precision="16-mixed"` silently means bfloat16."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))]}


def settings_of(precision: str) -> dict[str, Any]:
    return half_on_cpu() if precision == "16-mixed" else {"precision": precision}


class Watched(Traced):
    """Records the dtypes of activations and samples, and the hyperparameters after every batch."""

    def __init__(self, automatic: bool = False, **kwargs: Any) -> None:
        super().__init__(automatic, **kwargs)
        random_gates(self, 0.1)
        self.activations: set[torch.dtype] = set()
        self.samples: set[torch.dtype] = set()
        self.places: list[Tensor] = []
        self.net[5].register_forward_hook(self.look)  # type: ignore[index, union-attr]

    def look(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.activations.add(output.dtype)
        self.samples.add(self.hyperparameters.bound_sample().dtype)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.places.append(self.hyperparameters.unconstrained.clone())


@every_method
@pytest.mark.parametrize("automatic", MODES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_hyperparameters_are_float32_and_move(precision: str, automatic: bool, method: str) -> None:
    L.seed_everything(3, verbose=False)
    module, stn = Watched(automatic), callback(scales=Scales(tune=True), **METHODS[method])
    start = module.hyperparameters.unconstrained.clone(), module.hyperparameters.raw_scale.clone()
    weights = flat(module)
    train(module, stn=stn, **settings_of(precision))
    assert module.activations == {ACTIVATIONS.get(precision, torch.float32)}
    assert {p.dtype for p in module.parameters()} == {WEIGHTS.get(precision, torch.float32)}
    assert module.samples == {torch.float32}
    for now, before in zip(
        (module.hyperparameters.unconstrained, module.hyperparameters.raw_scale), start, strict=True
    ):
        assert now.dtype == torch.float32
        assert now.isfinite().all()
        assert (now != before).all()
    state = stn.state_dict()["optimizer"]["optimizer"]["state"]
    entries = [value for entry in state.values() for value in entry.values()]
    assert {entry.dtype for entry in entries if isinstance(entry, Tensor)} == {torch.float32}
    assert not torch.equal(flat(module), weights.to(flat(module).dtype))


def first_step(precision: str, **stn: Any) -> Tensor:
    """Change of hyperparameters and scales in one step of plain SGD, with weights that do not change."""
    L.seed_everything(3, verbose=False)
    module = Watched(configure=lambda optimizer: torch.optim.SGD(optimizer.param_groups[0]["params"], lr=1e-30))
    start = torch.cat([module.hyperparameters.unconstrained, module.hyperparameters.raw_scale])
    settings = {
        "train_steps": 1,
        "lr": 1.0,
        "optimizer": torch.optim.SGD,
        "scales": Scales(tune=True, entropy_weight=0.0),
        **stn,
    }
    train(module, stn=callback(**settings), n=8, max_epochs=1, limit_val_batches=1, **settings_of(precision))
    return torch.cat([module.hyperparameters.unconstrained, module.hyperparameters.raw_scale]) - start


@every_method
@pytest.mark.parametrize("tune_scales", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_hypergradients_agree_with_float32(precision: str, tune_scales: bool, method: str) -> None:
    stn = {"scales": Scales(tune=tune_scales, entropy_weight=0.0), **METHODS[method]}
    expected, got = first_step("32-true", **stn), first_step(precision, **stn)
    assert expected.norm() > 1e-3
    assert (got - expected).norm() <= TOLERANCE.get(precision, 0.08) * expected.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_small_hyperparameter_steps_accumulate(precision: str) -> None:
    """Steps of 3e-3 around 2.8, where bfloat16 has nothing between 2.8125 and 2.828125."""

    class Constant(Watched):
        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            total = self.hyperparameters.bound_sample().sum(1).mean()
            return super().validation_loss(batch, batch_idx) + 100 * total

    module = Constant()
    start = module.hyperparameters.unconstrained.clone()
    train(module, stn=callback(train_steps=1, lr=3e-3, anneal=False), max_epochs=4, **settings_of(precision))
    steps = -torch.stack([start, *module.places]).diff(dim=0)
    taken = steps[(steps != 0).any(1)]
    assert len(taken) >= (18 if precision.startswith("16") else 20)  # the scaler may skip steps
    torch.testing.assert_close(taken, torch.full_like(taken, 3e-3), rtol=0.1, atol=0.0)


class Overflows(Watched):
    """Has a loss too large for float16 in the given weight steps or hyperparameter steps."""

    def __init__(self, automatic: bool, phase: str, spoiled: range) -> None:
        super().__init__(automatic)
        self.phase = phase
        self.spoiled = spoiled

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_loss(batch, batch_idx)
        return loss * 1e6 if self.phase == "weight" and len(self.rates) - 1 in self.spoiled else loss

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().validation_loss(batch, batch_idx)
        if not torch.is_grad_enabled():
            return loss
        return loss * 1e6 if self.phase == "hyperparameter" and batch_idx in self.spoiled else loss


class WeightSteps(L.Callback):
    """Records whether weight steps move weights; goes before `STNCallback`, whose steps move base weights too."""

    def __init__(self) -> None:
        self.before = torch.zeros(0)
        self.moved: list[bool] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = flat(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        assert flat(pl_module).isfinite().all()
        self.moved.append(not torch.equal(flat(pl_module), self.before))


@every_method
@pytest.mark.parametrize("automatic", MODES)
@pytest.mark.parametrize("phase", ["weight", "hyperparameter"])
@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_a_scaler_recovers_from_an_overflow(precision: str, phase: str, automatic: bool, method: str) -> None:
    """The two steps with an overflow are skipped, and no others; all values stay finite, and there is no warning."""
    if (precision, phase) == ("16-true", "weight"):
        pytest.skip("Lightning scales no loss of the weights in 16-true.")
    L.seed_everything(3, verbose=False)
    module, stn = Overflows(automatic, phase, range(2, 4)), callback(train_steps=1, **METHODS[method])
    settings = half_on_cpu(init_scale=2.0**13) if precision == "16-mixed" else {"precision": precision}
    weight_steps, start = WeightSteps(), module.hyperparameters.unconstrained.clone()
    run = trainer(weight_steps, stn, **settings)
    run.fit(module, loader(40), loader(16, seed=1))
    places = torch.stack([start, *module.places])
    assert places.isfinite().all()
    assert flat(module).isfinite().all()
    moved = {"hyperparameter": (places[1:] != places[:-1]).any(1).tolist(), "weight": weight_steps.moved}
    assert moved[phase] == [index not in (2, 3) for index in range(10)]
    assert moved["weight" if phase == "hyperparameter" else "hyperparameter"] == [True] * 10
    scale = stn.state_dict()["optimizer"]["scaler"]["scale"]
    assert scale == 2.0**15 / (4 if phase == "hyperparameter" else 1)
    if precision == "16-mixed":
        assert run.precision_plugin.state_dict()["scale"] == 2.0**13 / (4 if phase == "weight" else 1)
    assert stn.state_dict()["watch"]["skipped"] == (2 if phase == "hyperparameter" else 0)


class TwoOptimizers(Watched):
    def configure_optimizers(self) -> Any:
        layers = self.net[0], nn.ModuleList([self.net[5], self.net[8]])  # type: ignore[index]
        return [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in layers]


@pytest.mark.parametrize("growth_interval", [1, 2, 2000])
def test_several_optimizers_step_with_the_same_scale(growth_interval: int) -> None:
    """Whether or not the scale grows after the first optimiser's step."""
    moved = []
    for settings in ({}, half_on_cpu(init_scale=64.0, growth_interval=growth_interval)):
        L.seed_everything(3, verbose=False)
        module = TwoOptimizers(
            hyperparameters={"noise": Float(0.0, None, init=0.1), "length": Integer(0, 4, init=2)}, dropout=None
        )
        before = flat(module)
        run = train(module, n=16, max_epochs=1, **settings)
        moved.append(flat(module) - before)
    assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()
    growths = 2 // growth_interval
    assert run.precision_plugin.state_dict()["scale"] == 64.0 * 2**growths


def test_overflow_of_one_optimizer_lowers_the_shared_scale() -> None:
    class Infinite(TwoOptimizers):
        def on_after_backward(self) -> None:
            self.net[0].weight.grad.fill_(float("inf"))  # type: ignore[index, union-attr]

    L.seed_everything(3, verbose=False)
    module = Infinite()
    first, second = module.net[0].weight.clone(), module.net[8].weight.clone()  # type: ignore[index, union-attr, operator]
    run = train(
        module,
        n=8,
        stn=callback(train_steps=1, method=STN(centred=False)),
        max_epochs=1,
        **half_on_cpu(init_scale=64.0),
    )
    assert run.precision_plugin.state_dict()["scale"] == 32.0
    assert torch.equal(module.net[0].weight, first)  # type: ignore[index, union-attr, arg-type]
    assert not torch.equal(module.net[8].weight, second)  # type: ignore[index, union-attr, arg-type]


@pytest.mark.parametrize("automatic", MODES)
def test_gradients_are_clipped_after_unscaling(automatic: bool) -> None:
    """A limit above every gradient norm, but below every scaled one, changes nothing."""
    finals = []
    for limit in (None, 100.0):
        L.seed_everything(3, verbose=False)
        module = Watched(automatic)
        clip = {} if limit is None else {"gradient_clip_val": limit}
        train(module, **clip, **half_on_cpu(init_scale=2.0**12))  # type: ignore[arg-type]
        finals.append(flat(module))
        assert max(module.steps.norms) < 50
    assert torch.equal(*finals)


class LitEverything(STNModule):
    """Every augmentation, convolutions with dropouts, and the penalties."""

    def __init__(self) -> None:
        small = {name: Float(0.0, 0.5, init=0.1) for name in ("colour", "scale", "noise", "erasing", "flip", "smooth")}
        super().__init__(
            hyperparameters={
                **small,
                "degrees": Float(0.0, 90.0, init=20.0),
                "alpha": Float(0.0, 2.0, init=0.5),
                "length": Integer(0, 4, init=2),
                "dropout": Float(0.0, 0.9, init=0.1),
                "decay": Float(1e-6, 1e-1, init=1e-3, log=True),
                "ar": Float(0.0, None, init=0.05),
            }
        )
        self.augment = nn.Sequential(
            ColorJitter("colour", "colour", "colour", "colour"),
            RandomAffine(degrees="degrees"),
            RandomErasing("erasing"),
            RandomHorizontalFlip("flip"),
            InputScale("scale"),
            Cutout("length"),
            GaussianNoise("noise"),
        )
        self.mix, self.cut = MixUp("alpha", 3), CutMix("alpha", 3)
        self.decay, self.activation, self.smoothing = (
            L2Penalty("decay"),
            ActivationPenalty("ar"),
            LabelSmoothing("smooth"),
        )
        body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Dropout2d(), nn.Flatten(), nn.Dropout())
        self.net = self.convert(nn.Sequential(body, nn.Linear(256, 3)), dropout="dropout")

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = self.augment(x)
        mixed, targets = self.mix(x, y)
        cut, cut_targets = self.cut(x, y)
        features = self.net[0](mixed)  # type: ignore[index]
        logits = self.net[1](features)  # type: ignore[index]
        loss = F.cross_entropy(logits, targets) + F.cross_entropy(self.net(cut), cut_targets)
        return loss + self.decay(self.net) + self.activation(features) + self.smoothing(logits, y)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


class LitWords(STNModule):
    """A recurrent network with the dropouts and the penalties for sequences."""

    def __init__(self, recurrent: type[nn.RNNBase] = nn.LSTM) -> None:
        rates = {name: Float(0.0, 0.9, init=0.1) for name in ("words", "locked", "plain")}
        super().__init__(
            hyperparameters={
                **rates,
                "weights": Float(0.0, 0.9, init=0.1, perturb="batch"),
                "ar": Float(0.0, None, init=0.05),
                "tar": Float(0.0, None, init=0.05),
            }
        )
        dropped = WeightDrop(recurrent(8, 8, batch_first=True), ["weight_hh_l0"], "weights")
        self.net = self.convert(nn.ModuleList([nn.Embedding(12, 8), dropped, nn.Linear(8, 12)]))
        self.embed = EmbeddingDropout(self.net[0], "words")  # type: ignore[index]
        self.locked, self.dropout = LockedDropout("locked"), Dropout("plain")
        self.ar, self.tar = ActivationPenalty("ar"), TemporalActivationPenalty("tar")

    def loss(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        output, _ = self.net[1](self.locked(self.embed(tokens[:, :-1])))  # type: ignore[index]
        logits = self.net[2](self.dropout(output))  # type: ignore[index]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), output

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss, output = self.loss(batch[0])
        return loss + self.ar(output) + self.tar(output)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch[0])[0]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pictures(n: int, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(torch.rand(n, 3, 8, 8, generator=generator), torch.arange(n) % 3), 8)


def texts(n: int, seed: int) -> DataLoader[Any]:
    drawn = torch.randint(0, 12, (n, 7), generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(drawn), 8)


@every_method
@pytest.mark.parametrize("kind", [LitEverything, LitWords])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_regularisers_and_augmentations_work_in_every_precision(precision: str, kind: Any, method: str) -> None:
    """Every hyperparameter is read and takes a step."""
    L.seed_everything(3, verbose=False)
    module, data = kind(), pictures if kind is LitEverything else texts
    if kind is LitWords and precision.startswith("16"):
        module = LitWords(nn.GRU)  # some CPUs have no LSTM in float16, not even torch's
    start = module.hyperparameters.unconstrained.clone()
    # Not linearised: both call their networks part by part.
    chosen = {"stn": STN(), "uncentred": STN(centred=False), "delta-stn": DeltaSTN(linearize=False)}[method]
    stn = STNCallback(1, 1, 0, lr=0.05, seed=1, method=chosen)
    run = trainer(stn, max_epochs=2, **settings_of(precision))
    run.fit(module, data(24, 0), data(16, 1))
    assert module.hyperparameters.unread() == []
    assert module.hyperparameters.unconstrained.isfinite().all()
    assert (module.hyperparameters.unconstrained != start).all()
    assert flat(module).isfinite().all()
    assert run.callback_metrics["val_loss"].isfinite()
