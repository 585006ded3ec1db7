"""No file of a results folder is half-written, no two runs share one, and whatever lies in it is read."""

import json
import math
import multiprocessing
import os
import stat
import time
from pathlib import Path
from typing import IO, Any

import pytest

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
FIRST: dict[str, Any] = {"epoch": 1, "val_accuracy": 0.5}
SECOND: dict[str, Any] = {"epoch": 2, "val_accuracy": None}


def make_cell(root: Path, cell: Cell = CELL, state: str = "done", reason: str = "") -> Path:
    """A cell's folder with every file that a reader looks at."""
    folder = cell.folder(root)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"task": cell.task})
    write_json_lines(folder / "metrics.jsonl", [FIRST, SECOND])
    write_json(folder / "result.json", {"best_epoch": 1})
    write_status(folder, state, reason)
    return folder


def make_root(root: Path, *cells: Cell) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    planned = [{"task": cell.task, "model": cell.model, "seed": cell.seed} for cell in cells]
    write_json(root / "config.json", {"schema_version": 1, "cells": planned})
    write_json(root / "environment.json", {"python": "3.11"})
    return root


# --- writing ----------------------------------------------------------------------------------------------


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
    sync, move = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        order.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        order.append("move")
        return move(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_text(tmp_path / "result.json", "text")
    assert order == ["sync file", "move", "sync folder"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_can_be_read_by_whom_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "shared", "text")
        (tmp_path / "usual").write_text("text")
    finally:
        os.umask(before)
    mode, usual = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("shared", "usual"))
    assert oct(mode) == oct(usual)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_is_refused_and_the_old_content_stays(tmp_path: Path, value: float) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": [value]})
    assert read_json(path) == {"loss": 1.0}
    write_json_lines(path, [FIRST])
    with pytest.raises(ValueError, match="JSON"):
        write_json_lines(path, [FIRST, {"epoch": 2, "loss": value}])
    assert read_json(path) == FIRST
    assert list(tmp_path.iterdir()) == [path]


def test_lines_are_one_object_each(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_json_lines(path, iter([FIRST, SECOND]))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [FIRST, SECOND]
    write_json_lines(path, [])
    assert path.read_text() == ""


@pytest.mark.parametrize("state", STATES)
def test_a_status_has_its_state_reason_and_time(tmp_path: Path, state: str) -> None:
    write_status(tmp_path, state, "because")
    status = read_json(tmp_path / "status.json")
    assert (status["state"], status["reason"]) == (state, "because")
    assert time.strptime(status["time"], "%Y-%m-%dT%H:%M:%S%z")


# --- the folder -------------------------------------------------------------------------------------------


def test_starts_in_one_second_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "results_20260102_030405")
    names = [create_results_folder(tmp_path / "deep" / "er").name for _ in range(3)]
    assert names == [f"results_20260102_030405{tail}" for tail in ("", "_2", "_3")]


def create(parent: Path, count: int) -> list[str]:
    return [create_results_folder(parent).name for _ in range(count)]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # as of Python 3.12
