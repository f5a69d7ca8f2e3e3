"""What hyperparameters are at each training batch of a run: a stored schedule or constants, with or without noise."""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch

from lightning_stn.arguments import is_whole, require_bool
from lightning_stn.policies.checks import READER, Constants, misfit, read_constants, typed
from lightning_stn.policies.noise import Noise
from lightning_stn.schedule import Interpolation, Schedule
from lightning_stn.schedule.unspecified import Unspecified
from lightning_stn.specifications import Hyperparameter, Value


@dataclass(frozen=True)
class Policy:
    """Values of hyperparameters at each training batch of a run; built by `Policy.of`.

    Args:
        schedule: where the values are stored; None for constants.
        constants: natural units by name; empty with a schedule.
        specifications: by name; an `Unspecified` where the range is not known, and none for a choice of unknown ones.
        scales: recorded perturbation scales by name, unconstrained units; none for those of the specifications.
        noise: what is added to the values, or None.
        stretch: whether a schedule is read by the share of the run that is over, or by the number of batches.
        interpolation: how values between two rows are read; see `Schedule.at`.
        seed: of the noise.
        length: training batches of the run; infinity where they are not known.

    Example:
        >>> from lightning_stn import Float
        >>> from lightning_stn.policies import Gaussian
        >>> policy = Policy.of({"dropout": Float(0.0, 0.9, init=0.3)}, noise=Gaussian(0.5))
        >>> policy.centre(7), [round(policy.values(batch)["dropout"], 2) for batch in (0, 1, 2)]
        ({'dropout': 0.3}, [0.41, 0.36, 0.38])
    """

    schedule: Schedule | None
    constants: Mapping[str, Value]
    specifications: Mapping[str, Hyperparameter]
    scales: Mapping[str, Sequence[float]] = field(default_factory=dict)
    noise: Noise | None = None
    stretch: bool = True
    interpolation: Interpolation = "step"
    seed: int = 0
    length: float = math.inf

    def __post_init__(self) -> None:
        """Check the settings, and that every hyperparameter can have its values."""
        if self.noise is not None and not isinstance(self.noise, Noise):
            raise ValueError(f"{READER}: expected noise to be Gaussian(...) or Sinusoid(...), got {self.noise!r}.")
        require_bool(READER, "stretch", self.stretch)
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(f"{READER}: expected interpolation='step' or 'linear', got {self.interpolation!r}.")
        if not is_whole(self.seed):
            raise ValueError(f"{READER}: expected seed to be a whole number, got {self.seed!r}; give for instance 0.")
        problems = [
            problem
            for name, specification in self.specifications.items()
            if (problem := misfit(name, specification, self._stored(name)))
        ]
        if problems:
            raise ValueError(
                f"{READER}: expected values that the hyperparameters can have; correct these, or the ranges:\n  "
                + "\n  ".join(problems)
            )
        constants = {name: typed(self.specifications.get(name), value) for name, value in self.constants.items()}
        object.__setattr__(self, "constants", constants)

    @classmethod
    def of(cls, values: Schedule | str | Path | Constants, *, final: bool = False, **settings: Any) -> "Policy":
        """The policy that arguments of `ScheduleReplay` stand for.

        Args:
            values: a schedule, the path of a stored one, or constants by name.
            final: whether to take the last row of the schedule alone, as constants.
            **settings: the other settings of a policy.

        Raises:
            ValueError: there are no values, or an argument is out of its range.
            TypeError: `values` is none of the three.
        """
        require_bool(READER, "final", final)
        if isinstance(values, Mapping):
            if final:
                raise ValueError(f"{READER}: expected a schedule with final=True, got constants; leave final out.")
            return cls(None, *read_constants(values), **settings)
        schedule = Schedule.load(values) if isinstance(values, str | Path) else values
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"{READER}: expected values to be a Schedule, the path of one, or constants by name, got {values!r}; "
                "write for instance {'dropout': 0.3}."
            )
        if not schedule.rows:
            raise ValueError(f"{READER}: expected a schedule with rows, got none; record or load one first.")
        schedule = Schedule(schedule.specifications, list(schedule.rows), schedule.warmup)  # one that does not grow
        recorded = iter(schedule.rows[-1].scales.values())
        scales = {name: list(itertools.islice(recorded, s.size)) for name, s in schedule.specifications.items()}
        constants = schedule.final if final else {}
        return cls(None if final else schedule, constants, schedule.specifications, scales, **settings)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hyperparameters that have values."""
        return tuple(self.constants) if self.schedule is None else self.schedule.names

    @property
    def recorded_length(self) -> int:
        """Training batches of the run that the schedule was recorded in, 0 for constants."""
        return 0 if self.schedule is None else self.schedule.rows[-1].step

    @property
    def changes_with_length(self) -> bool:
        """Whether the values depend on the length of the run."""
        return self.stretch and self.schedule is not None and len(self.schedule) > 1

    def with_specifications(self, specifications: Mapping[str, Hyperparameter]) -> "Policy":
        """The same values with other specifications for the names that both have.

        Raises:
            ValueError: a hyperparameter cannot have its values.
        """
        ours = {**self.specifications, **{n: s for n, s in specifications.items() if n in self.names}}
        schedule = self.schedule
        if schedule is not None:
            schedule = Schedule({name: ours[name] for name in schedule.names}, schedule.rows, schedule.warmup)
        return replace(self, schedule=schedule, specifications=ours)

    def position(self, batch: int) -> float:
        """The step of the schedule that is in force for the training batch after `batch` finished ones."""
        if not self.changes_with_length or not 0 < self.length < math.inf:
            return batch
        return batch * self.recorded_length / self.length

    def centre(self, batch: int) -> dict[str, Value]:
        """Values without noise for the training batch after `batch` finished ones, natural units."""
        if self.schedule is None:
            return dict(self.constants)
        return self.schedule.at(self.position(batch), self.interpolation)

    def values(self, batch: int) -> dict[str, Value]:
        """Values with noise for the training batch after `batch` finished ones, natural units.

        Raises:
            ValueError: the noise needs the length of the run or ranges, which are not known.
        """
        values = self.centre(batch)
        if self.noise is None:
            return values
        kinds = self._ranged()
        entries = [entry for name, kind in kinds.items() for entry in kind.entries(values[name])]
        scales = [scale for name, kind in kinds.items() for scale in self._scales_of(name, kind)]
        centre, widths = torch.tensor([entries, scales], dtype=torch.float64, device="cpu")
        offsets = self.noise.offsets(widths, batch=batch, length=self.length, seed=self.seed)
        sample = (centre + offsets).float().double()  # `Hyperparameter.value` takes numbers that float32 holds
        parts = torch.split(sample, [kind.size for kind in kinds.values()])
        return {name: kind.value(part) for (name, kind), part in zip(kinds.items(), parts, strict=True)}

    def signature(self) -> dict[str, Any]:
        """What tells this policy from others, as plain values: settings, and a digest of the values."""
        return {
            "values": self._digest,
            "noise": repr(self.noise),
            "stretch": self.stretch,
            "interpolation": self.interpolation,
            "seed": self.seed,
            "length": self.length,
        }

    @cached_property
    def _digest(self) -> str:
        rows = [] if self.schedule is None else [(row.step, dict(row.values)) for row in self.schedule.rows]
        known = repr((rows, dict(self.constants), {name: list(scales) for name, scales in self.scales.items()}))
        return hashlib.blake2b(known.encode(), digest_size=16).hexdigest()

    def _ranged(self) -> dict[str, Hyperparameter]:
        """The specifications, by name.

        Raises:
            ValueError: the range of a hyperparameter is not known.
        """
        unknown = [name for name in self.names if isinstance(self.specifications.get(name), Unspecified | None)]
        if unknown:
            raise ValueError(
                f"{READER}: expected ranges for noise, which is in unconstrained units, got none for {unknown}; give a "
                "schedule as JSON, constants as specifications such as Float(0.0, 0.9, init=0.3), or an STNModule."
            )
        return {name: self.specifications[name] for name in self.names}

    def _stored(self, name: str) -> list[Value]:
        """All values of one hyperparameter."""
        if self.schedule is None:
            return [self.constants[name]] if name in self.constants else []
        return [row.values[name] for row in self.schedule.rows]

    def _scales_of(self, name: str, kind: Hyperparameter) -> Sequence[float]:
        recorded = self.scales.get(name, ())
        return recorded if len(recorded) == kind.size else [kind.scale] * kind.size
