"""The step on the axis of the loggers."""

from lightning.pytorch import Trainer


class LoggedSteps:
    """Counts the steps that Lightning counts for `self.log`, so that all curves have one axis.

    A step is a training batch and, in automatic optimisation with `Trainer(accumulate_grad_batches=...)`, a step of the
    weights.

    Attributes:
        number: steps so far.
    """

    def __init__(self) -> None:
        self.number = 0
        self._completes = False  # whether the last batch completed one

    def count(self, trainer: Trainer, batch_idx: int) -> None:
        """Count the step that a batch completes, if it completes one.

        Args:
            trainer: the Trainer of the run.
            batch_idx: number of the batch in its epoch.
        """
        self._completes = not (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.is_last_batch
        self.number += self._completes

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the last batch completed a step after which `Trainer(log_every_n_steps)` wants a record."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and self._completes and self.number % every == 0  # 0 as with Trainer(barebones=True)

    def state_dict(self) -> dict[str, int | bool]:
        """The count, and whether the last batch completed a step."""
        return {"steps": self.number, "completes": self._completes}

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Continue from a saved state."""
        self.number, self._completes = state["steps"], bool(state["completes"])
