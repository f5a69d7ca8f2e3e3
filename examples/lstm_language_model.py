"""Seven regularisation hyperparameters of an LSTM language model, tuned in one training run.

The second experiment of MacKay et al. (2019), arXiv:1903.03088: a two-layer LSTM with tied embeddings. It tunes
dropout on output, input, hidden state and whole words, DropConnect on the recurrent weights, and the weights of two
penalties on activations. Three networks train on the same text for the same number of epochs:

- self-tuned: the hyperparameters start weak and are tuned while the network trains;
- fixed: the hyperparameters keep the start values of the self-tuned network;
- none: no regularisation.

The validation text tunes the hyperparameters, so the validation score favours the self-tuned network. Compare by the
test text, which is read once for each network, after its training.

    python examples/lstm_language_model.py                                   # Shakespeare by character, downloaded
    python examples/lstm_language_model.py --level word --data-dir DIR       # {train,valid,test}.txt, as of PTB
    python examples/lstm_language_model.py --level word --data-dir DIR --width 650 --units 650 --lr 30 --train-tokens 0
    tensorboard --logdir runs/language                                       # every hyperparameter over time
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from command_line import positive, set_up, summary
from comparison import Scores, compare, print_summary
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.text import Perplexity

from lightning_stn import STNCallback, STNModule, WeightStep, recommended_hyperparameters
from lightning_stn.regularizers import (
    ActivationPenalty,
    EmbeddingDropout,
    LockedDropout,
    TemporalActivationPenalty,
    WeightDrop,
)

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

HYPERPARAMETERS = recommended_hyperparameters("language")
START = {name: specification.init for name, specification in HYPERPARAMETERS.items()}
COLUMNS = ("val_loss", "val_perplexity", "test_loss", "test_perplexity")

State = list[tuple[Tensor, Tensor]]
"""Output and cell state of each layer."""


@dataclass
class Batch:
    """One stretch of all parallel texts.

    Args:
        tokens: `[n, t]`.
        targets: the token after each of them, `[n, t]`.
        first: whether the stretch is the beginning of the texts.
    """

    tokens: Tensor
    targets: Tensor
    first: bool


class Stretches(Dataset):
    """A text cut into parallel texts, and these into stretches.

    Args:
        tokens: the text.
        texts: number of parallel texts.
        length: tokens in a stretch.
    """

    def __init__(self, tokens: Tensor, texts: int, length: int) -> None:
        per_text = (len(tokens) - 1) // texts
        self.tokens = tokens[: per_text * texts].view(texts, per_text)
        self.targets = tokens[1 : per_text * texts + 1].view(texts, per_text)
        self.length = length

    def __len__(self) -> int:
        return self.tokens.shape[1] // self.length

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self):
            raise IndexError(index)
        part = slice(index * self.length, (index + 1) * self.length)
        return Batch(self.tokens[:, part], self.targets[:, part], index == 0)


class Text(L.LightningDataModule):
    """Training, validation and test text, as numbers.

    Args:
        data_dir: folder of `train.txt`, `valid.txt` and `test.txt`; None for Shakespeare, which is downloaded to
            `data/` and split 90 : 5 : 5.
        level: "word" or "char".
        train_tokens: number of training tokens to use; 0 for all.
        texts: number of parallel texts in training.
        length: tokens in a stretch.
    """

    def __init__(self, data_dir: Path | None, level: str, train_tokens: int, texts: int = 20, length: int = 35) -> None:
        super().__init__()
        self.data_dir = data_dir
        self.level = level
        self.train_tokens = train_tokens
        self.texts = texts
        self.length = length
        self.vocabulary: dict[str, int] = {}

    @property
    def shakespeare(self) -> Path:
        """Path of the download."""
        return Path("data") / "tinyshakespeare.txt"

    def prepare_data(self) -> None:
        """Download Shakespeare, unless a folder was given."""
        if self.data_dir is None and not self.shakespeare.exists():
            self.shakespeare.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(SHAKESPEARE, str(self.shakespeare), hash_prefix=SHAKESPEARE_SHA256)

    def setup(self, stage: str = "fit") -> None:
        """Read the texts, and build the vocabulary from the training text."""
        if self.vocabulary:
            return
        train, valid, test = map(self.split, self.read())
        train = train[: self.train_tokens or None]
        words = [word for word, _ in Counter(train).most_common()]
        self.vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["<unk>", *words]))}
        self.train, self.valid, self.test = (
            torch.tensor([self.vocabulary.get(word, 0) for word in part]) for part in (train, valid, test)
        )

    def read(self) -> list[str]:
        """Read training, validation and test text."""
        if self.data_dir is not None:
            return [(self.data_dir / f"{part}.txt").read_text(encoding="utf-8") for part in ("train", "valid", "test")]
        text = self.shakespeare.read_text(encoding="utf-8")
        first, second = int(0.9 * len(text)), int(0.95 * len(text))
        return [text[:first], text[first:second], text[second:]]

    def split(self, text: str) -> list[str]:
        """Split into characters, or into words with `<eos>` after each line that is not empty."""
        if self.level == "char":
            return list(text)
        return [word for line in text.splitlines() if line.strip() for word in [*line.split(), "<eos>"]]

    def loader(self, tokens: Tensor, texts: int) -> DataLoader:
        """Stretches in order: without automatic batching, neither this loader nor the validation stream is shuffled."""
        return DataLoader(Stretches(tokens, texts, self.length), batch_size=None)

    def train_dataloader(self) -> DataLoader:
        """The training text."""
        return self.loader(self.train, self.texts)

    def val_dataloader(self) -> DataLoader:
        """The validation text."""
        return self.loader(self.valid, 10)

    def test_dataloader(self) -> DataLoader:
        """The test text."""
        return self.loader(self.test, 10)


class LanguageModel(nn.Module):
    """Two LSTM layers between an embedding and its transpose.

    Args:
        words: size of the vocabulary.
        width: of the embedding.
        units: of the first LSTM layer.
        strengths: by hyperparameter, its name to tune it, or a constant.
    """

    def __init__(self, words: int, width: int, units: int, strengths: Mapping[str, str | float]) -> None:
        super().__init__()
        embedding = nn.Embedding(words, width)
        self.embedding = EmbeddingDropout(embedding, strengths["embedding_dropout"])
        self.drop_input = LockedDropout(strengths["input_dropout"])
        self.lstms = nn.ModuleList(
            WeightDrop(nn.LSTM(before, after, batch_first=True), ["weight_hh_l0"], strengths["weight_dropout"])
            for before, after in ((width, units), (units, width))
        )
        self.drop_hidden = LockedDropout(strengths["hidden_dropout"])
        self.drop_output = LockedDropout(strengths["output_dropout"])
        self.decoder = nn.Linear(width, words)
        nn.init.uniform_(embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = embedding.weight

    def forward(self, tokens: Tensor, state: State | None) -> tuple[Tensor, Tensor, Tensor, State]:
        """Tokens `[n, t]` to logits `[n, t, words]`, the output before and after its dropout, and the new state."""
        output = self.drop_input(self.embedding(tokens))
        new_state = []
        for number, lstm in enumerate(self.lstms):
            output, layer_state = lstm(self.drop_hidden(output) if number else output, state and state[number])
            new_state.append(layer_state)
        dropped = self.drop_output(output)
        return self.decoder(dropped), output, dropped, new_state


class LitLanguageModel(L.LightningModule):
    """An ordinary LightningModule, whose regularisation has to be chosen by hand.

    Each stream of text has a separate hidden state, so that training does not affect validation.
    """

    def __init__(
        self, words: int, width: int, units: int, lr: float, strengths: Mapping[str, str | float] = START
    ) -> None:
        super().__init__()
        self.net: nn.Module = LanguageModel(words, width, units, strengths)
        self.lr = lr
        self.activation_penalty = ActivationPenalty(strengths["ar"])
        self.temporal_penalty = TemporalActivationPenalty(strengths["tar"])
        self.perplexity = Perplexity()
        self.states: dict[str, State] = {}

    def predict(self, stream: str, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and outputs, from the hidden state at the end of this stream's last stretch."""
        state = None if batch.first else self.states[stream]
        logits, output, dropped, state = self.net(batch.tokens, state)
        if getattr(self, "runs_for", "weights") != "response":  # Delta-STN reads a batch twice
            self.states[stream] = [(h.detach(), c.detach()) for h, c in state]
        return logits, output, dropped

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy in nats per token, with dropouts and penalties."""
        logits, output, dropped = self.predict("train", batch)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        return loss + self.activation_penalty(dropped) + self.temporal_penalty(output)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log cross entropy and perplexity."""
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log cross entropy and perplexity."""
        self.evaluate(batch, "test")

    def evaluate(self, batch: Batch, stage: str) -> None:
        """Log cross entropy and perplexity without regularisation."""
        logits, _, _ = self.predict(stage, batch)
        self.perplexity(logits, batch.targets)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=batch.targets.numel())
        self.log(f"{stage}_perplexity", self.perplexity, batch_size=batch.targets.numel())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD over the weights."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class SelfTunedLanguageModel(STNModule, LitLanguageModel):
    """The same module with tuned hyperparameters; the `training_step` above gives its training loss."""

    def __init__(self, words: int, width: int, units: int, lr: float) -> None:
        names = {name: name for name in HYPERPARAMETERS}
        super().__init__(hyperparameters=HYPERPARAMETERS, words=words, width=width, units=units, lr=lr, strengths=names)
        self.net = self.convert(self.net)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, with a smaller rate for the gates, which would diverge at the rate of the weights."""
        return torch.optim.SGD(self.parameter_groups(self.lr))

    def validation_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss that the hyperparameters are tuned to minimise."""
        logits, _, _ = self.predict("tune", batch)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    def infer_batch_size(self, batch: Batch) -> int:
        """Number of parallel texts."""
        return len(batch.tokens)


class NonMonotoneDecay(L.Callback):
    """Divides the learning rate by four when the validation loss has not improved on that of `patience` epochs ago.

    The criterion of Merity et al. (2018), arXiv:1708.02182, section 4.
    """

    def __init__(self, patience: int = 5) -> None:
        self.patience = patience
        self.losses: list[float] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Divide the rate if the loss has not improved."""
        if trainer.sanity_checking or not trainer.optimizers:
            return
        loss = trainer.callback_metrics["val_loss"].item()
        if loss > min(self.losses[: -self.patience], default=float("inf")):
            for group in trainer.optimizers[0].param_groups:
                group["lr"] /= 4
            self.losses.clear()
        self.losses.append(loss)


