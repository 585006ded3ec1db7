"""Nothing that is read is executed, no link is followed out, nothing is written where it should not be."""

import ast
import gzip
import io
import itertools
import os
import tarfile
from pathlib import Path

import pytest
from results_fixture import make_results, write
from run_cases import Refused

from command_line import InputError
from evaluate_performance import main as evaluate_main
from results_folder import LARGEST_JSON, Cell, read_cell, read_json, read_results
from tasks import archives, imdb
from tasks.imdb import read_source

REPOSITORY = Path(imdb.__file__).parent.parent
PROGRAMS = sorted(
    [*REPOSITORY.glob("*.py"), *(path for path in REPOSITORY.glob("*/*.py") if path.parent.name != "tests")]
)
# What must stand at each call of a function by that name, however it was imported.
REQUIRED = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
FORBIDDEN = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load", "torch.package.PackageImporter"),
    *("marshal.load", "marshal.loads", "shelve.open", "joblib.load", "pandas.read_pickle"),
    *("eval", "exec", "os.system", "shutil.unpack_archive", "yaml.load"),
}
FORBIDDEN_METHODS = {"extractall", "extract"}


def names_of(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `np` for numpy, `load` for torch.load."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found |= {entry.asname or entry.name: module + entry.name for entry in node.names}
    return found


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def faults(source: str) -> list[str]:
    """The calls of a program that could execute what they read, or write where an archive says."""
    tree = ast.parse(source)
    names, found = names_of(tree), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func, names)
        if name in FORBIDDEN or name.rpartition(".")[2] in FORBIDDEN_METHODS:
            found.append(f"line {node.lineno}: {name}")
        if name in REQUIRED:
            keyword, value = REQUIRED[name]
            given = {entry.arg: entry.value for entry in node.keywords}.get(keyword)
            if not isinstance(given, ast.Constant) or given.value is not value:
                found.append(f"line {node.lineno}: {name} without {keyword}={value}")
    return found


def test_every_load_in_the_programs_refuses_pickles_and_no_archive_is_extracted() -> None:
    assert len(PROGRAMS) > 40
    found = {path.name: faults(path.read_text(encoding="utf-8")) for path in PROGRAMS}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        *("import torch\ntorch.load('x')", "import torch as t\nt.load('x', weights_only=False)"),
        *("from torch import load\nload('x')", "import numpy\nnumpy.load('x', allow_pickle=maybe)"),
        "from numpy import load as read\nread('x', allow_pickle=True)",
        *("import pickle\npickle.loads(b'')", "import tarfile\ntarfile.open('x').extractall()", "eval('1')"),
    ],
)
def test_the_walk_finds_what_it_looks_for(source: str) -> None:
    assert len(faults(source)) == 1


CELL = Cell("listops", "gravitational", 0)
FILES = ("status.json", "config.json", "metrics.jsonl", "result.json")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Of two models, with one cell each."""
    return make_results(tmp_path / "results", models=("conventional", CELL.model), seeds=(0,), epochs=1)


@pytest.mark.parametrize(
    ("name", "target"), [(".", "outside"), *itertools.product(FILES, ("outside", "absent", "/dev/zero"))]
)
def test_a_link_out_of_the_folder_is_not_read(name: str, target: str, results: Path, tmp_path: Path) -> None:
    path = CELL.folder(results) / name
    if target == "outside":
        path.rename(tmp_path / target)
    else:
        path.unlink()
    path.symlink_to(tmp_path / target)
    whole, broken = read_results(results).cells
    assert (broken.state, broken.damaged, broken.result, whole.state) == ("failed", True, None, "done")
    assert "a link that leads out of the folder" in broken.reason


def test_a_link_within_the_folder_is_followed_and_a_run_config_that_is_one_out_of_it_refused(
    results: Path, tmp_path: Path
) -> None:
    path = CELL.folder(results) / "result.json"
    path.symlink_to(path.rename(results / "elsewhere.json"))
    assert read_results(results).cells[1].state == "done"
    (results / "config.json").symlink_to((results / "config.json").rename(tmp_path / "config.json"))
    with pytest.raises(InputError, match="leads out of the folder"):
        read_results(results)


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_a_folder_or_a_file_of_an_unlikely_size_keeps_nobody_waiting(name: str, results: Path) -> None:
    path = CELL.folder(results) / name
    path.unlink()
    os.mkfifo(path)
    assert "not a file" in read_cell(results, CELL).reason
    path.unlink()
    path.mkdir()
    assert read_cell(results, CELL).state == "failed"
    path.rmdir()
    path.touch()
    os.truncate(path, LARGEST_JSON + 1)  # a hole: no such space is taken
    assert "bytes, more than any of ours has" in read_cell(results, CELL).reason


@pytest.mark.parametrize("text", ["1" * 30, "1e300", "-1e41", "1e999", "NaN", '"\\ud800"', "[" * 10_000])
def test_values_that_no_run_writes_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_json(path)


def test_a_reason_is_one_line_without_terminal_commands(results: Path) -> None:
    status = {"state": "failed", "reason": "a\x1b[2J\nb\t\x07" + "c" * 5000}
    write(CELL.folder(results) / "status.json", status)
    reason = read_cell(results, CELL).reason
    assert reason.startswith("a [2J b c") and reason.isprintable() and len(reason) <= 1000


def test_an_analysis_that_is_a_link_is_refused(results: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "outside").mkdir()
    (results / "analysis").symlink_to(tmp_path / "outside")
    assert "is a link" in refused(evaluate_main, CELL.folder(results))
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "value", "members", "size", "why"),
    [
        ("LARGEST_UNPACKED", 2**22, 1, 2**26, "unpacks to more than"),
        ("MOST_MEMBERS", 50, 60, 0, "more than 50 members"),
    ],
)
def test_an_archive_that_unpacks_to_far_too_much_is_given_up(
    limit: str, value: int, members: int, size: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, limit, value)
    path = tmp_path / "aclImdb_v1.tar.gz"
    with gzip.open(path, "wb") as file, tarfile.open(fileobj=file, mode="w|") as archive:
        for number in range(members):
            info = tarfile.TarInfo(f"aclImdb/train/unsup/{number}_0.txt")
            info.size = size
            archive.addfile(info, io.BytesIO(bytes(size)))
    assert path.stat().st_size < 2**17
    with pytest.raises(InputError, match=why):
        read_source(path, None)
