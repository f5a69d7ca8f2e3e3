"""Shared by several test files: a small self-tuning module on synthetic data, and a quiet Trainer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import DeltaSTN, Float, Integer, STNCallback, STNModule
from lightning_stn.augment import Cutout, GaussianNoise
from lightning_stn.layers import ResponseLayer
from lightning_stn.specifications import ResponseForm

CLASSES = 3

METHODS: dict[str, dict[str, Any]] = {
    "stn": {},
    "delta-stn": {"method": "delta-stn"},
    "uncentred": {"method": {"name": "stn", "centred": False}},
}
"""Settings of `STNCallback` by method."""

FORMS: dict[str, dict[str, Any]] = {
    "stn": {},
    "delta-stn": {"method": "delta-stn"},
    "delta-stn, not linearised": {"method": DeltaSTN(linearize=False)},
}
each_setting = pytest.mark.parametrize(
    "settings",
    [{**settings, "perturb": perturb} for settings in FORMS.values() for perturb in ("example", "batch")],
    ids=[f"{form}, {perturb}" for form in FORMS for perturb in ("example", "batch")],
)
"""Settings of `STNCallback` for what users write: methods, each with both ways to perturb."""

METHOD_PARAMS = [*list(METHODS)[:2], pytest.param("uncentred", marks=pytest.mark.slow)]
every_method = pytest.mark.parametrize("method", METHOD_PARAMS)


def lightning_before(version: str) -> bool:
    return Version(L.__version__) < Version(version)


def images(n: int, seed: int = 0, size: int = 6) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    pixels = torch.randn(n, 1, size, size, generator=generator) + labels[:, None, None, None]
    return TensorDataset(pixels, labels)


def loader(n: int, batch_size: int = 8, seed: int = 0, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(images(n, seed), batch_size=batch_size, **kwargs)


def small_net(rate: float = 0.1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(4, affine=False),
        nn.Dropout2d(rate),
        nn.Flatten(),
        nn.Linear(144, 16),
        nn.ReLU(),
        nn.Dropout(rate),
        nn.Linear(16, CLASSES),
    )


class LitSmall(STNModule):
    """Three hyperparameters on a small convolutional network; records the order of its losses."""

    def __init__(
        self,
        hyperparameters: dict[str, Any] | None = None,
        dropout: str | None = "dropout",
        response: ResponseForm = "full",
    ) -> None:
        super().__init__(
            response=response,
            hyperparameters=hyperparameters
            or {
                "dropout": Float(0.0, 0.9, init=0.05),
                "noise": Float(0.0, None, init=0.1),
                "length": Integer(0, 4, init=2),
            },
        )
        self.noise = GaussianNoise("noise")
        self.cutout = Cutout("length")
        self.net = self.convert(small_net(0.1 if dropout else 0.0), dropout=dropout)
        self.events: list[str] = []

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        if self.runs_for != "response":
            self.events.append("weight")
        x, y = batch
        return F.cross_entropy(self.net(self.cutout(self.noise(x))), y)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.trainer.sanity_checking or not torch.is_grad_enabled():
            self.events.append("evaluation")
        else:
            self.events.append("hyperparameter")
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class AfterEpoch(L.Callback):
    """Ends a run after so many epochs, before its planned end."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def trainer(*callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 2,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def fit(
    module: L.LightningModule,
    callback: STNCallback | None = None,
    *,
    n: int = 24,
    ckpt_path: Path | None = None,
    **kwargs: Any,
) -> tuple[L.Trainer, STNCallback]:
    """Train on three batches an epoch by default."""
    callback = callback or STNCallback(train_steps=2, valid_steps=1, warmup=0, lr=0.05, seed=1)
    run = trainer(callback, **kwargs)
    run.fit(module, loader(n), loader(16, seed=1), ckpt_path=ckpt_path)
    return run, callback


def random_gates(net: nn.Module, std: float = 1.0, seed: int = 0) -> nn.Module:
    """Fill all response parameters with noise, so that the response matters; keep `std` small for training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in response_layers(net):
        for parameter in layer.response_parameters():
            parameter.data.normal_(std=std, generator=generator)
    return net


def response_layers(net: nn.Module) -> Iterator[ResponseLayer]:
    return (layer for layer in net.modules() if isinstance(layer, ResponseLayer))
