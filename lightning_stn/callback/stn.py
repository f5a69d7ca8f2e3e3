"""`STNCallback`: joins the phases, the losses of an `STNModule`, and the Trainer."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn

from lightning_stn.binding import attach, bind, keep_merged, unbind
from lightning_stn.callback.checks import (
    check_optimizers,
    check_trainer,
    require_stn_module,
    tuning_loader,
)
from lightning_stn.callback.record import Recorder
from lightning_stn.callback.settings import Settings, checked_override
from lightning_stn.callback.stream import ValidationStream
from lightning_stn.callback.watch import Watch
from lightning_stn.functional import FrozenWeightsError
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.manual_optimization import MetricSteps, SchedulerSettings
from lightning_stn.methods.delta import recentre
from lightning_stn.methods.hypergradient import (
    RATES,
    HyperparameterOptimizer,
    Leaves,
    OptimizerFactory,
    derived_rate,
    own_scaler,
)
from lightning_stn.module import ClipAlgorithm, Method, STNModule
from lightning_stn.phases import Phase, PhaseClock, PhaseSchedule
from lightning_stn.randomness import derive_seed, random_state, set_random_state
from lightning_stn.resumable import ResumableLoader
from lightning_stn.schedule import Schedule
from lightning_stn.specifications import Perturb

_RANDOM_STATES = "lightning_stn_random_states"
"""Where a checkpoint keeps them: a list with an entry for each rank."""

_METRICS = "lightning_stn_metrics"
"""Where a checkpoint keeps what was logged last, for whatever follows a metric."""

_LOADER_STATES = "lightning_stn_loader_states"
"""Where a checkpoint keeps those of the `ResumableLoader`s, which are the same on all ranks."""


class STNCallback(Callback):
    """Alternates weight and hyperparameter phases, MacKay et al. (2019), arXiv:1903.03088, Algorithm 1.

    Args:
        train_steps: training batches in a weight phase.
        valid_steps: validation batches in the hyperparameter phase that follows.
        warmup_epochs: epochs at the start in which only the weights learn.
        warmup_steps: the same in training batches; where given, it takes the place of `warmup_epochs`.
        optimizer: builds the hyperparameter optimiser from parameter groups that carry their learning rates; a rate of
            its own is not used.
        lr: learning rate of the hyperparameters, unconstrained units per step. None derives it from the run's length,
            30 divided by the number of hyperparameter steps, kept between 3e-3 and 1e-1: how far the hyperparameters
            can travel decides, and a short run needs larger steps. The paper uses 3e-3 for its convolutional networks,
            in runs of tens of thousands of steps. For "delta-stn" all three are a third of that.
        scale_lr: learning rate of the perturbation scales; None for that of the hyperparameters.
        tune_scales: whether the scales are tuned. If not, hyperparameter steps run at the current hyperparameters,
            without perturbation.
        entropy_weight: `tau`, weight of the perturbation's entropy in the objective; larger keeps scales larger.
        method: "stn", or "delta-stn" for Bae and Grosse (2020), arXiv:2010.13514, whose response is centred at the
            current hyperparameters and fitted beside base weights that train unperturbed.
        linearize: for "delta-stn", whether the response is fitted on first-order predictions, as in that paper, or on
            the network's own, which costs less.
        share_primal: for "delta-stn", linearised: whether base weights and response train in one pass, on the loss at
            the first-order prediction and the perturbed hyperparameters, which costs less than either of these and runs
            `training_loss` once. The paper has two passes, with the base weights at the current hyperparameters.
        perturb: "example" draws a perturbation for each example, "batch" one for each mini-batch and rank, which costs
            little more than plain training.
        dataloader: validation batches for the hyperparameter phase; None for the hook `tuning_dataloader()` of the
            module or datamodule or, without one, the validation loader.
        gradient_clip_val: largest norm (or entry) of the weights' gradient, in manual optimisation, where the Trainer's
            own argument is not available.
        gradient_clip_algorithm: "norm" or "value".
        accumulate_grad_batches: training batches whose gradients one weight step averages, in manual optimisation.
        seed: fixes perturbations and validation order; None for torch's initial seed.
        override: names of arguments that count when a run is resumed; the others stay as they were in the checkpoint.
            "optimizer" begins with a new state of the hyperparameter optimiser, "hyperparameters" returns them to their
            initial values as well.

    Attributes:
        schedule: what the hyperparameters did, a row every `Trainer(log_every_n_steps)` training batches.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        train_steps: int = 2,
        valid_steps: int = 1,
        warmup_epochs: int = 5,
        *,
        warmup_steps: int | None = None,
        optimizer: OptimizerFactory = torch.optim.Adam,
        lr: float | None = None,
        scale_lr: float | None = None,
        tune_scales: bool = True,
        entropy_weight: float = 1e-3,
        method: Method = "stn",
        linearize: bool = True,
        share_primal: bool = False,
        perturb: Perturb = "example",
        dataloader: Iterable[Any] | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: ClipAlgorithm = "norm",
        accumulate_grad_batches: int = 1,
        seed: int | None = None,
        override: Sequence[str] = (),
    ) -> None:
        self._arguments = self._settings = Settings(
            train_steps=train_steps,
            valid_steps=valid_steps,
            warmup_epochs=warmup_epochs,
            warmup_steps=warmup_steps,
            lr=lr,
            scale_lr=scale_lr,
            tune_scales=tune_scales,
            entropy_weight=entropy_weight,
            method=method,
            linearize=linearize,
            share_primal=share_primal,
            perturb=perturb,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            accumulate_grad_batches=accumulate_grad_batches,
            seed=seed,
        )
        self._override = checked_override(override)
        if not callable(optimizer):
            raise ValueError(
                f"STNCallback: expected optimizer to build one from parameter groups, got {optimizer!r}; pass a class "
                "such as torch.optim.Adam, or a functools.partial of it."
            )
        if not isinstance(dataloader, Iterable | None):
            raise ValueError(
                f"STNCallback: expected dataloader to be an iterable of batches, got {type(dataloader).__name__}; wrap "
                "a dataset in a DataLoader."
            )
        self._clock = PhaseClock(self._settings.phases)
        self._factory = optimizer
        self._dataloader = dataloader
        self._schedulers = SchedulerSettings()
        self._metric_steps = MetricSteps()
        self._freeze = True
        self._restored: dict[str, Any] | None = None
        self._random_states: list[dict[str, Any]] | None = None
        self._metrics: dict[str, Tensor] = {}
        self._loader_states: list[dict[str, int]] = []
        self._optimizer: HyperparameterOptimizer
        self._stream: ValidationStream
        self._recorder: Recorder
        self._watch: Watch

    @property
    def phases(self) -> PhaseSchedule:
        """When the weights learn and when the hyperparameters do."""
        return self._clock.schedule

    @property
    def schedule(self) -> Schedule:
        """What the hyperparameters have done so far.

        Raises:
            RuntimeError: training has not started.
        """
        if not hasattr(self, "_recorder"):
            raise RuntimeError("There is no schedule yet; it is recorded while trainer.fit runs.")
        return self._recorder.schedule

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and let its regularisers and augmentations find their hyperparameters."""
        if stage != "fit":
            return
        self._settings = self._arguments
        module = require_stn_module(pl_module, self._settings.perturb)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        count = sum(isinstance(callback, STNCallback) for callback in callbacks)
        if count > 1:
            raise ValueError(f"Expected one STNCallback, got {count}; give the Trainer one.")
        check_trainer(trainer, module, self._settings)
        attach(module, module.hyperparameters)
        module.hyperparameters.unshare()
        recentre(module, module.hyperparameters, self._settings.method == "delta-stn")
        module.weight_step_settings = self._settings.weight_step
        if not module.automatic_optimization:
            self._schedulers.watch(module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build what the hyperparameter phase needs, and continue where a checkpoint left off."""
        module = _stn(pl_module)
        hyperparameters = module.hyperparameters
        if not module.automatic_optimization:
            self._schedulers.restore(trainer)
        check_optimizers(trainer, module)
        self._settle(trainer)
        settings = self._settings
        recentre(module, hyperparameters, settings.method == "delta-stn")
        module.weight_step_settings = settings.weight_step
        assert settings.lr is not None
        assert settings.scale_lr is not None
        optimizer = HyperparameterOptimizer(
            hyperparameters,
            self._factory,
            lr=settings.lr,
            scale_lr=settings.scale_lr,
            tune_scales=settings.tune_scales,
            scaler=own_scaler(trainer.precision, trainer.strategy.root_device),
        )
        self._stream = ValidationStream(
            tuning_loader(trainer, module, self._dataloader),
            seed=self._seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        self._optimizer = optimizer  # From here on there is a state to save.
        self._reloaded = trainer.current_epoch
        self._signature = hyperparameters.signature
        self._recorder = Recorder(hyperparameters, self._optimizer)
        self._watch = Watch(hyperparameters)
        if self._restored is not None:
            self._resume(self._restored, hyperparameters)
            self._restored = None
        for entries in (hyperparameters.unconstrained, hyperparameters.raw_scale):
            entries.copy_(trainer.strategy.broadcast(entries))
        for name, metric in self._metrics.items():
            trainer.callback_metrics.setdefault(name, metric.to(trainer.strategy.root_device))
        self._metrics = {}
        self._recorder.open(trainer)
        self._recorder.record(trainer, self._clock.batches)
        self._restore_streams(trainer)

    def _restore_streams(self, trainer: Trainer) -> None:
        """Put the training loaders and the generators where a checkpoint left them."""
        loaders = _resumable_loaders(trainer)
        if len(self._loader_states) == len(loaders):
            for loader, state in zip(loaders, self._loader_states, strict=True):
                loader.load_state_dict(state)
        self._loader_states = []
        if self._random_states is not None and len(self._random_states) == trainer.world_size:
            set_random_state(self._random_states[trainer.global_rank])
        self._random_states = None

    def _settle(self, trainer: Trainer) -> None:
        """Decide what the arguments leave to the run, equally on all ranks."""
        settings = self._settings
        self._clock.schedule = settings.phases
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._clock.schedule = settings.phases.immediate()
        steps = self._expected_steps(trainer)
        lr = derived_rate(steps, settings.method) if settings.lr is None else settings.lr
        self._settings = replace(
            settings,
            lr=lr,
            scale_lr=lr if settings.scale_lr is None else settings.scale_lr,
            seed=int(trainer.strategy.broadcast(torch.initial_seed() if settings.seed is None else settings.seed)),
        )

    def _resume(self, restored: dict[str, Any], hyperparameters: HyperparameterSet) -> None:
        """Continue from a checkpoint, but for what shall be overridden."""
        hyperparameters.require_signature(restored["hyperparameters"])
        if "hyperparameters" in self._override:
            hyperparameters.reset_parameters()
        if not self._override & {"hyperparameters", "optimizer", "tune_scales"}:
            self._optimizer.load_state_dict(restored["optimizer"])
            for group, name in zip(self._optimizer.optimizer.param_groups, RATES, strict=False):
                if name in self._override:
                    group["lr"] = getattr(self._settings, name)
        self._stream.load_state_dict(restored["stream"])
        self._recorder.load_state_dict(restored["schedule"])
        self._watch.skipped = restored["skipped"]
        self._metric_steps.load_state_dict(restored["metric_steps"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the schedulers that waited for the epoch's end, and follow validation data that the Trainer reloads."""
        self._metric_steps.settle(_stn(pl_module))
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if every and trainer.current_epoch - self._reloaded >= every:
            self._reloaded = trainer.current_epoch
            self._stream.read(tuning_loader(trainer, _stn(pl_module), self._dataloader))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Step the schedulers that waited for validation, and bind the sample of a weight step."""
        self._metric_steps.settle(_stn(pl_module))
        _stn(pl_module).perturb(batch, self._generator(trainer, Phase.WEIGHT, self._clock.batches))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Clip the weights' gradient; here a gradient scaler has already been undone."""
        limit = self._settings.gradient_clip_val
        if limit is not None:
            pl_module.clip_gradients(
                optimizer,
                gradient_clip_val=limit,
                gradient_clip_algorithm=self._settings.gradient_clip_algorithm,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run the hyperparameter steps that are due."""
        module = _stn(pl_module)
        unbind(module.hyperparameters)
        if self._clock.batches == 0:
            _warn_unread(module)
        self._recorder.train_loss.update(outputs.get("training_loss", outputs["loss"]))
        due = self._clock.finish_batch(trainer.current_epoch)
        for _ in range(due):
            with trainer.profiler.profile("[STNCallback]hyperparameter_step"):  # type: ignore[attr-defined]
                self._hyperparameter_step(trainer, module)
        self._metric_steps.finish_batch(module, batch_idx)
        if self._watch.gives_up:
            trainer.should_stop = True
        if due or batch_idx == 0:
            values = module.hyperparameters.constrain(module.hyperparameters.unconstrained)
            for name, value in values.items():
                module.log(name, value.float(), prog_bar=True, logger=False, on_step=True, on_epoch=False)
        if self._clock.batches % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._recorder.record(trainer, self._clock.batches)
            self._watch.look()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step the learning-rate schedulers that follow a metric of the epoch; unbind where it was broken off."""
        unbind(_stn(pl_module).hyperparameters)
        self._metric_steps.finish_epoch(_stn(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the final hyperparameters."""
        self._metric_steps.settle(_stn(pl_module))
        self._recorder.record(trainer, self._clock.batches)
        self._recorder.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let no later run train without its callback unnoticed."""
        if stage == "fit":
            _stn(pl_module).weight_step_settings = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing bound and no file open."""
        if isinstance(pl_module, STNModule):
            pl_module.weight_step_settings = None
            self._schedulers.release(pl_module)
            unbind(pl_module.hyperparameters)
            keep_merged(pl_module.hyperparameters, False)
        if hasattr(self, "_recorder"):
            self._recorder.close()

    def state_dict(self) -> dict[str, Any]:
        """Settings, counters, hyperparameter optimiser, position in the validation stream, schedule."""
        if not hasattr(self, "_optimizer"):
            return self._restored or {}
        return {
            "settings": self._settings.state_dict(),
            "hyperparameters": self._signature,
            "clock": self._clock.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "stream": self._stream.state_dict(),
            "schedule": self._recorder.state_dict(),
            "skipped": self._watch.skipped,
            "metric_steps": self._metric_steps.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over settings and counters now, and the rest when training starts."""
        if not state_dict:
            return
        self._settings, message = self._settings.resumed(state_dict["settings"], self._override)
        if message:
            rank_zero_warn(message)
        self._clock.load_state_dict(state_dict["clock"])
        self._restored = state_dict

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what Lightning leaves out: the states of all generators and of the training loaders, and the metrics."""
        states = [random_state()]
        if trainer.world_size > 1:
            states = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(states, random_state())
        checkpoint[_RANDOM_STATES] = states
        checkpoint[_METRICS] = {name: metric.cpu() for name, metric in trainer.callback_metrics.items()}
        # Lightning saves these too, but does not restore them at the end of an epoch, nor where loaders were built
        # early, as by trainer.estimated_stepping_batches (2.6).
        checkpoint[_LOADER_STATES] = [loader.state_dict() for loader in _resumable_loaders(trainer)]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take all that over when training starts."""
        self._random_states = checkpoint.get(_RANDOM_STATES)
        self._metrics = checkpoint.get(_METRICS, {})
        self._loader_states = checkpoint.get(_LOADER_STATES, [])

    def _hyperparameter_step(self, trainer: Trainer, module: STNModule) -> None:
        """One step on the validation loss, differentiated through the response alone."""
        leaves = self._optimizer.leaves()
        with _validating(trainer, module):
            batch = trainer.precision_plugin.convert_input(next(self._stream))
            batch = trainer.strategy.batch_to_device(batch)
            sample = leaves.sample(self._noise(trainer, module, batch))
            try:
                loss, hypergradient = self._differentiate(trainer, module, batch, leaves, sample)
            except FrozenWeightsError:  # a loss with a gradient of the network in it: from now on the longer way
                self._freeze = False
                loss, hypergradient = self._differentiate(trainer, module, batch, leaves, sample)
        hypergradient = trainer.strategy.reduce(hypergradient, reduce_op="mean")
        hypergradient = self._optimizer.receive(hypergradient)
        admitted = self._watch.admits(hypergradient, rescales=self._optimizer.rescales)
        if admitted:
            self._recorder.hypergradient.update(hypergradient)
        self._optimizer.step(admitted=admitted)
        self._recorder.valid_loss.update(loss)
        self._recorder.skipped = self._watch.skipped
        self._clock.finish_hyperparameter_step()

    def _differentiate(
        self, trainer: Trainer, module: STNModule, batch: Any, leaves: Leaves, sample: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Validation loss and hypergradient at a sample."""
        with bind(module.hyperparameters, sample, frozen=self._freeze):
            with trainer.precision_plugin.forward_context():
                loss = module.validation_loss(batch, self._clock.hyperparameter_steps)
            return loss, self._optimizer.hypergradient(loss, leaves, self._settings.entropy_weight)

    def _noise(self, trainer: Trainer, module: STNModule, batch: Any) -> Tensor | None:
        """`eps` of a hyperparameter step; None for a step without perturbation."""
        if not self._settings.tune_scales:
            return None
        rows = module.infer_batch_size(batch) if self._settings.perturb == "example" else 1
        generator = self._generator(trainer, Phase.HYPERPARAMETER, self._clock.hyperparameter_steps)
        return module.hyperparameters.noise(rows, generator)

    @property
    def _seed(self) -> int:
        """The seed in effect; known once training starts."""
        assert self._settings.seed is not None
        return self._settings.seed

    def _generator(self, trainer: Trainer, phase: Phase, step: int) -> torch.Generator:
        """Noise that depends on nothing but the seed, the rank, the phase and the step."""
        return torch.Generator().manual_seed(derive_seed(self._seed, trainer.global_rank, phase.value, step))

    def _expected_steps(self, trainer: Trainer) -> int | None:
        """Hyperparameter steps of the whole run; None where its length is not known. Warns where there are none."""
        per_epoch = trainer.num_training_batches
        limits = []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            limits.append(trainer.max_epochs * per_epoch)
        if trainer.max_steps >= 0:
            limits.append(trainer.max_steps * self._settings.accumulate_grad_batches)
        batches = min(limits, default=math.inf)
        schedule = self._clock.schedule
        if math.isinf(batches) or (math.isinf(per_epoch) and schedule.warmup_steps is None):
            return None
        steps = schedule.total_steps(int(batches), 0 if math.isinf(per_epoch) else int(per_epoch))
        if steps == 0:
            warnings.warn(
                f"This run of {int(batches)} training batches ends before its first hyperparameter step, so nothing "
                "will be tuned; lower warmup_epochs (or warmup_steps), or train for longer.",
                stacklevel=2,
            )
        return steps


def _stn(module: LightningModule) -> STNModule:
    assert isinstance(module, STNModule)
    return module


def _resumable_loaders(trainer: Trainer) -> list[ResumableLoader]:
    """Those among the training loaders; none before Lightning has asked for them."""
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    return [loader for loader in loaders if isinstance(loader, ResumableLoader)]


def _warn_unread(module: STNModule) -> None:
    """Say which hyperparameters nothing has read in the first weight step."""
    unread = module.hyperparameters.unread()
    if unread:
        warnings.warn(
            f"Nothing read the hyperparameters {unread} in the first training step, so tuning them means nothing; "
            "name them where they act (convert(net, dropout=...), a regulariser, an augmentation) or read "
            "self.hyperparameters[name] in training_loss.",
            stacklevel=2,
        )


@contextmanager
def _validating(trainer: Trainer, module: STNModule) -> Iterator[None]:
    """Let everything look as in validation, but for gradients; restore it in the end.

    Eval mode keeps dropout out and batch statistics still. `trainer.training` is False, so that augmentation in the
    batch-transfer hooks keeps out too.
    """
    modes: list[nn.Module] = [inner for inner in module.modules() if inner.training]
    module.eval()
    trainer.validating = True
    try:
        with module.muted(), torch.enable_grad():
            yield
    finally:
        trainer.training = True
        for inner in modes:
            inner.training = True
