"""Compiled networks, activation checkpoints and `torch.export`: each run compared with the same run without it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from features.runs import assert_equal_weights, callback
from lightning.pytorch.callbacks import ModelCheckpoint
from support import LitSmall, images, loader, random_gates, small_net, trainer
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.utils.checkpoint import checkpoint

from lightning_stn import STN, Method, Scales
from lightning_stn.layers import ResponseLayer

# Dynamo reads it inside its own warning filter, which has no effect where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

PERTURB = ("example", "batch")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _reset_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counted:
    """A compiler backend without C++ that counts its graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)


class Plain(LitSmall):
    """Has losses that append to no list; compiled, they would need a new graph for each length of the list."""

    def __init__(self, automatic: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        random_gates(self, 0.1)

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(self.cutout(self.noise(x))), y)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class Recomputed(nn.Sequential):
    """Keeps only the activations at the ends of its stages, and recomputes the others.

    Batch normalisation is outside the stages, because recomputation would update its running statistics twice.
    """

    def __init__(self, layers: nn.Sequential, reentrant: bool, always: bool) -> None:
        super().__init__(*layers)
        self.reentrant = reentrant
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        for stage in (layers[:2], layers[2:3], layers[3:8], layers[8:]):
            recompute = len(stage) > 1 and (self.always or self.training)
            # A reentrant checkpoint has a gradient only if its input requires one.
            recompute = recompute and (x.requires_grad or not self.reentrant)
            x = checkpoint(nn.Sequential(*stage), x, use_reentrant=self.reentrant) if recompute else self.run(stage, x)
        return x

    @staticmethod
    def run(stage: list[nn.Module], x: Tensor) -> Tensor:
        for layer in stage:
            x = layer(x)
        return x


