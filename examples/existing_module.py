"""A LightningModule that exists already, tuned without a change to it.

`LitImages` has `save_hyperparameters`, torchmetrics and a one-cycle schedule, its Trainer early stopping and
checkpoints. `Tuned` puts `STNModule` in front; the rest of the script stays as it was. Three modules train on the same
250 digits: tuned, as its author set it, and without regularisation. Each is tested once, at its best checkpoint.

    python examples/existing_module.py                      # about a minute on one core
    python examples/existing_module.py --seeds 0 1 2 3 4 5  # six times that
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from command_line import example_parser
from comparison import SELF_TUNED, Progress, Scores, over_seeds
from digits import Batch, load_data
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from lightning_stn import Float, STNModule
from lightning_stn.augment import RandomAffine


class LitImages(L.LightningModule):
    """A small CNN, its metrics, its optimiser and its schedule."""

    def __init__(self, width: int = 16, dropout: float = 0.3, lr: float = 3e-3, augment: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.augment: nn.Module = v2.RandomAffine((-10, 10), (0.1, 0.1)) if augment else nn.Identity()
        self.net: nn.Module = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.Dropout2d(dropout)),
            *(nn.Flatten(), nn.Linear(32 * width, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 10)),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy of augmented images."""
        return F.cross_entropy(self.net(self.augment(batch[0])), batch[1])

    def evaluate(self, batch: Batch, stage: str) -> None:
        """Log loss and accuracy."""
        logits, labels = self.net(batch[0]), batch[1]
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels))
        self.log(f"{stage}_accuracy", self.accuracy(logits, labels))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate."""
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate."""
        self.evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        """AdamW, whose rate rises and falls once over the run."""
        adam, steps = torch.optim.AdamW(self.parameters()), int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, self.hparams["lr"], total_steps=steps)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Tuned(STNModule, LitImages):
    """The existing module, whose dropout rates and augmentation start at the author's and are tuned."""

    def __init__(self, **arguments: Any) -> None:
        degrees, translate = Float(0.0, 45.0, init=10.0, unit="degrees"), Float(0.0, 0.5, init=0.1)
        super().__init__(hyperparameters={"degrees": degrees, "translate": translate}, **arguments)
        self.augment = RandomAffine("degrees", "translate")
        self.net = self.convert(self.net, dropout="per-layer")  # two more hyperparameters

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        return F.cross_entropy(self.net(batch[0]), batch[1])


PLAIN = partial(LitImages, dropout=0.0, augment=False)
MODULES: dict[str, Callable[[], LitImages]] = {SELF_TUNED: Tuned, "existing": LitImages, "none": PLAIN}


def run(seed: int, name: str, callbacks: list[L.Callback], args: argparse.Namespace) -> tuple[LitImages, Scores]:
    """The script of the existing module; `callbacks` is what the tuned one adds."""
    L.seed_everything(seed, verbose=False)
    (train, valid, test), best = load_data(seed), ModelCheckpoint(monitor="val_loss")
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[*callbacks, Progress(name), EarlyStopping("val_loss", patience=25), best],
        default_root_dir=args.out / f"seed{seed}" / name,
        log_every_n_steps=5,
        enable_progress_bar=False,
    )
    module, begin = MODULES[name](), time.perf_counter()
    trainer.fit(module, train, valid)
    scores: Scores = {"seconds": time.perf_counter() - begin, "epochs": trainer.current_epoch}
    loaded = type(module).load_from_checkpoint(best.best_model_path)
    scores |= {**trainer.validate(loaded, valid, verbose=False)[0], **trainer.test(loaded, test, verbose=False)[0]}
    return loaded, scores


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments and run."""
    args = example_parser(__doc__, epochs=100, out=Path("runs/existing_module")).parse_args(arguments)
    columns = ("epochs", "val_loss", "test_loss", "test_accuracy")
    over_seeds(list(MODULES), partial(run, args=args), args, "An existing module, tuned in one run", columns)


if __name__ == "__main__":
    main()
