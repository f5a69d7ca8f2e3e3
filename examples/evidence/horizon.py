"""How far ahead a response looks: its hypergradients against networks that train on at shifted hyperparameters.

    python examples/evidence/horizon.py --data-dir DIR --tasks lstm transformer    # runs what is missing, prints tables

A plain network trains at the start values for 40% of its run. From there copies train on, each with one hyperparameter
shifted by half a unit up or down. The slope of the validation loss after 1, 5, ... epochs is compared with what a
converted network predicts that is never tuned: its hypergradient over the whole validation data, at the end of each
epoch in the middle third of the run.
"""

import argparse
import logging
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import results
import torch
from results import Row
from tasks import TASKS, Constants, Folders, Task
from training import QUIET
from trials import METHODS

from lightning_stn import STNCallback, STNModule, Warmup
from lightning_stn.binding import bind

OUT = Path(__file__).with_name("horizon.jsonl")
SHIFT = 0.5
"""Unconstrained units."""
BEGIN = 0.4
"""Share of the run after which the shifted copies train on."""


class Losses(L.Callback):
    """Notes the validation loss of each epoch, and ends the run before the epoch `end`."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.seen: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the loss."""
        self.seen.append(trainer.callback_metrics["val_loss"].item())
        trainer.should_stop = trainer.current_epoch + 1 >= self.end


