"""The validation loss of a module at given hyperparameters, without a Trainer and without a trace in the module."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stn.arguments import is_whole
from lightning_stn.binding import bind
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.kept import keep_metrics
from lightning_stn.layers import ResponseLayer
from lightning_stn.methods.base import check_loss
from lightning_stn.randomness import random_state, set_random_state


def require_module(reader: str, module: Any) -> Any:
    """Return an argument that is an `STNModule` with a converted network.

    Args:
        reader: name of the function, for error messages.
        module: the argument. Its class stands above this package, so it is known by what it has.

    Raises:
        TypeError: the argument is no `STNModule`.
        ValueError: no layer responds to its hyperparameters.
    """
    hyperparameters = getattr(module, "hyperparameters", None)
    if not isinstance(module, nn.Module) or not isinstance(hyperparameters, HyperparameterSet):
        raise TypeError(
            f"{reader}: expected module to be an STNModule, got {type(module).__name__}; pass the LightningModule that "
            "derives from STNModule, such as trainer.lightning_module."
        )
    layers = (layer for layer in module.modules() if isinstance(layer, ResponseLayer))
    if not any(layer.hyperparameters is hyperparameters for layer in layers):
        raise ValueError(
            f"{reader}: expected module to hold a converted network, got {type(module).__name__} without a layer that "
            "responds; call self.net = self.convert(net, ...) in it."
        )
    return module


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Put a module into eval mode, without gradients.

    Within the block `self.log` does nothing, and the Trainer, if there is one, validates. On exit the modes of all
    submodules, the Trainer's stage and the global random generators are as they were.
    """
    modes = [inner for inner in module.modules() if inner.training]
    random = random_state()
    module.eval()
    try:
        with trainer_stage(module, training=False), module._stn_mute(), torch.no_grad():
            yield
    finally:
        for inner in modes:
            inner.training = True
        set_random_state(random)


@contextmanager
def trainer_stage(module: Any, *, training: bool) -> Iterator[None]:
    """Let the module's Trainer, if there is one, train or validate, since batch-transfer hooks may ask it."""
    trainer = getattr(module, "_trainer", None)  # the public property raises where there is none
    if trainer is None:
        yield
        return
    before = trainer.state.stage
    trainer.training, trainer.validating = training, not training
    try:
        yield
    finally:
        trainer.state.stage = before


@dataclass(frozen=True, eq=False)
class Batches:
    """Validation batches in memory, in the order of their loader.

    Args:
        module: the module whose batch-transfer hooks they pass through.
        batches: as the loader yields them.
        weights: share of each batch in the mean, `[b]`, float64.
        random: states of the random generators at the begin of every evaluation.
    """

    module: Any
    batches: list[Any]
    weights: Tensor
    random: dict[str, Any]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Index and batch, on the module's device; random generators begin in the same state every time."""
        set_random_state(self.random)
        for index, batch in enumerate(self.batches):
            yield index, transfer(self.module, batch)

    def mean(self, results: list[Tensor]) -> Tensor:
        """Weighted mean of a result `[...]` for each batch, float64 on the CPU."""
        stacked = torch.stack(results).detach().cpu().double()
        return (self.weights @ stacked.flatten(1)).reshape(stacked.shape[1:])

    def loss(self, module: Any, sample: Tensor) -> float:
        """Mean validation loss at a sample, `[1, h]`, through the response; call it within `evaluating`.

        All batches are read at one sample before the next, so that a network that keeps a hidden state from batch to
        batch sees them in order, and effective weights are built once.

        Args:
            module: the module, or a copy of it.
            sample: unconstrained units.

        Raises:
            ValueError: `validation_loss` returns anything but a scalar tensor.
        """
        with bind(module.hyperparameters, sample), keep_metrics(module):
            losses = [check_loss(module.validation_loss(batch, index), "validation_loss") for index, batch in self]
        return self.mean([loss.reshape(1) for loss in losses]).item()

    def losses(self, module: Any, samples: Tensor) -> Tensor:
        """`loss` at each row of `[p, h]`, `[p]`, float64 on the CPU."""
        losses = [self.loss(module, sample) for sample in samples.unsqueeze(1)]
        return torch.tensor(losses, dtype=torch.float64, device="cpu")


def read_batches(reader: str, module: Any, loader: Iterable[Any], limit: int | None) -> Batches:
    """Read validation batches once, and keep them in memory; call it within `evaluating`.

    A batch counts by its size or, where `infer_batch_size` cannot tell that of every batch, all batches equally.

    Args:
        reader: name of the function, for error messages.
        module: the module.
        loader: yields the batches.
        limit: largest number of batches; None for all.

    Raises:
        ValueError: there is no batch, no batch has an example, or `limit` is not a whole number of at least 1.
    """
    if limit is not None and not is_whole(limit, 1):
        raise ValueError(
            f"{reader}: expected batches to be a whole number of at least 1, got {limit!r}; None reads all."
        )
    random = random_state()
    batches = list(itertools.islice(loader, limit))
    if not batches:
        raise ValueError(f"{reader}: expected a loader with at least one batch, got none; pass a loader with data.")
    try:
        sizes = [module.infer_batch_size(batch) for batch in batches]
    except ValueError:
        sizes = [1] * len(batches)
    weights = torch.tensor(sizes, dtype=torch.float64, device="cpu")
    if not weights.sum() > 0:
        raise ValueError(f"{reader}: expected a loader with at least one example, got batches of the sizes {sizes}.")
    return Batches(module, batches, weights / weights.sum(), random)


def transfer(module: Any, batch: Any) -> Any:
    """Move a batch to the module's device, through the batch-transfer hooks of the module or its datamodule."""
    # Private, but what every loop of Lightning calls (2.5 and 2.6); it knows whether the datamodule has the hooks.
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return module._apply_batch_transfer_handler(batch, device=module.device, dataloader_idx=0)
