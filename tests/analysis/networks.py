"""Shared by the tests of the analyses: a small module without a Trainer, and its loss computed by hand."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from support import random_gates
from torch import Tensor, nn

from lightning_stn import Float, Integer, STNModule
from lightning_stn.specifications import ResponseForm

Batch = tuple[Tensor, Tensor]


class LitMlp(STNModule):
    """Two linear layers in float64 with random gates, and three hyperparameters."""

    def __init__(self, response: ResponseForm = "full", **specifications: Any) -> None:
        super().__init__(
            response=response,
            hyperparameters=specifications
            or {
                "rate": Float(0.0, 0.9, init=0.1, scale=0.3),
                "noise": Float(0.0, None, init=0.2, log=True),
                "length": Integer(0, 4, init=2, unit="pixels"),
            },
        )
        torch.manual_seed(0)
        self.net = self.convert(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))
        random_gates(self.net, std=0.5).double()

    def training_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        self.log("train_loss", 1.0)  # without a Trainer a warning, and so an error, where it is not muted
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        self.log("val_loss", 1.0)
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(*sizes: int, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def effective(layer: Any, distance: Tensor) -> tuple[Tensor, Tensor]:
    """`W + diag(V d) R` and `b + (C d) r` of a linear layer; with gates alone `(1 + diag(V d)) W` and `b + C d`."""
    gates, shifts = layer.weight_gate @ distance, layer.bias_gate @ distance
    with layer.reading_base():
        if layer.response_weight is None:
            return (1 + gates[:, None]) * layer.weight, layer.bias + shifts
        return layer.weight + gates[:, None] * layer.response_weight, layer.bias + shifts * layer.response_bias


def loss_by_hand(module: LitMlp, sample: Tensor, data: Iterable[Batch]) -> float:
    """Mean over all examples at `h`, `[h]`, unconstrained units, without a response layer's forward."""
    centre = module.hyperparameters.unconstrained.double() * module.hyperparameters.centred
    distance = module.hyperparameters.gate_scale * (sample.double() - centre)
    inputs, labels = (torch.cat(column) for column in zip(*data, strict=True))
    hidden = F.linear(inputs, *effective(module.net[0], distance)).tanh()
    return F.cross_entropy(F.linear(hidden, *effective(module.net[2], distance)), labels).item()
