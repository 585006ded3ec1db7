"""The results folder: where things lie in it, how they are written, how they are read back.

::

    results_YYYYmmdd_HHMMSS/
      config.json  environment.json       the run: settings, cells, argv; versions, commit, device, data
      <task>/<model>/seed<k>/             a cell: one model trained on one task with one seed
        config.json  status.json          its settings; its state and, where it has one, the reason
        metrics.jsonl  result.json        a line per epoch; the figures of the finished cell
        checkpoint_best.pt  checkpoint_last.pt  attention_patterns.npz
        error.txt                         of a failed cell: the traceback
        lease                             while a process works on it: which one (see experiment/cells.py)
        checkpoint_previous.pt            until it is done: the checkpoint before the last
      <task>/<model>/tuning/lr<rate>/seed<s>/   a cell that tries a learning rate, with a seed of no result
      <task>/<model>/learning_rate.json   what came of it, and the rate chosen (reporting/learning_rates.py)
      analysis/                           made by analyze_results.py alone

JSON is strict (no NaN). Every file is written beside its place and moved into it, so a reader sees the
old content or the new one, never a mixture. What is read may come from a stranger: files of an unlikely
size, numbers that no run gives and links that lead out of the folder are refused, and nothing in them is
executed.

Symbols of the arrays: K examples of at most M tokens, T timescales, H heads, B distance bins.
"""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import stat
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from command_line import LARGEST_NUMBER, LARGEST_WHOLE, InputError

SCHEMA_VERSION = 1
STATES = ("pending", "running", "done", "failed", "diverged", "interrupted")
ANALYSIS = "analysis"
SHARED_BY = "device_shared_by"
LARGEST_JSON = 2**24  # bytes; the largest file of a long run is a tenth of it
MOST_CELLS = 10_000
MOST_EPOCHS = 1_000_000
LONGEST_REASON = 1000
PATTERNS = "attention_patterns.npz"
LARGEST_ARRAYS = 2**30  # bytes when unpacked: a larger file is not one of ours


class WriteError(OSError):
    """A file of the results cannot be written: the disk is full, the folder read-only or gone."""


@dataclass(frozen=True, order=True)
class Cell:
    """One model trained on one task with one seed. trial: the learning rate that the cell tries; None where
    it is a result."""

    task: str
    model: str
    seed: int
    trial: float | None = None

    @property
    def _place(self) -> str:
        seed = f"seed{self.seed}"
        return seed if self.trial is None else f"tuning/lr{self.trial:g}/{seed}"

    def __str__(self) -> str:
        return f"{self.task}/{self.model}/{self._place}"

    def folder(self, root: Path) -> Path:
        return root / file_name(self.task) / file_name(self.model) / self._place

    def named(self) -> dict[str, Any]:
        """As config.json has a result."""
        return {"task": self.task, "model": self.model, "seed": self.seed}


@dataclass(frozen=True)
class CellRecord:
    """What a cell's folder holds. `state` is "missing" where the cell was planned and has no status.

    damaged: its files cannot be read, or contradict each other; the state is "failed", the reason says why.
    """

    cell: Cell
    folder: Path
    state: str
    reason: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    damaged: bool = False


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


def write_atomic(
    path: Path, write: Callable[[IO[bytes]], Any], verify: Callable[[Path], None] | None = None
) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there, both made durable.

    verify: called with the temporary file before it is moved; what it raises leaves `path` as it was.
    Raises WriteError where the file cannot be written."""
    # Not by tempfile, whose files nobody else may read: results are shared.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if verify is not None:
            verify(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:
            raise WriteError(*error.args) from error
        raise WriteError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what writers that were killed left behind. Only for who has the folder to himself."""
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.[0-9a-f]{16}", path.name):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # network shares and some virtual disks cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def as_json(value: Any) -> Any:
    """The value with null for each number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_status(folder: Path, state: str, reason: str = "") -> None:
    assert state in STATES
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(folder / "status.json", {"state": state, "reason": reason, "time": now})


def note_sharing(folder: Path, processes: int) -> None:
    """Note in a cell's config.json that it was one of so many on a device at a time, the most there were."""
    config = read_json(folder / "config.json")
    known = config.get(SHARED_BY)
    if processes > (known if isinstance(known, int) else 1):
        write_json(folder / "config.json", config | {SHARED_BY: processes})


