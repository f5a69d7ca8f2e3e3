"""Checks of a replay: its module and Trainer, and the state from which it is resumed."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_stn.arguments import is_whole
from lightning_stn.callback.checks import check_surroundings
from lightning_stn.callback.stn import STNCallback
from lightning_stn.manual_optimization import WeightStep
from lightning_stn.module import STNModule

VERSION = 1
"""Version of the form of the saved state."""

COUNTS = ("version", "batches", "steps")
"""Entries of the saved state that are whole numbers."""


def check_paths(attributes: Any) -> dict[str, str]:
    """The argument `attributes` of `ScheduleReplay` as a dictionary.

    Raises:
        TypeError: it is not a mapping from strings to strings.
    """
    paths = {} if attributes is None else attributes
    if not isinstance(paths, Mapping) or not all(isinstance(one, str) for pair in paths.items() for one in pair):
        raise TypeError(
            "ScheduleReplay: expected attributes to lead from paths to names of hyperparameters, got "
            f"{attributes!r}; write for instance {{'net.drop.p': 'dropout'}}."
        )
    return dict(paths)


def check_run(trainer: Trainer, module: LightningModule, step: WeightStep, kind: type[Callback]) -> None:
    """Refuse combinations that do not work.

    Args:
        trainer: the Trainer of the run.
        module: the module of the run.
        step: the argument `weight_step`.
        kind: of the callback that replays.

    Raises:
        ValueError: there is an `STNCallback` as well, or `step` is given where Lightning or the module itself takes the
            weight step.
        NotImplementedError: the strategy, or a callback beside this one, is not supported for an `STNModule`.
    """
    if any(isinstance(callback, STNCallback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            f"Expected STNCallback, which tunes, or {kind.__name__}, which replays, got both; give the Trainer one."
        )
    if step != WeightStep() and (not isinstance(module, STNModule) or module.automatic_optimization):
        raise ValueError(
            f"{kind.__name__}: expected weight_step for an STNModule in manual optimisation alone, got {step!r} for "
            f"{type(module).__name__}; leave it out, and pass those of its settings that the Trainer has to "
            "Trainer(...)."
        )
    if isinstance(module, STNModule):
        check_surroundings(trainer, module, kind)


def check_state(state: Any) -> None:
    """Check the form of a saved state.

    Raises:
        ValueError: the state is damaged, or of a newer version.
    """
    parts = {"signature": dict, "metric_steps": list, "surroundings": dict}
    damaged = [name for name in COUNTS if not is_whole(state.get(name), 0)]
    damaged += [name for name, kind in parts.items() if not isinstance(state.get(name), kind)]
    if damaged:
        raise ValueError(
            f"The checkpoint's state of ScheduleReplay is damaged: {damaged}; resume from another checkpoint."
        )
    if state["version"] > VERSION:
        raise ValueError(
            f"The checkpoint's state of ScheduleReplay has version {state['version']}, but this lightning_stn knows "
            f"versions up to {VERSION}; resume with the lightning_stn that wrote it, or a newer one."
        )


def describe_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """A message on what is replayed otherwise than before a checkpoint was written; empty if nothing is.

    Args:
        saved: `Policy.signature` of the run so far.
        current: that of the run that goes on.
    """
    changed = [
        name if name == "values" else f"{name}={current[name]} (it was {saved.get(name)})"
        for name in current
        if saved.get(name) != current[name]
    ]
    if not changed:
        return ""
    return (
        f"This run was begun with another replay, which differs in {', '.join(changed)}. From here on the run follows "
        "its present callback and length; to go on exactly, resume with those that it was begun with."
    )
