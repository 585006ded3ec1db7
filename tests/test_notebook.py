"""The notebook runs from top to bottom, shows what it says, and is kept with the outputs of such a run."""

import copy
import re
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
    for package in ("attention_engine", "experiment", "reporting", "tasks", "training"):
        shutil.copytree(REPOSITORY / package, tmp_path / package)
    fresh = copy.deepcopy(committed)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    place = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(
        fresh, timeout=300, kernel_name="python3", coalesce_streams=True, resources=place
    ).execute()
    assert shown(fresh) == shown(committed)
    for notebook in (fresh, committed):
        check_claims(printed(notebook))


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    return "".join(output.text for output in outputs if output.output_type == "stream")


def check_claims(text: str) -> None:
    """What the notebook's sentences say of each mechanism: right answers in %, at most and at least."""
    hold = {
        name: [int(share) for share in re.findall(r"(\d+)%", line)]
        for name, line in re.findall(r"^(\w+): right answers by length: (.*)$", text, re.MULTILINE)
    }  # at 64, 256 and 1,024 tokens
    assert hold["conventional"][0] < 70
    assert hold["multi_timescale"][0] > 85 and hold["multi_timescale"][1] < 75
    assert hold["adaptive"][0] > 95 and hold["adaptive"][1] > 85
    assert hold["gravitational_multi_timescale"][0] > 80
    flagged, plain = map(float, re.findall(r"mean token = 1: ([\d.]+)", text))
    assert flagged > 4 * plain
    recall = dict(re.findall(r"^(\w+): (\d+)% right; by guessing", text, re.MULTILINE))
    assert int(recall["conventional"]) > 95 and int(recall["gravitational"]) < 60


def test_the_committed_outputs_are_whole_small_and_without_errors(committed: nbformat.NotebookNode) -> None:
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [kind for outputs in shown(committed) for kind in outputs]
    assert "error" not in kinds and "stderr" not in kinds and sum("image/png" in kind for kind in kinds) == 6
    assert NOTEBOOK.stat().st_size < 500_000
