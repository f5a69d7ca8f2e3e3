"""What a step of self-tuning spends beyond a plain step, by operator: where the numbers of `step_cost.py` come from.

    python tests/benchmarks/kernels.py [--networks alexnet resnet18] [--step hyperparameter] [--perturb example]
        [--response gates] [--batches K] [--top N]

Runs a plain and a self-tuned network under torch's profiler. A row is an operator with its CPU time in a plain step and
in a weight or a hyperparameter step, without the operators that it calls, in units of the whole plain step; the rows
with the largest difference come first. A hyperparameter step is what a run of both steps in turns takes beyond one of
weight steps. The profiler adds about a microsecond to each call.
"""

import argparse
import logging
import warnings
from collections import Counter

import lightning as L
import torch
from networks import CASES
from runs import Plain, Runner, Tuned
from torch.profiler import ProfilerActivity, profile

from lightning_stn import STNCallback, Warmup
from lightning_stn.specifications import Perturb

Seconds = Counter[str]


def seconds(
    runner: Runner, module: Plain | Tuned, batches: int, perturb: Perturb = "batch", hyperparameter_steps: bool = False
) -> Seconds:
    """Own CPU seconds of each operator in a batch: of its weight step, and of a hyperparameter step after it."""

    def trainer(length: int) -> L.Trainer:
        if not isinstance(module, Tuned):
            return runner.trainer(length)
        warmup = 0 if hyperparameter_steps else Warmup(length + 1, "steps")
        stn = STNCallback(dataloader=runner.validation, warmup=warmup, train_steps=1, perturb=perturb)
        return runner.trainer(length, stn)

    trainer(1).fit(module, runner.training)  # builds the state of the optimisers
    measured = trainer(batches)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        measured.fit(module, runner.training)
    return Counter({entry.key: entry.self_cpu_time_total / 1e6 / batches for entry in profiler.key_averages()})


def step(runner: Runner, module: Tuned, batches: int, kind: str, perturb: Perturb) -> Seconds:
    """Own CPU seconds of each operator in a weight or in a hyperparameter step."""
    weight = seconds(runner, module, batches, perturb)
    if kind == "weight":
        return weight
    both = seconds(runner, module, batches, perturb, hyperparameter_steps=True)
    both.subtract(weight)
    return both


def table(plain: Seconds, tuned: Seconds, top: int, kind: str) -> list[str]:
    """Rows of Markdown: the operators with the largest difference, and the sum of all."""
    whole = plain.total()
    lines = [f"| operator | plain step | {kind} step | difference |", "|---|---|---|---|"]
    names = sorted({*plain, *tuned}, key=lambda name: plain[name] - tuned[name])[:top]
    for name, a, b in [*((name, plain[name], tuned[name]) for name in names), ("all", whole, tuned.total())]:
        lines.append(f"| {name} | {a / whole:.3f} | {b / whole:.3f} | {(b - a) / whole:+.3f} |")
    return lines


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--step", choices=("weight", "hyperparameter"), default="weight")
    parser.add_argument("--perturb", choices=("batch", "example"), default="batch")
    parser.add_argument("--response", choices=("full", "gates"), default="full")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--top", type=int, default=8, help="rows of each table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for network in args.networks:
        torch.manual_seed(0)
        runner = Runner(CASES[network], torch.device("cpu"))
        batches = args.batches * runner.case.repeats
        plain = seconds(runner, Plain(runner.case.build()), batches)
        module = Tuned(runner.case.build(), runner.case.dropout, args.response)
        tuned = step(runner, module, batches, args.step, args.perturb)
        print(f"{network}: plain step {1000 * plain.total():.0f} ms\n")
        print("\n".join(table(plain, tuned, args.top, args.step)), end="\n\n")


if __name__ == "__main__":
    main()
