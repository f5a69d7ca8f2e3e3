"""Compare the step costs of two checkouts, in one run, interleaved.

    python tests/benchmarks/compare.py OLD NEW [--networks mlp lstm] [--parts whole delta] [--rounds N]

Each checkout runs the parts of its `step_cost.py` in a separate process; the processes take turns, part by part, and
the order changes from round to round. A cell is the median over the rounds of NEW divided by OLD, in brackets
the quartiles. The unit is CPU time, with one thread. With `--out FILE` rows are appended to a file as they are
measured, so that a run that was cut off loses one round at most.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NETWORKS = ("alexnet", "resnet18", "lstm", "transformer", "mlp")
PARTS = ("whole", "fixed", "shared", "example", "delta", "evaluation")

KEEPS_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)}
"""Settings of the C library with which a process keeps freed memory; without them it returns some of it to the system
and faults it in again, which took up to a tenth of a step and depends on the order of allocations alone."""

Seconds = dict[str, float]


def work(root: Path, network: str) -> None:
    """Measure the parts that are named on standard input, one after the other; print each as a line of JSON."""
    sys.path[:0] = [str(root), str(root / "tests/benchmarks")]
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    from networks import CASES
    from runs import Runner
    from step_cost import Bench

    import lightning_stn

    assert Path(lightning_stn.__file__).is_relative_to(root), f"{lightning_stn.__file__} is not in {root}"
    case = CASES[network]
    bench = Bench(Runner(case, torch.device("cpu")), case.repeats * 2, case.repeats)
    for line in sys.stdin:
        try:
            seconds = getattr(bench, line.strip())()
        except Exception as error:
            seconds = {"error": str(error)}
        print("seconds", json.dumps(seconds), flush=True)


class Worker:
    """A process that measures one checkout.

    Args:
        root: the checkout.
        network: name of the network.
    """

    def __init__(self, root: Path, network: str) -> None:
        command = [sys.executable, __file__, "--work", str(root), network]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd="/",
            env=os.environ | KEEPS_MEMORY,
        )

    def measure(self, part: str) -> Seconds:
        """Seconds by name of the quantity.

        Raises:
            RuntimeError: the process ended, or the part failed there.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(part, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("seconds "):
                seconds: Seconds = json.loads(line.removeprefix("seconds "))
                if "error" in seconds:
                    raise RuntimeError(f"{part}: {seconds['error']}")
                return seconds
        self.errors.seek(0)
        raise RuntimeError(f"{part}: the process ended:\n{self.errors.read()[-2000:]}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def compare(old: Path, new: Path, network: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Ratios of NEW to OLD by quantity, one a round."""
    ratios: dict[str, list[float]] = {}
    workers = [Worker(old, network), Worker(new, network)]
    try:
        for number in range(options.rounds + 1):
            for part in options.parts:
                order = workers if number % 2 else workers[::-1]
                found = {worker: worker.measure(part) for worker in order}
                if number == 0:  # A first round warms both up.
                    continue
                before, after = (found[worker] for worker in workers)
                row: dict[str, Any] = {name: after[name] / before[name] for name in before if "wall" not in name}
                for name, ratio in row.items():
                    ratios.setdefault(name, []).append(ratio)
                if options.out is not None:
                    with options.out.open("a") as file:
                        print(json.dumps({"network": network, "part": part, "round": number, **row}), file=file)
            print(f"{network}: round {number} of {options.rounds}", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.close()
    return ratios


def show(network: str, ratios: dict[str, list[float]]) -> None:
    """Print a line for each quantity."""
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        print(f"{network:<12} {name:<18} {middle:.3f} [{low:.3f}, {high:.3f}]  {len(values)} rounds", flush=True)


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), sys.argv[3])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=lambda path: Path(path).resolve())
    parser.add_argument("new", type=lambda path: Path(path).resolve())
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, help="append every round to this file, a line of JSON each")
    options = parser.parse_args()
    for network in options.networks:
        show(network, compare(options.old, options.new, network, options))


if __name__ == "__main__":
    main()
