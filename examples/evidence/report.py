"""Tables and the figure, from the file of results alone.

    python examples/evidence/report.py                       # prints the tables, writes evidence.png beside this file
    python examples/evidence/report.py --results FILE --out DIR --trials 20 --methods stn

The best of several runs is the one with the lowest validation loss; its test loss is the one that counts. Every run is
tested at its best epoch by validation loss.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import results
from figure import plot
from results import Key, Row, plain_runs
from scipy.stats import t as student
from tasks import TASKS
from trials import FACTORS, GUESSES, METHODS, REPLAYS, SEARCHES, WHAT

DEFAULT = "stn"
"""The method with all defaults."""

RIVALS = ("none", "best guess", *SEARCHES)
"""What a self-tuned run is compared with, beside the converted and untuned network."""


class Result(NamedTuple):
    """What one seed of one entry comes to: its run, or the best by validation loss of several runs.

    Args:
        row: the run that validation selects.
        cost: of all runs, in plain runs; nan if their cost on this machine is not known.
    """

    row: Row
    cost: float

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
    return Result(min(finished, key=lambda row: row["best_val_loss"]), sum(map(plain_runs, rows)))


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


def at_equal_cost(rows: Mapping[Key, Row], task: str, search: str, ours: Mapping[int, Result]) -> dict[int, Result]:
    """For each seed the best of the first trials of a search that together cost what our run costs, at least of one."""
    found = {}
    for seed, result in ours.items():
        trials = results.trials(rows.values(), task, search, seed)
        spent = list(accumulate(map(plain_runs, trials)))
        if not spent or not spent[-1] >= result.cost:
            continue  # the search has not run for as long
        affordable = sum(cost <= result.cost for cost in spent)
        best = select(trials[: max(1, affordable)])
        if best is not None:
            found[seed] = best
    return found


def decimals(found: Results) -> int:
    """Decimals that show three digits or more of the losses of a task."""
    losses = [result.test_loss for by_seed in found.values() for result in by_seed.values()]
    smallest = min((loss for loss in losses if loss > 0), default=1.0)
    return 3 + max(0, -math.floor(math.log10(smallest)) - 1)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def mean_cost(by_seed: Mapping[int, Result]) -> str:
    """Mean cost in plain runs, over the seeds of which it is known."""
    costs = [result.cost for result in by_seed.values() if math.isfinite(result.cost)]
    return f"{statistics.mean(costs):.1f}" if costs else ""


def scores_table(task: str, found: Results) -> list[str]:
    """Scores and cost of every entry, mean and standard deviation over the seeds."""
    metric, digits = TASKS[task].metric, decimals(found)
    lines = [
        f"| {task} | test loss | {metric} | validation loss, best epoch | last epoch | cost, plain runs | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, by_seed in found.items():
        rows = [result.row for result in by_seed.values()]
        last = [row["last_val_loss"] for row in rows if row["last_val_loss"] is not None]
        cells = [
            name,
            spread([row["test"]["loss"] for row in rows], digits),
            spread([row["test"][metric] for row in rows], digits),
            spread([row["best_val_loss"] for row in rows], digits),
            spread(last, digits) if last else "not finite",
            mean_cost(by_seed),
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


def verdicts_table(task: str, found: Results, rows: Mapping[Key, Row], methods: Sequence[str]) -> list[str]:
    """Every self-tuned method against every rival, paired by seed."""
    digits = decimals(found)
    lines = [f"| {task} | rival | difference of test loss | 95% interval | |", "|---|---|---|---|---|"]
    for method in methods:
        ours = found.get(method, {})
        rivals = {rival: found.get(rival, {}) for rival in (*RIVALS, f"{method}:untuned")}
        rivals |= {f"{search} at equal cost": at_equal_cost(rows, task, search, ours) for search in SEARCHES}
        for rival, theirs in rivals.items():
            compared = difference(ours, theirs)
            if compared is None:
                continue
            interval = ""
            if compared.interval is not None:
                interval = "[{}]".format(", ".join(f"{end:+.{digits}f}" for end in compared.interval))
            lines.append(f"| {method} | {rival} | {compared.mean:+.{digits}f} | {interval} | {compared.verdict} |")
    return lines


def summary_table(found: Mapping[str, Results]) -> list[str]:
    """A row for each task: the self-tuned run with all defaults, and its difference of test loss to each rival."""
    rivals = (*RIVALS, f"{DEFAULT}:untuned")
    known = [rival for rival in rivals if any(rival in by_name for by_name in found.values())]
    lines = [
        f"| task | self-tuned, test loss | cost, plain runs | {' | '.join(f'minus {rival}' for rival in known)} |",
        "|---" * (3 + len(known)) + "|",
    ]
    for task, by_name in found.items():
        ours = by_name.get(DEFAULT, {})
        if not ours:
            continue
        cells = [_verdict(ours, by_name.get(rival, {}), decimals(by_name)) for rival in known]
        score = spread([result.test_loss for result in ours.values()], decimals(by_name))
        lines.append(f"| {task} | {score} | {mean_cost(ours)} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def _verdict(ours: Mapping[int, Result], theirs: Mapping[int, Result], digits: int) -> str:
    """Mean difference, half of its 95% interval, verdict, and number of seeds."""
    compared = difference(ours, theirs)
    if compared is None:
        return ""
    seeds = len(ours.keys() & theirs.keys())
    half = "" if compared.interval is None else f" ± {(compared.interval[1] - compared.interval[0]) / 2:.{digits}f}"
    return f"{compared.mean:+.{digits}f}{half}, {compared.verdict}" + (f" ({seeds} seeds)" if seeds > 1 else "")


def changes_table(found: Mapping[str, Results], rate: str = "") -> list[str]:
    """What each change of the default method does to the test loss: the change minus the default, paired by seed.

    Args:
        found: by task.
        rate: ending of the entries at another learning rate of the weights; empty for that of the task.
    """
    shown = {task: by_name for task, by_name in found.items() if not rate or f"{DEFAULT}{rate}" in by_name}
    lines = [f"| change | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
    for method in METHODS:
        cells = [
            _verdict(by_name.get(f"{method}{rate}", {}), by_name.get(f"{DEFAULT}{rate}", {}), decimals(by_name))
            for by_name in shown.values()
        ]
        if method != DEFAULT and any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def schedules_table(found: Mapping[str, Results]) -> list[str]:
    """What a schedule is worth: each use of it minus its final values as constants, paired by seed."""
    shown = {task: by_name for task, by_name in found.items() if f"{DEFAULT}:replay" in by_name}
    if not shown:
        return []
    constants, lines = f"{DEFAULT}:final", [f"| network | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
    for name in ("none", "best guess", DEFAULT, *(f"{DEFAULT}:{replay}" for replay in REPLAYS)):
        cells = [
            _verdict(by_name.get(name, {}), by_name.get(constants, {}), decimals(by_name)) for by_name in shown.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    scores = [
        spread([result.test_loss for result in by_name.get(constants, {}).values()], decimals(by_name))
        for by_name in shown.values()
        if constants in by_name
    ]
    return [*lines, f"| {constants}, test loss | {' | '.join(scores)} |"]


def correlations_table(found: Mapping[str, Results]) -> list[str]:
    """Median correlation between the hypergradients of two hyperparameters: mean over the seeds."""
    lines = [f"| correlation | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for method in METHODS:
        cells = []
        for by_name in found.values():
            rows = [result.row for result in by_name.get(method, {}).values()]
            known = [row["correlation"] for row in rows if row.get("correlation") is not None]
            cells.append(f"{statistics.mean(known):.2f}" if known else "")
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def rates_table(found: Mapping[str, Results]) -> list[str]:
    """Validation losses of the guesses at other learning rates of the weights: the best mean over the common seeds."""
    shown = {task: rates for task, by_name in found.items() if len(rates := _by_rate(by_name)) > 1}
    if not shown:
        return []
    lines = [f"| learning rate, in the task's | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
    for factor in sorted({1, *FACTORS}):
        cells = [rates.get(factor, "") for rates in shown.values()]
        if any(cells):
            lines.append(f"| {factor} | {' | '.join(cells)} |")
    return lines


def _by_rate(found: Results) -> dict[float, str]:
    """For each factor of the learning rate the lower of the mean validation losses of the guesses of 0.1 and 0.3."""
    names = {factor: "" if factor == 1 else f":rate-{factor}" for factor in (1, *FACTORS)}
    runs = {factor: [found.get(f"guess-{g}{name}", {}) for g in ("0.1", "0.3")] for factor, name in names.items()}
    runs = {factor: guesses for factor, guesses in runs.items() if all(guesses)}
    seeds = set.intersection(*(set(guess) for guesses in runs.values() for guess in guesses)) if runs else set()
    means = {
        factor: [statistics.mean(guess[seed].row["best_val_loss"] for seed in seeds) for guess in guesses]
        for factor, guesses in runs.items()
        if seeds
    }
    return {factor: f"{min(values):.{decimals(found)}f} ({len(seeds)})" for factor, values in means.items()}


def headroom_line(task: str, found: Results, rows: Mapping[Key, Row]) -> str:
    """The gain of random search over the best guess, at most 50 trials: the room that a task leaves for tuning."""
    guesses = found.get("best guess", {})
    searches = {seed: results.trials(rows.values(), task, "random", seed)[:50] for seed in guesses}
    trials = min(map(len, searches.values()), default=0)
    best = {seed: result for seed, runs in searches.items() if (result := select(runs[:trials]))}
    gap, digits = difference(best, guesses), decimals(found)
    if gap is None or gap.interval is None:
        return f"- {task}: not known yet"
    low, high = -gap.interval[1], -gap.interval[0]
    return f"- {task}: {-gap.mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}], {trials} trials, {len(best)} seeds"


def report(rows: Mapping[Key, Row], methods: Sequence[str], trials: int) -> str:
    """All tables, as Markdown."""
    tasks = [task for task in TASKS if any(key.task == task for key in rows)]
    found = {task: collect(rows, task, trials) for task in tasks}
    parts = [f"Of each search the best of {trials} trials; of each run its best epoch; both by validation loss."]
    if summary := summary_table(found):
        parts += ["Differences are paired by seed, with half of their 95% interval:", "\n".join(summary)]
    parts += ["\n".join(scores_table(task, found[task])) for task in tasks]
    parts += ["\n".join(verdicts_table(task, found[task], rows, methods)) for task in tasks]
    for title, table in (
        (f"Each change of the default, test loss minus that of {DEFAULT}:", changes_table(found)),
        *(
            (f"The same at {rate} of the task's learning rate:", changes_table(found, f":rate-{rate}"))
            for rate in FACTORS
        ),
        ("What a schedule is worth, test loss minus that of its final values as constants:", schedules_table(found)),
        ("Lowest validation loss of the guesses of 0.1 and 0.3, mean over (seeds):", rates_table(found)),
        ("Median correlation between the hypergradients of two hyperparameters:", correlations_table(found)),
    ):
        if table:
            parts += [title, "\n".join(table)]
    parts.append("Headroom: test loss of the best guess minus that of random search, with its 95% interval.")
    parts.append("\n".join(headroom_line(task, found[task], rows) for task in tasks))
    hours = sum(row["cpu_seconds"] for row in rows.values()) / 3600
    parts.append(f"{len(rows)} runs, {hours:.1f} CPU hours of training.")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, print the tables and write the figure."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=here / "results.jsonl")
    parser.add_argument("--out", type=Path, default=here, help="folder of the figure")
    parser.add_argument("--trials", type=int, default=20, help="of each search that count")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=[DEFAULT, "delta-stn"], help="to compare and plot"
    )
    args = parser.parse_args(arguments)
    rows = results.read(args.results)
    if not rows:
        parser.error(f"{args.results} holds no runs; make some with examples/evidence/run.py.")
    print(report(rows, args.methods, args.trials))
    picture = args.out / "evidence.png"
    tasks = [task for task in TASKS if any(key.task == task for key in rows)]
    plot(rows, tasks, args.methods, args.trials, picture)
    print(f"\nFigure: {picture}")


if __name__ == "__main__":
    main()
