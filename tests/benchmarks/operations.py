"""How many operators a step calls, and how often it waits for the device: what small networks on a GPU spend time on.

    python tests/benchmarks/operations.py [--hyperparameters 4 256]

Counts operators as torch dispatches them, forward, backward and a fused Adam together, on the CPU. An operator is about
one kernel on a GPU. A wait is a number that Python reads from a tensor, for which a GPU has to finish its work.
"""

import argparse
import logging
import warnings
from collections import Counter
from typing import Any, NamedTuple

import lightning as L
import torch
from small_networks import LitPerceptron, TunedPerceptron, noise
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_stn import STNCallback

WAIT = "aten._local_scalar_dense.default"


class Calls(NamedTuple):
    """Calls of operators, and waits among them."""

    operators: int
    waits: int


class Counting(TorchDispatchMode):
    """Counts the operators that are called within it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and call."""
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def calls(self) -> Calls:
        """The counts so far."""
        return Calls(self.names.total(), self.names[WAIT])


class Notes(L.Callback):
    """Notes the counts at one boundary of every step, in the place that it has among the callbacks."""

    def __init__(self, counting: Counting) -> None:
        self.counting = counting
        self.starts: list[Calls] = []
        self.ends: list[Calls] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """A step begins."""
        self.starts.append(self.counting.calls())

    def on_train_batch_end(self, *args: Any) -> None:
        """The step is over for the callbacks before this one."""
        self.ends.append(self.counting.calls())


def fused(module: L.LightningModule) -> L.LightningModule:
    """The module with a fused Adam, whose operators do not multiply with the number of parameters."""
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), fused=True)  # type: ignore[method-assign]
    return module


def count(module: L.LightningModule, stn: STNCallback | None) -> tuple[Calls, Calls | None]:
    """Calls in a weight step, and in a hyperparameter step; a later one of each, after everything has been built."""
    with Counting() as counting:
        before, after = Notes(counting), Notes(counting)
        trainer = L.Trainer(
            max_epochs=1,
            callbacks=[before, *([] if stn is None else [stn]), after],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(fused(module), DataLoader(noise(32 * 13), 32), DataLoader(noise(128), 64))
    weight = _difference(before.starts[6], before.ends[6])
    if stn is None:
        return weight, None
    # A hyperparameter step follows every fourth batch; what the callback does after the others is not part of it.
    usual = _difference(before.ends[6], after.ends[6])
    whole = _difference(before.ends[7], after.ends[7])
    return weight, _difference(usual, whole)


def _difference(first: Calls, then: Calls) -> Calls:
    return Calls(*(b - a for a, b in zip(first, then, strict=True)))


def main() -> None:
    """Read the arguments, count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hyperparameters", type=int, nargs="+", default=[4, 256])
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    plain, _ = count(LitPerceptron(), None)
    print(f"{'':<28}{'operators':>10}{'waits':>8}")
    print(f"{'plain step':<28}{plain.operators:>10}{plain.waits:>8}")
    for number in args.hyperparameters:
        weight, tuned = count(TunedPerceptron(number), STNCallback(warmup=0))
        assert tuned is not None
        for name, calls in (("weight step", weight), ("hyperparameter step", tuned)):
            print(f"{f'{name}, {number}':<28}{calls.operators:>10}{calls.waits:>8}")


if __name__ == "__main__":
    main()
