"""Where an interrupted run goes on: what was under way is undone, or finished when the run is resumed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_stn.callback.loaders import loader_states, resumable_loaders
from lightning_stn.callback.progress import after_batch, batch_progress, before_batch, epochs_processed
from lightning_stn.manual_optimization import WeightStep
from lightning_stn.randomness import GlobalGenerators


class Place(NamedTuple):
    """Where a run goes on.

    Args:
        generators: the global generators at that place.
        gradients: of the weights, by name, where they accumulate over several batches and have not been used; not
            copies, so that accumulation needs no further memory.
        inexact: why the run will not be the one without interruption, in words; empty where it will.
    """

    generators: GlobalGenerators
    gradients: dict[str, Tensor]
    inexact: str = ""

    @classmethod
    def here(cls, trainer: Trainer, module: LightningModule, step: WeightStep) -> "Place":
        """The place between two batches, or at the end of one, at which the run is now."""
        every, progress = max(step.accumulate_grad_batches, trainer.accumulate_grad_batches), batch_progress(trainer)
        if progress.current.ready % every == 0 or progress.is_last_batch:
            return cls(GlobalGenerators(), {})
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        if gradients and trainer.world_size > 1:
            return cls(GlobalGenerators(), {}, "the gradients that each process had accumulated are not in it")
        return cls(GlobalGenerators(), gradients)


class Bookmark:
    """The last place from which a run can go on, kept for an exception that comes before the next one.

    A batch whose weight step has not been taken is undone: loaders, buffers and Lightning's counters go back to its
    start. After the weight step the batch is kept, and what is left of it is for the resumed run. Validation begins
    again.

    Args:
        trainer: the Trainer of the run, with its optimisers.
        module: the module of the run.
        step: how the weights step in manual optimisation.

    Attributes:
        counted: whether the clock has counted the batch that is under way.
        validated: whether the validation after the last batch is over.
        epoch: epochs whose batches were over.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, step: WeightStep) -> None:
        self._module, self._step = module, step
        self._steps = [StepWatch(optimizer) for optimizer in trainer.optimizers]
        self._buffers = Buffers(module)
        self._before_step: GlobalGenerators | None = None
        self.place(trainer)

    def place(self, trainer: Trainer, *, validated: bool = False) -> None:
        """Go on from here after an exception: between two batches, before or after the validation."""
        progress = batch_progress(trainer)
        self.counted, self.validated, self.epoch = False, validated, epochs_processed(trainer)
        self._ready, self._is_last_batch = progress.total.ready, progress.is_last_batch
        self._place = Place.here(trainer, self._module, self._step)
        self._versions = [gradient._version for gradient in self._place.gradients.values()]
        self._loaders, self._states = resumable_loaders(trainer), loader_states(trainer)
        self._buffers.keep()
        for step in self._steps:
            step.forget()

    def follow_reload(self, trainer: Trainer) -> None:
        """Go on with the loaders that Lightning has reloaded at the start of an epoch."""
        loaders = resumable_loaders(trainer)
        if [id(loader) for loader in loaders] != [id(loader) for loader in self._loaders]:
            self._loaders, self._states = loaders, loader_states(trainer)

    @contextmanager
    def hyperparameter_step(self) -> Iterator[None]:
        """Go on from the start of this block, if it fails."""
        self._before_step = GlobalGenerators()
        yield
        self._before_step = None

    def weights_have_moved(self, trainer: Trainer) -> bool:
        """Whether the weight step of a batch that the clock has not counted has been taken."""
        progress = batch_progress(trainer)
        if self.counted or progress.total.ready == self._ready:
            return False
        processed = progress.current.started == progress.current.processed == progress.current.ready  # and not skipped
        return processed or any(step.began for step in self._steps)

    def go_back(self, trainer: Trainer) -> Place:
        """Return to the last place from which the run can go on; a batch whose weights have moved has to be counted."""
        self.release()
        if epochs_processed(trainer) > self.epoch:  # in a hook at the end of an epoch
            return Place.here(trainer, self._module, self._step)
        if self.counted:
            place = Place.here(trainer, self._module, self._step)
            after_batch(trainer, validated=False)
            return place._replace(generators=self._before_step or place.generators)
        self._buffers.restore()
        for loader, state in zip(self._loaders, self._states, strict=True):
            loader.rewind(state)
        if not before_batch(trainer, self._ready, self._is_last_batch):
            after_batch(trainer, validated=self.validated)
        if [gradient._version for gradient in self._place.gradients.values()] != self._versions:
            lost = "the exception came after a backward pass had added to the gradients of earlier batches"
            return self._place._replace(gradients={}, inexact=lost)
        return self._place

    def release(self) -> None:
        """Watch the optimisers no more."""
        for step in self._steps:
            step.release()

    def inexact(self, trainer: Trainer) -> str:
        """Why a run that goes on from here is not the one without interruption, in words; empty where it is."""
        if averages_weights(trainer) and trainer.validating:
            return "the weights were exchanged for their average, since the exception came in a validation"
        if averages_weights(trainer) and (self.counted or self.weights_have_moved(trainer)):
            return "the weights of the last batch may not have been averaged, since the exception came within it"
        unfinished = [step.name for step in self._steps if step.began and not step.finished]
        if unfinished:
            return f"the exception came while {' and '.join(unfinished)} changed the weights"
        waiting = [step.name for step in self._steps if not step.began]
        progress = batch_progress(trainer)
        if not self.weights_have_moved(trainer) or progress.current.processed == progress.current.ready:
            return ""
        if waiting:
            return f"the exception came before {' and '.join(waiting)} stepped, after the other optimisers had"
        if trainer.lr_scheduler_configs and not getattr(self._module, "_stn_stepped", False):
            return "the exception came before the learning-rate schedulers stepped"
        return ""


