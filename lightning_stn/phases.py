"""Schedule of weight and hyperparameter phases: plain Python, no tensors."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple


class Phase(str, Enum):
    """Kind of a step, by the parameters that it trains."""

    WARMUP = "warm-up"
    WEIGHT = "weight"
    HYPERPARAMETER = "hyperparameter"


class Event(NamedTuple):
    """One step of a trace: its phase, its epoch, and the number of training batches finished before it."""

    phase: Phase
    epoch: int
    batches: int


@dataclass(frozen=True)
class PhaseSchedule:
    """The alternation of MacKay et al. (2019), Algorithm 1, after a warm-up.

    Args:
        train_steps: training batches in a weight phase.
        valid_steps: validation batches in the hyperparameter phase that follows.
        warmup_epochs: epochs at the start in which only the weights train.
        warmup_steps: length of the warm-up in training batches; if given, it replaces `warmup_epochs`.

    Raises:
        ValueError: a count is not a whole number, is negative, or is zero for one of the two phases.
    """

    train_steps: int = 2
    valid_steps: int = 1
    warmup_epochs: int = 5
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        """Check the counts."""
        for name, least in (("train_steps", 1), ("valid_steps", 1), ("warmup_epochs", 0), ("warmup_steps", 0)):
            count = getattr(self, name)
            if count is None and name == "warmup_steps":
                continue
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise ValueError(f"Expected {name} to be a whole number of at least {least}, got {count!r}.")

    def phase(self, batches: int, epoch: int) -> Phase:
        """Phase of the next training batch after `batches` finished ones, in `epoch`, counted from 0."""
        warm = epoch < self.warmup_epochs if self.warmup_steps is None else batches < self.warmup_steps
        return Phase.WARMUP if warm else Phase.WEIGHT

    def steps_due(self, weight_steps: int) -> int:
        """Number of hyperparameter steps due after the `weight_steps`-th training batch since the warm-up."""
        return self.valid_steps if weight_steps and weight_steps % self.train_steps == 0 else 0

    def warmup_batches(self, batches_per_epoch: int) -> int:
        """Length of the warm-up in training batches."""
        return self.warmup_epochs * batches_per_epoch if self.warmup_steps is None else self.warmup_steps

    def total_steps(self, batches: int, batches_per_epoch: int) -> int:
        """Hyperparameter steps in a run of `batches` training batches."""
        return max(0, batches - self.warmup_batches(batches_per_epoch)) // self.train_steps * self.valid_steps

    def immediate(self) -> "PhaseSchedule":
        """The shortest schedule with both phases, for `fast_dev_run`: no warm-up, one batch for each phase."""
        return replace(self, train_steps=1, valid_steps=1, warmup_epochs=0, warmup_steps=None)

    def trace(self, epochs: int, batches_per_epoch: int) -> Iterator[Event]:
        """Every step of a run, in order.

        >>> schedule = PhaseSchedule(train_steps=2, valid_steps=1, warmup_epochs=1)
        >>> [event.phase.value for event in schedule.trace(epochs=2, batches_per_epoch=2)]
        ['warm-up', 'warm-up', 'weight', 'weight', 'hyperparameter']
        """
        clock = PhaseClock(self)
        for epoch in range(epochs):
            for _ in range(batches_per_epoch):
                yield Event(clock.phase(epoch), epoch, clock.batches)
                for _ in range(clock.finish_batch(epoch)):
                    yield Event(Phase.HYPERPARAMETER, epoch, clock.batches)
                    clock.finish_hyperparameter_step()


@dataclass
class PhaseClock:
    """Position of a run in its schedule: three counters, all saved in checkpoints.

    Args:
        schedule: the schedule of the run.
        batches: training batches finished; the time axis of every log.
        weight_steps: training batches finished after the warm-up.
        hyperparameter_steps: hyperparameter steps finished.
    """

    schedule: PhaseSchedule = field(default_factory=PhaseSchedule)
    batches: int = 0
    weight_steps: int = 0
    hyperparameter_steps: int = 0

    def phase(self, epoch: int) -> Phase:
        """Phase of the next training batch."""
        return self.schedule.phase(self.batches, epoch)

    def finish_batch(self, epoch: int) -> int:
        """Count one training batch, and return the number of hyperparameter steps due after it."""
        warm = self.phase(epoch) is Phase.WARMUP
        self.batches += 1
        if warm:
            return 0
        self.weight_steps += 1
        return self.schedule.steps_due(self.weight_steps)

    def finish_hyperparameter_step(self) -> None:
        """Count one hyperparameter step."""
        self.hyperparameter_steps += 1

    def state_dict(self) -> dict[str, int]:
        """The counters."""
        return {
            "batches": self.batches,
            "weight_steps": self.weight_steps,
            "hyperparameter_steps": self.hyperparameter_steps,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from saved counters."""
        self.batches = state["batches"]
        self.weight_steps = state["weight_steps"]
        self.hyperparameter_steps = state["hyperparameter_steps"]
