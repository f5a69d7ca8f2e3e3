"""How long a run is, in training batches and in hyperparameter steps."""

import math
import warnings
from dataclasses import replace

import torch
from lightning.pytorch import Trainer

from lightning_stn.callback.settings import Settings
from lightning_stn.manual_optimization import WeightStep
from lightning_stn.phases import PhaseSchedule, Warmup

LEAST_REACH = 1.0
"""Distance, unconstrained units, that a hyperparameter should be able to cover in a run: from a rate of 0.1 to 0.23."""


def resolve(trainer: Trainer, settings: Settings) -> tuple[Settings, PhaseSchedule, float]:
    """Choose, equally on all ranks, the values that the arguments leave to the run.

    Returns:
        The settings, the phases, and the training batches of the whole run; infinity where these are not known.
    """
    batches = run_length(trainer, settings.weight_step)
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    settings = replace(settings, warmup=settings.warmup.resolve(batches, epochs))
    phases = settings.phases.immediate() if trainer.fast_dev_run else settings.phases  # type: ignore[attr-defined]
    steps = expected_steps(trainer, phases, batches)
    if steps and settings.lr is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        _warn_of_few_steps(settings, steps, int(batches))
    settings = replace(
        settings,
        lr=settings.method.rates.derive(steps) if settings.lr is None else settings.lr,
        seed=int(trainer.strategy.broadcast(torch.initial_seed() if settings.seed is None else settings.seed)),
    )
    return settings, phases, batches


def run_length(trainer: Trainer, step: WeightStep) -> float:
    """Training batches of the whole run; infinity where the number is not known."""
    limits: list[float] = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * trainer.num_training_batches)
    if trainer.max_steps >= 0:
        limits.append(_batches_of(trainer.max_steps, trainer, step))
    return min(limits, default=math.inf)


def _batches_of(steps: int, trainer: Trainer, step: WeightStep) -> float:
    """Training batches of so many steps of all optimisers; the last batch of an epoch completes a step of each."""
    # One of the two is 1: manual optimisation has its own argument, and refuses the Trainer's.
    accumulated = step.accumulate_grad_batches * trainer.accumulate_grad_batches
    per_epoch = trainer.num_training_batches
    steps = math.ceil(steps / max(1, len(trainer.optimizers)))  # `max_steps` counts those of every optimiser
    if math.isinf(per_epoch):
        return steps * accumulated
    epochs, rest = divmod(steps, math.ceil(per_epoch / accumulated))
    return epochs * per_epoch + rest * accumulated


def expected_steps(trainer: Trainer, schedule: PhaseSchedule, batches: float) -> int | None:
    """Hyperparameter steps of the whole run; None where its length is not known. Warns where there are none."""
    per_epoch = trainer.num_training_batches
    if math.isinf(batches) or (math.isinf(per_epoch) and Warmup.parse(schedule.warmup).unit == "epochs"):
        return None
    steps = schedule.total_steps(int(batches), 0 if math.isinf(per_epoch) else int(per_epoch))
    if steps == 0:
        warnings.warn(
            f"This run of {int(batches)} training batches ends before its first hyperparameter step, so nothing "
            "will be tuned; lower warmup or train_steps, or train for longer.",
            stacklevel=2,
        )
    return steps


def _warn_of_few_steps(settings: Settings, steps: int, batches: int) -> None:
    """Warn where hyperparameters can hardly move within the run, although their rate is chosen for its length."""
    rates = settings.method.rates
    share = 0.5 if settings.anneal else 1.0  # mean of a half cosine
    reach = share * rates.derive(steps) * steps
    if reach < LEAST_REACH:
        rate = 1 / (1 + 9 * math.exp(-reach))
        warnings.warn(
            f"This run of {batches} training batches has {steps} hyperparameter steps, in which a hyperparameter moves "
            f"by about {reach:.2g} unconstrained units, as from a rate of 0.1 to one of {rate:.2g}: it is too short to "
            f"tune. Let it have {math.ceil(LEAST_REACH / (share * rates.largest))} steps or more: train for longer, or "
            "lower train_steps or warmup.",
            stacklevel=3,
        )
