"""Compare what a step costs beside its kernels in two checkouts, on a network so small that it is most of the step.

    python tests/benchmarks/overhead.py OLD NEW [--parts weight_batch hyper] [--rounds N]

Each checkout runs in a separate process. The two take turns with bursts of a few steps, tens of milliseconds each,
so that a clock that changes from second to second meets both alike. A cell is the median over the rounds of NEW divided
by OLD, in brackets the quartiles. The unit is CPU time, with one thread. `compare.py` does the same with whole runs of
larger networks, whose kernels are the same in both.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES, HYPERPARAMETERS = 16, 7

METHODS = {"weight": "stn", "delta": "delta-stn", "shared": "delta-stn", "direct": "delta-stn"}
SETTINGS: dict[str, dict[str, Any]] = {"shared": {"passes": 1}, "direct": {"linearize": False}}
ROWS = {"batch": 1, "example": EXAMPLES}
PARTS = (*(f"{name}_{per}" for name in METHODS for per in ROWS), "hyper", "evaluation")
"""Weight steps of STN and of three forms of Delta-STN, the gradient of a hyperparameter step, and an evaluation."""


def work(root: Path) -> None:
    """Take the steps that standard input asks for, `part number` a line; print the CPU seconds of one step."""
    sys.path[:0] = [str(root)]
    import torch

    import lightning_stn

    assert Path(lightning_stn.__file__).is_relative_to(root), f"{lightning_stn.__file__} is not in {root}"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = parts()
    for line in sys.stdin:
        name, number = line.split()
        begin = time.process_time()
        for _ in range(int(number)):
            steps[name]()
        print((time.process_time() - begin) / int(number), flush=True)


def parts() -> dict[str, Callable[[], None]]:
    """A function for each of `PARTS`, on a perceptron with a layer normalisation."""
    import torch
    from torch import Tensor, nn

    from lightning_stn import Float, HyperparameterSet, convert
    from lightning_stn.binding import bind, bind_weight_phase, unbind
    from lightning_stn.methods import resolve_method
    from lightning_stn.methods.base import recentre

    hyperparameters = HyperparameterSet({f"h{n}": Float(0.0, 1.0, init=0.3) for n in range(HYPERPARAMETERS)})
    layers = (nn.Linear(32, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    net = convert(nn.Sequential(*layers), hyperparameters)
    recentre(net, hyperparameters, True)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    x = torch.randn(EXAMPLES, 32)

    def loss() -> Tensor:
        value: Tensor = net(x).square().mean()
        return value

    def weight_step(name: str, rows: int) -> Callable[[], None]:
        method = resolve_method({"name": METHODS[name], **SETTINGS.get(name, {})})

        def step() -> None:
            bind_weight_phase(hyperparameters, hyperparameters.sample(rows))
            method.objective(net, hyperparameters, loss)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
            unbind(hyperparameters)

        return step

    def hyper() -> None:
        sample = hyperparameters.unconstrained.clone().requires_grad_()
        with bind(hyperparameters, sample.unsqueeze(0), frozen=True):
            torch.autograd.grad(loss(), sample)

    def evaluation() -> None:
        with torch.no_grad():
            loss()

    steps = {f"{name}_{per}": weight_step(name, rows) for name in METHODS for per, rows in ROWS.items()}
    return {**steps, "hyper": hyper, "evaluation": evaluation}


class Worker:
    """A process that runs one checkout."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, __file__, "--work", str(root)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")

    def seconds(self, part: str, number: int) -> float:
        """CPU seconds of a step, the mean of a burst."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(part, number, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def compare(workers: list[Worker], part: str, rounds: int) -> tuple[list[float], float]:
    """Ratios of the second worker to the first, one a round, and the median seconds of the first."""
    for worker in workers:
        worker.seconds(part, 20)  # warms up
    number = max(1, round(0.06 / workers[0].seconds(part, 20)))
    ratios, seconds = [], []
    for turn in range(rounds):
        found = {worker: worker.seconds(part, number) for worker in (workers if turn % 2 else workers[::-1])}
        ratios.append(found[workers[1]] / found[workers[0]])
        seconds.append(found[workers[0]])
    return ratios, statistics.median(seconds)


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=lambda path: Path(path).resolve())
    parser.add_argument("new", type=lambda path: Path(path).resolve())
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    workers = [Worker(options.old), Worker(options.new)]
    for part in options.parts:
        ratios, seconds = compare(workers, part, options.rounds)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{part:<16} {middle:.3f} [{low:.3f}, {high:.3f}]  OLD {1e6 * seconds:.0f} us", flush=True)


if __name__ == "__main__":
    main()
