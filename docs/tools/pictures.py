"""Makes the pictures in `docs/pictures` from one run of the quick start of `docs/index.md`, and prints its report.

python docs/tools/pictures.py        # about a minute
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

DOCS = Path(__file__).parents[1]
DPI = 80


def quick_start() -> dict[str, Any]:
    """The names that the quick start leaves behind; its files go to a temporary folder."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", (DOCS / "index.md").read_text(), re.DOTALL | re.MULTILINE))
    names: dict[str, Any] = {"__name__": "quickstart"}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(compile(code, "index.md", "exec"), names)
        finally:
            os.chdir(before)
    return names


def main() -> None:
    """Train, ask the trained module, and save a picture of each answer."""
    names = quick_start()
    from lightning_stn.analysis import importance, response_fit, sweep_pair

    module, valid = names["trainer"].lightning_module, names["trainer"].val_dataloaders
    train = names["trainer"].train_dataloader
    answers = {
        "sweep": module.sweep(valid),
        "sweep_pair": sweep_pair(module, valid, ("dropout_2", "noise")),
        "importance": importance(module, valid),
        "response_fit": response_fit(module, train, valid),
    }
    figures = {"quickstart": names["stn"].schedule.plot()[0]} | {name: one.plot()[0] for name, one in answers.items()}
    for name, figure in figures.items():
        figure.savefig(DOCS / "pictures" / f"{name}.png", dpi=DPI)
    print(answers["importance"])


if __name__ == "__main__":
    main()
