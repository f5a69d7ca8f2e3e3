"""What a checkpoint holds of an `STNModule`, and the checks before anything of it is loaded."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from lightning_stn.hyperparameters import HyperparameterSet

PREFIX = "hyperparameters."
"""Begins the names of the hyperparameters' state in the state dict of an `STNModule`."""

_SIGNATURE = "lightning_stn_hyperparameters"
"""Key of the signature of the hyperparameters in a checkpoint."""


@runtime_checkable
class ChecksCheckpoint(Protocol):
    """A callback that checks its own part of a checkpoint before the weights are loaded."""

    def check_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint from which the run cannot be resumed."""


def save_hyperparameters(hyperparameters: HyperparameterSet, checkpoint: dict[str, Any]) -> None:
    """Save the current hyperparameters, also where a callback saves an averaged copy of the module instead."""
    current = hyperparameters.state_dict(prefix=PREFIX)
    checkpoint["state_dict"] |= {key: value for key, value in current.items() if key in checkpoint["state_dict"]}
    checkpoint[_SIGNATURE] = hyperparameters.signature


def saved_hyperparameters(hyperparameters: HyperparameterSet, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters' part of a checkpoint's state dict.

    Where Lightning shards the weights, it has loaded and removed the state dict before any hook is called.
    """
    state = checkpoint.get("state_dict") or hyperparameters.state_dict(prefix=PREFIX)
    return {key: value for key, value in state.items() if key.startswith(PREFIX)}


def check_before_loading(
    hyperparameters: HyperparameterSet, checkpoint: dict[str, Any], trainer: Any, module: Any
) -> None:
    """Check a checkpoint before anything of it is loaded.

    Args:
        hyperparameters: those of the module.
        checkpoint: what is about to be loaded.
        trainer: the Trainer that resumes a run from it; None where weights alone are loaded.
        module: the module of the run.

    Raises:
        ValueError: the hyperparameters do not fit, or a callback refuses its own part.
    """
    if trainer is not None and _SIGNATURE in checkpoint:
        hyperparameters.require_signature(checkpoint[_SIGNATURE])
    misfits = hyperparameters.misfits(saved_hyperparameters(hyperparameters, checkpoint), PREFIX)
    if misfits:
        raise ValueError(" ".join(misfits))
    for callback in [] if trainer is None else trainer.callbacks:
        if isinstance(callback, ChecksCheckpoint):
            callback.check_checkpoint(trainer, module, checkpoint)