def averages_weights(trainer: Trainer) -> bool:
    """Whether Lightning's `WeightAveraging` is among the callbacks; its hooks are not repeated."""
    kinds: list[type] = [kind for callback in trainer.callbacks for kind in type(callback).__mro__]  # type: ignore[attr-defined]
    return any(kind.__name__ == "WeightAveraging" for kind in kinds)  # by name, since Lightning has it from 2.6 on


class StepWatch:
    """Tells whether an optimiser has changed weights since the last batch, in whatever way it was called.

    Args:
        optimizer: the optimiser to watch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._finish),
        ]
        self.forget()

    def forget(self) -> None:
        """Watch from now on."""
        self._versions: list[int] | None = None
        self.finished = False

    def release(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()

    @property
    def name(self) -> str:
        """Name of the optimiser's class."""
        return type(self._optimizer).__name__

    @property
    def began(self) -> bool:
        """Whether the optimiser has changed a weight or its state."""
        return self.finished or (self._versions is not None and self._versions != self._current_versions())

    def _begin(self, *_: Any) -> None:
        if not self.finished:
            self._versions = self._current_versions()

    def _finish(self, *_: Any) -> None:
        self.finished = True

    def _current_versions(self) -> list[int]:
        """Every change of a tensor in place raises its version."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        own = [value for state in self._optimizer.state.values() for value in state.values()]
        return [value._version for value in (*parameters, *own) if isinstance(value, Tensor)]


class Buffers:
    """Copies of the buffers of a module, such as running statistics, which forward passes change.

    Args:
        root: the module that owns all others.
    """

    def __init__(self, root: nn.Module) -> None:
        self._owners = [module for module in root.modules() if module._buffers]
        self._kept: dict[tuple[int, str], tuple[Tensor, int, Tensor]] = {}

    def keep(self) -> None:
        """Copy the buffers that may have changed since the last call.

        A change raises the version of a tensor, except where torch updates running statistics, which are vectors.
        """
        for index, owner in enumerate(self._owners):
            for name, buffer in owner._buffers.items():
                if buffer is None or buffer.is_inference():
                    continue
                kept = self._kept.get((index, name))
                if buffer.dim() <= 1 or kept is None or kept[0] is not buffer or kept[1] != buffer._version:
                    self._kept[index, name] = buffer, buffer._version, buffer.detach().clone()

    def restore(self) -> None:
        """Return the buffers to what they were at the last call of `keep`."""
        with torch.no_grad():
            for (index, name), (buffer, _, copy) in self._kept.items():
                buffer.copy_(copy)
                self._owners[index]._buffers[name] = buffer
        self._kept.clear()
