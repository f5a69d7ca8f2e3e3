"""`transformer`: a word-level language model twelve hyperparameters, 30,000 words."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_stn import Float
from lightning_stn.regularizers import LabelSmoothing
from tasks import wikitext
from tasks.base import Folders, Loaders, PlainModule, SelfTuned, Strengths, Task, batches, dropout

VOCABULARY = 2000
WIDTH, HEADS, LAYERS = 80, 4, 3
PLACES = ("attention", "residual", "feedforward")
LENGTH = 32
"""Words in an example."""

SPACE = {
    "embedding_dropout": Float(0.0, 0.8),
    **{f"layer{layer}_{place}_dropout": Float(0.0, 0.8) for layer in range(1, LAYERS + 1) for place in PLACES},
    "output_dropout": Float(0.0, 0.8),
    "label_smoothing": Float(0.0, 0.3),
}


class Attention(nn.Module):
    """Causal self-attention, with a dropout on the attention weights."""

    def __init__(self, rate: str | float) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.drop = dropout(rate)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, t, width]` to the same shape."""
        n, length, _ = x.shape
        query, key, value = self.project(x).view(n, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = self.drop(scores.masked_fill(future, float("-inf")).softmax(-1))
        return self.output((weights @ value).transpose(1, 2).reshape(n, length, WIDTH))


class Layer(nn.Module):
    """Attention and a feed-forward network, each after a normalisation and beside a residual connection."""

    def __init__(self, strengths: Strengths, number: int) -> None:
        super().__init__()
        rates = {place: strengths[f"layer{number}_{place}_dropout"] for place in PLACES}
        self.attention = nn.Sequential(nn.LayerNorm(WIDTH), Attention(rates["attention"]), dropout(rates["residual"]))
        self.feedforward = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(),
            dropout(rates["feedforward"]),
            nn.Linear(4 * WIDTH, WIDTH),
            dropout(rates["residual"]),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[n, t, width]` to the same shape."""
        x = x + self.attention(x)
        return x + self.feedforward(x)


class LanguageTransformer(nn.Module):
    """Embeddings of words and positions, causal layers, and a decoder whose weight is that of the word embedding."""

    def __init__(self, strengths: Strengths) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.drop_embedding = dropout(strengths["embedding_dropout"])
        self.layers = nn.Sequential(*(Layer(strengths, number) for number in range(1, LAYERS + 1)))
        self.norm = nn.LayerNorm(WIDTH)
        self.drop_output = dropout(strengths["output_dropout"])
        self.decoder = nn.Linear(WIDTH, VOCABULARY)
        nn.init.normal_(self.words.weight, std=WIDTH**-0.5)
        nn.init.normal_(self.positions.weight, std=WIDTH**-0.5)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        """Words `[n, t]` to logits `[n, t, vocabulary]`."""
        places = torch.arange(words.shape[1], device=words.device).expand_as(words)
        x = self.drop_embedding(self.words(words) + self.positions(places))
        return self.decoder(self.drop_output(self.norm(self.layers(x))))


class LitTransformer(PlainModule):
    """Dropout on embeddings, output and, by layer, attention, residual branches and hidden units; label smoothing."""

    def __init__(self, strengths: Strengths) -> None:
        super().__init__()
        self.net = LanguageTransformer(strengths)
        self.label_smoothing = LabelSmoothing(strengths["label_smoothing"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy in nats per word, with dropouts and label smoothing."""
        words, targets = batch
        logits = self.net(words).transpose(1, 2)
        return F.cross_entropy(logits, targets) + self.label_smoothing(logits, targets)

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        """Cross entropy in nats per word."""
        words, targets = batch
        return F.cross_entropy(self.net(words).transpose(1, 2), targets)

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


class TunedTransformer(SelfTuned, LitTransformer):
    """The same with tuned hyperparameters."""


def _examples(text: Tensor) -> TensorDataset:
    """A text cut into examples `[n, t]` and the word after each of their words."""
    count = (len(text) - 1) // LENGTH
    return TensorDataset(text[: count * LENGTH].view(count, LENGTH), text[1 : count * LENGTH + 1].view(count, LENGTH))


def loaders(seed: int, folders: Folders) -> Loaders:
    """Examples of 30,000 training words from a place that the seed draws, 10,000 to validate and 40,000 to test."""
    texts = wikitext.read(folders.data / "wikitext2", VOCABULARY, 30_000, 10_000, 40_000, seed)
    train, valid, test = map(_examples, texts)
    return Loaders(batches(train, 25, seed), batches(valid, 50), batches(test, 50))


TASK = Task(LitTransformer, TunedTransformer, SPACE, loaders, epochs=12, metric="perplexity", clip=1.0)
