"""Lightning's counters of a run, put where a resumed run has to go on.

Lightning 2.5 and 2.6 read from these counters at which stage of a batch, a validation or an epoch a checkpoint was
written, and expect one that was written by a checkpoint callback. After an exception they say something else.
"""

from typing import Any

from lightning.pytorch import Trainer

_STAGES = ("ready", "started", "processed")


def batch_progress(trainer: Trainer) -> Any:
    """Counters of batches, of this epoch and of the whole run."""
    return trainer.fit_loop.epoch_loop.batch_progress


def epoch_progress(trainer: Trainer) -> Any:
    """Counters of epochs, of this `fit` and of the whole run."""
    return trainer.fit_loop.epoch_progress


def epoch_is_over(trainer: Trainer) -> bool:
    """Whether the last epoch is over, with all of its hooks and scheduler steps."""
    progress = epoch_progress(trainer).current
    return bool(progress.completed == progress.processed)


def epochs_processed(trainer: Trainer) -> int:
    """Epochs whose batches are over; the hooks at the end of the last one may still run."""
    return int(epoch_progress(trainer).current.processed)


def before_batch(trainer: Trainer, ready: int, is_last_batch: bool) -> bool:
    """Undo a batch that was begun and, if it was the first one, its epoch.

    Args:
        trainer: the Trainer of the run.
        ready: batches of the whole run that were begun before this one.
        is_last_batch: whether the batch before this one was the last of an epoch.

    Returns:
        Whether the run goes on at the start of an epoch.
    """
    progress, epochs = batch_progress(trainer), epoch_progress(trainer)
    _return(progress, progress.total.ready - ready)
    progress.is_last_batch = is_last_batch
    if progress.current.ready and epochs.current.ready == epochs.current.started:
        return False
    for name in ("ready", "started"):
        undone = getattr(epochs.current, name) - epochs.current.processed
        setattr(epochs.total, name, getattr(epochs.total, name) - undone)
        setattr(epochs.current, name, epochs.current.processed)
    progress.current.reset()
    progress.is_last_batch = False
    return True


def after_batch(trainer: Trainer, *, validated: bool) -> None:
    """Go on after the last batch that was begun, with the validation if it follows and is not over.

    Lightning does not repeat the hooks at the end of an epoch that ends without a validation.

    Args:
        trainer: the Trainer of the run.
        validated: whether the validation is over.
    """
    loop = trainer.fit_loop
    epoch_loop, progress, epochs = loop.epoch_loop, batch_progress(trainer), epoch_progress(trainer)
    # Private, but there is no other way to know (2.5 and 2.6).
    validates = not validated and loop._data_fetcher is not None and epoch_loop._should_check_val_fx(loop._data_fetcher)
    ends = progress.is_last_batch and not validated and epochs.current.ready > epochs.current.processed
    if validates:
        _begin_validation(epoch_loop.val_loop.batch_progress)
    elif ends:  # as in the hook at the end of an epoch, since from a batch Lightning would begin a validation
        epochs.total.processed += 1
        epochs.current.processed += 1
    for name in ("started", "processed", "completed") if validates or ends else ("started", "processed"):
        setattr(progress.current, name, progress.current.ready)
    for name in ("started", "processed", "completed"):  # the totals lag behind where a hook has skipped batches
        behind = progress.current.ready - getattr(progress.current, name)
        setattr(progress.total, name, progress.total.ready - behind)


def end_validation(trainer: Trainer) -> None:
    """Forget that `after_batch` announced a validation, once Lightning has read it."""
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    if progress.current.ready == 0:
        progress.total.ready = progress.total.started = progress.total.completed


def _return(progress: Any, batches: int) -> None:
    """Undo the last batches that were begun and are not completed."""
    for name in _STAGES:
        undone = getattr(progress.current, name) - progress.current.completed
        if batches and undone > 0:
            setattr(progress.total, name, getattr(progress.total, name) - undone)
            setattr(progress.current, name, progress.current.completed)


def _begin_validation(progress: Any) -> None:
    """Say that the first batch of a validation is under way, which begins the validation again."""
    progress.current.reset()
    progress.is_last_batch = False
    progress.total.processed = progress.total.completed
    progress.total.ready = progress.total.started = progress.total.completed + 1