def create_results_folder(parent: Path) -> Path:
    """A new folder `results_YYYYmmdd_HHMMSS` under `parent`, with `_2` and so on for starts in one second.

    Raises InputError where it cannot be written."""
    stamp = time.strftime("results_%Y%m%d_%H%M%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for name in (stamp, *(f"{stamp}_{number}" for number in range(2, 1000))):
            with contextlib.suppress(FileExistsError):
                (parent / name).mkdir()
                return parent / name
    except OSError as error:
        why = f"cannot write to {parent}: {error.strerror}; choose another --output-dir"
        raise InputError(why) from error
    raise InputError(f"{parent} holds a thousand folders named {stamp}; choose another --output-dir")


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `target` at the end; an error leaves `target` as it was.

    It is made beside `target`. Raises InputError where it cannot be written."""
    place: dict[str, Any] = {"dir": target.parent, "prefix": f".{target.name}."}
    try:
        scratch = tempfile.TemporaryDirectory(**place, ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(f"cannot write to {target.parent}: {error.strerror}") from error
    with scratch as name:
        fresh, old = Path(name, "new"), Path(name, "old")
        fresh.mkdir()
        yield fresh
        if _exists(target):
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if _exists(old):
                old.rename(target)
            raise


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _whole(text: str) -> int:
    if len(text) > len(str(-LARGEST_WHOLE)) or abs(int(text)) > LARGEST_WHOLE:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _fraction(text: str) -> float:
    if not abs(float(text)) <= LARGEST_NUMBER:
        raise ValueError(f"{text[:40]} is too large a number")
    return float(text)


def _parse(text: str) -> Any:
    value = json.loads(text, parse_constant=_refuse, parse_int=_whole, parse_float=_fraction)
    if "\\ud" in text.lower():
        # Half of a pair, which no file and no terminal takes: UnicodeEncodeError, a ValueError.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def inside(path: Path, root: Path) -> bool:
    """Whether a path, its links followed, is in the folder `root`."""
    return path.resolve().is_relative_to(root.resolve())


def _text(path: Path, root: Path) -> str:
    """The text of a file of the results folder `root`; ValueError or OSError where it is not to be read."""
    if not inside(path, root):
        raise ValueError("a link that leads out of the folder")
    # Without waiting: a pipe of that name would keep us for ever.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("not a file")
        if about.st_size > LARGEST_JSON:
            raise ValueError(f"{about.st_size:,} bytes, more than any of ours has")
        return file.read(LARGEST_JSON).decode()


def read_json(path: Path, root: Path | None = None) -> Any:
    """The value in a strict JSON file of the results folder `root` (not given: the folder it is in).

    ValueError names the file where it is none."""
    try:
        return _parse(_text(path, root or path.parent))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error


def _read_object(path: Path, root: Path) -> dict[str, Any]:
    value = read_json(path, root)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    version = value.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ValueError(f"{path}: schema version {version!r}, this program reads {SCHEMA_VERSION}")
    return value


def _read_json_lines(path: Path, root: Path) -> list[dict[str, Any]]:
    try:
        rows = [_parse(line) for line in _text(path, root).splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON lines ({error})") from error
    epoch = 0
    for row in rows:
        found = row.get("epoch") if isinstance(row, dict) else None
        if not isinstance(found, int) or isinstance(found, bool) or not epoch < found <= MOST_EPOCHS:
            raise ValueError(f"{path}: expected one object with an epoch per line, in rising order")
        epoch = found
    return rows


def _exists(path: Path) -> bool:
    """Also for a link that leads nowhere, which `exists` would take for nothing."""
    with contextlib.suppress(FileNotFoundError):
        path.lstat()
        return True
    return False


def _plain(text: object) -> str:
    """One line of a sensible length, without what a terminal would take for a command."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(text)).strip()[:LONGEST_REASON]


def read_cell(root: Path, cell: Cell) -> CellRecord:
    """A cell as its folder has it; one whose files do not parse is returned as failed, with the reason."""
    folder = cell.folder(root)
    try:
        if not _exists(folder / "status.json"):
            return CellRecord(cell, folder, "missing", "planned, but never started")
        status = _read_object(folder / "status.json", root)
        state = status.get("state")
        if state not in STATES:
            raise ValueError(f"{folder / 'status.json'}: unknown state {state!r}")
        config = _read_object(folder / "config.json", root)
        metrics_path = folder / "metrics.jsonl"
        metrics = _read_json_lines(metrics_path, root) if _exists(metrics_path) else []
        result = _read_object(folder / "result.json", root) if state == "done" else None
    except (OSError, ValueError, RecursionError) as error:
        return CellRecord(cell, folder, "failed", f"unreadable: {_plain(error)}", damaged=True)
    return CellRecord(cell, folder, state, _plain(status.get("reason", "")), config, metrics, result)


def _planned(config: dict[str, Any]) -> list[Cell]:
    """The cells of a run's config.json; ValueError, TypeError or KeyError where it is not as expected."""
    if len(config["cells"]) > MOST_CELLS:
        raise ValueError(f"{len(config['cells']):,} cells")
    cells = [Cell(cell["task"], cell["model"], cell["seed"]) for cell in config["cells"]]
    for cell in cells:
        names = isinstance(cell.task, str) and isinstance(cell.model, str)
        if not names or not isinstance(cell.seed, int) or isinstance(cell.seed, bool):
            raise TypeError(f"no cell: {_plain(cell)}")
    return cells


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
        config = _read_object(root / "config.json", root)
        planned = _planned(config)
    except (KeyError, OSError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"{root} is not a results folder: config.json is not as expected ({_plain(error)})"
        ) from error
    environment: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # no number hangs on it
        environment = _read_object(root / "environment.json", root)
    return Results(root, config, environment, [read_cell(root, cell) for cell in planned])


# Arrays


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    write_atomic(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


@dataclass(frozen=True)
class AttentionPatterns:
    """attention_patterns.npz, checked. The masses are None where the mechanism has none.

    tokens (K, M) whole numbers, 0 = pad; symbols (K, M) text; lengths, labels, predictions (K,); maps
    (layers, K, T, H, M, M), rows that sum to 1 over true tokens, 0 elsewhere; key_mass, query_mass
    (layers, K, T, H, M); distance_edges (B + 1,), distance_share (layers, T, H, B): the share of a query's
    weight at edge_b <= |i - j| < edge_(b + 1) in long examples.
    """

    tokens: np.ndarray
    symbols: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    maps: np.ndarray
    distance_edges: np.ndarray
    distance_share: np.ndarray
    key_mass: np.ndarray | None = None
    query_mass: np.ndarray | None = None

    def __post_init__(self) -> None:
        examples, longest = self.tokens.shape if self.tokens.ndim == 2 else (0, 0)
        layers, _, timescales, heads = self.maps.shape[:4] if self.maps.ndim == 6 else (0, 0, 0, 0)
        bins = len(self.distance_edges) - 1 if self.distance_edges.ndim == 1 else 0
        expected: dict[str, tuple[tuple[int, ...], str]] = {
            "tokens": ((examples, longest), "iu"),
            "symbols": ((examples, longest), "U"),
            "lengths": ((examples,), "iu"),
            "labels": ((examples,), "iu"),
            "predictions": ((examples,), "iu"),
            "maps": ((layers, examples, timescales, heads, longest, longest), "f"),
            "distance_edges": ((bins + 1,), "iuf"),
            "distance_share": ((layers, timescales, heads, bins), "f"),
            "key_mass": ((layers, examples, timescales, heads, longest), "f"),
            "query_mass": ((layers, examples, timescales, heads, longest), "f"),
        }
        for name, (shape, kinds) in expected.items():
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape or array.dtype.kind not in kinds or 0 in shape:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected shape {shape}")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name} holds numbers that are not finite")
        if not ((self.lengths >= 1) & (self.lengths <= longest)).all():
            raise ValueError(f"lengths must be 1 to {longest}, got {self.lengths.tolist()}")
        if not (np.diff(self.distance_edges) > 0).all():
            raise ValueError(f"distance_edges must ascend, got {self.distance_edges.tolist()}")


def read_attention_patterns(path: Path) -> AttentionPatterns:
    """The patterns in a file; ValueError says why it holds none. Nothing in it is executed."""
    try:
        if path.is_symlink():
            raise ValueError("it is a link, which may lead out of the folder")
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > LARGEST_ARRAYS:
            raise ValueError(f"it would unpack to {size:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            ours = {entry.name for entry in fields(AttentionPatterns)} & set(arrays.files)
            found = {name: arrays[name] for name in ours}
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("it holds something that is no array")
        return AttentionPatterns(**found)
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path.name}") from error
    except Exception as error:  # whatever an archive that is none of ours makes of its readers
        raise ValueError(f"{path.name} cannot be used: {error}") from error
