"""The evidence suite: runs are appended once, searches and controls read the runs before them, tables are right."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SUITE = Path(__file__).parents[1] / "examples" / "evidence"


def python(code: str, *arguments: str) -> str:
    """Output of a program that imports the scripts of the suite, as a command line run from that folder would."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        f"import sys; sys.path.insert(0, {str(SUITE)!r})\n{code}",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


CUT_OFF = """
import json, run
from pathlib import Path
first, second, out, before = json.loads(sys.argv[1])
run.main(first)
text = Path(out).read_text()
Path(before).write_text(text)
Path(out).write_text(text[:-100])
run.main(second)
"""
"""Runs something, cuts the last line off, and runs more."""


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_runs_are_appended_once_and_a_line_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    out, before = tmp_path / "rows.jsonl", tmp_path / "before.jsonl"
    options = ["--tasks", "digits", "--seeds", "0", "--epochs", "1", "--trials", "2", "--out", str(out)]
    first = [*options, "--what", "none", "random", "stn"]
    second = [*options, "--what", "none", "random", "stn", "stn:final", "delta-stn:final", "--machine", "other"]
    said = python(CUT_OFF, json.dumps([first, second, str(out), str(before)]))
    assert "delta-stn:final seed 0 trial 0: skipped, needs the final values of delta-stn" in said
    rows = read(before)
    assert [(row["what"], row["trial"]) for row in rows] == [("none", 0), ("random", 0), ("random", 1), ("stn", 0)]
    assert rows[1]["hyperparameters"] != rows[2]["hyperparameters"]
    assert all(row["test"]["accuracy"] > 0 and len(row["curve"]) == 1 for row in rows)
    text = before.read_text()[:-100]
    assert out.read_text().startswith(text)
    unit, again, final = (json.loads(line) for line in out.read_text()[len(text) + 1 :].splitlines())
    assert (unit["what"], again["what"], final["what"]) == ("none", "stn", "stn:final")
    assert unit["machine"] == "other"  # each machine has its own unit of cost
    assert again["best_val_loss"] == rows[3]["best_val_loss"]
    assert final["hyperparameters"] == again["final"]


