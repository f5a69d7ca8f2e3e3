"""The settings of a run: checked once, saved in its checkpoints, and compared when it is resumed."""

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, get_args

from lightning_stn.arguments import is_number
from lightning_stn.manual_optimization import WeightStep
from lightning_stn.methods import Method, Scales, resolve_method
from lightning_stn.phases import PhaseSchedule, Warmup
from lightning_stn.specifications import Perturb
from lightning_stn.weight_phase import WeightPhase

OBJECTS = ("optimizer", "hyperparameters")
"""What `on_resume_use` can name beside the settings."""


@dataclass(frozen=True)
class Settings:
    """The arguments of `STNCallback` that are plain values; see there.

    Raises:
        ValueError: an argument is out of its range.
    """

    train_steps: int
    valid_steps: int
    warmup: Warmup
    method: Method
    perturb: Perturb
    lr: float | None
    anneal: bool
    scales: Scales
    weight_step: WeightStep
    seed: int | None

    def __post_init__(self) -> None:
        """Check and resolve the arguments."""
        object.__setattr__(self, "warmup", Warmup.parse(self.warmup))
        object.__setattr__(self, "method", resolve_method(self.method))
        if self.perturb not in get_args(Perturb):
            expected = " or ".join(f"perturb={choice!r}" for choice in get_args(Perturb))
            raise ValueError(f"STNCallback: expected {expected}, got {self.perturb!r}.")
        for name, kind in (("scales", Scales), ("weight_step", WeightStep)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ValueError(f"STNCallback: expected {name} to be {kind.__name__}(...), got {value!r}.")
        lr: Any = self.lr
        if lr is not None and not (is_number(lr) and lr > 0):
            raise ValueError(f"STNCallback: expected lr to be positive, or None, got {lr!r}.")
        if not isinstance(self.anneal, bool):
            raise ValueError(f"STNCallback: expected anneal to be True or False, got {self.anneal!r}.")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise ValueError(f"STNCallback: expected seed to be a whole number, or None, got {self.seed!r}.")
        _ = self.phases

    @property
    def phases(self) -> PhaseSchedule:
        """When the weights learn and when the hyperparameters do."""
        return PhaseSchedule(self.train_steps, self.valid_steps, self.warmup)

    @property
    def weight_phase(self) -> WeightPhase:
        """How the weight phase works."""
        return WeightPhase(self.method, self.perturb, self.weight_step)

    def state_dict(self) -> dict[str, Any]:
        """Name to value, as plain values."""
        return {**asdict(self), "method": self.method.state_dict()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Settings":
        """The settings that a `state_dict` was taken of."""
        groups: dict[str, Any] = {"warmup": Warmup, "scales": Scales, "weight_step": WeightStep}
        # Runs saved before `anneal` existed had constant rates.
        known = {"anneal": False} | {name: value for name, value in state.items() if name in setting_names()}
        for name in groups.keys() & known:
            names = {field.name for field in fields(groups[name])}
            known[name] = groups[name](**{key: value for key, value in known[name].items() if key in names})
        return cls(**known)

    def resumed(self, saved: Mapping[str, Any], on_resume_use: Collection[str]) -> tuple["Settings", str]:
        """The settings with which a run continues: the saved ones, except for those that `on_resume_use` names.

        Returns:
            The settings, and a message on arguments that differ and are not used; empty if there are none.
        """
        before = Settings.from_state(saved)
        kept = {name: getattr(before, name) for name in setting_names() if name not in on_resume_use}
        ignored = [
            difference
            for name, value in kept.items()
            if not self._left_to_the_run(name)
            for difference in _differences(name, getattr(self, name), value)
        ]
        message = ""
        if ignored:
            message = (
                "A resumed run keeps the settings of its checkpoint, so that these arguments of STNCallback are not "
                f"used: {', '.join(ignored)}. To change one in the middle of a run, name it in on_resume_use=[...]."
            )
        return replace(self, **kept), message

    def _left_to_the_run(self, name: str) -> bool:
        """Whether the argument leaves its value to the run, which has saved the one that it chose."""
        return getattr(self, name) is None or (name == "warmup" and self.warmup.unit == "share")


def _differences(name: str, given: Any, kept: Any) -> list[str]:
    """Where a setting that was given differs from the one that is kept; of two groups, field by field."""
    if given == kept:
        return []
    if is_dataclass(given) and type(given) is type(kept):
        pairs = [(field.name, getattr(given, field.name), getattr(kept, field.name)) for field in fields(given)]
        return [f"{name}.{key}={one!r} (it stays {other!r})" for key, one, other in pairs if one != other]
    return [f"{name}={given!r} (it stays {kept!r})"]


def setting_names() -> tuple[str, ...]:
    """Names of all settings."""
    return tuple(field.name for field in fields(Settings))


def check_on_resume_use(names: Any) -> frozenset[str]:
    """The names of what a resumed run takes from the arguments of its callback, as a set.

    Raises:
        ValueError: there is no setting of a name.
    """
    given = [names] if isinstance(names, str) else names
    known = (*setting_names(), *OBJECTS)
    if not isinstance(given, Sequence | Set) or any(name not in known for name in given):
        raise ValueError(f"STNCallback: expected on_resume_use to name some of {list(known)}, got {names!r}.")
    return frozenset(given)


def check_objects(optimizer: Any, dataloader: Any) -> None:
    """Check the arguments of `STNCallback` that are not plain values.

    Raises:
        ValueError: `optimizer` builds no optimiser, or `dataloader` yields no batches.
    """
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