def test_eight_processes_at_once_never_share_a_folder(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(8) as pool:
        made = pool.starmap(create, [(tmp_path / "new", 5)] * 8, chunksize=1)
    names = [name for part in made for name in part]
    assert len(set(names)) == 40
    assert sorted(names) == sorted(path.name for path in (tmp_path / "new").iterdir())


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


# --- reading ----------------------------------------------------------------------------------------------


def test_a_done_cell_is_read_whole(tmp_path: Path) -> None:
    folder = make_cell(tmp_path)
    record = read_cell(tmp_path, CELL)
    assert (record.cell, record.folder, record.state, record.reason) == (CELL, folder, "done", "")
    assert record.config == {"task": "listops"}
    assert record.metrics == [FIRST, SECOND]
    assert record.result == {"best_epoch": 1}


@pytest.mark.parametrize("state", [state for state in STATES if state != "done"])
def test_a_cell_that_is_not_done_has_no_result(tmp_path: Path, state: str) -> None:
    make_cell(tmp_path, state=state, reason="why")
    record = read_cell(tmp_path, CELL)
    assert (record.state, record.reason, record.result) == (state, "why", None)
    assert record.metrics == [FIRST, SECOND]


def test_a_cell_that_never_started_is_missing(tmp_path: Path) -> None:
    record = read_cell(tmp_path, CELL)
    assert (record.state, record.result, record.metrics) == ("missing", None, [])
    assert "never started" in record.reason
    (make_cell(tmp_path) / "status.json").unlink()
    assert read_cell(tmp_path, CELL).state == "missing"


@pytest.mark.parametrize("file", ["status.json", "config.json", "metrics.jsonl", "result.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b'{"state": "do', b"[1]", b"null", b"\xff\xfe", b'{"state": "done", "epoch": NaN}', b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "not UTF-8", "NaN", "deep"],
)
def test_an_unreadable_file_makes_the_cell_failed_with_a_reason(
    tmp_path: Path, file: str, content: bytes
) -> None:
    folder = make_cell(tmp_path)
    (folder / file).write_bytes(content)
    record = read_cell(tmp_path, CELL)
    if file == "metrics.jsonl" and content == b"":
        assert (record.state, record.metrics) == ("done", [])
        return
    assert record.state == "failed"
    assert record.reason.startswith("unreadable: ")
    assert record.result is None


@pytest.mark.parametrize("row", ['{"loss": 1}', '{"epoch": "1"}', '{"epoch": 1, "loss": NaN}', "[]", "7"])
def test_a_row_of_metrics_that_is_none_makes_the_cell_failed(tmp_path: Path, row: str) -> None:
    folder = make_cell(tmp_path)
    (folder / "metrics.jsonl").write_text(json.dumps(FIRST) + "\n" + row + "\n")
    record = read_cell(tmp_path, CELL)
    assert record.state == "failed"
    assert "metrics.jsonl" in record.reason


@pytest.mark.parametrize("state", ["finished", "missing", "", None, 3, ["done"], {"done": 1}])
def test_an_unknown_state_makes_the_cell_failed(tmp_path: Path, state: Any) -> None:
    folder = make_cell(tmp_path)
    write_json(folder / "status.json", {"state": state})
    record = read_cell(tmp_path, CELL)
    assert record.state == "failed"
    assert "unknown state" in record.reason


def test_a_done_cell_without_its_result_is_failed(tmp_path: Path) -> None:
    (make_cell(tmp_path) / "result.json").unlink()
    record = read_cell(tmp_path, CELL)
    assert record.state == "failed"
    assert "result.json" in record.reason


def test_results_are_read_in_the_order_of_the_plan_with_what_is_missing(tmp_path: Path) -> None:
    other, never = Cell("imdb", "conventional", 0), Cell("imdb", "package.module:Class", 1)
    root = make_root(tmp_path / "results", CELL, never, other)
    make_cell(root)
    (make_cell(root, other) / "result.json").write_text("{")
    results = read_results(root)
    assert results.root == root
    assert results.environment == {"python": "3.11"}
    assert [record.cell for record in results.cells] == [CELL, never, other]
    assert [record.state for record in results.cells] == ["done", "missing", "failed"]
    (root / "environment.json").unlink()
    assert read_results(root).environment == {}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"cells": 3}',
        '{"cells": {"a": 1}}',
        '{"cells": [1]}',
        '{"cells": [{"task": "a", "model": "b"}]}',
        '{"cells": [{"task": "a", "model": "b", "seed": "x"}]}',
        '{"cells": [{"task": "a", "model": "b", "seed": null}]}',
        '{"cells": [{"task": "a", "model": "b", "seed": 1e999}]}',
        '{"cells": [{"task": "a", "model": "b", "seed": NaN}]}',
    ],
)
def test_a_folder_with_another_kind_of_config_is_an_input_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="is not a results folder") as refused:
        read_results(tmp_path)
    assert "\n" not in str(refused.value)


def test_what_is_no_results_folder_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path, tmp_path / "absent", tmp_path / "file", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="is not a results folder"):
            read_results(root)


def test_a_cell_with_a_name_too_long_for_a_folder_is_not_read_as_done(tmp_path: Path) -> None:
    root = make_root(tmp_path / "results", Cell("t" * 300, "m", 0))
    assert read_results(root).cells[0].state in ("missing", "failed")
