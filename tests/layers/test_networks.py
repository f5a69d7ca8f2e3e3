"""Common networks (torchvision, LSTM, GRU, transformer encoder): converted, trained with a Trainer, and exported."""

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from support import random_gates, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stn import Float, HyperparameterSet, STNCallback, STNModule, convert, export
from lightning_stn.augment import GaussianNoise
from lightning_stn.regularizers import Dropout

Build = Callable[[], nn.Module]


class Sequence(nn.Module):
    """A recurrent layer and a classifier on its last output."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return out


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(7 * 16, 5))


IMAGES = ["alexnet", "resnet18", "mobilenet_v3_small", "convnext_tiny", "vit_b_16"]
NETWORKS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "encoder": (encoder, (7, 16)),
    "lstm": (lambda: Sequence(nn.LSTM(16, 16, 2, batch_first=True, dropout=0.1)), (7, 16)),
    "gru": (lambda: Sequence(nn.GRU(16, 8, 2, batch_first=True, bidirectional=True)), (7, 16)),
}
for _name in IMAGES:
    _settings = {"num_classes": 5} | ({"image_size": 64} if _name == "vit_b_16" else {})
    NETWORKS[_name] = (partial(torchvision.models.get_model, _name, **_settings), (3, 64, 64))
every_network = pytest.mark.parametrize(
    ("build", "shape"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in IMAGES)) for name, case in NETWORKS.items()],
)


def specifications() -> dict[str, Float]:
    return {"dropout": Float(0.0, 0.9, init=0.1), "noise": Float(0.0, None, init=0.1, perturb="batch")}


@every_network
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_convert_keeps_the_outputs_of_a_network(
    build: Build, shape: tuple[int, ...], training: bool, grad: bool
) -> None:
    plain = build().train(training)
    net, x = convert(copy.deepcopy(plain), HyperparameterSet(specifications())), torch.randn(2, *shape)
    outputs = []
    with torch.set_grad_enabled(grad):
        for module in (plain, net):
            torch.manual_seed(0)
            outputs.append(module(x))
    if isinstance(plain, nn.Sequential) and not grad:  # torch's fused attention kernel rounds differently
        torch.testing.assert_close(*outputs)
    else:
        assert torch.equal(*outputs)


class LitNetwork(STNModule):
    """A network on eight random examples, which it can fit."""

    def __init__(self, build: Build, shape: tuple[int, ...]) -> None:
        super().__init__(hyperparameters=specifications())
        self.drop, self.noise = Dropout("dropout"), GaussianNoise("noise")
        self.net = self.convert(build(), dropout="dropout")
        self.data = torch.randn(8, *shape), torch.arange(8) % 5
        self.losses: list[float] = []

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(self.drop(self.noise(x))), y)
        self.losses.append(loss.item())
        return loss

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@every_network
def test_twenty_training_steps_lower_the_loss_and_change_every_hyperparameter(
    build: Build, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module = LitNetwork(build, shape)
    start = module.hyperparameters.unconstrained.clone()
    callback = STNCallback(train_steps=1, warmup=0, perturb="batch", lr=0.05)
    run = trainer(callback, max_epochs=1)
    data = DataLoader([module.data] * 20, batch_size=None)  # type: ignore[arg-type]
    run.fit(module, data, DataLoader([module.data], batch_size=None))  # type: ignore[arg-type]
    assert run.global_step == len(module.losses) == 20
    assert sum(module.losses[-5:]) < sum(module.losses[:5])
    assert (module.hyperparameters.unconstrained != start).all()


@every_network
def test_exported_network_runs_in_a_process_without_this_package(
    build: Build, shape: tuple[int, ...], tmp_path: Path
) -> None:
    plain = build()
    plain = plain.recurrent if isinstance(plain, Sequence) else plain  # unpickling Sequence would import the package
    net = random_gates(convert(copy.deepcopy(plain), HyperparameterSet(specifications())), 0.01).eval()
    taken, x = export(net), torch.randn(2, *shape)
    assert [type(module) for module in taken.modules()] == [type(module) for module in plain.modules()]
    assert list(taken.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        torch.save((taken.state_dict(), x, net(x)), tmp_path / "net.pt")
    torch.save(torch.nn.Sequential(taken), tmp_path / "whole.pt")
    code = (
        "import sys; sys.modules['lightning_stn'] = None\n"
        "import torch\n"
        "state, x, y = torch.load(sys.argv[1] + '/net.pt')\n"
        "net = torch.load(sys.argv[1] + '/whole.pt', weights_only=False)[0].eval()\n"
        "net.load_state_dict(state)\n"
        "with torch.no_grad(): torch.testing.assert_close(net(x), y, rtol=1e-5, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
