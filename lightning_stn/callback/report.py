"""What a run found, in words, at its end."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

from lightning_stn.callback.statistics import ONE_DIRECTION, HypergradientStatistics
from lightning_stn.callback.underfitting import underfitting
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.schedule import Schedule
from lightning_stn.schedule.tables import describe

MOST = 12
"""Hyperparameters that the report lists one by one; of more it tells how many there are."""

SLIGHT = 0.01
"""Share of the largest influence on the validation loss below which a hyperparameter hardly matters."""


class Recorded(Protocol):
    """What the report reads of a `Recorder`."""

    hyperparameters: HyperparameterSet
    schedule: Schedule
    path: Path | None


def report(recorded: Recorded, statistics: HypergradientStatistics) -> str:
    """A short block: first and last values, what stands out in the run, and where its file lies.

    Args:
        recorded: hyperparameters and schedule at the end of the run.
        statistics: of its hypergradients.
    """
    schedule = recorded.schedule
    first, last = schedule.rows[0], schedule.rows[-1]
    count = len(schedule.names)
    moves = [f"{name} {describe(first.values[name])} -> {describe(last.values[name])}" for name in schedule.names]
    shown = f": {', '.join(moves[:MOST])}" + (f", and {count - MOST} more" if count > MOST else "")
    noun = "hyperparameter" if count == 1 else "hyperparameters"
    lines = [f"Tuned {count} {noun} over {last.step} training batches{shown}."]
    lines += _findings(recorded.hyperparameters, schedule, statistics)
    if recorded.path is not None:
        lines.append(f"Schedule: {recorded.path} (Schedule.load(path).plot() draws it)")
    return "\n".join(lines)


def _findings(
    hyperparameters: HyperparameterSet, schedule: Schedule, statistics: HypergradientStatistics
) -> Iterator[str]:
    """A sentence for each thing that stands out."""
    if schedule.warmup is None:
        yield "No hyperparameter step was taken: the run ended within the warm-up. Train for longer, or lower warmup."
        return
    entries = hyperparameters.unconstrained.tolist()
    bounds = {
        name: bound
        for name, specification in hyperparameters.specifications.items()
        if (bound := specification.bound_reached(entries[hyperparameters.slices[name]])) is not None
    }
    slight = statistics.slight(SLIGHT)
    off: Collection[str] = ()
    if (cause := underfitting(schedule, slight)) is not None:
        yield str(cause)
        off = cause.names  # neither a wider range nor another start would help
    if bounds := {name: bound for name, bound in bounds.items() if name not in off}:
        found = ", ".join(f"{name} at {describe(bound)}" for name, bound in bounds.items())
        yield f"Ended at a bound: {found}. Widen the range if values beyond make sense."
    if pulled := {label: way for label, way in statistics.pulled().items() if label not in (*bounds, *off)}:
        found = ", ".join(f"{label} {way}" for label, way in pulled.items())
        yield f"Still moving at the end: {found}. Start them further that way, or train for longer."
    if slight:
        yield f"Hardly mattered for the validation loss: {', '.join(slight)}."
    share = statistics.first_direction
    if share is not None and share > ONE_DIRECTION and len(schedule.names) > 2:
        yield f"All pointed the same way (stn/first_direction {share:.2f}): one direction was tuned, not each of them."
