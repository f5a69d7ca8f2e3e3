"""Runs what is missing from the file of results, one run at a time; each run is appended when it has ended.

    pip install -e ".[evidence]"
    python examples/evidence/run.py --list                                           # what is missing
    python examples/evidence/run.py --data-dir DIR                                   # everything, for days
    python examples/evidence/run.py --data-dir DIR --tasks digits --what stn 'guess-*' --seeds 0 1
    python examples/evidence/run.py --data-dir DIR --what random --trials 50
    python examples/evidence/run.py --data-dir DIR --epochs 1 --trials 2 --out /tmp/smoke.jsonl

CPU seconds are compared within a machine only: give each a label by `--machine`, and run `--what none` on each.

`--data-dir` holds `cifar10/{train,test}/<class>/*` and `wikitext2/{valid,test}.txt`; without `cifar10/train`,
torchvision downloads CIFAR-10. A run that is in the file is skipped, so that a command that was cut off goes on where
it stopped.
Start two processes on different tasks or seeds to use two cores; each trains on one thread.
"""

import argparse
import logging
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import results
import torch
from results import Key, Row
from tasks import TASKS, Folders
from training import Run, provenance
from trials import WHAT, Place, Waiting

OUT = Path(__file__).with_name("results.jsonl")


def planned(tasks: Sequence[str], what: Sequence[str], seeds: Sequence[int], trials: int) -> Iterator[Key]:
    """All runs that were asked for, seed by seed, so that an early end leaves whole comparisons."""
    for seed in seeds:
        for task in tasks:
            for name in what:
                for trial in range(trials if WHAT[name].searches else 1):
                    yield Key(task, name, seed, trial)


def train(key: Key, rows: dict[Key, Row], folders: Folders, epochs: int | None, machine: str) -> Row:
    """Train one run, and return its row.

    Raises:
        Waiting: the run needs a row that is not there yet.
    """
    run = Run(TASKS[key.task], key.seed, folders, epochs)
    fields = WHAT[key.what].train(Place(key, run, rows))
    return {**key._asdict(), **fields, "machine": machine, **provenance()}


def is_there(key: Key, rows: Sequence[Row], machine: str) -> bool:
    """Whether the file has this run; of the unit of cost, whether it has it from this machine."""
    own = [row for row in rows if results.key(row) == key]
    return any(key.what != results.UNIT or results.machine(row) == machine for row in own)


def run_missing(keys: Sequence[Key], out: Path, folders: Folders, epochs: int | None, machine: str) -> None:
    """Train every run that is not in the file, and append it."""
    for key in keys:
        rows = results.read(out)
        if is_there(key, results.lines(out), machine):
            continue
        label = f"{key.task} {key.what} seed {key.seed} trial {key.trial}"
        try:
            row = train(key, rows, folders, epochs, machine)
        except Waiting as missing:
            print(f"{label}: skipped, needs {missing}", flush=True)
            continue
        results.append(out, row)
        print(f"{label}: validation {row['best_val_loss']:.4f} in {row['cpu_seconds']:.0f} CPU s", flush=True)


def print_missing(keys: Sequence[Key], out: Path, machine: str) -> None:
    """Print how many runs of each task and entry are there and missing."""
    rows = results.lines(out)
    counts: dict[tuple[str, str], list[int]] = {}
    for key in keys:
        counts.setdefault((key.task, key.what), [0, 0])[not is_there(key, rows, machine)] += 1
    print(f"{'task':<16}{'what':<28}{'there':>7}{'missing':>9}")
    for (task, what), (there, missing) in counts.items():
        print(f"{task:<16}{what:<28}{there:>7}{missing:>9}")
    print(f"{sum(missing for _, missing in counts.values())} of {len(keys)} runs are missing from {out}")


def selected(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known names that match a name or shell pattern, in their order.

    Raises:
        SystemExit: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise SystemExit(f"Nothing is called {pattern!r}; there are {', '.join(known)}.")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["*"], help=f"names or shell patterns of {', '.join(TASKS)}")
    parser.add_argument("--what", nargs="+", default=["*"], help=f"names or shell patterns of {', '.join(WHAT)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--trials", type=int, default=20, help="of each search")
    parser.add_argument("--epochs", type=int, help="another length of every run, for a quick look; needs --out")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds cifar10/ and wikitext2/")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/evidence"), help="for what is computed once")
    parser.add_argument("--machine", default="", help="label, where runs come from more than one machine")
    parser.add_argument("--out", type=Path, default=OUT, help="file of results")
    parser.add_argument("--list", action="store_true", help="show what is missing, and run nothing")
    args = parser.parse_args(arguments)
    if args.epochs is not None and args.out == OUT:
        parser.error("--epochs needs another --out, so that no shortened run enters the results.")

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")  # tips on data workers, deprecations inside Lightning
    warnings.filterwarnings("ignore", "This run of .* ends before its first hyperparameter step")  # the controls do
    torch.set_num_threads(1)
    keys = list(planned(selected(args.tasks, list(TASKS)), selected(args.what, list(WHAT)), args.seeds, args.trials))
    if args.list:
        print_missing(keys, args.out, args.machine)
    else:
        run_missing(keys, args.out, Folders(args.data_dir, args.cache_dir), args.epochs, args.machine)


if __name__ == "__main__":
    main()
