"""The notebook runs from top to bottom, and is kept with the outputs of such a run."""

import copy
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

import attention_kernels

REPOSITORY = Path(attention_kernels.__file__).parent
NOTEBOOK = REPOSITORY / "notebooks" / "attention_in_a_notebook.ipynb"


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    notebook: nbformat.NotebookNode = nbformat.read(NOTEBOOK, as_version=4)
    return notebook


def shown(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """The kinds of output of each code cell."""
    return [
        [output.get("name") or ", ".join(sorted(output.get("data", ["error"]))) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.filterwarnings("ignore")  # what Jupyter itself warns of is not ours to mend
def test_the_notebook_runs_and_shows_what_is_committed(
    committed: nbformat.NotebookNode, tmp_path: Path
) -> None:
    """In a copy, so that nothing is written beside the sources."""
    (tmp_path / "notebooks").mkdir()
    for source in REPOSITORY.glob("*.py"):
        shutil.copy(source, tmp_path)
    shutil.copytree(REPOSITORY / "attention_engine", tmp_path / "attention_engine")
    fresh = copy.deepcopy(committed)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    place = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(
        fresh, timeout=120, kernel_name="python3", coalesce_streams=True, resources=place
    ).execute()
    assert shown(fresh) == shown(committed)


def test_the_committed_outputs_are_whole_small_and_without_errors(committed: nbformat.NotebookNode) -> None:
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [kind for outputs in shown(committed) for kind in outputs]
    assert "error" not in kinds and "stderr" not in kinds and sum("image/png" in kind for kind in kinds) == 2
    assert NOTEBOOK.stat().st_size < 500_000
