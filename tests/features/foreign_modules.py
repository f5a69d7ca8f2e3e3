"""Plain modules as their authors wrote them, and each with self-tuning in front of it, by the README alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from support import CLASSES
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchvision.models import mobilenet_v3_small

from lightning_stn import Float, STNModule
from lightning_stn.augment import GaussianNoise
from lightning_stn.regularizers import L2Penalty

BATCH = 8
VOCABULARY = 20


class LitImages(L.LightningModule):
    """An image classifier: metrics as objects, saved arguments, one step for all stages, a schedule by epoch."""

    def __init__(self, channels: int = 4, dropout: float = 0.3, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            *(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(4)),
            *(nn.Dropout2d(dropout), nn.Flatten(), nn.Linear(64 * channels, 16), nn.ReLU()),
            *(nn.Dropout(dropout), nn.Linear(16, CLASSES)),
        )
        self.train_accuracy = MulticlassAccuracy(CLASSES)
        self.val_accuracy = MulticlassAccuracy(CLASSES)
        self.test_accuracy = MulticlassAccuracy(CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def _step(self, batch: Any, stage: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        accuracy = getattr(self, f"{stage}_accuracy")
        accuracy(logits, labels)
        self.log(f"{stage}_accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "test")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.8)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class TunedImages(STNModule, LitImages):
    """Noise, weight decay, and a rate for each dropout."""

    def __init__(self, channels: int = 4, dropout: float = 0.3, lr: float = 3e-3) -> None:
        hyperparameters = {"noise": Float(0.0, 2.0), "decay": Float(1e-6, 1e-1, init=1e-4, log=True)}
        super().__init__(hyperparameters=hyperparameters, channels=channels, dropout=dropout, lr=lr)
        self.augment = GaussianNoise(std="noise")
        self.decay = L2Penalty("decay")
        self.model = self.convert(self.model, dropout="per-layer")

    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return super().training_loss((self.augment(images), labels), batch_idx) + self.decay(self.model)

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)


class LitText(L.LightningModule):
    """A text classifier: layers on the module itself, batches as dictionaries, a rate that follows the validation."""

    def __init__(self, width: int = 8, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True, dropout=0.2, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(2 * width, CLASSES)
        self.f1 = MulticlassF1Score(CLASSES)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        words = self.dropout(self.embedding(batch["tokens"]))
        packed = nn.utils.rnn.pack_padded_sequence(words, batch["lengths"], batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        logits: Tensor = self.head(self.dropout(torch.cat([last[-2], last[-1]], dim=1)))
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits = self(batch)
        loss = F.cross_entropy(logits, batch["label"])
        self.log("train_loss", loss, batch_size=len(logits))
        return {"loss": loss, "logits": logits.detach()}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch)
        self.f1(logits, batch["label"])
        self.log_dict({"val_loss": F.cross_entropy(logits, batch["label"]), "val_f1": self.f1}, batch_size=len(logits))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class TunedText(STNModule, LitText):
    """A rate for each dropout, and nothing else."""

    def __init__(self, width: int = 8, lr: float = 0.01) -> None:
        super().__init__(hyperparameters={}, width=width, lr=lr)
        self.convert(self, dropout="per-layer")

    def validation_loss(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), batch["label"])


class LitFineTuning(L.LightningModule):
    """A torchvision network with frozen early layers, AdamW, and a cosine schedule by batch."""

    def __init__(self, classes: int = CLASSES, lr: float = 1e-3, weight_decay: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = mobilenet_v3_small(weights=None)
        self.net.classifier[-1] = nn.Linear(1024, classes)
        self.net.features[:10].requires_grad_(False)
        self.accuracy = MulticlassAccuracy(classes)

    def train(self, mode: bool = True) -> "LitFineTuning":
        """As usual, but statistics of frozen layers stay."""
        super().train(mode)
        self.net.features[:10].eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.accuracy.update(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels))

    def on_validation_epoch_end(self) -> None:
        self.log("val_accuracy", self.accuracy.compute())
        self.accuracy.reset()

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TunedFineTuning(STNModule, LitFineTuning):
    """One dropout rate."""

    def __init__(self, classes: int = CLASSES, lr: float = 1e-3, weight_decay: float = 0.01) -> None:
        arguments = {"classes": classes, "lr": lr, "weight_decay": weight_decay}
        super().__init__(hyperparameters={"dropout": Float(0.0, 0.9)}, **arguments)
        self.net = self.convert(self.net, dropout="dropout")

    def validation_loss(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)


def photographs(n: int, seed: int) -> Dataset[Any]:
    """Coloured images whose brightness tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    return TensorDataset(torch.randn(n, 3, 32, 32, generator=generator) + labels[:, None, None, None], labels)


class Sentences(Dataset[Any]):
    """Sentences of two to nine words, most of them words of the class."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, 10, (n,), generator=generator)
        words = [torch.randint(1, 8, (length,), generator=generator) for length in lengths.tolist()]
        self.examples = [(sentence + 5 * (i % CLASSES), i % CLASSES) for i, sentence in enumerate(words)]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.examples[index]


def collate(examples: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    sentences, labels = zip(*examples, strict=True)
    return {
        "tokens": nn.utils.rnn.pad_sequence(list(sentences), batch_first=True),
        "lengths": torch.tensor([len(sentence) for sentence in sentences]),
        "label": torch.tensor(labels),
    }


class Case(NamedTuple):
    """A plain module, the tuned one, and what a test needs to know of them."""

    plain: Any
    tuned: Any
    arguments: dict[str, Any]
    """Of both modules, where they differ from the defaults."""
    parts: tuple[str, ...]
    """Attributes of the module that hold its network."""
    hyperparameters: set[str]
    metrics: set[str]
    """What the plain module logs in training and validation."""
    test_metrics: set[str]
    """What the plain module logs in a test; without a step for it, what `STNModule` does."""
    scheduler_steps: int
    """In three epochs of six batches."""
    data: Any
    """A dataset of so many examples, from a seed."""
    settings: dict[str, Any]
    """Further arguments of its loaders."""


CASES = {
    "images": Case(
        plain=LitImages,
        tuned=TunedImages,
        arguments={"channels": 6, "lr": 2e-3},
        parts=("model",),
        hyperparameters={"noise", "decay", "dropout_4", "dropout_8"},
        metrics={"train_loss", "train_accuracy", "val_loss", "val_accuracy"},
        test_metrics={"test_loss", "test_accuracy"},
        scheduler_steps=3,
        data=photographs,
        settings={},
    ),
    "text": Case(
        plain=LitText,
        tuned=TunedText,
        arguments={"width": 6},
        parts=("embedding", "lstm", "dropout", "head"),
        hyperparameters={"dropout_lstm", "dropout_dropout"},
        metrics={"train_loss", "val_loss", "val_f1"},
        test_metrics={"test_loss"},
        scheduler_steps=3,
        data=Sentences,
        settings={"collate_fn": collate},
    ),
    "fine-tuning": Case(
        plain=LitFineTuning,
        tuned=TunedFineTuning,
        arguments={"lr": 5e-4},
        parts=("net",),
        hyperparameters={"dropout"},
        metrics={"train_loss", "train_loss_step", "train_loss_epoch", "val_loss", "val_accuracy"},
        test_metrics={"test_loss"},
        scheduler_steps=18,
        data=photographs,
        settings={},
    ),
}
