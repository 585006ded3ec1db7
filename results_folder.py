"""The results folder: where things lie in it, how they are written, how they are read back.

::

    results_YYYYmmdd_HHMMSS/
      config.json  environment.json       the run: settings, cells, argv; versions, commit, device, data
      <task>/<model>/seed<k>/             a cell: one model trained on one task with one seed
        config.json  status.json          its settings; its state and, where it has one, the reason
        metrics.jsonl  result.json        a line per epoch; the figures of the finished cell
        checkpoint_best.pt  checkpoint_last.pt  attention_patterns.npz
      analysis/                           made by analyze_results.py alone

JSON is strict (no NaN). Every file is written beside its place and moved into it, so a reader sees the
old content or the new one, never a mixture. Needs the standard library only.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from command_line import InputError

SCHEMA_VERSION = 1
STATES = ("pending", "running", "done", "failed", "diverged", "interrupted")
ANALYSIS = "analysis"


@dataclass(frozen=True, order=True)
class Cell:
    """One model trained on one task with one seed."""

    task: str
    model: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}/{self.model}/seed{self.seed}"

    def folder(self, root: Path) -> Path:
        return root / file_name(self.task) / file_name(self.model) / f"seed{self.seed}"


@dataclass(frozen=True)
class CellRecord:
    """What a cell's folder holds. `state` is "missing" where the cell was planned and has no status."""

    cell: Cell
    folder: Path
    state: str
    reason: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None


@dataclass(frozen=True)
class Results:
    """A results folder as read: the run's settings and its cells, in the order they were planned."""

    root: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    cells: list[CellRecord]


def file_name(name: str) -> str:
    """A task's or model's name as a folder name: `package.module:Class` becomes `package.module_Class`."""
    return re.sub(r"^\.|[^\w.-]", "_", name) or "_"


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there, both made durable."""
    # Not by tempfile, whose files nobody else may read: results are shared.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def write_status(folder: Path, state: str, reason: str = "") -> None:
    assert state in STATES
    write_json(
        folder / "status.json",
        {"state": state, "reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
    )


def create_results_folder(parent: Path) -> Path:
    """A new folder `results_YYYYmmdd_HHMMSS` under `parent`, with `_2` and so on for starts in one second.

    Raises InputError where it cannot be written."""
    stamp = time.strftime("results_%Y%m%d_%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            folder = parent / (stamp if attempt == 1 else f"{stamp}_{attempt}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise InputError(
            f"cannot write to {parent}: {error.strerror}; choose another --output-dir"
        ) from error
    raise InputError(f"{parent} holds a thousand folders named {stamp}; choose another --output-dir")


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `target` at the end; an error leaves `target` as it was.

    It is made beside `target`. Raises InputError where it cannot be written."""
    try:
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise InputError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        fresh, old = scratch / "new", scratch / "old"
        fresh.mkdir()
        yield fresh
        if target.is_symlink() or target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.is_symlink() or old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def read_json(path: Path) -> Any:
    """The value in a strict JSON file; ValueError names the file where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line, parse_constant=_refuse) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON lines ({error})") from error
    if not all(isinstance(row, dict) and isinstance(row.get("epoch"), int) for row in rows):
        raise ValueError(f"{path}: expected one object with an epoch per line")
    return rows


def read_cell(root: Path, cell: Cell) -> CellRecord:
    """A cell as its folder has it; one whose files do not parse is returned as failed, with the reason."""
    folder = cell.folder(root)
    try:
        if not (folder / "status.json").is_file():
            return CellRecord(cell, folder, "missing", "planned, but never started")
        status = _read_object(folder / "status.json")
        if status.get("state") not in STATES:
            raise ValueError(f"{folder / 'status.json'}: unknown state {status.get('state')!r}")
        config = _read_object(folder / "config.json")
        metrics = _read_json_lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
        result = _read_object(folder / "result.json") if status["state"] == "done" else None
    except (OSError, ValueError, RecursionError) as error:
        return CellRecord(cell, folder, "failed", f"unreadable: {error}")
    return CellRecord(cell, folder, status["state"], str(status.get("reason", "")), config, metrics, result)


def read_results(root: Path) -> Results:
    """Read a results folder; InputError where `root` is none."""
    try:
        found = (root / "config.json").is_file()
    except OSError:  # a name too long, a folder that may not be entered
        found = False
    if not found:
        raise InputError(
            f"{root} is not a results folder (no config.json); give one made by run_experiment.py"
        )
    try:
        config = _read_object(root / "config.json")
        environment = _read_object(root / "environment.json") if (root / "environment.json").is_file() else {}
        planned = [Cell(str(cell["task"]), str(cell["model"]), int(cell["seed"])) for cell in config["cells"]]
    except (KeyError, OSError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"{root} is not a results folder: config.json is not as expected ({error})"
        ) from error
    return Results(root, config, environment, [read_cell(root, cell) for cell in planned])
