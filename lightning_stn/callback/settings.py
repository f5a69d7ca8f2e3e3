"""The settings of a run: checked once, saved in its checkpoints, and compared when it is resumed."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

from lightning_stn.module import ClipAlgorithm, Method, WeightStepSettings
from lightning_stn.phases import PhaseSchedule
from lightning_stn.specifications import Perturb

_CHOSEN_BY_THE_RUN = ("lr", "scale_lr", "seed")
"""None leaves these to the run, and so to the checkpoint."""

OBJECTS = ("optimizer", "hyperparameters")
"""What can be overridden on resuming beside the settings."""


@dataclass(frozen=True)
class Settings:
    """Those arguments of `STNCallback` that are plain values; it says what they mean.

    Raises:
        ValueError: an argument is out of its range.
    """

    train_steps: int = 2
    valid_steps: int = 1
    warmup_epochs: int = 5
    warmup_steps: int | None = None
    lr: float | None = None
    scale_lr: float | None = None
    tune_scales: bool = True
    entropy_weight: float = 1e-3
    method: Method = "stn"
    linearize: bool = True
    share_primal: bool = False
    perturb: Perturb = "example"
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: ClipAlgorithm = "norm"
    accumulate_grad_batches: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("perturb", Perturb), ("gradient_clip_algorithm", ClipAlgorithm)):
            choices = get_args(kind)
            if getattr(self, name) not in choices:
                expected = " or ".join(f"{name}={choice!r}" for choice in choices)
                raise ValueError(f"STNCallback: expected {expected}, got {getattr(self, name)!r}.")
        for name in ("lr", "scale_lr", "gradient_clip_val"):
            rate = getattr(self, name)
            if rate is not None and not (_is_number(rate) and rate > 0):
                raise ValueError(f"STNCallback: expected {name} to be positive, or None, got {rate!r}.")
        if not (_is_number(self.entropy_weight) and self.entropy_weight >= 0):
            raise ValueError(
                f"STNCallback: expected entropy_weight to be a number of at least 0, got {self.entropy_weight!r}."
            )
        accumulate: Any = self.accumulate_grad_batches
        if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
            raise ValueError(
                f"STNCallback: expected accumulate_grad_batches to be a whole number of at least 1, got {accumulate!r}."
            )
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise ValueError(f"STNCallback: expected seed to be a whole number, or None, got {self.seed!r}.")
        for name in ("tune_scales", "linearize", "share_primal"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"STNCallback: expected {name} to be True or False, got {getattr(self, name)!r}.")
        if self.share_primal and not (self.method == "delta-stn" and self.linearize):
            raise ValueError(
                "STNCallback: share_primal=True is for linearised predictions, got "
                f"method={self.method!r}, linearize={self.linearize!r}; use method='delta-stn' with linearize=True, or "
                "leave share_primal out."
            )
        _ = self.phases

    @property
    def phases(self) -> PhaseSchedule:
        """When the weights learn and when the hyperparameters do."""
        return PhaseSchedule(self.train_steps, self.valid_steps, self.warmup_epochs, self.warmup_steps)

    @property
    def weight_step(self) -> WeightStepSettings:
        """How the manual weight step runs."""
        return WeightStepSettings(**{field.name: getattr(self, field.name) for field in fields(WeightStepSettings)})

    def state_dict(self) -> dict[str, Any]:
        """Name to value."""
        return asdict(self)

    def resumed(self, saved: Mapping[str, Any], override: Collection[str]) -> tuple["Settings", str]:
        """The settings with which a run continues: the saved ones, but for those named in `override`.

        Returns:
            The settings, and a message on what was given and does not count; empty if there is nothing of the kind.
        """
        kept = {name: value for name, value in saved.items() if name in setting_names() and name not in override}
        ignored = [
            f"{name}={getattr(self, name)!r} (it stays {value!r})"
            for name, value in kept.items()
            if getattr(self, name) != value and not (name in _CHOSEN_BY_THE_RUN and getattr(self, name) is None)
        ]
        message = ""
        if ignored:
            message = (
                "A resumed run keeps the settings of its checkpoint, so that these arguments of STNCallback do not "
                f"count: {', '.join(ignored)}. To change one in the middle of a run, name it in override=[...] as well."
            )
        return replace(self, **kept), message


def setting_names() -> tuple[str, ...]:
    """Names of all settings."""
    return tuple(field.name for field in fields(Settings))


def checked_override(override: Collection[str]) -> frozenset[str]:
    """What a resumed run shall take from its arguments, as a set.

    Raises:
        ValueError: there is no setting of a name.
    """
    names = [override] if isinstance(override, str) else override
    known = (*setting_names(), *OBJECTS)
    if not isinstance(names, Collection) or any(name not in known for name in names):
        raise ValueError(f"STNCallback: expected override to name some of {list(known)}, got {override!r}.")
    return frozenset(names)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
