"""What the schedule of a long run costs: time of a record, size of checkpoint and file, time to load and to draw.

    python tests/benchmarks/schedule_size.py [--steps N] [--hyperparameters H]

Simulates a run that records after every training batch; a step moves every hyperparameter. Times are seconds of CPU,
medians over the records of a stage.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger
from report import machine

from lightning_stn import Float, HyperparameterSet, Integer, Schedule
from lightning_stn.callback.hyperparameter_phase import HyperparameterStep
from lightning_stn.callback.record import Recorder

STAGES = 10
"""Equal parts of the run, each with a median."""


class Quiet(CSVLogger):
    """Has a folder, and writes nothing itself."""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing."""


def recorder(count: int, folder: Path) -> tuple[Recorder, Any]:
    """A recorder of so many hyperparameters, and the Trainer that it asks."""
    specifications = {f"h{i}": Float(0.0, 0.9) if i % 4 else Integer(0, 16) for i in range(count)}
    phase: Any = SimpleNamespace(
        optimizer=SimpleNamespace(rates={"lr": 0.01}),
        watch=SimpleNamespace(skipped=0),
        statistics=SimpleNamespace(metrics=dict),
    )
    found = Recorder(HyperparameterSet(specifications), phase)
    trainer = SimpleNamespace(
        is_global_zero=True,
        world_size=1,
        loggers=[Quiet(folder, name="run", version=0)],
        fast_dev_run=False,
        log_every_n_steps=1,
        accumulate_grad_batches=1,
        is_last_batch=False,
    )
    found.open(trainer, None)  # type: ignore[arg-type]
    return found, trainer


def simulate(steps: int, count: int, folder: Path) -> None:
    """Record so many steps; print a line for each stage."""
    found, trainer = recorder(count, folder)
    generator, loss = torch.Generator().manual_seed(0), torch.tensor(1.0)
    found.record(trainer, 0, 0)
    print(f"{'steps':>10}{'rows':>8}{'ms/record':>11}{'checkpoint, kB':>16}{'file, kB':>10}")
    times: list[float] = []
    for step in range(1, steps + 1):
        found.hyperparameters.unconstrained.add_(0.01 * torch.randn(count, generator=generator))
        found.train_loss.update(loss)
        found.update(HyperparameterStep(loss, torch.zeros(2, count)), step)
        found.count(trainer, step - 1)
        begin = time.process_time()
        found.record(trainer, step, step // 1000)
        times.append(time.process_time() - begin)
        if step % (steps // STAGES) == 0:
            _print_stage(found, step, times, folder)
            times = []
    _print_reading(found, folder)


def _print_stage(found: Recorder, step: int, times: list[float], folder: Path) -> None:
    torch.save(found.state_dict(), folder / "state.pt")
    sizes = [(folder / "state.pt").stat().st_size, found.path.stat().st_size if found.path else 0]
    print(
        f"{step:>10,}{len(found.schedule):>8,}{1e3 * statistics.median(times):>11.3f}"
        f"{sizes[0] / 1e3:>16,.0f}{sizes[1] / 1e3:>10,.0f}",
        flush=True,
    )


def _print_reading(found: Recorder, folder: Path) -> None:
    """Print how long the file takes to be loaded and drawn."""
    assert found.path is not None
    begin = time.process_time()
    loaded = Schedule.load(found.path)
    middle = time.process_time()
    figure, _ = loaded.plot()
    figure.savefig(folder / "schedule.png")
    print(f"loaded in {middle - begin:.2f} s, drawn in {time.process_time() - middle:.2f} s")
    assert loaded == found.schedule


def main() -> None:
    """Read the arguments and simulate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--hyperparameters", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        simulate(args.steps, args.hyperparameters, Path(folder))


if __name__ == "__main__":
    main()
