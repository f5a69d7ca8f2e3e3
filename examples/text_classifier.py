"""A Transformer that classifies texts, built from `torch.nn`, with a dozen tuned hyperparameters.

A text is a paragraph from the documentation of one of five installed libraries; the class is the library. Words
that name a library are left out. The texts depend on the versions of the libraries, and so do the results. Three
networks start from the same weights and train on the same 1,500 texts:

- self-tuned: dropout rates and label smoothing start weak and are tuned while the network trains;
- guess: dropout rates and label smoothing of 0.1, as many Transformers are trained;
- none: no regularisation.

Each network is tested at its best epoch by validation loss. The 500 validation texts also tune the hyperparameters, so
compare by the 1,000 test texts, which are read once for each network and come from other files.

    python examples/text_classifier.py                    # about 80 seconds on one core
    python examples/text_classifier.py --seeds 0 1 2      # three times that
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from classifier import Batch, LitClassifier
from command_line import example_parser
from comparison import SELF_TUNED, Loaders, compare_over_seeds
from documentation import LIBRARIES, PADDING, encode, read_texts
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stn import Float, STNModule
from lightning_stn.regularizers import EmbeddingDropout, LabelSmoothing

VOCABULARY, LENGTH, WIDTH = 3000, 50, 64


class TextTransformer(nn.Module):
    """Embeddings of words and positions, two encoder layers, and the mean over the words.

    Args:
        dropout: rate of all dropouts inside the encoder, and of that before the last layer.
        word_dropout: rate at which whole words are dropped: a number, or the name of a hyperparameter.
    """

    def __init__(self, dropout: float, word_dropout: str | float) -> None:
        super().__init__()
        words = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING)
        self.words = EmbeddingDropout(words, word_dropout)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(words.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.01)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.drop_output = nn.Dropout(dropout)
        self.output = nn.Linear(WIDTH, len(LIBRARIES))

    def forward(self, words: Tensor) -> Tensor:
        """Words `[n, t]` to logits `[n, libraries]`."""
        is_padding = words == PADDING
        places = torch.arange(words.shape[1], device=words.device).expand_as(words)
        encoded = self.encoder(self.words(words) + self.positions(places), src_key_padding_mask=is_padding)
        kept = encoded.masked_fill(is_padding.unsqueeze(-1), 0.0)
        mean = kept.sum(1) / (~is_padding).sum(1, keepdim=True)
        return self.output(self.drop_output(mean))


class LitText(LitClassifier):
    """An ordinary LightningModule: the Transformer, trained with label smoothing."""

    def __init__(self, dropout: float, word_dropout: str | float, smoothing: str | float) -> None:
        super().__init__(TextTransformer(dropout, word_dropout), len(LIBRARIES), lr=1e-3)
        self.smoothing = LabelSmoothing(smoothing)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy with dropout and label smoothing."""
        words, labels = batch
        logits = self.net(words)
        return F.cross_entropy(logits, labels) + self.smoothing(logits, labels)


class SelfTuned(STNModule, LitText):
    """The same module with tuned hyperparameters; the `training_step` above gives its training loss."""

    def __init__(self) -> None:
        hyperparameters = {"word_dropout": Float(0.0, 0.9), "smoothing": Float(0.0, 0.5)}
        super().__init__(
            hyperparameters=hyperparameters, dropout=0.1, word_dropout="word_dropout", smoothing="smoothing"
        )
        self.net = self.convert(self.net, dropout="per-layer")  # nine more, those inside attention among them

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        words, labels = batch
        return F.cross_entropy(self.net(words), labels)


def load(seed: int) -> Loaders:
    """Training, validation and test texts; the seed fixes the order of the training texts."""
    train, valid, test = encode(read_texts((300, 100, 200)), VOCABULARY, LENGTH)
    shuffled = DataLoader(train, 50, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return Loaders(shuffled, DataLoader(valid, 100), DataLoader(test, 500))


NETWORKS: dict[str, Callable[[], LitText]] = {
    SELF_TUNED: SelfTuned,
    "guess": lambda: LitText(dropout=0.1, word_dropout=0.1, smoothing=0.1),
    "none": lambda: LitText(dropout=0.0, word_dropout=0.0, smoothing=0.0),
}


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments and run."""
    args = example_parser(__doc__, epochs=12, out=Path("runs/text")).parse_args(arguments)
    title = "Regularisation schedules that one self-tuned run of a Transformer found on 1,500 texts"
    compare_over_seeds(NETWORKS, load, args, title)


if __name__ == "__main__":
    main()
