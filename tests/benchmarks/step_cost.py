"""Cost of a self-tuning step, in units of a plain Lightning step of the same network.

    python tests/benchmarks/step_cost.py [--networks alexnet mlp] [--methods stn delta-stn] [--rounds N] [--batches K]
        [--response gates] [--threads T] [--quick]

Plain and self-tuning runs alternate, a few batches each, in rounds. Each round gives a ratio of median times. A cell is
the median of the ratios, with their quartiles in brackets. On a CPU the unit is CPU time of the process, which other
load on the machine disturbs little as long as there is one thread; on a GPU it is synchronised wall time.
"""

import argparse
import logging
import sys
import textwrap
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from networks import CASES
from report import Result, machine, tables
from runs import Plain, Runner, Tuned

from lightning_stn import DeltaSTN, Scales
from lightning_stn.specifications import ResponseForm

TRAIN_STEPS = 5
"""Weight steps to a hyperparameter step in the whole run."""

METHODS = ("stn", "delta-stn")

Seconds = dict[str, float]


@dataclass
class Bench:
    """One network in its three forms.

    Args:
        runner: starts the runs.
        batches: batches counted in a run.
        cycles: weight and hyperparameter phases in the whole run.
        response: what layers learn beside their weights.
    """

    runner: Runner
    batches: int
    cycles: int
    response: ResponseForm = "full"
    plain: Plain = field(init=False)
    tuned: Tuned = field(init=False)
    plain_export: Plain = field(init=False)

    def __post_init__(self) -> None:
        """Build them."""
        torch.manual_seed(0)
        case = self.runner.case
        self.plain = Plain(case.build())
        self.tuned = Tuned(case.build(), case.dropout, self.response)
        self.plain_export = Plain(self.tuned.export())

    def base(self) -> Seconds:
        """The plain run that everything else is compared with."""
        run = self.runner.fit(self.plain, self.cycles * TRAIN_STEPS)
        evaluation = self.runner.validate(self.plain, self.batches).evaluation()
        return {"step": run.weight_step(), "evaluation": evaluation, "cpu": run.whole(0), "wall": run.whole(1)}

    def whole(self) -> Seconds:
        """A run of the same number of weight steps, with a hyperparameter step after every fifth."""
        settings = {"train_steps": TRAIN_STEPS, "perturb": "batch"}
        run = self.runner.fit(self.tuned, self.cycles * TRAIN_STEPS, **settings)
        return {"weight_batch": run.weight_step(), "whole_cpu": run.whole(0), "whole_wall": run.whole(1)}

    def fixed(self) -> Seconds:
        """Hyperparameter steps with fixed scales."""
        run = self.runner.fit(self.tuned, self.batches, train_steps=1, scales=Scales(tune=False), perturb="batch")
        return {"hyper_fixed": run.hyperparameter_step()}

    def shared(self) -> Seconds:
        """Hyperparameter steps with tuned scales, one perturbation for the batch."""
        run = self.runner.fit(self.tuned, self.batches, train_steps=1, scales=Scales(tune=True), perturb="batch")
        return {"hyper_batch": run.hyperparameter_step()}

    def example(self) -> Seconds:
        """Both steps with a perturbation for each example."""
        run = self.runner.fit(self.tuned, self.batches, train_steps=1, scales=Scales(tune=True), perturb="example")
        return {"weight_example": run.weight_step(), "hyper_example": run.hyperparameter_step()}

    def delta(self) -> Seconds:
        """Delta-STN's weight steps and its hyperparameter step with fixed scales."""
        seconds: Seconds = {}
        forms = {"delta": DeltaSTN(), "shared": DeltaSTN(passes=1), "direct": DeltaSTN(linearize=False)}
        for name, method in forms.items():
            for perturb in ("batch", "example"):
                settings = {"method": method, "perturb": perturb, "scales": Scales(tune=False)}
                run = self.runner.fit(self.tuned, self.batches, train_steps=1, **settings)
                seconds[f"{name}_{perturb}"] = run.weight_step()
                seconds["delta_fixed"] = run.hyperparameter_step()
        return seconds

    def evaluation(self) -> Seconds:
        """Evaluation of the converted network."""
        return {"evaluation": self.runner.validate(self.tuned, self.batches).evaluation()}

    def exported(self) -> Seconds:
        """Plain training of the exported network."""
        return {"exported": self.runner.fit(self.plain_export, self.batches).weight_step()}


