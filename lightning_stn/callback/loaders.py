"""The training loaders of a run that can be resumed, and their states."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_stn.resumable import ResumableLoader


def resumable_loaders(trainer: Trainer) -> list[ResumableLoader]:
    """The training loaders that are resumable; none before Lightning has asked for the loaders."""
    return _resumable(trainer.train_dataloader)


def _resumable(loaders: Any) -> list[ResumableLoader]:
    flat = loaders.flattened if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders).flattened
    return [loader for loader in flat if isinstance(loader, ResumableLoader)]


def loader_states(trainer: Trainer) -> list[dict[str, int]]:
    """States of the resumable loaders after the batches that Lightning has taken from its own store."""
    return [loader.state_before(_prefetched(trainer)) for loader in resumable_loaders(trainer)]


def check_loader_states(trainer: Trainer, states: list[dict[str, int]]) -> None:
    """Check the loaders that `trainer.fit` was given; those that a hook returns are not known before it is called.

    Raises:
        ValueError: a state is damaged, or of a loader with other data, another batch size or another order.
    """
    source = trainer.fit_loop._data_source  # private, but it has the loaders before any state is loaded (2.5 and 2.6)
    loaders = [] if source.is_module() else _resumable(source.instance)
    if len(states) == len(loaders):
        for loader, state in zip(loaders, states, strict=True):
            loader.check_state(state)


def load_loader_states(trainer: Trainer, states: list[dict[str, int]]) -> None:
    """Continue the resumable loaders from their states, if their number is that of this run."""
    loaders = resumable_loaders(trainer)
    if len(states) != len(loaders):
        return
    for loader, state in zip(loaders, states, strict=True):
        loader.load_state_dict(state)
    if _prefetched(trainer):
        iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]  # what it holds was read before


def _prefetched(trainer: Trainer) -> int:
    """Batches that Lightning has read ahead, as it does where the length of an epoch is not known."""
    # Private, but nothing else tells (2.5 and 2.6).
    return len(getattr(trainer.fit_loop._data_fetcher, "batches", ()))
