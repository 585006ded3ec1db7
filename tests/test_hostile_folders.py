"""Results folders in which anything may be wrong: analysed without a traceback, whole cells as ever.

The long version, with 600 mutated folders: pytest tests/test_hostile_folders.py -m slow
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from results_fixture import make_results

import analyze_results
from comparison_tables import done_cells, metric_table, read_patterns, usable
from results_folder import Cell, read_results

MODELS = ("conventional", "gravitational", "multi_timescale")
WHOLE = Cell("listops", "conventional", 0)  # no mutation reaches it
ROOT_FILES = ("config.json", "environment.json")
CELL_FILES = ("status.json", "config.json", "metrics.jsonl", "result.json", "attention_patterns.npz")

STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.sampled_from([10**400, -1, 0, 2**63, 1e308, -1e308, 1e39, 5e-324, float("nan"), float("inf")]),
    st.text(max_size=8),
    st.sampled_from(["", "\ud800", "\x1b[2J", "../../x", "|<b>$\\", "9" * 50]),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry in a JSON value."""
    entries: Any = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    found = [path] if path else []
    for key, entry in entries:
        found += places(entry, (*path, key))
    return found


def put(value: Any, path: tuple[Any, ...], strange: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = strange


@st.composite
def value_mutations(draw: st.DrawFn) -> Callable[[Path], None]:
    """Another value, or none, somewhere in a file's JSON."""
    number, strange = draw(st.integers(0, 10**6)), draw(STRANGE)
    delete = draw(st.booleans()) and draw(st.booleans())

    def mutate(path: Path) -> None:
        if path.suffix == ".npz" or not path.is_file():
            return
        try:
            lines = (
                [json.loads(line) for line in path.read_text().splitlines()]
                if path.suffix == ".jsonl"
                else []
            )
            value = lines or json.loads(path.read_text())
        except ValueError:
            return  # mutated before
        found = places(value)
        if not found:
            return
        place = found[number % len(found)]
        put(value, place, strange)
        if delete and len(place) > 1:
            parent = value
            for key in place[:-1]:
                parent = parent[key]
            del parent[place[-1]]
        rows = value if path.suffix == ".jsonl" else [value]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return mutate


@st.composite
def byte_mutations(draw: st.DrawFn) -> Callable[[Path], None]:
    """A file that is deleted, emptied, truncated, overwritten, a folder, a link, a pipe."""
    kind = draw(
        st.sampled_from(
            ["delete", "empty", "cut", "flip", "junk", "deep", "schema", "folder", "link", "pipe"]
        )
    )
    share, junk = draw(st.floats(0, 1)), draw(st.binary(max_size=20))

    def mutate(path: Path) -> None:
        if not path.is_file():
            return
        content = bytearray(path.read_bytes())
        if kind == "flip" and content:
            content[min(int(share * len(content)), len(content) - 1)] ^= 1 << (len(junk) % 8)
            path.write_bytes(content)
        elif kind in ("empty", "cut"):
            path.write_bytes(content[: int(share * len(content)) if kind == "cut" else 0])
        elif kind == "junk":
            path.write_bytes(junk)
        elif kind == "deep":
            path.write_bytes(b'{"a":' * 20_000 + b"1" + b"}" * 20_000)
        elif kind == "schema":
            path.write_bytes(content.replace(b'"schema_version": 1', b'"schema_version": 2'))
        else:
            path.unlink()
            if kind == "folder":
                path.mkdir()
            elif kind == "link":
                path.symlink_to("/dev/zero")
            elif kind == "pipe":
                os.mkfifo(path)

    return mutate


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, Callable[[Path], None]]]:
    """Files, by their path in the folder, and what is to become of each."""
    cells = [f"listops/{model}/seed0/{name}" for model in MODELS[1:] for name in CELL_FILES]
    names = st.sampled_from([*cells, *cells, *ROOT_FILES])
    return draw(
        st.lists(
            st.tuples(names, st.one_of(value_mutations(), value_mutations(), byte_mutations())),
            min_size=1,
            max_size=4,
        )
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original") / "results"
    return make_results(root, tasks=("listops",), models=MODELS, seeds=(0,), epochs=3)


def whole_cell(root: Path) -> list[tuple[Any, ...]]:
    """What the comparison says of the cell that no mutation reaches."""
    results = usable(read_results(root))
    patterns, _ = read_patterns(results)
    table = metric_table(results, patterns)
    mine = table[(table["model"] == WHOLE.model) & (table["seed"] == WHOLE.seed)]
    return [tuple(row) for row in mine.itertuples(index=False)]


def snapshot(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }


def check_mutated(original: Path, changes: list[tuple[str, Callable[[Path], None]]]) -> None:
    """Analyse a mutated copy: one line or an analysis with the whole cell as it was and the others named."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "results"
        shutil.copytree(original, root)
        for file, mutate in changes:
            mutate(root / file)
        before = snapshot(Path(name))
        code = analyze_results.main([str(root)])
        after = snapshot(Path(name))
        assert {path: after.get(path, "gone") for path in before} == before
        assert all(path.startswith("results/analysis") for path in after.keys() - before.keys())
        if code == 2:  # the run's own config is no such any more
            assert any(file in ROOT_FILES for file, _ in changes)
            assert not (root / "analysis").exists()
            return
        assert code == 0
        results = usable(read_results(root))
        if WHOLE in [record.cell for record in results.cells]:
            assert whole_cell(root) == whole_cell(original)
        report = (root / "analysis" / "report.md").read_text(encoding="utf-8")
        done = {record.cell for record in done_cells(results)}
        for record in results.cells:
            assert record.cell in done or record.state in report


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Figures take a hundred times as long as all the rest, and are drawn from the same tables."""

    def draw(figures: Any) -> Iterator[Any]:
        return iter(())

    monkeypatch.setattr("task_figures.TaskFigures.draw", draw)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield


QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.mark.usefixtures("no_figures")
@settings(max_examples=25, derandomize=True, **QUIET)
@given(changes=mutations())
def test_a_mutated_folder_is_analysed_without_a_traceback_and_its_whole_cells_are_used(
    original: Path, changes: list[tuple[str, Callable[[Path], None]]]
) -> None:
    check_mutated(original, changes)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
@settings(max_examples=600, **QUIET)
@given(changes=mutations())
def test_600_mutated_folders_are_analysed_without_a_traceback(
    original: Path, changes: list[tuple[str, Callable[[Path], None]]]
) -> None:
    check_mutated(original, changes)


@pytest.mark.slow
@settings(max_examples=25, **QUIET)
@given(changes=mutations())
def test_25_mutated_folders_are_analysed_with_their_figures(
    original: Path, changes: list[tuple[str, Callable[[Path], None]]]
) -> None:
    check_mutated(original, changes)
