"""A step leaves no tensor behind, whether or not a backward pass reaches all that was built for it."""

import gc
from typing import Any, Literal

import lightning as L
import pytest
import torch
from support import METHODS, LitSmall, every_method, loader, trainer
from torch import Tensor, nn

from lightning_stn import Float, STNCallback, STNModule


def alive() -> int:
    """Number of tensors that are in use after a collection of unreachable ones."""
    gc.collect()
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


class Counts(L.Callback):
    """Counts the tensors in use at the start of each epoch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.seen.append(alive())


@every_method
@pytest.mark.parametrize("perturb", ["batch", pytest.param("example", marks=pytest.mark.slow)])
def test_a_run_holds_as_many_tensors_after_many_steps_as_after_few(
    method: str, perturb: Literal["batch", "example"]
) -> None:
    counts = Counts()
    stn = STNCallback(train_steps=1, warmup=0, perturb=perturb, **METHODS[method])
    trainer(stn, counts, max_epochs=4, log_every_n_steps=1000, num_sanity_val_steps=1).fit(
        LitSmall(), loader(24), loader(16)
    )
    later = counts.seen[2:]
    assert len(later) == 2
    assert max(later) == min(later)


class Unused(STNModule):
    """A layer computes, and the loss does not read its output."""

    def __init__(self) -> None:
        super().__init__(hyperparameters={"rate": Float(0.0, 0.9)})
        self.net = self.convert(nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 6)), dropout="rate")
        self.beside = self.convert(nn.Linear(6, 6))

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = batch[0].flatten(1)[:, :6]
        self.beside(inputs)
        return self.net(inputs).square().mean()

    validation_loss = training_loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_an_output_that_no_loss_reads_is_freed() -> None:
    counts = Counts()
    stn = STNCallback(train_steps=1, warmup=0)
    trainer(stn, counts, max_epochs=4, log_every_n_steps=1000).fit(Unused(), loader(24), loader(16))
    assert max(counts.seen[2:]) == min(counts.seen[2:])
