"""What every task consists of: a plain module, its self-tuned subclass, data, and a space of hyperparameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stn import Float, Hyperparameter, Integer, STNModule
from lightning_stn.regularizers import Dropout
from lightning_stn.specifications import ResponseForm

Constants = Mapping[str, float]
"""Value of each hyperparameter by name, natural units."""

Strengths = Mapping[str, str | float]
"""Strength of each regulariser by name: a constant, or the name of the hyperparameter that tunes it."""


class Loaders(NamedTuple):
    """Batches of one run; the validation examples select and tune, the test examples are read once."""

    train: DataLoader
    valid: DataLoader
    test: DataLoader


class Folders(NamedTuple):
    """Where a task finds its data, and where it may keep what it computes once."""

    data: Path
    cache: Path


class PlainModule(L.LightningModule):
    """An ordinary LightningModule, whose regularisation has to be chosen by hand.

    A subclass builds `self.net` in its constructor, which takes `strengths` alone, and defines `training_step`,
    `evaluate` and `optimizer`.
    """

    net: nn.Module

    def evaluate(self, batch: Any, stage: str) -> Tensor:
        """The loss without regularisation; may log further metrics as `<stage>_<metric>`."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the weights, at its largest learning rate."""
        raise NotImplementedError

    def examples(self, batch: Any) -> int:
        """Number of examples in a batch."""
        return len(batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the validation loss."""
        self.log("val_loss", self.evaluate(batch, "val"), batch_size=self.examples(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the test loss."""
        self.log("test_loss", self.evaluate(batch, "test"), batch_size=self.examples(batch))

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser, whose rate falls to zero along a cosine over the epochs of the run."""
        optimizer = self.optimizer()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class SelfTuned(STNModule):
    """Stands in front of a `PlainModule`, whose `training_step` then gives the training loss."""

    def __init__(self, specifications: Mapping[str, Hyperparameter], response: ResponseForm = "full") -> None:
        names = {name: name for name in specifications}
        super().__init__(hyperparameters=specifications, response=response, strengths=names)
        self.net = self.convert(self.net)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        return self.evaluate(batch, "tune")

    def infer_batch_size(self, batch: Any) -> int:
        """Number of examples."""
        return self.examples(batch)


class Classifier(PlainModule):
    """Cross entropy and accuracy of a network on inputs and labels.

    A subclass sets `self.augment`, which acts on prepared inputs in training, and may override `prepare` and
    `normalise`.
    """

    augment: nn.Module

    def prepare(self, inputs: Tensor) -> Tensor:
        """What augmentation acts on."""
        return inputs

    def normalise(self, inputs: Tensor) -> Tensor:
        """What the network reads, after augmentation."""
        return inputs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy with dropout and augmentation."""
        inputs, labels = batch
        return F.cross_entropy(self.net(self.normalise(self.augment(self.prepare(inputs)))), labels)

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        """Cross entropy; logs the accuracy."""
        inputs, labels = batch
        logits = self.net(self.normalise(self.prepare(inputs)))
        self.log(f"{stage}_accuracy", (logits.argmax(1) == labels).float().mean(), batch_size=len(labels))
        return F.cross_entropy(logits, labels)


@dataclass(frozen=True)
class Task:
    """One task: a plain module that is trained at constants, and the same module with tuned hyperparameters.

    Args:
        plain: the ordinary module; its constructor takes `strengths`.
        self_tuned: the subclass with `SelfTuned` in front.
        space: range of each hyperparameter, for search and tuning alike.
        loaders: the data of a run by its seed.
        epochs: length of a run.
        metric: what is reported beside the loss: "accuracy", "perplexity" or "rmse".
        clip: largest norm of the weights' gradient; None for no clipping.
        begin: sets weights that a run begins from, instead of random ones.
    """

    plain: Callable[..., PlainModule]
    self_tuned: Callable[..., STNModule]
    space: Mapping[str, Hyperparameter]
    loaders: Callable[[int, Folders], Loaders]
    epochs: int
    metric: str
    clip: float | None = None
    begin: Callable[[nn.Module, Folders], None] | None = None

    @property
    def off(self) -> Constants:
        """No regularisation."""
        return dict.fromkeys(self.space, 0)

    @property
    def start(self) -> Constants:
        """Where a self-tuned run starts: dropouts at 0.1, others a tenth along their range, on a log scale halfway."""
        shares = {name: 0.5 if is_logarithmic(one) else 0.1 for name, one in self.space.items()}
        return {name: at_fraction(name, one, shares[name]) for name, one in self.space.items()}

    def build(self, constants: Constants | None, folders: Folders) -> PlainModule:
        """The plain module at constants; None for no regularisation."""
        return self._begun(self.plain(strengths=self.off if constants is None else constants), folders)

    def tuned(self, start: Constants, folders: Folders, response: ResponseForm) -> STNModule:
        """The self-tuned module, whose hyperparameters start at these values."""
        specifications = {name: replace(spec, init=_inside(spec, start[name])) for name, spec in self.space.items()}
        return self._begun(self.self_tuned(specifications, response), folders)

    def _begun(self, module: Any, folders: Folders) -> Any:
        if self.begin is not None:
            self.begin(module.net, folders)
        return module


def _inside(specification: Hyperparameter, value: float) -> float:
    """The value, a little inside a range whose bound it has reached; a start on a bound could not be represented."""
    low, high = specification.low, specification.high
    if isinstance(low, int):  # An `Integer` may start on a bound.
        return value
    margin = 1e-6 * (high - low)
    return min(max(value, low + margin), high - margin)


def at_fraction(name: str, specification: Hyperparameter, fraction: float) -> float:
    """A rate of dropout of this fraction, or the value at this fraction of another range."""
    low, high = bounds(specification)
    if name.endswith("dropout"):
        return min(fraction, high)
    if is_logarithmic(specification):
        return low * (high / low) ** fraction
    value = low + fraction * (high - low)
    return round(value) if isinstance(specification, Integer) else value


def is_logarithmic(specification: Hyperparameter) -> bool:
    """Whether a hyperparameter is perturbed and tuned on a logarithmic scale."""
    return isinstance(specification, Float) and specification.log


def bounds(specification: Hyperparameter) -> tuple[float, float]:
    """Lowest and highest value of a hyperparameter with a range."""
    assert specification.bounds is not None
    return specification.bounds


def dropout(rate: str | float) -> nn.Module:
    """`nn.Dropout` at a constant rate, or a dropout whose rate is a hyperparameter."""
    return Dropout(rate) if isinstance(rate, str) else nn.Dropout(rate)


def batches(data: TensorDataset, size: int, seed: int | None = None) -> DataLoader:
    """Batches in order; with a seed, shuffled by a separate generator, so that compared runs read the same order."""
    if seed is None:
        return DataLoader(data, size)
    return DataLoader(data, size, shuffle=True, generator=torch.Generator().manual_seed(seed))
