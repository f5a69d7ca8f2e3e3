"""The quick start is code that runs."""

import re
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore:This run of .* training batches ends before its first hyperparameter step")
@pytest.mark.filterwarnings("ignore:.*GPU available but not used")
def test_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parents[1] / "README.md"
    code = re.search(r"## Quick start\n\n```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert code is not None
    shortened = code[1].replace("max_epochs=50", "max_epochs=6, enable_progress_bar=False")
    assert shortened != code[1]
    names: dict[str, object] = {}
    exec(shortened, names)
    (schedule,) = tmp_path.rglob("schedule.csv")
    assert len(schedule.read_text().splitlines()) == 8
