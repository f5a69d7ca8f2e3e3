"""A row for each example meets the batch, and no dimension that has its size by chance."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from support import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import Float, STNCallback, STNModule
from lightning_stn.callback import stn as hooks
from lightning_stn.callback.row_check import enlarged

EXAMPLES = 4


class Sequences(STNModule):
    """Mean squared output of a network on sequences `[n, t, 6]`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(hyperparameters={"rate": Float(0.0, 0.9, init=0.2)})
        self.net = self.convert(network, dropout="rate")

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    validation_loss = training_loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Positions(nn.Module):
    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.positions, self.linear, self.drop = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Dropout(0.1)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.linear(self.drop(input) + self.positions(torch.arange(input.shape[1])))
        return output


class BatchedPositions(Positions):
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.linear(self.drop(input) + self.positions(torch.arange(input.shape[1]).unsqueeze(0)))
        return output


class TimeFirst(Positions):
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.drop(self.linear(input.transpose(0, 1)))
        return output


class DropsPositions(Positions):
    """Only the dropout meets the positions, whose embedding the batch does not index."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.linear(input + self.drop(torch.ones(input.shape[1], 6)))
        return output


def sequences(length: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(12, length, 6, generator=generator)), batch_size=EXAMPLES)


def fit(module: STNModule, length: int, **settings: Any) -> None:
    stn = STNCallback(**{"perturb": "example", "warmup": 0, "train_steps": 1, "seed": 3} | settings)
    trainer(stn, max_epochs=1).fit(module, sequences(length), sequences(length))


@pytest.mark.parametrize("network", [Positions, TimeFirst, DropsPositions])
@pytest.mark.parametrize("method", ["stn", "delta-stn"])
def test_dimension_that_equals_the_batch_by_chance_is_refused(network: Callable[[], nn.Module], method: str) -> None:
    with pytest.raises(ValueError, match=r"has 4 entries, as many as the batch has.*with 5 examples.*perturb='batch'"):
        fit(Sequences(network()), EXAMPLES, method=method)


@pytest.mark.parametrize("length", [3, EXAMPLES])
def test_batch_first_trains_at_every_length(length: int) -> None:
    fit(Sequences(BatchedPositions()), length)


def test_a_shared_row_needs_no_check() -> None:
    fit(Sequences(Positions()), EXAMPLES, perturb="batch")


class Remembers(Sequences):
    """Everything that an evaluation of the loss may change: statistics, counters, metrics, random numbers."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(5), nn.Dropout(0.1)))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.mean = torchmetrics.MeanMetric()
        self.noise: list[tuple[float, float, float]] = []

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_loss(batch, batch_idx)
        if self.runs_for == "weights":
            self.noise.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        self.calls.add_(1)
        self.mean(loss.detach())
        self.log("loss", loss)
        return loss

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_loss(batch, batch_idx)


def test_check_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = 0
    original = hooks.check_rows

    def run(check: Callable[..., None]) -> Remembers:
        monkeypatch.setattr(hooks, "check_rows", check)
        module = Remembers()
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        fit(module, 5)
        return module

    def counted(*arguments: Any) -> None:
        nonlocal checks
        checks += 1
        original(*arguments)

    checked, unchecked = run(counted), run(lambda *arguments: None)
    assert checks == 1
    assert checked.calls == 3
    assert checked.noise == unchecked.noise
    assert checked.mean.compute() == unchecked.mean.compute()
    assert all(torch.equal(value, unchecked.state_dict()[name]) for name, value in checked.state_dict().items())


class OneSize(Sequences):
    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_loss([batch[0].view(EXAMPLES, -1, 6)], batch_idx) if len(batch[0]) else batch[0].sum()


def test_a_loss_of_one_batch_size_trains_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"could not check with 5 examples.*RuntimeError: shape.*perturb='batch'"):
        fit(OneSize(BatchedPositions()), 5)


class TimeFirstBatches(Sequences):
    """The batch itself is `[t, n, 6]`."""

    def infer_batch_size(self, batch: Any) -> int:
        size: int = batch[0].shape[1]
        return size


@pytest.mark.parametrize("steps", [EXAMPLES, 7])
def test_enlarges_the_dimension_of_the_examples(steps: int) -> None:
    batch = {"x": [torch.randn(steps, EXAMPLES, 6)], "mask": torch.ones(steps, EXAMPLES), "name": "words"}

    class Named(TimeFirstBatches):
        def infer_batch_size(self, batch: Any) -> int:
            size: int = batch["x"][0].shape[1]
            return size

    larger = enlarged(Named(BatchedPositions()), batch, EXAMPLES)
    assert larger["x"][0].shape == (steps, EXAMPLES + 1, 6)
    assert larger["mask"].shape == (steps, EXAMPLES + 1)
    assert larger["name"] == "words"
    assert torch.equal(larger["x"][0][:, :-1], batch["x"][0])
    assert torch.equal(larger["x"][0][:, -1], batch["x"][0][:, 0])


def test_a_batch_of_unknown_type_is_not_enlarged() -> None:
    class Graphs(Sequences):
        def infer_batch_size(self, batch: Any) -> int:
            size: int = batch.graphs
            return size

    assert enlarged(Graphs(BatchedPositions()), SimpleNamespace(graphs=EXAMPLES), EXAMPLES) is None