def made_up(task: str, what: str, seed: int, trial: int, loss: float, seconds: float = 10.0) -> dict[str, Any]:
    return {
        "task": task,
        "what": what,
        "seed": seed,
        "trial": trial,
        "best_val_loss": loss,
        "last_val_loss": loss + 0.1,
        "test": {"loss": loss + 0.01 * seed, "accuracy": 0.9},
        "cpu_seconds": seconds,
        "curve": [[0, loss + 0.5, seconds / 2], [1, loss, seconds]],
    }


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three seeds: random search is best, self-tuning lies between it and the guesses, and Delta-STN varies."""
    found = []
    for seed in range(3):
        found += [made_up("digits", "none", seed, 0, 1.0)]
        found += [
            made_up("digits", f"guess-{g}", seed, 0, loss) for g, loss in (("0.1", 0.9), ("0.3", 0.8), ("0.5", 0.85))
        ]
        found += [made_up("digits", "random", seed, trial, 0.9 - 0.2 * trial) for trial in range(2)]
        found += [made_up("digits", "stn", seed, 0, 0.75 + 0.001 * seed, 20.0) | {"correlation": 0.1 * seed}]
        found += [made_up("digits", "delta-stn", seed, 0, 0.7 + 0.1 * seed)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_report_selects_by_validation_loss_and_pairs_by_seed(rows: Path, tmp_path: Path) -> None:
    options = ["--results", str(rows), "--out", str(tmp_path), "--trials", "2"]
    text = python("import report; report.main()", *options)
    lines = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    scores = {line[0]: line for line in lines if len(line) == 7}
    assert scores["random"][1] == "0.710 ± 0.010"  # the second trial, 0.7, and 0.01 for each seed
    assert scores["random"][5] == "2.0"
    assert scores["best guess"][3] == "0.800 ± 0.000"
    assert scores["stn"][5] == "2.0"
    verdicts = {(line[0], line[1]): line for line in lines if len(line) == 5}
    assert verdicts["stn", "best guess"][2:] == ["-0.049", "[-0.051, -0.047]", "won"]
    assert verdicts["stn", "random"][4] == "lost"
    assert verdicts["stn", "random at equal cost"][2:] == verdicts["stn", "random"][2:]  # the cost of two trials
    assert verdicts["delta-stn", "random"][2] == "+0.100"
    assert verdicts["delta-stn", "random at equal cost"][2] == "-0.100"  # the cost of one
    assert verdicts["delta-stn", "best guess"][4] == "tied"
    pairs = {line[0]: line[1] for line in lines if len(line) == 2}
    assert pairs["stn"] == "0.10"  # the mean correlation over the seeds
    assert pairs["delta-stn"] == "+0.049 ± 0.246, tied (3 seeds)"  # its change of the test loss
    assert "- digits: 0.100 [0.100, 0.100], 2 trials, 3 seeds" in text
    assert (tmp_path / "evidence.png").stat().st_size > 10_000


def test_cost_is_counted_in_plain_runs_of_the_same_machine(rows: Path, tmp_path: Path) -> None:
    found = [made_up("digits", "none", 0, 0, 5.0, 30.0) | {"machine": "other"}]
    found += [made_up("digits", "gates", 0, 0, 0.7, 90.0) | {"machine": "other"}]
    found += [made_up("digits", "adam", 0, 0, 0.7, 90.0) | {"machine": "unknown"}]
    with rows.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in found)
    text = python("import report; report.main()", "--results", str(rows), "--out", str(tmp_path), "--trials", "2")
    cost = {
        line.split("|")[1].strip(): line.split("|")[6].strip() for line in text.splitlines() if line.count("|") == 8
    }
    assert (cost["stn"], cost["gates"], cost["adam"]) == ("2.0", "3.0", "")
    assert "| none | 1.010 ± 0.010 |" in text  # the loss of the first machine


def test_readme_and_docs_give_the_figures_of_the_committed_results(tmp_path: Path) -> None:
    text = python("import report; report.main()", "--out", str(tmp_path))
    summary, rest = text[: text.index("Each change")], text[text.index("What a schedule is worth") :]
    table = [line for line in summary.splitlines() if line.endswith("seeds) |")]
    readme, page = ((SUITE.parents[1] / name).read_text() for name in ("README.md", "docs/evidence.md"))
    for text_of_page in (readme, page):
        before = text_of_page[: text_of_page.index("A tie means")].split("minus never tuned |")[1]
        _compare_summary(table, [line for line in before.splitlines() if line.startswith("|")][1:])
    worth = [_cells(line) for line in rest.split("\n\n")[1].splitlines()[2:]]
    shown = [_cells(line) for line in page[page.index("## What a schedule is worth") :].splitlines()]
    shown = [cells for cells in shown if len(cells) == 4][2:]
    assert [cells[1:] for cells in shown[: len(worth)]] == [[c.split(", ")[0] for c in cells[1:]] for cells in worth]
    changes = [_cells(line) for line in text[text.index("Each change") :].split("\n\n")[1].splitlines()[2:]]
    shown = [_cells(line) for line in page[page.index("## Where the defaults come from") :].splitlines()]
    shown = [cells for cells in shown if len(cells) == 8][2:]
    assert {cells[0].strip("`"): cells[2:] for cells in shown} == {
        name: [_without_verdict(cell) for cell in cells] for name, *cells in changes
    }


def _compare_summary(table: list[str], rows: list[str]) -> None:
    assert len(table) == len(rows) == 6
    for ours, theirs in zip(table, rows, strict=True):
        (_, score, cost, none, guess, *_, untuned) = [cell.strip() for cell in ours.strip("|").split("|")]
        cells = [cell.strip() for cell in theirs.strip("|").split("|")][1:]
        differences = [cell.removesuffix(" (5 seeds)") for cell in (none, guess, untuned)]
        assert [score, cost, *differences] == cells


def _without_verdict(cell: str) -> str:
    """A difference, with the number of its seeds where it is not five."""
    value, _, verdict = cell.partition(", ")
    seeds = verdict.partition("(")[2].removesuffix(" seeds)")
    return value if seeds == "5" or not cell else f"{value} ({seeds or 1})"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
