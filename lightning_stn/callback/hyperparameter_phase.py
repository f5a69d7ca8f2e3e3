"""The hyperparameter phase: from a validation batch by way of its hypergradient to a step of the hyperparameters."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_stn.callback.checks import tuning_loader
from lightning_stn.callback.settings import Settings
from lightning_stn.callback.statistics import HypergradientStatistics
from lightning_stn.callback.stream import ValidationStream
from lightning_stn.callback.watch import Watch
from lightning_stn.kept import keep_metrics
from lightning_stn.methods import HyperparameterOptimizer, OptimizerFactory
from lightning_stn.methods.hypergradient import own_scaler
from lightning_stn.module import STNModule
from lightning_stn.phases import Phase, PhaseClock
from lightning_stn.randomness import derive_seed


class HyperparameterStep(NamedTuple):
    """What one hyperparameter step has seen.

    Args:
        loss: validation loss of this rank's batch, a scalar.
        hypergradient: gradient in `lambda` and `rho`, `[2, h]`, mean over the ranks; None where the step was skipped.
    """

    loss: Tensor
    hypergradient: Tensor | None


class HyperparameterPhase:
    """Takes hyperparameter steps; owns the validation stream, the hyperparameter optimiser, the watch and the seeds.

    Args:
        trainer: the Trainer of the run.
        module: the module of the run.
        settings: with learning rate and seed resolved.
        factory: builds the hyperparameter optimiser.
        dataloader: validation batches; None for those of module, datamodule or Trainer, see `tuning_loader`.
        batches: training batches of the whole run; infinity where they are not known.

    Attributes:
        optimizer: steps the hyperparameters.
        stream: yields validation batches.
        watch: keeps non-finite hypergradients out.
        statistics: of the hypergradients so far.
        inexact: why a run cannot go on exactly if a step fails now, in words; empty where it can.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: STNModule,
        settings: Settings,
        factory: OptimizerFactory,
        dataloader: Iterable[Any] | None,
        batches: float,
    ) -> None:
        assert settings.lr is not None
        assert settings.seed is not None
        self._method = settings.method
        self._per_example = settings.perturb == "example"
        self._seed = settings.seed
        self._dataloader = dataloader
        self._annealed_over = batches if settings.anneal else math.inf
        self.optimizer = HyperparameterOptimizer(
            module.hyperparameters,
            factory,
            lr=settings.lr,
            scales=settings.scales,
            scaler=own_scaler(trainer.precision, trainer.strategy.root_device),
        )
        self.stream = ValidationStream(
            tuning_loader(trainer, module, dataloader),
            seed=self._seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        self.watch = Watch(module.hyperparameters)
        self.statistics = HypergradientStatistics(module.hyperparameters)
        self.inexact = ""
        self._loaded_in = trainer.current_epoch

    def follow_reload(self, trainer: Trainer, module: STNModule) -> None:
        """Read the validation loader anew in epochs in which the Trainer reloads its own."""
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if every and trainer.current_epoch - self._loaded_in >= every:
            self._loaded_in = trainer.current_epoch
            self.stream.read(tuning_loader(trainer, module, self._dataloader))

    def generator(self, trainer: Trainer, phase: Phase, step: int) -> torch.Generator:
        """A generator of noise that depends on nothing but the seed, the rank, the phase and the step."""
        return torch.Generator().manual_seed(derive_seed(self._seed, trainer.global_rank, phase.value, step))

    def step(self, trainer: Trainer, module: STNModule, clock: PhaseClock) -> HyperparameterStep:
        """One step on the validation loss, differentiated through the response alone.

        Args:
            trainer: the Trainer of the run.
            module: the module of the run.
            clock: position of the run.
        """
        number = clock.hyperparameter_steps

        def validation_loss() -> Tensor:
            with trainer.precision_plugin.forward_context():
                return module.validation_loss(batch, number)

        with validation_mode(trainer, module):
            batch = trainer.precision_plugin.convert_input(next(self.stream))
            batch = trainer.strategy.batch_to_device(batch)
            noise = self._noise(trainer, module, batch, number)
            loss, hypergradient = self.optimizer.differentiate(validation_loss, noise)
            hypergradient = trainer.strategy.reduce(hypergradient, reduce_op="mean")
        self.inexact = "the exception came while a hyperparameter step changed hyperparameters or weights"
        hypergradient = self.optimizer.receive(hypergradient)
        typical = self.statistics.typical_norm
        admitted = self.watch.admits(hypergradient, rescales=self.optimizer.rescales, typical=typical)
        if admitted:
            self.statistics.update(hypergradient[0])
        before = module.hyperparameters.unconstrained.clone()
        if math.isfinite(self._annealed_over):
            self.optimizer.anneal((clock.batches - 1) / self._annealed_over)  # the last step is not zero
        self.optimizer.step(admitted=admitted)
        self._method.follow(module, module.hyperparameters, module.hyperparameters.unconstrained - before)
        self.inexact = ""
        return HyperparameterStep(loss, hypergradient if admitted else None)

    def _noise(self, trainer: Trainer, module: STNModule, batch: Any, number: int) -> Tensor | None:
        """`eps` of a hyperparameter step; None for a step without perturbation."""
        if not self.optimizer.tunes_scales:
            return None
        rows = module.infer_batch_size(batch) if self._per_example else 1
        return module.hyperparameters.noise(rows, self.generator(trainer, Phase.HYPERPARAMETER, number))


@contextmanager
def validation_mode(trainer: Trainer, module: STNModule) -> Iterator[None]:
    """Put module and trainer into validation mode, with gradients enabled; restored on exit.

    Eval mode keeps dropout out and batch statistics unchanged. `trainer.training` is False, so that augmentation in the
    batch-transfer hooks keeps out too. Metrics count nothing.
    """
    modes: list[nn.Module] = [inner for inner in module.modules() if inner.training]
    module.eval()
    trainer.validating = True
    try:
        with module._stn_mute(), keep_metrics(module), torch.enable_grad():
            yield
    finally:
        trainer.training = True
        for inner in modes:
            inner.training = True