class Predictions(L.Callback):
    """Notes the hypergradient on all validation batches at the end of each epoch in the middle third."""

    def __init__(self, epochs: int) -> None:
        self.epochs = range(epochs // 3, 2 * epochs // 3)
        self.seen: list[list[float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Differentiate the validation loss through the response."""
        assert isinstance(pl_module, STNModule)
        if trainer.current_epoch not in self.epochs:
            return
        pl_module.eval()
        gradients = [_hypergradient(pl_module, batch, i) for i, batch in enumerate(trainer.val_dataloaders)]
        pl_module.train()
        self.seen.append(torch.stack(gradients).mean(0).tolist())


def _hypergradient(module: STNModule, batch: Any, index: int) -> torch.Tensor:
    unconstrained = module.hyperparameters.unconstrained.clone().requires_grad_()
    with bind(module.hyperparameters, unconstrained.unsqueeze(0), frozen=True), torch.enable_grad():
        (gradient,) = torch.autograd.grad(module.validation_loss(batch, index), unconstrained)
    return gradient


def trainer(task: Task, callbacks: list[L.Callback], clip: bool = True) -> L.Trainer:
    """A trainer for whole runs of a task on the CPU."""
    clipping = task.clip if clip else None
    return L.Trainer(
        max_epochs=task.epochs,
        callbacks=callbacks,
        gradient_clip_val=clipping,
        accelerator="cpu",
        num_sanity_val_steps=0,
        **QUIET,
    )


def predict(task: Task, seed: int, folders: Folders) -> dict[str, list[float]]:
    """By name, the hypergradient in each epoch of the middle third, per unconstrained unit."""
    L.seed_everything(seed, verbose=False)
    module = task.tuned(METHODS["stn"].start_values(task), folders, "full")
    train, valid, _ = task.loaders(seed, folders)
    seen = Predictions(task.epochs)
    trainer(task, [STNCallback(warmup=Warmup(task.epochs, "epochs")), seen], clip=False).fit(module, train, valid)
    return dict(zip(module.hyperparameters.labels, map(list, zip(*seen.seen, strict=True)), strict=True))


def shifted(task: Task, name: str, sign: int, folders: Folders) -> Constants:
    """The start values, one of them shifted."""
    hyperparameters = task.tuned(METHODS["stn"].start_values(task), folders, "full").hyperparameters
    hyperparameters.unconstrained[hyperparameters.slices[name]] += sign * SHIFT
    return hyperparameters.values()


def train_on(task: Task, seed: int, folders: Folders, epochs: int, repeats: int) -> Iterator[Row]:
    """Validation losses of all shifted copies, for each epoch after the shift."""
    train, valid, _ = task.loaders(seed, folders)
    begin = round(BEGIN * task.epochs)
    L.seed_everything(seed, verbose=False)
    plain = trainer(task, [Losses(begin)])
    plain.fit(task.build(METHODS["stn"].start_values(task), folders), train, valid)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "begin.ckpt"
        plain.save_checkpoint(checkpoint)
        for repeat in range(repeats):
            for name in task.space:
                for sign in (-1, 1):
                    constants = shifted(task, name, sign, folders)
                    module = task.build(constants, folders)
                    L.seed_everything(1000 + repeat, verbose=False)
                    losses = Losses(begin + epochs)
                    train, valid, _ = task.loaders(seed, folders)
                    trainer(task, [losses]).fit(module, train, valid, ckpt_path=checkpoint, weights_only=False)
                    yield {"repeat": repeat, "name": name, "sign": sign, "losses": losses.seen}


def run_missing(names: Sequence[str], seed: int, folders: Folders, out: Path, epochs: int, repeats: int) -> None:
    """Append what the file does not have of each task: the predictions, and all shifted copies together."""
    for name in names:
        task, there = (
            TASKS[name],
            {row["kind"] for row in results.lines(out) if (row["task"], row["seed"]) == (name, seed)},
        )
        if "prediction" not in there:
            values = predict(task, seed, folders)
            results.append(out, {"task": name, "seed": seed, "kind": "prediction", "hypergradients": values})
        if "copies" not in there:
            copies = list(train_on(task, seed, folders, min(epochs, task.epochs - round(BEGIN * task.epochs)), repeats))
            results.append(out, {"task": name, "seed": seed, "kind": "copies", "copies": copies})


def table(name: str, rows: Sequence[Row], horizons: Sequence[int]) -> list[str]:
    """Slopes of the validation loss, 1e-4 per unconstrained unit: of the copies by horizon, and as predicted."""
    copies = [copy for row in rows if (row["task"], row["kind"]) == (name, "copies") for copy in row["copies"]]
    predictions = [row["hypergradients"] for row in rows if (row["task"], row["kind"]) == (name, "prediction")]
    if not copies or not predictions:
        return []
    reached = [horizon for horizon in horizons if horizon <= len(copies[0]["losses"])]
    lines = [
        f"| {name} | {' | '.join(f'{horizon} epochs' for horizon in reached)} | the response predicts |",
        "|---" * (2 + len(reached)) + "|",
    ]
    for hyperparameter in predictions[0]:
        cells = [_cell(_slopes(copies, hyperparameter, horizon)) for horizon in reached]
        predicted = [value for prediction in predictions for value in prediction[hyperparameter]]
        lines.append(f"| {hyperparameter} | {' | '.join(cells)} | {_cell(predicted)} |")
    return lines


def _slopes(copies: Sequence[Row], name: str, horizon: int) -> list[float]:
    """Of each repeat, the slope at one horizon."""
    ends = {
        sign: [c["losses"][horizon - 1] for c in copies if (c["name"], c["sign"]) == (name, sign)] for sign in (-1, 1)
    }
    return [(up - down) / (2 * SHIFT) for down, up in zip(ends[-1], ends[1], strict=True)]


def _cell(values: Sequence[float]) -> str:
    """Mean and standard error, in units of 1e-4."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values) * 1e4:+.0f} ± {error * 1e4:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--horizons", type=int, nargs="+", default=[1, 5, 20], help="epochs after the shift")
    parser.add_argument("--repeats", type=int, default=4, help="of each shifted copy, with other random numbers")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds cifar10/ and wikitext2/")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/evidence"), help="for what is computed once")
    parser.add_argument("--out", type=Path, default=OUT, help="file of results")
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folders = Folders(args.data_dir, args.cache_dir)
    run_missing(args.tasks, args.seed, folders, args.out, max(args.horizons), args.repeats)
    for name in args.tasks:
        print("\n".join(table(name, results.lines(args.out), args.horizons)), end="\n\n")


if __name__ == "__main__":
    main()
