"""Real Lightning runs, plain and self-tuning, and their measurements: seconds and bytes."""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from networks import Batch, Batches, Case, loss
from torch import Tensor, nn

from lightning_stn import Float, STNCallback, STNModule, Warmup
from lightning_stn.layers import ResponseLayer
from lightning_stn.specifications import ResponseForm

HYPERPARAMETERS = 7
WARM = 1
"""Batches at the start of every run that are not counted."""


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of all runs; its rate is small, so that no weight diverges on noise."""
    return torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)


class Plain(L.LightningModule):
    """Ordinary training in automatic optimisation."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss."""
        return loss(self.net, batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss, as `STNModule` does."""
        self.log("val_loss", loss(self.net, batch), prog_bar=True, sync_dist=True, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD with momentum."""
        return sgd(self)


class Tuned(STNModule):
    """`Plain` with seven hyperparameters: tuned dropout if the network has dropout; the others are idle."""

    def __init__(self, net: nn.Module, dropout: float | None, response: ResponseForm = "full") -> None:
        active = {} if dropout is None else {"dropout": Float(0.0, 0.9, init=dropout)}
        idle = {f"idle_{index}": Float(0.0, 1.0, init=0.3) for index in range(HYPERPARAMETERS - len(active))}
        super().__init__(hyperparameters={**active, **idle}, response=response)
        self.net = self.convert(net, dropout=None if dropout is None else "dropout")

    def training_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss."""
        return loss(self.net, batch)

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss."""
        return loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD with momentum."""
        return sgd(self)


@dataclass
class Marks:
    """Readings of two clocks at the boundaries of every step: (CPU or device seconds, wall seconds).

    Args:
        device: where the steps run; CPU time of the process is read on a CPU, synchronised wall time elsewhere.
    """

    device: torch.device
    starts: list[tuple[float, float]] = field(default_factory=list)
    weights: list[tuple[float, float]] = field(default_factory=list)
    ends: list[tuple[float, float]] = field(default_factory=list)

    def read(self) -> tuple[float, float]:
        """Both clocks now."""
        if self.device.type == "cpu":
            return time.process_time(), time.perf_counter()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter(),) * 2

    def weight_step(self) -> float:
        """Median seconds of a weight step, including the draw of the sample."""
        return _median(self.starts, self.weights)

    def hyperparameter_step(self) -> float:
        """Median seconds that the callback takes after a weight step."""
        return _median(self.weights, self.ends)

    def evaluation(self) -> float:
        """Median seconds of an evaluation batch."""
        return _median(self.starts, self.ends)

    def whole(self, clock: int) -> float:
        """Seconds from the first counted batch to the end (clock 0: CPU or device, 1: wall)."""
        return self.ends[-1][clock] - self.starts[WARM][clock]


def _median(first: list[tuple[float, float]], then: list[tuple[float, float]]) -> float:
    return statistics.median(b[0] - a[0] for a, b in list(zip(first, then, strict=True))[WARM:])


class Before(L.Callback):
    """Reads the clocks before other callbacks act. Lightning keeps the order of the list."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def on_train_batch_start(self, *args: Any) -> None:
        """A weight step begins, the draw of its sample included."""
        self.marks.starts.append(self.marks.read())

    def on_train_batch_end(self, *args: Any) -> None:
        """The weight step is over."""
        self.marks.weights.append(self.marks.read())

    def on_validation_batch_start(self, *args: Any) -> None:
        """An evaluation batch begins."""
        self.marks.starts.append(self.marks.read())


class After(L.Callback):
    """Reads the clocks when the other callbacks have acted."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def on_train_batch_end(self, *args: Any) -> None:
        """The hyperparameter steps, if any, are over."""
        self.marks.ends.append(self.marks.read())

    def on_validation_batch_end(self, *args: Any) -> None:
        """The evaluation batch is over."""
        self.marks.ends.append(self.marks.read())


class SavedBytes(L.Callback):
    """Counts the bytes kept for backward in a training batch; each storage once, no parameters, buffers or inputs.

    Attributes:
        activations: bytes that grow with the batch.
        effective_weights: bytes of effective weights.
    """

    def __init__(self) -> None:
        self._kept: dict[int, int] = {}
        self._effective: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.activations = self.effective_weights = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *args: Any) -> None:
        """Start to count."""
        self._kept.clear()
        self._known = [*pl_module.parameters(), *pl_module.buffers(), *batch]
        self._original = ResponseLayer._effective

        def effective(layer: ResponseLayer, name: str, sample: Tensor) -> Tensor:
            parameter = self._original(layer, name, sample)
            self._effective.append(parameter)
            return parameter

        ResponseLayer._effective = effective  # type: ignore[method-assign]
        self._hooks.__enter__()

    def on_before_backward(self, *args: Any) -> None:
        """The forward pass is over."""
        self._hooks.__exit__(None, None, None)
        ResponseLayer._effective = self._original  # type: ignore[method-assign]
        known, effective = (
            {tensor.untyped_storage().data_ptr() for tensor in tensors} for tensors in (self._known, self._effective)
        )
        self.effective_weights = sum(size for place, size in self._kept.items() if place in effective)
        self.activations = sum(size for place, size in self._kept.items() if place not in known | effective)
        self._effective.clear()


@dataclass
class Runner:
    """Starts runs of one case on one device."""

    case: Case
    device: torch.device

    def __post_init__(self) -> None:
        """Lay the data out."""
        self.training = Batches(self.case, self.device)
        self.validation = Batches(self.case, self.device)

    def trainer(self, batches: int, *callbacks: L.Callback) -> L.Trainer:
        """A quiet Trainer for `batches` batches."""
        return L.Trainer(
            accelerator="cpu" if self.device.type == "cpu" else "gpu",
            devices=1,
            max_epochs=1,
            limit_train_batches=batches,
            limit_val_batches=batches,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )

    def fit(self, module: L.LightningModule, batches: int, **settings: Any) -> Marks:
        """Time a training run; `settings` go to the STNCallback of a self-tuning module."""
        marks = Marks(self.device)
        callbacks = [Before(marks), *self._tuning(module, settings), After(marks)]
        self.trainer(WARM + batches, *callbacks).fit(module, self.training)
        return marks

    def validate(self, module: L.LightningModule, batches: int) -> Marks:
        """Time an evaluation run."""
        marks = Marks(self.device)
        callbacks = [Before(marks), *self._tuning(module, {}), After(marks)]
        self.trainer(WARM + batches, *callbacks).validate(module, self.validation, verbose=False)
        return marks

    def saved_bytes(self, module: L.LightningModule, **settings: Any) -> SavedBytes:
        """Bytes kept for backward in one weight step."""
        saved = SavedBytes()
        self.trainer(1, saved, *self._tuning(module, settings)).fit(module, self.training)
        return saved

    def _tuning(self, module: L.LightningModule, settings: dict[str, Any]) -> list[L.Callback]:
        """The STNCallback of a self-tuning module."""
        if not isinstance(module, STNModule):
            return []
        return [STNCallback(dataloader=self.validation, warmup=Warmup(WARM, "steps"), seed=0, **settings)]
