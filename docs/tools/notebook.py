"""Runs `examples/quickstart.ipynb`, and stores its outputs in it: tables, pictures, texts and the report of the run.

python docs/tools/notebook.py        # about a minute
"""

import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_output

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},  # without the version that ran it
}


def report(outputs: list[NotebookNode], folder: str) -> NotebookNode:
    """The report of a run, without progress bar, messages of Lightning, and the folder of the run."""
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    found = re.search(r"^Tuned .*?^Schedule: .*?$", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return new_output("stream", name="stdout", text=found[0].replace(f"{folder}/", "") + "\n")


def main() -> None:
    """Run all cells in a temporary folder, and write the notebook."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": folder}})
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if "trainer.fit(" in cell.source:
            cell.outputs = [report(cell.outputs, str(Path(folder).resolve()))]
        else:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = METADATA
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
