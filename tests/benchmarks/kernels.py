"""What a weight step spends beyond a plain step, by operator: where the numbers of `step_cost.py` come from.

    python tests/benchmarks/kernels.py [--networks alexnet resnet18] [--response gates] [--batches K] [--top N]

Runs a plain and a self-tuned network under torch's profiler, weight steps only. A row is an operator with its CPU time
in both, without the operators that it calls, in units of the whole plain step; the rows with the largest difference
come first. The profiler adds about a microsecond to each call.
"""

import argparse
import logging
import warnings
from collections import Counter

import torch
from networks import CASES
from runs import Plain, Runner, Tuned
from torch.profiler import ProfilerActivity, profile

from lightning_stn import STNCallback, Warmup

Seconds = Counter[str]


def seconds(runner: Runner, module: Plain | Tuned, batches: int) -> Seconds:
    """Own CPU seconds of each operator in a batch, weight steps only."""
    never = Warmup(batches + 1, "steps")
    callbacks = [STNCallback(dataloader=runner.validation, warmup=never)] if isinstance(module, Tuned) else []
    runner.trainer(1, *callbacks).fit(module, runner.training)  # builds the state of the optimiser
    callbacks = [STNCallback(dataloader=runner.validation, warmup=never)] if isinstance(module, Tuned) else []
    trainer = runner.trainer(batches, *callbacks)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        trainer.fit(module, runner.training)
    return Counter({entry.key: entry.self_cpu_time_total / 1e6 / batches for entry in profiler.key_averages()})


def table(plain: Seconds, tuned: Seconds, top: int) -> list[str]:
    """Rows of Markdown: the operators with the largest difference, and the sum of all."""
    whole = plain.total()
    lines = ["| operator | plain | self-tuned | difference |", "|---|---|---|---|"]
    names = sorted({*plain, *tuned}, key=lambda name: plain[name] - tuned[name])[:top]
    for name, a, b in [*((name, plain[name], tuned[name]) for name in names), ("all", whole, tuned.total())]:
        lines.append(f"| {name} | {a / whole:.3f} | {b / whole:.3f} | {(b - a) / whole:+.3f} |")
    return lines


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
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
        plain, tuned = Plain(runner.case.build()), Tuned(runner.case.build(), runner.case.dropout, args.response)
        found = [seconds(runner, module, args.batches * runner.case.repeats) for module in (plain, tuned)]
        print(f"{network}: plain step {1000 * found[0].total():.0f} ms\n")
        print("\n".join(table(*found, args.top)), end="\n\n")


if __name__ == "__main__":
    main()
