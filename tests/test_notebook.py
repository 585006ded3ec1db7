"""The notebooks run from top to bottom, show what they say, and are kept with the outputs of such a run."""

import copy
import re
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

import attention_kernels

REPOSITORY = Path(attention_kernels.__file__).parent
MECHANISMS, TEXTS = "attention_in_a_notebook", "text_of_byte_models"


def committed(name: str) -> nbformat.NotebookNode:
    notebook: nbformat.NotebookNode = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)
    return notebook


def shown(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """The kinds of output of each code cell."""
    return [
        [output.get("name") or ", ".join(sorted(output.get("data", ["error"]))) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def run_again(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """In a copy, so that nothing is written beside the sources."""
    (folder / "notebooks").mkdir()
    for source in REPOSITORY.glob("*.py"):
        shutil.copy(source, folder)
    for package in ("attention_engine", "experiment", "reporting", "tasks", "training"):
        shutil.copytree(REPOSITORY / package, folder / package)
    fresh = copy.deepcopy(notebook)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    place = {"metadata": {"path": str(folder / "notebooks")}}
    client = nbclient.NotebookClient(
        fresh, timeout=600, kernel_name="python3", coalesce_streams=True, resources=place
    )
    client.execute()
    assert shown(fresh) == shown(notebook)
    return fresh


@pytest.mark.filterwarnings("ignore")  # what Jupyter itself warns of is not ours to mend
def test_the_notebook_runs_and_shows_what_is_committed(tmp_path: Path) -> None:
    notebook = committed(MECHANISMS)
    for one in (run_again(notebook, tmp_path), notebook):
        check_claims(printed(one))


@pytest.mark.slow  # five minutes
@pytest.mark.filterwarnings("ignore")
def test_byte_models_write_what_is_committed(
    real_reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTENTION_IMDB_DIR", str(real_reviews))
    check_bits(printed(run_again(committed(TEXTS), tmp_path)))


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


def check_bits(text: str) -> None:
    """What is said of bits per byte, at 128 and at 2,048 bytes, and that each model wrote two texts."""
    bits = {
        name: [*map(float, re.findall(r": '([\d.]+)'", line))]
        for name, line in re.findall(r"^(\w+): bits per byte by length: (.*)$", text, re.MULTILINE)
    }
    short, _, long = bits.pop("conventional")
    assert 2.6 < short < 3 < 4 < long and len(re.findall(r"^[01]: .This movie is ", text, re.MULTILINE)) == 10
    del bits["gravitational"]
    assert len(bits) == 3
    for of_timescales in bits.values():
        assert 0.1 < short - of_timescales[0] < 0.3 and 0.4 < long - of_timescales[2] < 1.3


def test_the_committed_texts_have_the_bits_that_are_said() -> None:
    check_bits(printed(committed(TEXTS)))


@pytest.mark.parametrize(("name", "pictures"), [(MECHANISMS, 6), (TEXTS, 0)])
def test_the_committed_outputs_are_whole_small_and_without_errors(name: str, pictures: int) -> None:
    notebook = committed(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [kind for outputs in shown(notebook) for kind in outputs]
    assert "error" not in kinds and "stderr" not in kinds
    assert sum("image/png" in kind for kind in kinds) == pictures
    assert len(nbformat.writes(notebook)) < 500_000
