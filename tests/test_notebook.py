"""`examples/quickstart.ipynb` runs, begins with the README's quick start, and is stored with clean outputs."""

import ast
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode
from pages import ROOT, blocks, check_shell

from lightning_stn import Schedule

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
SHORT = {
    "max_epochs=80": "max_epochs=6, enable_progress_bar=False, accelerator='cpu'",
    "STNCallback()": "STNCallback(lr=0.1)",
}
"""For six epochs: one beyond the warm-up."""


def read() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code(notebook: NotebookNode) -> str:
    return "\n".join(cell.source for cell in code_cells(notebook))


def texts(notebook: NotebookNode) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    return (output for cell in code_cells(notebook) for output in cell.outputs)


def printed(cell: NotebookNode) -> str:
    """What a cell has printed; a kernel may send it in several parts."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def shown(notebook: NotebookNode, kind: str) -> list[str]:
    """The outputs of a MIME type."""
    return [output.data[kind] for output in outputs(notebook) if kind in output.get("data", {})]


def tables(notebook: NotebookNode) -> list[str]:
    """The tables of this package; Lightning's summary of a module may be HTML as well."""
    found = shown(notebook, "text/html") + shown(notebook, "text/markdown")
    return [table for table in found if "hyperparameter" in table and "Params" not in table]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def executed(folder: Path) -> NotebookNode:
    """The notebook after a short run, by a kernel of this interpreter, whichever others are registered."""
    notebook = read()
    for text, short in SHORT.items():
        assert code(notebook).count(text) == 1
        for cell in code_cells(notebook):
            cell.source = cell.source.replace(text, short)
    write_kernel_spec(folder / "jupyter" / "kernels" / "python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))  # without a user's start-up files
        patch.delenv("MPLBACKEND", raising=False)  # the kernel's own draws into the notebook
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return notebook


def test_notebook_begins_with_the_quick_start_of_the_readme() -> None:
    quick_start = ast.parse(blocks(ROOT / "README.md", "python")[0].code).body
    cells = ast.parse(code(read())).body
    assert [ast.dump(one) for one in cells[: len(quick_start)]] == [ast.dump(one) for one in quick_start]


def test_every_code_cell_has_a_sentence_before_it() -> None:
    kinds = [cell.cell_type for cell in read().cells]
    assert all(before == "markdown" for before, kind in pairwise(kinds) if kind == "code")


def test_run_of_the_notebook_tunes_and_draws_its_schedule(executed: NotebookNode, folder: Path) -> None:
    schedule = Schedule.load(folder / "lightning_logs/version_0/schedule.json")
    first, last = schedule.rows[0].values, schedule.rows[-1].values
    assert set(first) == {"noise", "dropout_2", "dropout_5"}
    assert all(first[name] != last[name] for name in first)
    assert (folder / "schedule.png").stat().st_size > 10_000


def test_run_of_the_notebook_shows_tables_pictures_and_the_plain_network(executed: NotebookNode) -> None:
    assert len(shown(executed, "image/png")) == 2
    first, second, ranking = tables(executed)
    assert first.startswith("<table><caption>HyperparameterSet")
    assert second.startswith("<table><caption>Schedule")
    assert all(name in table for table in (first, second, ranking) for name in ("noise", "dropout_2", "dropout_5"))
    assert "(0): Linear(in_features=10, out_features=128, bias=True)" in shown(executed, "text/plain")[-1]
    assert 0 < float(printed(code_cells(executed)[-1])) < 2


def test_run_of_the_notebook_gives_no_warning_of_this_package(executed: NotebookNode) -> None:
    messages = "".join(output.text for output in outputs(executed) if output.get("name") == "stderr")
    assert "lightning_stn" not in messages
    assert not re.search("Warning: .*hyperparameter", messages)


def test_stored_outputs_are_those_of_a_run_without_its_surroundings(executed: NotebookNode) -> None:
    """Nothing of the machine, of a progress bar or of Lightning's messages; `docs/tools/notebook.py` stores them."""
    stored = read()
    nbformat.validate(stored)
    assert NOTEBOOK.stat().st_size < 300_000
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    assert [cell.execution_count for cell in code_cells(stored)] == list(range(1, 1 + len(code_cells(stored))))
    assert len(tables(stored)) == len(tables(executed))
    assert len(shown(stored, "image/png")) == len(shown(executed, "image/png"))
    assert {output.get("name", "stdout") for output in outputs(stored)} == {"stdout"}
    text = json.dumps([output for output in outputs(stored) if "image/png" not in output.get("data", {})])
    assert "Tuned 3 hyperparameters over 1600 training batches" in text
    assert not re.search(r"Warning|\\r|\\u001b|\\u2501|[\" ]/\w|[A-Z]:\\\\|it/s", text)


def test_command_and_links_of_the_notebook_name_files_that_exist() -> None:
    for command in re.findall(r"^```sh\n(.*?)^```$", texts(read()), re.DOTALL | re.MULTILINE):
        check_shell(command)
    links = re.findall(r"\]\(https://github.com/lightning-stn/lightning-stn/blob/main/([^)]+)\)", texts(read()))
    assert len(links) > 5
    assert all((ROOT / path).exists() for path in links)
