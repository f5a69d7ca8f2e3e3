"""Runs on a GPU; each test also runs on a CPU, so that without a GPU only the device is untested."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from callback import test_resume
from features.runs import assert_equal_weights, callback, flat
from features.test_compile import build, train
from features.test_precision import LitWords, Watched, settings_of, texts
from support import LitSmall, loader, random_gates, trainer
from test_examples import example
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import STNCallback, STNModule

GPU = pytest.param("gpu", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]
PERTURB = ("example", "batch")

pytestmark = [
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]


@pytest.fixture(autouse=True)
def _deterministic_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make cuDNN deterministic, with the float32 precision of a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Place(L.Callback):
    """Records the devices of weights, hyperparameters, scales and samples during training."""

    def __init__(self) -> None:
        self.devices: set[str] = set()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        hyperparameters = pl_module.hyperparameters
        tensors = [hyperparameters.unconstrained, hyperparameters.raw_scale, hyperparameters.bound_sample()]
        self.devices |= {tensor.device.type for tensor in (*tensors, *pl_module.parameters())}


def assert_trained_on(accelerator: str, module: STNModule, place: Place, start: Tensor) -> None:
    """All tensors were on that device, and every hyperparameter has moved, in float32."""
    assert place.devices == {"cuda" if accelerator == "gpu" else "cpu"}
    now = module.hyperparameters.unconstrained
    assert now.dtype == module.hyperparameters.raw_scale.dtype == torch.float32
    assert now.isfinite().all()
    assert (now.cpu() != start).all()


def precision_settings(accelerator: str, precision: str) -> dict[str, Any]:
    settings = settings_of(precision) if accelerator == "cpu" else {"precision": precision}
    return {"accelerator": accelerator, "devices": 1, **settings}


@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accelerator", DEVICES)
def test_hyperparameters_are_float32_and_move(accelerator: str, precision: str, perturb: str) -> None:
    L.seed_everything(3, verbose=False)
    module, stn, place = Watched(), callback(perturb=perturb), Place()
    start = module.hyperparameters.unconstrained.clone()
    weights = flat(module)
    run = trainer(stn, place, **precision_settings(accelerator, precision))
    run.fit(module, loader(40), loader(16, seed=1))
    assert_trained_on(accelerator, module, place, start)
    assert module.activations == {
        {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision, torch.float32)
    }
    assert module.samples == {torch.float32}
    state = stn.state_dict()["optimizer"]
    entries = [value for entry in state["optimizer"]["state"].values() for value in entry.values()]
    assert {entry.dtype for entry in entries if isinstance(entry, Tensor)} == {torch.float32}
    assert (state["scaler"] is not None) == (precision == "16-mixed")
    assert flat(module).isfinite().all()
    assert not torch.equal(flat(module), weights)
    assert run.callback_metrics["val_loss"].isfinite()


def standing_still(module: Any) -> Any:
    """Fix the weights, so that a run is its hyperparameter steps, whose noise is the same on every device."""
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-30)
    random_gates(module.net, 0.1)
    return module


def words() -> LitWords:
    return standing_still(LitWords())


def pictures() -> LitSmall:
    """Running statistics are fixed too, because they depend on noise drawn on the device."""
    module: LitSmall = standing_still(LitSmall())
    module.net[2].momentum = 0.0  # type: ignore[index, union-attr]
    return module


DATA: dict[Any, Any] = {words: texts, pictures: lambda n, seed: loader(n, seed=seed)}


def steps(build: Any, accelerator: str, perturb: str) -> Tensor:
    """Change of the hyperparameters after each of several steps of plain SGD."""
    L.seed_everything(3, verbose=False)
    module, place, places = build(), Place(), []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            places.append(pl_module.hyperparameters.unconstrained.cpu().clone())

    start = module.hyperparameters.unconstrained.clone()
    stn = STNCallback(1, 1, 0, lr=1.0, seed=1, optimizer=torch.optim.SGD, perturb=perturb)  # type: ignore[arg-type]
    run = trainer(stn, place, Keep(), accelerator=accelerator, devices=1, max_epochs=2)
    run.fit(module, DATA[build](24, 0), DATA[build](16, 1))
    assert_trained_on(accelerator, module, place, start)
    return torch.stack(places) - start


@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("build", DATA)
@pytest.mark.parametrize("accelerator", DEVICES)
def test_hyperparameter_steps_equal_those_on_a_cpu(accelerator: str, build: Any, perturb: str) -> None:
    """Through convolutions, and through an LSTM, for which cuDNN has no backward in eval mode."""
    got = steps(build, accelerator, perturb)
    assert got.norm(dim=1)[-1] > 1e-3
    if accelerator == "gpu":
        torch.testing.assert_close(got, steps(build, "cpu", perturb), rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:A resumed run keeps the settings of its checkpoint")
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accelerator", DEVICES)
def test_an_interrupted_run_continues_bit_for_bit(tmp_path: Path, accelerator: str, precision: str) -> None:
    """Dropout and noise draw from the generator of the device, and the resumed run is seeded differently."""
    options = {"trainer": {"accelerator": accelerator, "devices": 1}, "precision": precision}
    test_resume.assert_resumes(tmp_path, 8, 10, options)
    saved = torch.load(tmp_path / "first" / "step=8.ckpt", weights_only=True)
    (states,) = saved["callbacks"]["STNCallback"]["surroundings"]["generators"]
    assert ("cuda" in states) == torch.cuda.is_available()


@pytest.fixture
def _process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End the process group and unset its variables after the test; keep Lightning from changing the threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = set(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.mark.usefixtures("_process_group")
@pytest.mark.filterwarnings("default")  # torch and NCCL warn about a group of one
@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("accelerator", DEVICES)
def test_alexnet_example_trains_under_ddp(accelerator: str, perturb: str) -> None:
    """All fifteen hyperparameters are read and move, on random images."""
    L.seed_everything(3, verbose=False)
    module, place = example("cifar10_alexnet").SelfTunedAlexNet(0.125, 0.01), Place()
    start = module.hyperparameters.unconstrained.clone()
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    data = DataLoader(TensorDataset(images, torch.arange(16) % 10), batch_size=8)
    wrapped = []

    class Wrapped(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            wrapped.append(type(trainer.strategy.model))

    stn = STNCallback(train_steps=1, warmup=0, perturb=perturb)  # type: ignore[arg-type]
    run = trainer(stn, place, Wrapped(), accelerator=accelerator, devices=1, strategy="ddp", max_epochs=2)
    run.fit(module, data, data)
    assert wrapped == [nn.parallel.DistributedDataParallel]
    assert len(module.hyperparameters.names) == 15
    assert module.hyperparameters.unread() == []
    assert_trained_on(accelerator, module, place, start)


@pytest.mark.gpu
@pytest.mark.parametrize("perturb", PERTURB)
def test_compiled_network_trains_as_the_eager_one(perturb: str) -> None:
    """In whole graphs, by the default compiler, with torch's random numbers."""
    torch.compiler.reset()
    settings = {"accelerator": "gpu", "devices": 1}
    plain = train(build(), perturb, trainer_settings=settings)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = train(build(), perturb, "net.compile", trainer_settings=settings, fullgraph=True)
    torch.compiler.reset()
    # Adam normalises hypergradients, which amplifies the rounding errors of small ones.
    assert_equal_weights(compiled, plain, rtol=1e-2, atol=1e-3)
    assert (plain.hyperparameters.unconstrained != build().hyperparameters.unconstrained).all()