NETWORKS: dict[str, Callable[[int, int, int, float], LitLanguageModel]] = {
    "self-tuned": SelfTunedLanguageModel,
    "fixed": LitLanguageModel,
    "none": partial(LitLanguageModel, strengths=dict.fromkeys(HYPERPARAMETERS, 0.0)),
}


def run(seed: int, args: argparse.Namespace, name: str, callbacks: list[L.Callback]) -> tuple[LitLanguageModel, Scores]:
    """Train one network from this seed; return it, and its scores after the last epoch."""
    print(f"  training: {name}", flush=True)
    L.seed_everything(seed, verbose=False)
    data = Text(args.data_dir, args.level, args.train_tokens, args.texts, args.length)
    data.prepare_data()
    data.setup()
    module = NETWORKS[name](len(data.vocabulary), args.width, args.units, args.lr)
    clipping = {} if name == "self-tuned" else {"gradient_clip_val": args.clip}
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[*callbacks, NonMonotoneDecay()],
        logger=TensorBoardLogger(args.out / f"seed{seed}", name=name),
        accelerator=args.accelerator,
        devices=1,  # one process must read the text in order
        precision=args.precision,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=args.progress,
        enable_model_summary=False,
        **clipping,
    )
    begin = time.perf_counter()
    trainer.fit(module, datamodule=data)
    scores = {"seconds": time.perf_counter() - begin}
    scores |= trainer.validate(module, datamodule=data, verbose=False)[0]
    scores |= trainer.test(module, datamodule=data, verbose=False)[0]
    return module, scores


