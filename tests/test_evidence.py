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


def run(out: Path, *what: str, trials: int = 2) -> list[dict[str, Any]]:
    """One epoch of entries on the digits, with one seed; returns the file."""
    options = ["--tasks", "digits", "--seeds", "0", "--epochs", "1", "--trials", str(trials), "--out", str(out)]
    python("import run; run.main()", *options, "--what", *what)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_runs_are_appended_once_and_a_line_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    first = run(out, "none", "random", "stn")
    assert [(row["what"], row["trial"]) for row in first] == [("none", 0), ("random", 0), ("random", 1), ("stn", 0)]
    assert first[1]["hyperparameters"] != first[2]["hyperparameters"]
    assert all(row["test"]["accuracy"] > 0 and len(row["curve"]) == 1 for row in first)
    out.write_text("".join(json.dumps(row) + "\n" for row in first[:3]) + json.dumps(first[3])[:40])
    text = out.read_text()
    options = ["--tasks", "digits", "--seeds", "0", "--epochs", "1", "--trials", "2", "--out", str(out)]
    python("import run; run.main()", *options, "--what", "none", "random", "stn", "stn:final")
    assert out.read_text().startswith(text)
    rows = [json.loads(line) for line in out.read_text().splitlines()[4:]]
    assert [row["what"] for row in rows] == ["stn", "stn:final"]
    assert rows[0]["best_val_loss"] == first[3]["best_val_loss"]
    assert rows[1]["hyperparameters"] == rows[0]["final"]


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
        found += [made_up("digits", "stn", seed, 0, 0.75 + 0.001 * seed, 20.0)]
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
    assert verdicts["delta-stn", "best guess"][4] == "tied"
    assert "digits: 0.100 [0.100, 0.100]" in text
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
