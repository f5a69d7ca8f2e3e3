"""The documented way to tune a custom augmentation: any callable, applied to each example."""

from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tvf
from support import fit, small_net
from torch import Tensor

from lightning_stn import Float, STNCallback, STNModule


class LitSharpness(STNModule):
    """Reads the hyperparameter in `training_loss`, which runs in the weight phase only."""

    def __init__(self) -> None:
        super().__init__(hyperparameters={"sharpness": Float(0.0, 2.0, init=0.5)})
        self.net = self.convert(small_net(0.0))
        self.sampled: list[list[float]] = []

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        strengths = self.hyperparameters["sharpness"].expand(len(images)).tolist()
        if self.runs_for == "weights":  # not in the check of the rows
            self.sampled.append(strengths)
        images = torch.stack([tvf.adjust_sharpness(image, 1 + s) for image, s in zip(images, strengths, strict=True)])
        return F.cross_entropy(self.net(images), labels)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_custom_augmentation_in_the_training_loss_is_tuned() -> None:
    torch.manual_seed(0)
    module = LitSharpness()
    fit(module, STNCallback(train_steps=2, warmup=0, perturb="example", lr=0.05, seed=1))
    assert len(module.sampled) == 6
    assert all(len(set(strengths)) == 8 for strengths in module.sampled)  # a value for each example of the batch
    assert module.hyperparameters.values()["sharpness"] != 0.5
