"""What an `STNModule` does in validation, test and prediction."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.data import extract_batch_size

from lightning_stn.binding import cache_effective_parameters
from lightning_stn.hyperparameters import HyperparameterSet
from lightning_stn.inherited import accepted, inherited


class CachedEvaluation(L.LightningModule):
    """Computes effective weights once for a whole loop of validation, test or prediction."""

    hyperparameters: HyperparameterSet

    def on_validation_epoch_start(self) -> None:
        """Compute effective weights once for the whole loop."""
        cache_effective_parameters(self.hyperparameters, True)
        super().on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        """Drop the effective weights of the loop."""
        cache_effective_parameters(self.hyperparameters, False)
        super().on_validation_epoch_end()

    def on_test_epoch_start(self) -> None:
        """Compute effective weights once for the whole loop."""
        cache_effective_parameters(self.hyperparameters, True)
        super().on_test_epoch_start()

    def on_test_epoch_end(self) -> None:
        """Drop the effective weights of the loop."""
        cache_effective_parameters(self.hyperparameters, False)
        super().on_test_epoch_end()

    def on_predict_epoch_start(self) -> None:
        """Compute effective weights once for the whole loop."""
        cache_effective_parameters(self.hyperparameters, True)
        super().on_predict_epoch_start()

    def on_predict_epoch_end(self) -> None:
        """Drop the effective weights of the loop."""
        cache_effective_parameters(self.hyperparameters, False)
        super().on_predict_epoch_end()


def evaluate(module: Any, mixin: type, stage: str, tag: str, batch: Any, batch_idx: int, *args: Any) -> Any:
    """Run the step of an existing module behind a mixin or, without one, log the validation loss of the mixin."""
    if (step := inherited(module, mixin, f"{stage}_step")) is not None:
        return step(*accepted(step, batch, batch_idx, *args))
    loss = module.validation_loss(batch, batch_idx)
    module.log(tag, loss, prog_bar=True, sync_dist=True, batch_size=_logged_batch_size(module, batch))
    return loss


def _logged_batch_size(module: Any, batch: Any) -> int:
    """The weight of a batch in the mean of an epoch; where it is not clear, what Lightning takes."""
    try:
        size: int = module.infer_batch_size(batch)
    except ValueError:
        size = extract_batch_size(batch)
    return size