def compare_networks(seed: int, args: argparse.Namespace) -> dict[str, Scores]:
    """Train the networks from one seed; print their scores, and plot the schedules."""
    print(f"\nSeed {seed}, {args.epochs} epochs", flush=True)
    stn = STNCallback(
        method=args.method,
        perturb=args.perturb,
        weight_step=WeightStep(gradient_clip_val=args.clip),
    )
    title = f"Regularisation schedules that one self-tuned run of a language model found, seed {seed}"
    picture = args.out / f"seed{seed}" / "schedules.png"
    return compare(args.networks, lambda *what: run(seed, args, *what), stn, picture, title, COLUMNS)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--data-dir", type=Path, help="folder of train.txt, valid.txt and test.txt")
    parser.add_argument("--level", choices=("word", "char"), default="char", help="unit of the tokens")
    parser.add_argument("--train-tokens", type=int, default=50_000, help="number of training tokens to use; 0 for all")
    parser.add_argument("--width", type=int, default=128, help="of the embedding; 650 in the paper")
    parser.add_argument("--units", type=int, default=256, help="of the first LSTM layer; 650 in the paper")
    parser.add_argument("--texts", type=int, default=20, help="parallel texts, the batch size")
    parser.add_argument("--length", type=int, default=35, help="tokens through which gradients are propagated")
    parser.add_argument("--lr", type=float, default=10.0, help="of plain SGD; 30 in the paper")
    parser.add_argument("--clip", type=float, default=0.25, help="largest norm of the gradient")
    parser.add_argument("--epochs", type=positive, default=30)
    parser.add_argument("--method", choices=("stn", "delta-stn"), default="stn")
    parser.add_argument("--perturb", choices=("batch", "example"), default="batch", help="example: unrolled, slower")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seed", "--seeds", type=int, nargs="+", default=[0], help="one comparison for each of them")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; these layers are too small for many")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--progress", action="store_true", help="show Lightning's progress bar")
    parser.add_argument("--out", type=Path, default=Path("runs/language"), help="folder of the logs and pictures")
    args = parser.parse_args()

    set_up(args.threads)
    runs = [compare_networks(seed, args) for seed in args.seed]
    if len(runs) > 1:
        print_summary(runs, ["val_perplexity", "test_loss", "test_perplexity"])
    print(f"\nAll hyperparameters over time: tensorboard --logdir {args.out}")


if __name__ == "__main__":
    main()
