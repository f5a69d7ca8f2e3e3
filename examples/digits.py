"""Five regularisation hyperparameters of a small CNN, tuned in one training run on 250 handwritten digits.

Three networks start from the same weights and train on the same batches for the same number of epochs:

- self-tuned: the hyperparameters start at a tenth and are tuned while the network trains;
- guess: constants that an experienced user would try, dropout rates of 0.3 with noise and cutout;
- none: no regularisation.

Each network keeps its best checkpoint by validation loss. The validation images also tune the hyperparameters, so the
validation score favours the self-tuned network. Compare by the test images, which are read once for each network.

    python examples/digits.py                    # about a minute on a CPU
    python examples/digits.py --seeds 0 1 2      # three times that
    tensorboard --logdir runs/digits             # every hyperparameter over time, during training
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from command_line import example_parser, set_up
from comparison import Scores, print_hyperparameters, print_scores, print_summary, save_picture
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_stn import Float, Integer, STNCallback, STNModule
from lightning_stn.augment import Cutout, GaussianNoise

Batch = tuple[Tensor, Tensor]

DROPOUT, NOISE, CUTOUT = 0.1, 0.1, 1
"""Start values: dropout rates, standard deviation of the noise for pixels in [0, 1], side of the square in pixels."""

GUESS = {"dropout": 0.3, "noise": 0.15, "cutout": 2}

COLUMNS = ("last_val_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy")


class DigitsCNN(nn.Module):
    """Two convolutions and two fully connected layers, with a plain dropout after each but the last."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.after_conv1 = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.after_conv2 = nn.Dropout(dropout)
        self.hidden = nn.Linear(32 * 4 * 4, 128)
        self.after_hidden = nn.Dropout(dropout)
        self.output = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, 1, 8, 8]` to logits `[n, 10]`."""
        x = self.after_conv1(F.max_pool2d(F.relu(self.conv1(x)), 2))
        x = self.after_conv2(F.relu(self.conv2(x)))
        x = self.after_hidden(F.relu(self.hidden(x.flatten(1))))
        return self.output(x)


class LitDigits(L.LightningModule):
    """An ordinary LightningModule, whose regularisation has to be chosen by hand."""

    def __init__(self, dropout: float = DROPOUT, noise: float | str = NOISE, cutout: int | str = CUTOUT) -> None:
        super().__init__()
        self.net: nn.Module = DigitsCNN(dropout)
        self.augment = nn.Sequential(GaussianNoise(std=noise), Cutout(length=cutout))
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy with dropout and augmentation."""
        images, labels = batch
        return F.cross_entropy(self.net(self.augment(images)), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self.evaluate(batch, "test")

    def evaluate(self, batch: Batch, stage: str) -> None:
        """Log loss and accuracy without regularisation."""
        images, labels = batch
        logits = self.net(images)
        self.accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels))
        self.log(f"{stage}_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the weights."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class SelfTunedDigits(STNModule, LitDigits):
    """The same module with tuned hyperparameters; the `training_step` above gives its training loss."""

    def __init__(self) -> None:
        hyperparameters = {
            "noise": Float(0.0, 1.0, init=NOISE, unit="standard deviation"),
            "cutout": Integer(0, 6, init=CUTOUT, unit="pixels"),
        }
        super().__init__(hyperparameters=hyperparameters, noise="noise", cutout="cutout")  # named where they act
        self.net = self.convert(self.net, dropout="per-layer")  # one more hyperparameter for each dropout

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)


NETWORKS: dict[str, Callable[[], LitDigits]] = {
    "self-tuned": SelfTunedDigits,
    "guess": partial(LitDigits, **GUESS),
    "none": partial(LitDigits, dropout=0.0, noise=0.0, cutout=0),
}


def load_data(seed: int) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Loaders of 250 training, 500 validation and 1,047 test images; `seed` fixes the order of the training images."""
    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16  # pixels in [0, 1]
    labels = torch.tensor(classes)
    seen, test = train_test_split(range(len(labels)), train_size=750, stratify=labels, random_state=0)
    train, valid = train_test_split(seen, train_size=250, stratify=labels[seen], random_state=0)
    train_set, valid_set, test_set = (TensorDataset(images[part], labels[part]) for part in (train, valid, test))
    order = torch.Generator().manual_seed(seed)
    train_data = DataLoader(train_set, batch_size=50, shuffle=True, generator=order)
    return train_data, DataLoader(valid_set, batch_size=100), DataLoader(test_set, batch_size=500)


def run(name: str, seed: int, epochs: int, out: Path, callbacks: list[L.Callback]) -> tuple[LitDigits, Scores]:
    """Train one network from this seed; return it at its best epoch, and its scores there."""
    print(f"  training: {name}", flush=True)
    L.seed_everything(seed, verbose=False)
    train_data, valid_data, test_data = load_data(seed)
    module = NETWORKS[name]()
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, best := ModelCheckpoint(monitor="val_loss")],
        logger=TensorBoardLogger(out, name=name),
        accelerator="cpu",
        log_every_n_steps=5,  # once an epoch
        check_val_every_n_epoch=5,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begin = time.perf_counter()
    trainer.fit(module, train_data, valid_data)
    scores = {"seconds": time.perf_counter() - begin, "last_val_loss": trainer.callback_metrics["val_loss"].item()}
    scores |= trainer.validate(module, valid_data, ckpt_path=best.best_model_path, verbose=False)[0]
    scores |= trainer.test(module, test_data, verbose=False)[0]
    return module, scores


def compare(seed: int, epochs: int, out: Path) -> dict[str, Scores]:
    """Train the three networks from one seed; print their scores, and plot the schedules."""
    print(f"\nSeed {seed}, {epochs} epochs", flush=True)
    stn = STNCallback()
    scores = {}
    for name in NETWORKS:
        callbacks: list[L.Callback] = [stn] if name == "self-tuned" else []
        _, scores[name] = run(name, seed, epochs, out, callbacks)
    print_hyperparameters(stn.schedule)
    print_scores(scores, COLUMNS)
    picture = out / "schedules.png"
    title = "Regularisation schedules that one self-tuned run found on 250 digits"
    save_picture(stn.schedule, picture, title)
    print(f"\nSchedules: {picture}")
    return scores


def main() -> None:
    """Read the arguments and run."""
    args = example_parser(__doc__, epochs=200, out=Path("runs/digits")).parse_args()
    set_up()
    runs = [compare(seed, args.epochs, args.out / f"seed{seed}") for seed in args.seed]
    if len(runs) > 1:
        print_summary(runs, ["last_val_loss", "test_loss", "seconds"])
    print(f"\nAll hyperparameters over time: tensorboard --logdir {args.out}")


if __name__ == "__main__":
    main()
