"""`lstm`: the two-layer language model of `examples/lstm_language_model.py`, seven hyperparameters, 20,000 words."""

import torch
import torch.nn.functional as F
from lstm_language_model import Batch, LanguageModel, State, Stretches
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stn import Float
from lightning_stn.regularizers import ActivationPenalty, TemporalActivationPenalty
from tasks import wikitext
from tasks.base import Folders, Loaders, PlainModule, SelfTuned, Strengths, Task

VOCABULARY = 2000
WIDTH, UNITS = 128, 192
LENGTH = 35
"""Words through which gradients are propagated."""

SPACE = {
    **{f"{place}_dropout": Float(0.0, 0.8) for place in ("output", "input", "hidden", "embedding")},
    "weight_dropout": Float(0.0, 0.8, perturb="batch"),
    "ar": Float(0.0, 4.0),
    "tar": Float(0.0, 4.0),
}


class LitLSTM(PlainModule):
    """Dropouts on words, input, hidden state, output and recurrent weights; two penalties on activations."""

    def __init__(self, strengths: Strengths) -> None:
        super().__init__()
        self.net = LanguageModel(VOCABULARY, WIDTH, UNITS, strengths)
        self.activation_penalty = ActivationPenalty(strengths["ar"])
        self.temporal_penalty = TemporalActivationPenalty(strengths["tar"])
        self.states: dict[str, State] = {}

    def predict(self, batch: Batch, stream: str) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and the outputs before and after dropout, from the state at the end of the stream's last stretch."""
        state = None if batch.first else self.states[stream]
        logits, output, dropped, state = self.net(batch.tokens, state)
        if getattr(self, "runs_for", "weights") != "response":  # Delta-STN reads a batch twice
            self.states[stream] = [(h.detach(), c.detach()) for h, c in state]
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()), output, dropped

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy in nats per word, with dropouts and penalties."""
        loss, output, dropped = self.predict(batch, "train")
        return loss + self.activation_penalty(dropped) + self.temporal_penalty(output)

    def evaluate(self, batch: Batch, stage: str) -> Tensor:
        """Cross entropy in nats per word."""
        return self.predict(batch, stage)[0]

    def examples(self, batch: Batch) -> int:
        """Number of parallel texts."""
        return len(batch.tokens)

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=6e-3)


class TunedLSTM(SelfTuned, LitLSTM):
    """The same with tuned hyperparameters."""


def begin(net: nn.Module, folders: Folders) -> None:
    """Begin from the frequencies of the words, which the LSTM would otherwise learn first, and saturate by it."""
    with torch.no_grad():
        net.decoder.bias.copy_(wikitext.log_frequencies(folders.data / "wikitext2", VOCABULARY))


def loaders(seed: int, folders: Folders) -> Loaders:
    """Stretches in order: 20,000 training words from a place that the seed draws, 10,000 to validate, 40,000 to test.

    Without automatic batching, neither the training loader nor the validation stream is shuffled.
    """
    texts = wikitext.read(folders.data / "wikitext2", VOCABULARY, 20_000, 10_000, 40_000, seed)
    return Loaders(*(DataLoader(Stretches(text, 20, LENGTH), batch_size=None) for text in texts))


TASK = Task(LitLSTM, TunedLSTM, SPACE, loaders, epochs=18, metric="perplexity", clip=0.25, begin=begin)