UNIT = {"whole_cpu": "cpu", "whole_wall": "wall", "evaluation": "evaluation"}
"""Plain quantity that a ratio is relative to; the plain step for names not listed."""


def measure(bench: Bench, methods: Collection[str], rounds: int, result: Result) -> None:
    """Alternate plain and self-tuning runs, and collect ratios."""
    parts = [bench.whole, bench.fixed, bench.shared, bench.example, bench.evaluation, bench.exported]
    parts = [*(parts if "stn" in methods else []), *([bench.delta] if "delta-stn" in methods else [])]
    for number in range(rounds):
        print(f"{result.network}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        base = bench.base()
        result.plain.append(base["step"])
        for part in list(parts):
            try:
                seconds = part()
            except Exception as error:
                result.notes.append(f"{part.__name__}: {reason(error)}")
                parts.remove(part)
                continue
            for name, value in seconds.items():
                result.ratios.setdefault(name, []).append(value / base[UNIT.get(name, "step")])


def weigh(bench: Bench, result: Result) -> None:
    """Compare bytes: parameters, activations kept for backward, effective weights, all with gradients and momentum."""
    parameters = {module: sum(p.nbytes for p in module.parameters()) for module in (bench.plain, bench.tuned)}
    plain = bench.runner.saved_bytes(bench.plain).activations
    total = 3 * parameters[bench.plain] + plain
    result.ratios["parameters"] = [parameters[bench.tuned] / parameters[bench.plain]]
    for perturb in ("batch", "example"):
        try:
            saved = bench.runner.saved_bytes(bench.tuned, perturb=perturb)
        except Exception as error:
            result.notes.append(f"memory, {perturb}: {reason(error)}")
            continue
        result.ratios[f"activations_{perturb}"] = [saved.activations / plain]
        if perturb == "batch":
            result.ratios["effective_weights"] = [saved.effective_weights / parameters[bench.plain]]
        everything = 3 * parameters[bench.tuned] + saved.activations + saved.effective_weights
        result.ratios[f"total_{perturb}"] = [everything / total]


def reason(error: Exception) -> str:
    """An error in one short line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


def results(options: argparse.Namespace) -> Iterator[Result]:
    """Measure one network after another; a failure is noted in its result."""
    for network in options.networks:
        result = Result(network)
        try:
            case = CASES[network]
            runner = Runner(case, torch.device(options.device))
            bench = Bench(runner, case.repeats * options.batches, case.repeats * options.cycles, options.response)
            if "stn" in options.methods:
                weigh(bench, result)
            measure(bench, options.methods, options.rounds, result)
        except Exception as error:
            result.notes.append(reason(error))
        yield result


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--response", choices=("full", "gates"), default="full")
    parser.add_argument("--rounds", type=int, default=4, help="repetitions of everything")
    parser.add_argument("--batches", type=int, default=2, help="batches counted in each run")
    parser.add_argument("--cycles", type=int, default=1, help="hyperparameter phases in the whole run")
    parser.add_argument(
        "--threads", type=int, default=1, help="more than one busy-wait for each other, which counts as CPU time"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0")
    parser.add_argument("--quick", action="store_true", help="a single round")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    # Idle hyperparameters and runs without a validation loader are intended here.
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"{machine(torch.device(options.device))}; {options.rounds} rounds of {options.batches} batches\n")
    print(tables(list(results(options)), torch.device(options.device)))


if __name__ == "__main__":
    main()
