"""After the first step of a run with a row for each example: is the dimension that rows meet really the batch?"""

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_stn.functional import RowsError
from lightning_stn.kept import keep_buffers, keep_metrics
from lightning_stn.methods.linearized import eager
from lightning_stn.module import STNModule
from lightning_stn.passes import Pass


def check_rows(trainer: Trainer, module: STNModule, batch: Any, batch_idx: int) -> None:
    """Evaluate the training loss once with one example more, so that a size that is equal by chance is seen.

    A position embedding of as many positions as the batch has examples fits a row for each example by its shape alone.
    With one example more it does not. Nothing remembers this evaluation: random numbers, buffers and metrics are as
    before, and `self.log` does nothing. Where a batch cannot be enlarged, or the loss cannot be computed from it, a
    warning says so.

    Args:
        trainer: the Trainer of the run.
        module: the module of the run.
        batch: the first training batch.
        batch_idx: its index.

    Raises:
        ValueError: a module takes a dimension that does not grow with the batch for that of the examples.
    """
    examples = module.infer_batch_size(batch)
    if examples < 2:
        return  # one row is shared
    larger = enlarged(module, batch, examples)
    reason: object = f"a batch of type {type(batch).__name__} cannot be enlarged"
    if larger is not None:
        try:
            with ExitStack() as stack:
                for unremembered in (isolate_rng(), keep_buffers(module, lambda *_: True), keep_metrics(module)):
                    stack.enter_context(unremembered)
                stack.enter_context(trainer.precision_plugin.train_step_context())
                _at_rows(module, examples + 1, larger, batch_idx)
            return
        except RowsError as error:
            raise ValueError(
                f"STNCallback(perturb='example'): a dimension has {examples} entries, as many as the batch has "
                f"examples, but not because of them: with {examples + 1} examples, {error}"
            ) from error
        except Exception as error:  # of the user's code, which need not work with a batch of another size
            reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"STNCallback(perturb='example'): could not check with {examples + 1} examples that the first dimension of "
        f"what each module gets is the batch ({reason}). Make sure that no other dimension of {examples} entries comes "
        "first, such as time, or share one row over the batch with perturb='batch'.",
        stacklevel=2,
    )


def enlarged(module: STNModule, batch: Any, examples: int) -> Any:
    """A copy of the batch in which its first example comes twice; None where that cannot be done.

    Args:
        module: says how many examples a batch has.
        batch: tensors in any nesting of lists, tuples, mappings and dataclasses.
        examples: number of examples in it.
    """
    for dim in (0, 1):

        def enlarge(tensor: Tensor, dim: int = dim) -> Tensor:
            if tensor.dim() <= dim or tensor.size(dim) != examples:
                return tensor
            return torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)

        try:
            larger = apply_to_collection(batch, Tensor, enlarge)
            if module.infer_batch_size(larger) == examples + 1:
                return larger
        except Exception:  # a batch of the user's own type
            return None
    return None


def _at_rows(module: STNModule, rows: int, batch: Any, batch_idx: int) -> None:
    """Evaluate the training loss at a sample of so many rows."""
    hyperparameters = module.hyperparameters
    sample = hyperparameters.sample(rows)
    run = Pass(hyperparameters.gate_input(sample), values=hyperparameters.bound_values(sample), extra=True)
    with hyperparameters.running(run), eager():
        module.training_loss(batch, batch_idx)
