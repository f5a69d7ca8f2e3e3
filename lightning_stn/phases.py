"""Schedule of weight and hyperparameter phases: plain Python, no tensors."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal, NamedTuple, get_args

WarmupUnit = Literal["epochs", "steps", "share"]


UNKNOWN_LENGTH = 1000
"""Training batches in a warm-up that is a share of a run of unknown length."""


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
class Warmup:
    """Length of the warm-up, in which only the weights learn.

    Args:
        length: a whole number of epochs or training batches, or a share of the run in [0, 1).
        unit: "epochs", "steps" (training batches), or "share" (of all training batches of the run).

    Raises:
        ValueError: the unit is unknown, or the length is negative, not whole, or no share.

    Example:
        >>> Warmup(300, "steps"), Warmup.parse(5), Warmup.parse(0.1)
        (Warmup(length=300, unit='steps'), Warmup(length=5, unit='epochs'), Warmup(length=0.1, unit='share'))
    """

    length: int | float
    unit: WarmupUnit = "epochs"

    def __post_init__(self) -> None:
        """Check length and unit."""
        length: Any = self.length
        if self.unit not in get_args(WarmupUnit):
            expected = ", ".join(map(repr, get_args(WarmupUnit)))
            raise ValueError(f"Warmup: expected unit to be one of {expected}, got {self.unit!r}.")
        number = isinstance(length, int | float) and not isinstance(length, bool)
        if self.unit == "share":
            if not (number and 0 <= length < 1):
                raise ValueError(f"Warmup: expected length to be a share of the run in [0, 1), got {length!r}.")
        elif not (number and isinstance(length, int) and length >= 0):
            raise ValueError(
                f"Warmup: expected length to be a whole number of {self.unit} of at least 0, got {length!r}; a share "
                "of the run is a float below 1."
            )

    @classmethod
    def parse(cls, warmup: Any) -> "Warmup":
        """The warm-up that an argument stands for: a whole number of epochs, a float for a share, or a `Warmup`.

        Raises:
            ValueError: the argument is neither.
        """
        if isinstance(warmup, Warmup):
            return warmup
        if isinstance(warmup, bool) or not isinstance(warmup, int | float):
            raise ValueError(
                "Expected warmup to be a whole number of epochs, a share of the run as a float, or a Warmup such as "
                f"Warmup(300, 'steps'), got {warmup!r}."
            )
        return cls(warmup, "share" if isinstance(warmup, float) else "epochs")

    def batches(self, batches_per_epoch: int) -> int:
        """Length in training batches; a share has to be resolved before."""
        assert self.unit != "share"
        return int(self.length) * (batches_per_epoch if self.unit == "epochs" else 1)

    def resolve(self, batches: float, epochs: float = math.inf) -> "Warmup":
        """A share as a number of training batches or epochs; every other length as it is.

        In a run of unknown length a share is `UNKNOWN_LENGTH` training batches.

        Args:
            batches: training batches of the run; infinity where they are not known.
            epochs: of the run; infinity where they are not known.
        """
        if self.unit != "share":
            return self
        if not self.length:
            return Warmup(0, "steps")
        if math.isinf(batches) and math.isinf(epochs):
            return Warmup(UNKNOWN_LENGTH, "steps")
        if math.isinf(batches):
            return Warmup(round(self.length * epochs), "epochs")
        return Warmup(round(self.length * batches), "steps")


@dataclass(frozen=True)
class PhaseSchedule:
    """The alternation of MacKay et al. (2019), Algorithm 1, after a warm-up.

    Args:
        train_steps: training batches in a weight phase.
        valid_steps: validation batches in the hyperparameter phase that follows.
        warmup: length of the warm-up: a whole number of epochs, a float for a share of the run, or a `Warmup`.

    Raises:
        ValueError: a count is not a whole number of at least 1, or the warm-up is out of its range.
    """

    train_steps: int = 4
    valid_steps: int = 1
    warmup: Warmup | int | float = 0.1

    def __post_init__(self) -> None:
        """Check the counts."""
        for name in ("train_steps", "valid_steps"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"Expected {name} to be a whole number of at least 1, got {count!r}.")
        object.__setattr__(self, "warmup", Warmup.parse(self.warmup))

    @property
    def _warmup(self) -> Warmup:
        assert isinstance(self.warmup, Warmup)
        return self.warmup

    def phase(self, batches: int, epoch: int) -> Phase:
        """Phase of the next training batch after `batches` finished ones, in `epoch`, counted from 0."""
        finished = epoch if self._warmup.unit == "epochs" else batches
        return Phase.WARMUP if finished < self._warmup.length else Phase.WEIGHT

    def steps_due(self, weight_steps: int) -> int:
        """Number of hyperparameter steps due after the `weight_steps`-th training batch since the warm-up."""
        return self.valid_steps if weight_steps and weight_steps % self.train_steps == 0 else 0

    def warmup_batches(self, batches_per_epoch: int) -> int:
        """Length of the warm-up in training batches."""
        return self._warmup.batches(batches_per_epoch)

    def total_steps(self, batches: int, batches_per_epoch: int) -> int:
        """Hyperparameter steps in a run of `batches` training batches."""
        return max(0, batches - self.warmup_batches(batches_per_epoch)) // self.train_steps * self.valid_steps

    def resolve(self, batches: float) -> "PhaseSchedule":
        """The schedule of a run of so many training batches; see `Warmup.resolve`."""
        return replace(self, warmup=self._warmup.resolve(batches))

    def immediate(self) -> "PhaseSchedule":
        """The shortest schedule with both phases, for `fast_dev_run`: no warm-up, one batch for each phase."""
        return replace(self, train_steps=1, valid_steps=1, warmup=0)

    def trace(self, epochs: int, batches_per_epoch: int) -> Iterator[Event]:
        """Every step of a run, in order.

        Example:
            >>> schedule = PhaseSchedule(train_steps=2, valid_steps=1, warmup=1)
            >>> [event.phase.value for event in schedule.trace(epochs=2, batches_per_epoch=2)]
            ['warm-up', 'warm-up', 'weight', 'weight', 'hyperparameter']
        """
        clock = PhaseClock(self.resolve(epochs * batches_per_epoch))
        for epoch in range(epochs):
            for _ in range(batches_per_epoch):
                yield Event(clock.phase(epoch), epoch, clock.batches)
                for _ in range(clock.finish_batch(epoch)):
                    yield Event(Phase.HYPERPARAMETER, epoch, clock.batches)
                    clock.finish_hyperparameter_step()


@dataclass
class PhaseClock:
    """Position of a run in its schedule: counters, all saved in checkpoints.

    Args:
        schedule: the schedule of the run.
        batches: training batches finished; the time axis of every log.
        weight_steps: training batches finished after the warm-up.
        hyperparameter_steps: hyperparameter steps finished.
        due: hyperparameter steps that follow the last training batch and are not finished.
        epoch: of the last training batch, counted from 0.
    """

    schedule: PhaseSchedule = field(default_factory=PhaseSchedule)
    batches: int = 0
    weight_steps: int = 0
    hyperparameter_steps: int = 0
    due: int = 0
    epoch: int = 0

    def phase(self, epoch: int) -> Phase:
        """Phase of the next training batch."""
        return self.schedule.phase(self.batches, epoch)

    def finish_batch(self, epoch: int) -> int:
        """Count one training batch, and return the number of hyperparameter steps due after it."""
        warm = self.phase(epoch) is Phase.WARMUP
        self.batches += 1
        self.epoch = epoch
        self.weight_steps += not warm
        self.due = 0 if warm else self.schedule.steps_due(self.weight_steps)
        return self.due

    def finish_hyperparameter_step(self) -> None:
        """Count one hyperparameter step."""
        self.hyperparameter_steps += 1
        self.due -= 1

    def state_dict(self) -> dict[str, int]:
        """The counters."""
        return {name: getattr(self, name) for name in COUNTERS}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from saved counters."""
        for name in COUNTERS:
            setattr(self, name, state[name])


COUNTERS = ("batches", "weight_steps", "hyperparameter_steps", "due", "epoch")
"""Names of the counters of a `PhaseClock`."""
