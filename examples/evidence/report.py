"""Tables and the figure, from the file of results alone.

python examples/evidence/report.py                       # prints the tables, writes evidence.png beside them
python examples/evidence/report.py --results FILE --out DIR --trials 20
"""

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import results
from results import Key, Row
from scipy.stats import t as student
from tasks import TASKS
from trials import METHODS, SEARCHES, WHAT

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GUESSES = tuple(name for name in WHAT if name.startswith("guess-"))
RIVALS = ("none", "best guess", *SEARCHES)
"""What a self-tuned run is compared with, beside the converted and untuned network."""


class Result(NamedTuple):
    """What one seed of one entry comes to: its run, or the best by validation loss of several runs.

    Args:
        row: the run that validation selects.
        cpu_seconds: of all runs.
    """

    row: Row
    cpu_seconds: float

    @property
    def test_loss(self) -> float:
        """Test loss at the best epoch."""
        return float(self.row["test"]["loss"])


Results = dict[str, dict[int, Result]]
"""By name of the entry, then by seed."""


def select(rows: Sequence[Row]) -> Result | None:
    """The run with the lowest validation loss; None where no run has a finite one."""
    finished = [row for row in rows if row["best_val_loss"] is not None]
    if not finished:
        return None
    return Result(min(finished, key=lambda row: row["best_val_loss"]), sum(row["cpu_seconds"] for row in rows))