class Whole(nn.Sequential):
    """Overrides `forward`, because up to torch 2.8 `nn.Sequential.compile` compiles each layer separately."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def compile_whole(module: LitSmall, **options: Any) -> None:
    module.net.__class__ = Whole
    module.net.compile(**options)


HOW = {
    "net.compile": compile_whole,
    "torch.compile(net)": lambda module, **options: setattr(module, "net", torch.compile(module.net, **options)),
    "torch.compile(module)": lambda module, **options: torch.compile(module, **options),
}


def train(
    module: LitSmall,
    perturb: str,
    how: str | None = None,
    epochs: int = 2,
    method: Method | str = "stn",
    trainer_settings: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> LitSmall:
    """Train on five batches an epoch, a hyperparameter step after every second; `options` go to the compiler."""
    compiled = None if how is None else HOW[how](module, **options)
    L.seed_everything(3, verbose=False)
    # Adam moves every entry by about `lr`, so that the comparison covers them all.
    steps: dict[str, Any] = {"scales": Scales(tune=True), "optimizer": torch.optim.Adam, "anneal": False}
    stn = callback(perturb=perturb, method=method, **steps)
    run = trainer(stn, max_epochs=epochs, **trainer_settings)
    run.fit(module if compiled is None else compiled, loader(40), loader(16, seed=1))
    assert run.lightning_module is module
    return module


def build(automatic: bool = False) -> Plain:
    L.seed_everything(3, verbose=False)
    return Plain(automatic)


def assert_same(ours: LitSmall, theirs: LitSmall, **tolerance: Any) -> None:
    """Compare weights, hyperparameters, scales and logged validation losses; all hyperparameters have moved."""
    logged = [float(module.trainer.callback_metrics["val_loss"]) for module in (ours, theirs)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)
    if hasattr(ours.net, "_orig_mod"):
        ours.net = ours.net._orig_mod  # type: ignore[assignment]
    assert_equal_weights(ours, theirs, **tolerance)
    start = build()
    for name in ("unconstrained", "raw_scale"):
        now, before = getattr(ours.hyperparameters, name), getattr(start.hyperparameters, name)
        assert ((now - before).abs() > 0.01).all()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("perturb", "centred"), [("example", True), ("batch", True), pytest.param("example", False, marks=SLOW)]
)
def test_compiled_network_trains_as_the_eager_one(perturb: str, centred: bool) -> None:
    """Four graphs for a run of any length.

    They are the first weight step (which records the reads of hyperparameters), the later ones, the hyperparameter
    step, and evaluation.
    """
    compiler, method = Counted(), STN(centred=centred)
    compiled = train(build(), perturb, "net.compile", epochs=4, method=method, backend=compiler, fullgraph=True)
    assert compiler.graphs == 4
    assert_same(compiled, train(build(), perturb, epochs=4, method=method), **CLOSE)


@pytest.mark.parametrize(
    ("how", "perturb"),
    [
        ("torch.compile(net)", "batch"),
        pytest.param("torch.compile(module)", "batch", marks=SLOW),
        pytest.param("torch.compile(net)", "example", marks=SLOW),
        pytest.param("torch.compile(module)", "example", marks=SLOW),
    ],
)
def test_compiled_wrapper_of_network_or_module_trains_as_the_eager_one(how: str, perturb: str) -> None:
    compiled = train(build(), perturb, how, epochs=1, backend="eager")  # the graphs themselves are tested above
    keys = {"torch.compile(net)": "net._orig_mod.0.weight", "torch.compile(module)": "net.0.weight"}
    assert keys[how] in compiled.state_dict()
    plain = compiled.export()
    assert list(plain.state_dict()) == list(small_net().state_dict())
    assert type(plain) is nn.Sequential
    assert_same(compiled, train(build(), perturb, epochs=1), **CLOSE)
    assert_exports(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("perturb", PERTURB)
def test_compiled_network_trains_as_the_eager_one_in_automatic_optimisation(perturb: str) -> None:
    compiled = train(build(automatic=True), perturb, "net.compile", backend="aot_eager", fullgraph=True)
    assert_same(compiled, train(build(automatic=True), perturb), **CLOSE)


@pytest.mark.slow  # half a minute of C++ compiler
@pytest.mark.parametrize("perturb", PERTURB)
def test_network_of_the_default_compiler_trains_as_the_eager_one(perturb: str) -> None:
    with torch._inductor.config.patch(fallback_random=True):  # random numbers drawn as torch draws them
        compiled = train(build(), perturb, "net.compile", fullgraph=True)
    assert_same(compiled, train(build(), perturb), **CLOSE)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_compiled_network_is_saved_and_exported_as_an_eager_one(tmp_path: Path) -> None:
    """With a smaller last batch in every epoch."""
    module = build()
    compile_whole(module, backend="aot_eager", fullgraph=True)
    saver = ModelCheckpoint(tmp_path, "last")
    run = trainer(callback(), saver, max_epochs=2, enable_checkpointing=True)
    run.fit(module, loader(43), loader(19, seed=1))
    loaded = Plain.load_from_checkpoint(saver.best_model_path)
    assert_equal_weights(loaded, module)
    assert_exports(module)


@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize(
    ("reentrant", "always"),
    [(False, True), (False, False), (True, False)],
    ids=["not reentrant", "not reentrant, in training", "reentrant, in training"],
)
def test_activation_checkpointing_gives_the_same_run_bit_for_bit(reentrant: bool, always: bool, perturb: str) -> None:
    """Recomputation in backward uses the sample and the random numbers of the forward pass."""
    module = build()
    passes: list[None] = []
    module.net = Recomputed(module.net, reentrant, always)  # type: ignore[arg-type]
    module.net[5].register_forward_hook(lambda *_: passes.append(None))  # type: ignore[operator, union-attr]
    expected = build()
    assert_same(train(module, perturb), train(expected, perturb))
    weights, hyperparameters, evaluations = 10, 5, 4
    recomputed = weights + (hyperparameters if always else 0)
    checks = 1 if perturb == "example" else 0
    assert len(passes) == weights + hyperparameters + evaluations + recomputed + checks


def test_fit_refuses_reentrant_checkpoints_in_the_hyperparameter_phase_with_the_reason() -> None:
    module = build()
    module.net = Recomputed(module.net, reentrant=True, always=True)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=r"use_reentrant=False\), or checkpoint only where self.training"):
        train(module, "example")


def assert_exports(module: LitSmall) -> None:
    """`torch.export` gives a program of plain operators, for any batch size, with the test loss of the module."""
    plain = module.export().eval()
    assert not any(isinstance(layer, ResponseLayer) for layer in plain.modules())
    x, y = images(12, seed=2)[:]
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(plain, (x[:4],), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        loss = F.cross_entropy(program.module()(x), y)
    (tested,) = trainer().test(module, loader(12, batch_size=12, seed=2), verbose=False)
    torch.testing.assert_close(loss.item(), tested["test_loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("perturb", PERTURB)
def test_trained_network_exports_as_a_program(perturb: str) -> None:
    assert_exports(train(build(), perturb))
