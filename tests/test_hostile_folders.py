"""Results folders in which anything may be wrong: analysed without a traceback, whole cells as ever.

The long version, with 600 mutated folders: pytest tests/test_hostile_folders.py -m slow
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from results_fixture import make_results, report_of, snapshot

import analyze_results
from reporting.comparison_tables import metric_table
from reporting.run_results import done_cells, read_patterns, usable
from results_folder import Cell, read_results

MODELS = ("conventional", "gravitational", "multi_timescale")
WHOLE = Cell("listops", "conventional", 0)  # no mutation reaches it
NAMES = ("status.json", "config.json", "metrics.jsonl", "result.json", "attention_patterns.npz")
FILES = [f"listops/{model}/seed0/{name}" for model in MODELS[1:] for name in NAMES]
STRANGE = st.one_of(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.text(max_size=8),
    st.sampled_from([10**400, -1, 2**63, 1e308, 1e39, 5e-324, float("nan"), float("inf")]),
    st.sampled_from(["", "\ud800", "\x1b[2J", "../../x", "|<b>$\\", "9" * 50]),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)
# What becomes of a file's bytes, by a number that says where.
BYTES: dict[str, Callable[[bytes, int], bytes]] = {
    "flip": lambda old, at: bytes(b ^ (1 << at % 8 if i == at % len(old) else 0) for i, b in enumerate(old)),
    "cut": lambda old, at: old[: at % (len(old) + 1)],
    "schema": lambda old, _: old.replace(b'"schema_version": 1', b'"schema_version": 2'),
    "deep": lambda *_: b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "not UTF-8": lambda *_: b"\xff\xfe\x00",
    "a list": lambda *_: b"[1, 2]",
    "NUL": lambda *_: bytes(100),
}
# What stands in its place.
PLACES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("/dev/zero"),
    "pipe": lambda path: os.mkfifo(path),
}
KINDS = st.sampled_from(["value"] * 10 + ["remove"] * 2 + [*BYTES, *PLACES])
ANY_FILE = st.sampled_from([*FILES, *FILES, "config.json", "environment.json"])
CHANGE = st.tuples(ANY_FILE, KINDS, st.integers(0, 10**6), STRANGE)
CHANGES = st.lists(CHANGE, min_size=1, max_size=4, unique_by=lambda change: change[0])
Changes = list[tuple[str, str, int, Any]]


def change(path: Path, kind: str, at: int, strange: Any) -> None:
    """Mutate a file: other bytes, something else in its place, or a value of its JSON changed or removed."""
    if kind in BYTES:
        path.write_bytes(BYTES[kind](path.read_bytes(), at))
    elif kind in PLACES:
        path.unlink()
        PLACES[kind](path)
    elif path.suffix != ".npz":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        parent, key = (found := entries(rows))[at % len(found)]
        if kind == "value":
            parent[key] = strange
        else:
            del parent[key]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def entries(value: Any) -> list[tuple[Any, Any]]:
    """Every entry in a JSON value, as (what it is in, its key there)."""
    keys: Any = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [found for key in keys for found in entries(value[key])]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_results(tmp_path_factory.mktemp("original"), models=MODELS, seeds=(0,), epochs=2)


def whole_cell(root: Path) -> list[list[Any]]:
    """What the comparison says of the cell that no mutation reaches."""
    results = usable(read_results(root))
    table = metric_table(results, read_patterns(results)[0])
    return table[table["model"] == WHOLE.model].to_numpy().tolist()


def check_mutated(original: Path, changes: Changes) -> None:
    """Analyse a mutated copy: one line or an analysis with the whole cell as it was and the others named."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "results"
        shutil.copytree(original, root)
        for file, *mutation in changes:
            change(root / file, *mutation)
        before = snapshot(Path(name))
        code = analyze_results.main([str(root)])
        after = snapshot(Path(name))
        assert {path: after.get(path, "gone") for path in before} == before
        assert all(path.startswith("results/analysis") for path in after.keys() - before.keys())
        if code == 2:  # the run's own config is no such any more
            assert "config.json" in [file for file, *_ in changes] and not (root / "analysis").exists()
            return
        assert code == 0
        results = usable(read_results(root))
        if WHOLE in [record.cell for record in results.cells]:
            assert whole_cell(root) == whole_cell(original)
        report = report_of(root)
        done = {record.cell for record in done_cells(results)}
        assert all(record.cell in done or record.state in report for record in results.cells)


@pytest.mark.usefixtures("texts_alone")
@pytest.mark.parametrize("examples", [8, pytest.param(600, marks=pytest.mark.slow)])
def test_a_mutated_folder_is_analysed_and_its_whole_cells_used(
    examples: int, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    quiet: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
    chosen = settings(max_examples=examples, derandomize=examples < 600, **quiet)
    chosen(given(changes=CHANGES)(lambda changes: check_mutated(original, changes)))()