def collect(rows: Mapping[Key, Row], task: str, trials: int) -> Results:
    """Results of one task; a search counts where all its trials are there, the best guess where all guesses are."""
    found: Results = {}
    seeds = sorted({key.seed for key in rows if key.task == task})
    for seed in seeds:
        for name in WHAT:
            count = trials if name in SEARCHES else 1
            runs = [rows[key] for trial in range(count) if (key := Key(task, name, seed, trial)) in rows]
            if len(runs) == count and (result := select(runs)):
                found.setdefault(name, {})[seed] = result
        guesses = [rows[key] for name in GUESSES if (key := Key(task, name, seed)) in rows]
        if len(guesses) == len(GUESSES) and (result := select(guesses)):
            found.setdefault("best guess", {})[seed] = result
    return found


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def scores_table(task: str, found: Results) -> list[str]:
    """Scores and cost of every entry, mean and standard deviation over the seeds."""
    metric = TASKS[task].metric
    plain = [result.cpu_seconds for result in found.get("none", {}).values()]
    unit = statistics.mean(plain) if plain else None
    lines = [
        f"| {task} | test loss | {metric} | validation loss, best epoch | last epoch | cost, plain runs | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, by_seed in found.items():
        rows = [result.row for result in by_seed.values()]
        cost = statistics.mean(result.cpu_seconds for result in by_seed.values())
        last = [row["last_val_loss"] for row in rows if row["last_val_loss"] is not None]
        cells = [
            name,
            spread([row["test"]["loss"] for row in rows]),
            spread([row["test"][metric] for row in rows]),
            spread([row["best_val_loss"] for row in rows]),
            spread(last) if last else "not finite",
            "" if unit is None else f"{cost / unit:.1f}",
            str(len(rows)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


class Difference(NamedTuple):
    """Mean of paired differences, with its 95% interval by Student's t; the interval is None for one pair."""

    mean: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """Won, tied (the interval includes zero) or lost, where lower is better."""
        if self.interval is None:
            return "one seed"
        low, high = self.interval
        return "won" if high < 0 else "lost" if low > 0 else "tied"


def difference(ours: Mapping[int, Result], theirs: Mapping[int, Result]) -> Difference | None:
    """Test loss of ours minus theirs, over the seeds that both have; None where they share none."""
    pairs = [ours[seed].test_loss - theirs[seed].test_loss for seed in ours if seed in theirs]
    if not pairs:
        return None
    mean = statistics.mean(pairs)
    if len(pairs) == 1:
        return Difference(mean, None)
    half = float(student.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return Difference(mean, (mean - half, mean + half))


def verdicts_table(task: str, found: Results) -> list[str]:
    """Every self-tuned method against every rival, paired by seed."""
    lines = [f"| {task} | rival | difference of test loss | 95% interval | |", "|---|---|---|---|---|"]
    for method in METHODS:
        for rival in (*RIVALS, f"{method}:untuned"):
            if method not in found or rival not in found:
                continue
            compared = difference(found[method], found[rival])
            if compared is None:
                continue
            interval = "" if compared.interval is None else "[{:+.3f}, {:+.3f}]".format(*compared.interval)
            lines.append(f"| {method} | {rival} | {compared.mean:+.3f} | {interval} | {compared.verdict} |")
    return lines


def headroom_line(task: str, found: Results) -> str:
    """What random search gains over the best guess: the room that a task leaves for tuning."""
    if "random" not in found or "best guess" not in found:
        return f"{task}: not known yet"
    gap = difference(found["random"], found["best guess"])
    if gap is None or gap.interval is None:
        return f"{task}: fewer than two seeds"
    return f"{task}: {-gap.mean:.3f} [{-gap.interval[1]:.3f}, {-gap.interval[0]:.3f}]"


Curve = list[tuple[float, float]]
"""CPU seconds spent, and the lowest validation loss so far."""


def progress(rows: Iterable[Row]) -> Curve:
    """The lowest validation loss so far, over the CPU seconds of runs one after the other."""
    curve: Curve = []
    best, before = float("inf"), 0.0
    for row in rows:
        for _, loss, seconds in row["curve"]:
            if loss is not None and loss < best:
                best = loss
                curve.append((before + seconds, best))
        before += row["cpu_seconds"]
    return [*curve, (before, best)] if curve else []


def plot(rows: Mapping[Key, Row], tasks: Sequence[str], trials: int, path: Path) -> None:
    """A panel for each task: best validation loss against CPU seconds, a line for each seed."""
    figure, grid = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.6), layout="constrained", squeeze=False)
    names = [*METHODS, *SEARCHES]
    colours = dict(zip(names, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for task, axes in zip(tasks, grid[0], strict=True):
        for name, colour in colours.items():
            for curve in curves(rows, task, name, trials):
                style = "-" if name in METHODS else "--"
                axes.step(*zip(*curve, strict=True), style, where="post", color=colour, alpha=0.7, label=name)
        for name in GUESSES:
            for curve in curves(rows, task, name, trials):
                axes.plot(*curve[-1], "k.", label="guesses")
        axes.set(title=task, xscale="log", xlabel="CPU seconds")
    grid[0][0].set_ylabel("best validation loss")
    labels = [axes.get_legend_handles_labels() for axes in grid[0]]
    handles = {label: handle for pair in labels for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curves(rows: Mapping[Key, Row], task: str, name: str, trials: int) -> list[Curve]:
    """The progress of each seed of an entry."""
    count = trials if name in SEARCHES else 1
    seeds = sorted({key.seed for key in rows if (key.task, key.what) == (task, name)})
    runs = ([rows[key] for n in range(count) if (key := Key(task, name, seed, n)) in rows] for seed in seeds)
    return [curve for curve in map(progress, runs) if curve]


def report(rows: Mapping[Key, Row], trials: int) -> str:
    """All tables, as Markdown."""
    tasks = [task for task in TASKS if any(key.task == task for key in rows)]
    found = {task: collect(rows, task, trials) for task in tasks}
    tables: list[Callable[[str, Results], list[str]]] = [scores_table, verdicts_table]
    parts = ["\n".join(table(task, found[task])) for table in tables for task in tasks]
    lines = ["Headroom, test loss of the best guess minus that of random search:", ""]
    lines += [headroom_line(task, found[task]) for task in tasks]
    return "\n\n".join([*parts, "\n".join(lines)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, print the tables and write the figure."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=here / "results.jsonl")
    parser.add_argument("--out", type=Path, default=here, help="folder of the figure")
    parser.add_argument("--trials", type=int, default=20, help="of each search that count")
    args = parser.parse_args(arguments)
    rows = results.read(args.results)
    if not rows:
        parser.error(f"{args.results} holds no runs; make some with examples/evidence/run.py.")
    print(report(rows, args.trials))
    picture = args.out / "evidence.png"
    plot(rows, [task for task in TASKS if any(key.task == task for key in rows)], args.trials, picture)
    print(f"\nFigure: {picture}")


if __name__ == "__main__":
    main()
