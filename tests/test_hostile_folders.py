"""Results folders in which anything may be wrong: analysed without a traceback, whole cells as ever.

The long version, with 600 mutated folders: pytest tests/test_hostile_folders.py -m slow
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from results_fixture import make_results, without_figures

import analyze_results
from reporting.comparison_tables import metric_table
from reporting.run_results import done_cells, read_patterns, usable
from results_folder import Cell, read_results

MODELS = ("conventional", "gravitational", "multi_timescale")
WHOLE = Cell("listops", "conventional", 0)  # no mutation reaches it
ROOT_FILES = ("config.json", "environment.json")
CELL_FILES = (
    "status.json",
    "config.json",
    "metrics.jsonl",
    "result.json",
    "attention_patterns.npz",
    "test_predictions.npz",
)

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


@dataclass(frozen=True)
class Mutation:
    """What is to become of a file: another value somewhere in its JSON, one value less, other bytes, no file.

    number, share: where in it. strange: the value, also the bytes of "junk"."""

    kind: str
    number: int
    share: float
    strange: Any

    def apply(self, path: Path) -> None:
        if path.is_symlink() or not path.is_file():
            return  # mutated before
        if self.kind in ("value", "remove"):
            self.change_json(path)
        else:
            self.change_bytes(path)

    def change_json(self, path: Path) -> None:
        try:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            rows = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return
        found = places(rows)
        if not found:
            return
        *parents, key = found[self.number % len(found)]
        parent: Any = rows
        for step in parents:
            parent = parent[step]
        if self.kind == "value":
            parent[key] = self.strange
        else:
            del parent[key]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def change_bytes(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        path.unlink()
        if self.kind == "folder":
            path.mkdir()
        elif self.kind == "link":
            path.symlink_to("/dev/zero")
        elif self.kind == "pipe":
            os.mkfifo(path)
        elif self.kind == "flip" and content:
            content[min(int(self.share * len(content)), len(content) - 1)] ^= 1 << (self.number % 8)
            path.write_bytes(content)
        elif self.kind == "cut":
            path.write_bytes(content[: int(self.share * len(content))])
        elif self.kind == "schema":
            path.write_bytes(content.replace(b'"schema_version": 1', b'"schema_version": 2'))
        elif self.kind in OTHER_CONTENTS:
            path.write_bytes(OTHER_CONTENTS[self.kind])


OTHER_CONTENTS = {
    "empty": b"",
    "deep": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "not UTF-8": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "NUL": bytes(100),
}
BYTES = ("delete", "flip", "cut", "schema", "folder", "link", "pipe", *OTHER_CONTENTS)
CELLS = [f"listops/{model}/seed0/{name}" for model in MODELS[1:] for name in CELL_FILES]
MUTATIONS = st.builds(
    Mutation,
    kind=st.one_of(st.just("value"), st.sampled_from(["value", "remove", *BYTES])),
    number=st.integers(0, 10**6),
    share=st.floats(0, 1),
    strange=STRANGE,
)
Changes = list[tuple[str, Mutation]]
CHANGES = st.lists(
    st.tuples(st.sampled_from([*CELLS, *CELLS, *ROOT_FILES]), MUTATIONS), min_size=1, max_size=4
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


def check_mutated(original: Path, changes: Changes) -> None:
    """Analyse a mutated copy: one line or an analysis with the whole cell as it was and the others named."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "results"
        shutil.copytree(original, root)
        for file, mutation in changes:
            mutation.apply(root / file)
        before = snapshot(Path(name))
        code = analyze_results.main([str(root)])
        after = snapshot(Path(name))
        assert {path: after.get(path, "gone") for path in before} == before
        assert all(path.startswith("results/analysis") for path in after.keys() - before.keys())
        if code == 2:  # the run's own config is no such any more
            assert any(file == "config.json" for file, _ in changes)
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
    without_figures(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield


QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.mark.usefixtures("no_figures")
@settings(max_examples=25, derandomize=True, **QUIET)
@given(changes=CHANGES)
def test_a_mutated_folder_is_analysed_without_a_traceback_and_its_whole_cells_are_used(
    original: Path, changes: Changes
) -> None:
    check_mutated(original, changes)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
@settings(max_examples=600, phases=[Phase.generate], **QUIET)
@given(changes=CHANGES)
def test_600_mutated_folders_are_analysed_without_a_traceback(original: Path, changes: Changes) -> None:
    check_mutated(original, changes)


@pytest.mark.slow
@settings(max_examples=25, phases=[Phase.generate], **QUIET)
@given(changes=CHANGES)
def test_25_mutated_folders_are_analysed_with_their_figures(original: Path, changes: Changes) -> None:
    check_mutated(original, changes)
