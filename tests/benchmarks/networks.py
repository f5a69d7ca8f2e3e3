"""Networks whose steps are timed, each with its batches."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class WordModel(nn.Module):
    """A two-layer LSTM language model of 650 units, the medium one of Zaremba et al. (2014), arXiv:1409.2329.

    Args:
        words: size of the vocabulary.
        units: width of embedding and state.
        dropout: rate before and after the recurrence.
    """

    def __init__(self, words: int, units: int = 650, dropout: float = 0.5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, units)
        self.drop_in = nn.Dropout(dropout)
        self.recurrence = nn.LSTM(units, units, num_layers=2, batch_first=True)
        self.drop_out = nn.Dropout(dropout)
        self.decoder = nn.Linear(units, words)

    def forward(self, words: Tensor) -> Tensor:
        """Words `[n, t]` to logits `[n, t, words]`."""
        output, _ = self.recurrence(self.drop_in(self.embedding(words)))
        logits: Tensor = self.decoder(self.drop_out(output))
        return logits


def alexnet() -> nn.Module:
    """AlexNet as it is used on CIFAR-10: five convolutions, three linear layers, two dropouts."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Dropout(0.5), nn.Linear(1024, 4096), nn.ReLU()),
        *(nn.Dropout(0.5), nn.Linear(4096, 4096), nn.ReLU()),
        nn.Linear(4096, 10),
    )


def resnet18() -> nn.Module:
    """Torchvision's ResNet-18, ten classes, no dropout."""
    return torchvision.models.resnet18(num_classes=10)


def lstm() -> nn.Module:
    """The language model, with a vocabulary of 2,000 words."""
    return WordModel(2000)


def transformer() -> nn.Module:
    """Six encoder layers of width 256, and a linear head on every position."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), nn.Linear(256, 10))


def mlp() -> nn.Module:
    """784-1200-1200-1200-10, with a dropout after each hidden layer."""
    widths = [784, 1200, 1200, 1200]
    hidden = [
        module
        for narrow, wide in itertools.pairwise(widths)
        for module in (nn.Linear(narrow, wide), nn.ReLU(), nn.Dropout(0.5))
    ]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], 10))


@dataclass(frozen=True)
class Case:
    """A network and its data.

    Args:
        build: makes the plain network.
        input_shape: shape of one batch of inputs.
        classes: number of labels.
        dropout: rate of the network's dropout layers; None where it has none.
        words: size of the vocabulary where the inputs are words; None for real numbers.
        labels: dimensions of the input that carry a label each (2: every position of a sequence).
        repeats: factor on the number of timed batches, for networks with short steps.
    """

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    classes: int = 10
    dropout: float | None = None
    words: int | None = None
    labels: int = 1
    repeats: int = 1

    def batch(self, device: torch.device) -> Batch:
        """One batch of noise."""
        inputs = torch.randn(self.input_shape) if self.words is None else torch.randint(self.words, self.input_shape)
        labels = torch.randint(self.classes, self.input_shape[: self.labels])
        return inputs.to(device), labels.to(device)


CASES = {
    "alexnet": Case(alexnet, (128, 3, 32, 32), dropout=0.5),
    "resnet18": Case(resnet18, (64, 3, 32, 32)),
    "lstm": Case(lstm, (20, 35), classes=2000, dropout=0.5, words=2000, labels=2),
    "transformer": Case(transformer, (16, 64, 256), dropout=0.1, labels=2),
    "mlp": Case(mlp, (128, 784), dropout=0.5, repeats=4),
}


class Batches:
    """Batches in memory, returned in turn, so that loading costs nothing.

    Args:
        case: network that they fit.
        device: where they are stored.
        distinct: number of different batches.
        length: number of batches in an epoch.
    """

    def __init__(self, case: Case, device: torch.device, distinct: int = 4, length: int = 1000) -> None:
        self._batches = [case.batch(device) for _ in range(distinct)]
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return (self._batches[index % len(self._batches)] for index in range(self._length))


def loss(net: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy, mean over all labels."""
    inputs, labels = batch
    logits: Tensor = net(inputs)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
