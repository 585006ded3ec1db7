"""No file of a results folder is half-written, no two runs share one, and whatever lies in it is read."""

import itertools
import math
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest
from results_fixture import write

from command_line import InputError
from results_folder import (
    STATES,
    Cell,
    create_results_folder,
    file_name,
    read_cell,
    read_json,
    read_results,
    write_atomic,
    write_json,
    write_json_lines,
    write_status,
    write_text,
)

CELL = Cell("listops", "gravitational", 3)
NO_JSON = (b'{"state": "do', b"[1]", b"null", b"\xff\xfe", b'{"state": "done", "epoch": NaN}', b"[" * 10**5)
NO_STATE = ('"finished"', '"missing"', '""', "null", "3", '["done"]', '{"done": 1}')
NO_ROW = b'{"loss": 1}', b'{"epoch": "1"}', b"[]", b"7", b'{"epoch": 1, "loss": NaN}', b'{"epoch": 2}\n' * 2
FIRST: dict[str, Any] = {"epoch": 1, "val_accuracy": 0.5}
SECOND: dict[str, Any] = {"epoch": 2, "val_accuracy": None}


def make_cell(root: Path, cell: Cell = CELL, state: str = "done", reason: str = "") -> Path:
    """A cell's folder with every file that a reader looks at."""
    folder = cell.folder(root)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"task": cell.task})
    write_json_lines(folder / "metrics.jsonl", iter([FIRST, SECOND]))
    write_json(folder / "result.json", {"best_epoch": 1})
    write_status(folder, state, reason)
    return folder


def test_a_writer_that_fails_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half of the ne")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomic(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_durable_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        order.append((kind, (tmp_path / "result.json").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "result.json", "text")
    assert order == [("file", False), ("folder", True)]


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_files_can_be_read_by_whom_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    write_text(tmp_path / "shared", "text")
    os.umask(before)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_is_refused_and_the_old_content_stays(tmp_path: Path, value: float) -> None:
    path = tmp_path / "result.json"
    write_json(path, FIRST)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": [value]})
    with pytest.raises(ValueError, match="JSON"):
        write_json_lines(path, [FIRST, {"epoch": 2, "loss": value}])
    assert read_json(path) == FIRST
    assert list(tmp_path.iterdir()) == [path]


def test_starts_side_by_side_in_one_second_have_own_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "results_20260102_030405")
    parent = tmp_path / "deep" / "er"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(create_results_folder, [parent] * 40))
    names = ["results_20260102_030405", *(f"results_20260102_030405_{number}" for number in range(2, 41))]
    assert sorted(made) == sorted(parent.iterdir()) == sorted(parent / name for name in names)


def test_a_parent_that_is_a_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(InputError, match=r"cannot write to .*; choose another --output-dir"):
            create_results_folder(parent)


def test_cells_lie_under_task_model_and_seed(tmp_path: Path) -> None:
    assert CELL.folder(tmp_path) == tmp_path / "listops" / "gravitational" / "seed3"
    assert str(CELL) == "listops/gravitational/seed3"
    assert file_name("package.module:Class") == "package.module_Class"
    hostile = Cell("../..", "a/b\\c", 0).folder(tmp_path)
    assert hostile.parent.parent.parent == tmp_path
    assert file_name("..") not in ("..", ".", "")


@pytest.mark.parametrize("state", STATES)
def test_a_cell_is_read_as_written_and_has_a_result_where_it_is_done(tmp_path: Path, state: str) -> None:
    folder = make_cell(tmp_path, state=state, reason="why")
    record = read_cell(tmp_path, CELL)
    assert (record.cell, record.folder, record.state, record.reason) == (CELL, folder, state, "why")
    assert (record.config, record.metrics) == ({"task": "listops"}, [FIRST, SECOND])
    assert record.result == ({"best_epoch": 1} if state == "done" else None)
    assert time.strptime(read_json(folder / "status.json")["time"], "%Y-%m-%dT%H:%M:%S%z")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *itertools.product(("status.json", "config.json", "metrics.jsonl", "result.json"), NO_JSON),
        *[("metrics.jsonl", row) for row in NO_ROW],
        *[("status.json", f'{{"state": {state}}}'.encode()) for state in NO_STATE],
        *[("config.json", b""), ("config.json", None), ("result.json", None)],
    ],
    ids=itertools.count(1),
)
def test_an_unreadable_file_fails_its_cell(tmp_path: Path, file: str, content: bytes | None) -> None:
    path = make_cell(tmp_path) / file
    path.write_bytes(content) if content is not None else path.unlink()
    record = read_cell(tmp_path, CELL)
    assert (record.state, record.damaged, record.result) == ("failed", True, None)
    assert record.reason.startswith("unreadable: ") and file in record.reason


def test_a_cell_without_a_status_is_missing_and_one_without_an_epoch_has_no_metrics(tmp_path: Path) -> None:
    folder = make_cell(tmp_path)
    for write_or_remove in ((folder / "metrics.jsonl").unlink, (folder / "metrics.jsonl").touch):
        write_or_remove()
        assert read_cell(tmp_path, CELL).metrics == []
    (folder / "status.json").unlink()
    record = read_cell(tmp_path, CELL)
    assert (record.state, record.result) == ("missing", None) and "never started" in record.reason


def test_results_are_read_in_the_order_of_the_plan_with_what_is_missing(tmp_path: Path) -> None:
    other, never = Cell("imdb", "conventional", 0), Cell("imdb", "package.module:Class", 1)
    too_long = Cell("t" * 300, "m", 0)  # for a folder's name
    planned = [CELL, never, other, too_long]
    write(tmp_path / "config.json", {"schema_version": 1, "cells": [cell.named() for cell in planned]})
    write(tmp_path / "environment.json", {"python": "3.11"})
    make_cell(tmp_path)
    (make_cell(tmp_path, other) / "result.json").write_text("{")
    results = read_results(tmp_path)
    assert (results.root, results.environment) == (tmp_path, {"python": "3.11"})
    assert [record.cell for record in results.cells] == planned
    assert [record.state for record in results.cells] == ["done", "missing", "failed", "failed"]
    (tmp_path / "environment.json").unlink()
    assert read_results(tmp_path).environment == {}


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"cells": 3}', '{"cells": {"a": 1}}', '{"cells": [1]}'),
        '{"cells": [{"task": "a", "model": "b"}]}',
        *(
            f'{{"cells": [{{"task": "a", "model": "b", "seed": {x}}}]}}'
            for x in ('"x"', "null", "1e999", "NaN")
        ),
    ],
)
def test_what_is_no_results_folder_is_an_input_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(content)
    for root in (tmp_path, *(tmp_path / name for name in ("a", "absent", "a/config.json", "x" * 300))):
        with pytest.raises(InputError, match=r"^.* is not a results folder.*$"):
            read_results(root)
