"""What self-tuning costs where networks are small: whole runs, by the number of hyperparameters, and the import.

    python tests/benchmarks/small_networks.py [--rounds N] [--parts digits mlp floor many import] [--bar]

A whole run is `trainer.fit` of the same network, data and number of batches, plain and self-tuned in turns; CPU time,
one thread. A cell is the median over the rounds, with quartiles.

- "digits" is the example's network beside its constants, with default settings and with `train_steps=5`.
- "mlp" is the same for a perceptron with four hyperparameters.
- "floor" says where the time of the perceptron goes: the plain network whose optimiser steps as many further tensors as
  the response has, one whose dropouts a `ScheduleReplay` drives, the converted one without hyperparameter steps, and
  the self-tuned one with gates alone.
- "many" is the perceptron with 16 to 1,024 hyperparameters, in units of the run with four.
- "import" is what `import lightning_stn` takes beyond `import lightning`, in seconds.
"""

import argparse
import contextlib
import io
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from report import machine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import digits

from lightning_stn import Float, ScheduleReplay, STNCallback, STNModule
from lightning_stn.specifications import ResponseForm

BATCHES, EPOCHS = 18, 20
RATES, ATTRIBUTES = {"first": 0.1, "second": 0.1}, {"net.2.p": "first", "net.5.p": "second"}
"""Constants of a replay, and the attributes that it sets."""
SIZES = (16, 64, 256, 1024)
"""Numbers of hyperparameters that are compared with four."""


class LitPerceptron(L.LightningModule):
    """A perceptron of 64, 128, 128 and 10 units with two dropouts."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [layer for size in (64, 128) for layer in (nn.Linear(size, 128), nn.ReLU(), nn.Dropout(0.1))]
        self.net: nn.Module = nn.Sequential(*hidden, nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class HeavyPerceptron(LitPerceptron):
    """The same with tensors beside the network, of the shapes of the response, which the optimiser steps as well."""

    def __init__(self) -> None:
        super().__init__()
        response = TunedPerceptron(4).named_parameters()
        shapes = [weights.shape for name, weights in response if "response_" in name or name.endswith("_gate")]
        self.beside = nn.ParameterList(torch.zeros(shape) for shape in shapes)

    def on_after_backward(self) -> None:
        """Give each of them a gradient, at no cost."""
        for weights in self.beside:
            weights.grad = weights.detach()


class TunedPerceptron(STNModule, LitPerceptron):
    """The same with tuned dropouts; further hyperparameters take part in every step and act on nothing."""

    def __init__(self, count: int, response: ResponseForm = "full") -> None:
        idle = {f"idle{index}": Float(0.0, 0.9) for index in range(count - 2)}
        super().__init__(hyperparameters=idle, response=response)
        self.net = self.convert(self.net, dropout="per-layer")

    def validation_loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def noise(examples: int) -> TensorDataset:
    """Random inputs with random labels."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(examples, 64, generator=generator), torch.arange(examples) % 10)


def fit(module: L.LightningModule, stn: STNCallback | None, bar: bool, loaders: tuple[Any, Any], epochs: int) -> float:
    """CPU seconds of a whole run."""
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[] if stn is None else [stn],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        begin = time.process_time()
        trainer.fit(module, *loaders)
        return time.process_time() - begin


def perceptron(module: Callable[[], L.LightningModule], callback: L.Callback | None, bar: bool) -> float:
    """Seconds of a run of a perceptron."""
    L.seed_everything(0, verbose=False)
    loaders = DataLoader(noise(32 * BATCHES), 32, shuffle=True), DataLoader(noise(128), 64)
    return fit(module(), callback, bar, loaders, EPOCHS)


def tuned(count: int, bar: bool, **settings: Any) -> float:
    """Seconds of a run with so many hyperparameters."""
    return perceptron(partial(TunedPerceptron, count), STNCallback(**settings), bar)


def example(name: str, bar: bool, **settings: Any) -> float:
    """Seconds of a run of a network of the digits example."""
    L.seed_everything(0, verbose=False)
    train, valid, _ = digits.load_data(0)
    stn = STNCallback(**settings) if name == "self-tuned" else None
    return fit(digits.NETWORKS[name](), stn, bar, (train, valid), 60)


Runs = Mapping[str, Callable[[], float]]


def rows(parts: list[str], bar: bool) -> Iterator[Runs]:
    """What is compared: in each mapping the unit comes first."""
    for part, plain, self_tuned in (
        ("digits", partial(example, "guess", bar), partial(example, "self-tuned", bar)),
        ("mlp", partial(perceptron, LitPerceptron, None, bar), partial(tuned, 4, bar)),
    ):
        if part in parts:
            yield {
                f"{part}, plain": plain,
                f"{part}, defaults": self_tuned,
                f"{part}, train_steps=5": partial(self_tuned, train_steps=5),
            }
    if "floor" in parts:
        yield {
            "mlp, plain": partial(perceptron, LitPerceptron, None, bar),
            "mlp, as many tensors": partial(perceptron, HeavyPerceptron, None, bar),
            "mlp, replayed": lambda: perceptron(LitPerceptron, ScheduleReplay(RATES, attributes=ATTRIBUTES), bar),
            "mlp, never tuned": partial(tuned, 4, bar, warmup=EPOCHS),
            "mlp, gates alone": lambda: perceptron(partial(TunedPerceptron, 4, "gates"), STNCallback(), bar),
        }
    if "many" in parts:
        yield {f"{count} hyperparameters": partial(tuned, count, bar) for count in (4, *SIZES)}


def compare(runs: Runs, rounds: int) -> None:
    """Run all in turns, and print ratios to the first."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in list(runs.items())[:: 1 if turn % 2 else -1]:
            seconds = run()
            if turn:  # the first round warms up
                found[name].append(seconds)
    unit, *others = found
    print(f"{unit:<28}{statistics.median(found[unit]):>8.2f} s")
    for name in others:
        ratios = [own / base for own, base in zip(found[name], found[unit], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:<28}{middle:>8.3f} [{low:.3f}, {high:.3f}]", flush=True)


IMPORT = "import time, lightning; begin = time.process_time(); import lightning_stn; print(time.process_time() - begin)"


def print_import(rounds: int) -> None:
    """Print CPU seconds of the import, beyond that of Lightning."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT]
    seconds = [float(subprocess.run(command, capture_output=True, check=True, text=True).stdout) for _ in range(rounds)]
    low, middle, high = statistics.quantiles(seconds, n=4)
    print(f"{'import beyond lightning':<28}{middle:>8.3f} s [{low:.3f}, {high:.3f}]")


def main() -> None:
    """Read the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["digits", "mlp", "floor", "many", "import"]
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--bar", action="store_true", help="with a progress bar")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    print(machine(torch.device("cpu")))
    for runs in rows(args.parts, args.bar):
        compare(runs, args.rounds)
    if "import" in args.parts:
        print_import(args.rounds)


if __name__ == "__main__":
    main()
