"""What a user registers, as `docs/networks.md` shows it, trains as what torch and torchvision have."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pages import DOCS, blocks
from support import each_setting, loader, response_layers, trainer
from torch import Tensor, nn
from torchvision.ops import StochasticDepth  # type: ignore[import-untyped]

from lightning_stn import Float, Schedule, STNCallback, STNModule
from lightning_stn.layers import registry
from lightning_stn.regularizers import registry as tunables


def block(line: str) -> str:
    (code,) = [block.code for block in blocks(DOCS / "networks.md", "python") if line in block.code]
    return code


def moved(schedule: Schedule) -> bool:
    return all(schedule.rows[0].values[name] != schedule.rows[-1].values[name] for name in schedule.names)


def tuned(module: STNModule, settings: dict[str, Any]) -> STNCallback:
    """Train a module on three batches of made-up images an epoch."""
    callback = STNCallback(train_steps=1, warmup=0, lr=0.05, seed=1, **settings)
    run = trainer(callback)
    run.fit(module, loader(24), loader(16, seed=1))
    assert run.global_step == 6
    return callback


class MyLinear(nn.Module):
    """`nn.Linear`, but not a subclass of it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        return my_product(input, self.weight) + self.bias


def my_product(input: Tensor, weight: Tensor) -> Tensor:
    return input @ weight.T


class LitLayers(STNModule):
    """A regularised network of two layers of one type."""

    def __init__(self, layer: type[MyLinear] | type[nn.Linear]) -> None:
        super().__init__(hyperparameters={"noise": Float(0.0, None, init=0.1)})
        torch.manual_seed(0)
        self.net = self.convert(nn.Sequential(nn.Flatten(), layer(36, 8), nn.ReLU(), layer(8, 3)))

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        strength = self.hyperparameters["noise"].reshape(-1, 1, 1, 1)
        return F.cross_entropy(self.net(images + strength * torch.ones_like(images)), labels)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@each_setting
def test_registered_layer_trains_as_torch_s(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RESPONSES", dict(registry._RESPONSES))
    names: dict[str, Any] = {"MyLinear": MyLinear, "my_product": my_product}
    exec(block("@register_response(MyLinear)"), names)
    ours, theirs = LitLayers(MyLinear), LitLayers(nn.Linear)
    assert [type(layer) for layer in response_layers(ours.net)] == [names["ResponseMyLinear"]] * 2
    assert moved(tuned(ours, settings).schedule)
    tuned(theirs, settings)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-6)
    assert all(
        layer.gate_weights("weight").any() and layer.gate_weights("bias").any() for layer in response_layers(ours.net)
    )
    assert [type(layer) for layer in ours.export().modules()][2:] == [MyLinear, nn.ReLU, MyLinear]


class MyDropPath(nn.Module):
    """Stochastic depth, but not torchvision's."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob


class Branches(nn.Module):
    """A residual branch that is dropped, and a readout.

    Args:
        drop_path: the module that drops the branch.
    """

    def __init__(self, drop_path: nn.Module) -> None:
        super().__init__()
        self.branch, self.drop_path, self.readout = nn.Linear(36, 36), drop_path, nn.Linear(36, 3)

    def forward(self, input: Tensor) -> Tensor:
        input = input.flatten(1)
        output: Tensor = self.readout(input + self.drop_path(self.branch(input).tanh()))
        return output


class LitBranches(STNModule):
    """A network whose branch is dropped at a tuned rate."""

    def __init__(self, drop_path: nn.Module) -> None:
        super().__init__(hyperparameters={"rate": Float(0.0, 0.9, init=0.2)})
        torch.manual_seed(0)
        self.net = self.convert(Branches(drop_path), drop_path="rate")

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@each_setting
def test_registered_drop_path_trains_as_torchvision_s(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunables, "_TUNABLE", dict(tunables._TUNABLE))
    names: dict[str, Any] = {"MyDropPath": MyDropPath}
    exec(block("@register_tunable(MyDropPath, "), names)
    ours = LitBranches(MyDropPath(0.2))
    assert type(ours.net.drop_path) is names["TunedMyDropPath"]
    assert moved(tuned(ours, settings).schedule)
    theirs = LitBranches(StochasticDepth(0.2, "row"))
    tuned(theirs, settings)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    exported: Any = ours.export()
    assert type(exported.drop_path) is MyDropPath
    assert exported.drop_path.drop_prob == ours.hyperparameters.values()["rate"]
