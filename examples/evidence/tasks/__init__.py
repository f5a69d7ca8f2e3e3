"""The tasks of the evidence suite: each is one file with a `TASK`, and one entry of `TASKS`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the examples whose networks the tasks use

from tasks import cifar_alexnet, digits, finetune, lstm, tabular, transformer
from tasks.base import Constants, Folders, Loaders, PlainModule, Strengths, Task, at_fraction, bounds, is_logarithmic

__all__ = [
    "TASKS",
    "Constants",
    "Folders",
    "Loaders",
    "PlainModule",
    "Strengths",
    "Task",
    "at_fraction",
    "bounds",
    "is_logarithmic",
]

TASKS: dict[str, Task] = {
    "digits": digits.TASK,
    "cifar_alexnet": cifar_alexnet.TASK,
    "lstm": lstm.TASK,
    "transformer": transformer.TASK,
    "finetune": finetune.TASK,
    "tabular": tabular.TASK,
}
