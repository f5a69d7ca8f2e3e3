"""The plain classifier that several examples in this folder build on."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]
"""Inputs `[n, *]` and labels `[n]`."""


class LitClassifier(L.LightningModule):
    """An ordinary LightningModule: cross entropy, accuracy, and Adam with a rate that falls to zero along a cosine.

    Args:
        net: network from inputs to logits.
        classes: number of classes.
        lr: largest learning rate.
    """

    def __init__(self, net: nn.Module, classes: int, lr: float) -> None:
        super().__init__()
        self.net = net
        self.lr = lr
        self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy; a subclass adds augmentation and penalties."""
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self.evaluate(batch, "test")

    def evaluate(self, batch: Batch, stage: str) -> None:
        """Log loss and accuracy without regularisation."""
        inputs, labels = batch
        logits = self.net(inputs)
        self.accuracy(logits, labels)
        self.log_dict({f"{stage}_loss": F.cross_entropy(logits, labels), f"{stage}_accuracy": self.accuracy})

    def configure_optimizers(self) -> Any:
        """Adam over the weights."""
        adam = torch.optim.Adam(self.parameters(), lr=self.lr)
        return [adam], [torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.trainer.max_epochs or 1)]
