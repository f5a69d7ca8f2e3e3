"""Train and eval mode: restored where an evaluation raised, and named where it keeps hyperparameters unread."""

import warnings

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_stn.module import STNModule
from lightning_stn.regularizer import Regularizer


def restore_modes(trainer: Trainer, module: LightningModule) -> None:
    """Put a module that an exception left in eval mode into the modes that it had before this evaluation.

    Lightning restores them at the end of an evaluation only, so that the next `fit` would train in eval mode, with
    dropout, augmentation and penalties off.
    """
    if module.training or not (trainer.evaluating or trainer.sanity_checking or trainer.predicting):
        return
    loop = {
        TrainerFn.FITTING: trainer.fit_loop.epoch_loop.val_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }.get(trainer.state.fn)  # type: ignore[arg-type]
    # Private, but the only record of the modes before Lightning changed them (2.5 and 2.6).
    modes = getattr(loop, "_module_mode", None)
    if modes is not None:
        modes.restore(module)


def warn_unread(module: STNModule) -> None:
    """Warn of hyperparameters that nothing has read in the first weight step of this `fit`."""
    unread = module.hyperparameters.unread()
    if not unread:
        return
    off = [name for name, part in module.named_modules() if isinstance(part, Regularizer) and not part.training]
    advice = (
        f"these modules are in eval mode, in which they change nothing: {off}. Call train() on them before trainer.fit."
        if off
        else "name them where they act (convert(net, dropout=...), a regulariser, an augmentation) or read "
        "self.hyperparameters[name] in training_loss."
    )
    warnings.warn(
        f"Nothing read the hyperparameters {unread} in the first training step, so tuning them means nothing; {advice}",
        stacklevel=3,
    )
