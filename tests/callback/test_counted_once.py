"""What a module counts beside its losses counts each batch of an epoch once, whatever else a step computes."""

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from support import CLASSES, LitSmall, images, loader, trainer
from torch import Tensor
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_stn import DeltaSTN, STNCallback

SETTINGS: dict[str, dict[str, Any]] = {
    "stn": {},
    "by example": {"perturb": "example"},
    "delta-stn": {"method": "delta-stn"},
    "delta-stn in one pass": {"method": DeltaSTN(passes=1)},
}


class Counts(LitSmall):
    """Metrics of several kinds in both losses, and a list."""

    def __init__(self) -> None:
        super().__init__()
        accuracy = {"accuracy": MulticlassAccuracy(CLASSES, average="micro"), "f1": MulticlassF1Score(CLASSES)}
        self.scores = MetricCollection(accuracy)
        self.seen = CatMetric()
        self.mean_loss = MeanMetric()
        self.counted: list[int] = []
        self.predictions: list[Tensor] = []
        self.kinds: set[str] = set()
        self.examples = 0

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_loss(batch, batch_idx)
        self.kinds.add(self.runs_for)
        self.mean_loss(loss.detach(), weight=len(batch[1]))
        self.log("mean_loss", self.mean_loss, on_step=False, on_epoch=True)
        return loss

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        self.kinds.add(self.runs_for)
        self.scores.update(logits, y)
        self.seen.update(y)
        self.log_dict(self.scores)
        if self.runs_for == "evaluation":
            self.predictions.append(logits.argmax(1))
        return F.cross_entropy(logits, y)

    def on_train_epoch_end(self) -> None:
        self.counted.append(int(self.mean_loss.weight))
        super().on_train_epoch_end()

    def on_validation_epoch_end(self) -> None:
        self.examples = self.seen.compute().numel()
        assert self.scores["accuracy"]._update_count == 3
        assert sum(map(len, self.predictions)) == 20
        self.seen.reset()
        self.predictions.clear()
        super().on_validation_epoch_end()


@pytest.mark.parametrize("name", SETTINGS)
def test_metrics_count_every_batch_of_an_epoch_once(name: str) -> None:
    module, settings = Counts(), SETTINGS[name]
    run = trainer(STNCallback(train_steps=1, valid_steps=2, warmup=0, seed=1, **settings), max_epochs=2)
    run.fit(module, loader(24), loader(20, seed=1))
    assert module.counted == [24, 24]
    assert module.examples == 20
    extra = {"response"} if name in ("by example", "delta-stn") else set()
    assert module.kinds == {"weights", "hyperparameters", "evaluation"} | extra
    module.eval()
    x, y = images(20, seed=1)[:]
    expected = (module.net(x).argmax(1) == y).float().mean()
    assert run.callback_metrics["accuracy"] == pytest.approx(float(expected))


def test_metric_of_a_step_that_fails_is_as_it_was() -> None:
    class Fails(Counts):
        def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().validation_loss(batch, batch_idx)
            if self.runs_for == "hyperparameters":
                raise RuntimeError("stop")
            return loss

    module = Fails()
    run = trainer(STNCallback(train_steps=1, warmup=0), max_epochs=1)
    with pytest.raises(RuntimeError, match="stop"):
        run.fit(module, loader(24), loader(20, seed=1))
    assert module.seen._update_count == module.scores["accuracy"]._update_count == 0
    assert module.seen.metric_state == {"value": []}
    assert torch.equal(module.scores["accuracy"].tp, torch.zeros_like(module.scores["accuracy"].tp))


def test_a_loss_by_hand_is_an_evaluation() -> None:
    module = LitSmall()
    assert module.runs_for == "evaluation"
    assert isinstance(module, L.LightningModule)
