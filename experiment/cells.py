"""One cell in its folder: run under its lease, its fate noted, its result verified.

    ended = run_cell(CellJob(root, cell), progress, check)
    record = verified_cell(root, cell)

Whoever works on a cell holds its lease, a file that filelock renews while its process lives: of several
processes, also of several machines, one works on a cell. A lease is taken over at once where its process is
gone from this machine, and where another machine's was not renewed for three minutes. What is said of a cell
is what its folder holds. An error in a cell ends it alone: its reason is in status.json, its traceback in
error.txt.
"""

import contextlib
import math
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from command_line import InputError, first_line
from experiment.plan_files import check_data, placed, read_plan
from experiment.run_plan import RunPlan, load_once, settings_by_cell
from experiment.stop_request import StoppedError
from experiment.tensorboard_log import TensorboardProgress
from experiment.tuning import training_of
from reporting.metrics import number
from reporting.run_results import metric_of
from results_folder import (
    SCHEMA_VERSION,
    Cell,
    CellRecord,
    WriteError,
    as_json,
    note_sharing,
    read_cell,
    read_json,
    remove_unfinished,
    write_json,
    write_status,
    write_text,
)
from train_and_evaluate import train_and_evaluate
from training.checkpoints import PREVIOUS
from training.training_progress import DivergedError, Progress

LEASE = "lease"
LEASE_SECONDS, HEARTBEAT_SECONDS = 180.0, 20.0
LOOK_AGAIN_SECONDS = 1.0
ERROR = "error.txt"
LONGEST_MESSAGE = 500
GIVEN_UP = ("failed", "diverged")
SETTLED = ("done", *GIVEN_UP)
LEFT, LEFT_FAR = "left", "left to another machine"  # of our work, not of the cell: another process has it
ELSEWHERE = "another process ran it"


class LeasedError(Exception):
    """Another process holds the lease; the message names it. far: it is another machine's, where nobody here
    can see whether it lives."""

    def __init__(self, owner: filelock.OwnerRecord | None) -> None:
        who = f"process {owner.pid} on {owner.hostname}" if owner else "a process that left no name"
        super().__init__(f"{who} works on it")
        self.far = owner is not None and owner.hostname.split("?")[0] != socket.gethostname()


class LeaseLostError(Exception):
    """The lease was taken over by another process, whose folder it is now."""


@contextlib.contextmanager
def leased(folder: Path, wait: float = 0.0) -> Iterator[Callable[[], None]]:
    """Hold a folder's lease; the function given raises LeaseLostError once another process has taken it.

    Raises LeasedError where it is not free within `wait` seconds, WriteError where it cannot be written."""
    lease = _lease(folder)
    try:
        lease.acquire(timeout=wait)
    except filelock.Timeout:
        raise LeasedError(lease.owner) from None
    except OSError as error:
        raise WriteError(error.errno, error.strerror, str(folder / LEASE)) from error

    def check() -> None:
        if lease.compromise is not None:
            raise LeaseLostError(f"{folder / LEASE} is not ours any more: {lease.compromise.reason}")

    try:
        yield check
    finally:
        lease.release()


def _lease(folder: Path) -> filelock.SoftFileLease:
    # A machine that lost its power may leave an empty file, which filelock would respect for ever.
    with contextlib.suppress(OSError):
        about = (folder / LEASE).stat()
        if about.st_size == 0 and time.time() - about.st_mtime > LEASE_SECONDS:
            (folder / LEASE).unlink()
    return filelock.SoftFileLease(
        folder / LEASE, lease_duration=LEASE_SECONDS, heartbeat_interval=HEARTBEAT_SECONDS
    )


def freed(
    root: Path, cells: Iterable[Cell], check: Callable[[], None], *, to_the_end: bool = False
) -> Iterator[Cell]:
    """Of cells whose leases others hold, those that are released, or not renewed for LEASE_SECONDS; all are
    watched for that long, or `to_the_end`: until none is held."""
    leases = {cell: _lease(cell.folder(root)) for cell in cells}
    end = math.inf if to_the_end else time.monotonic() + LEASE_SECONDS + HEARTBEAT_SECONDS
    while leases and time.monotonic() < end:
        check()
        for cell, lease in list(leases.items()):
            with contextlib.suppress(filelock.Timeout):
                lease.acquire(timeout=0)
                lease.release()
                del leases[cell]
                yield cell
        time.sleep(LOOK_AGAIN_SECONDS)


@dataclass(frozen=True)
class CellJob:
    """Run this cell in this folder: all that a process needs to know, on whatever machine.

    device, places: this machine's, see plan_files.placed. sharing: how many cells share the device. wait:
    seconds to wait for the cell's lease. tensorboard: whether to write what TensorBoard shows."""

    root: Path
    cell: Cell
    device: str = "auto"
    places: dict[str, Any] = field(default_factory=dict)
    sharing: int = 1
    wait: float = 0.0
    tensorboard: bool = False


class Ended(NamedTuple):
    """What became of a cell: a state of CellRecord, LEFT or LEFT_FAR, and its result or the reason."""

    state: str
    text: str


def run_cell(job: CellJob, progress: Progress, check: Callable[[], None]) -> Ended:
    """Run a cell from its last checkpoint to its fate, if it is neither done nor another process's.

    An error in it, lack of memory included, makes it "failed", losses that are not finite "diverged".
    StoppedError (from `check`, called after each step) and KeyboardInterrupt are noted as "interrupted" and
    passed on; WriteError is passed on, for want of a place to note it in."""
    folder = job.cell.folder(job.root)
    try:
        with leased(folder, job.wait) as check_lease:
            record = verified_cell(job.root, job.cell)
            if record.state in SETTLED and not record.damaged:
                return Ended(record.state, ELSEWHERE)
            if record.state == "running":
                progress.note("taken over from a process that has ended")
            if record.damaged:
                progress.note(f"run again: {record.reason}")

            def check_both() -> None:
                check_lease()  # first: nothing is written into a folder that is another's
                check()

            state, reason = noted(folder, lambda: _train(job, folder, progress, check_both))
            return Ended(state, reason or _result(verified_cell(job.root, job.cell)))
    except LeasedError as error:
        return Ended(LEFT_FAR if error.far else LEFT, str(error))
    except LeaseLostError as error:
        return Ended(LEFT, str(error))


def noted(folder: Path, train: Callable[[], dict[str, Any]]) -> tuple[str, str]:
    """Train, with what comes of it in status.json: the state and, where it has one, the reason."""
    remove_unfinished(folder)
    (folder / ERROR).unlink(missing_ok=True)
    write_status(folder, "running")
    try:
        write_json(folder / "result.json", as_json(train()))
        state, reason = "done", ""
    except (StoppedError, KeyboardInterrupt) as stopped:
        write_status(folder, "interrupted", str(stopped) or "interrupted by the user or the system")
        raise
    except (WriteError, LeaseLostError):
        raise
    except DivergedError as error:
        state, reason = "diverged", str(error)
    except (Exception, SystemExit) as error:  # a model of the user's may also try to end the program
        state, reason = "failed", _described(error)
        write_text(folder / ERROR, _encodable(traceback.format_exc()))
    write_status(folder, state, reason)
    if state == "done":
        (folder / PREVIOUS).unlink(missing_ok=True)
    return state, reason


def _train(job: CellJob, folder: Path, progress: Progress, check: Callable[[], None]) -> dict[str, Any]:
    plan = placed(_plan_of(job.root), job.places, job.device)
    task = load_once(job.cell.task, plan.data_settings[job.cell.task])
    check_data(job.root, {job.cell.task: task})
    note_sharing(folder, job.sharing)
    chosen = training_of(job.root, plan, job.cell)
    if plan.learning_rates:
        config = read_json(folder / "config.json") | {"training_settings": asdict(chosen)}
        write_json(folder / "config.json", config)
    if job.cell.trial is not None:
        # What chooses a setting never sees the test split.
        task = replace(task, test=task.val, longer_tests={})
    settings = settings_by_cell(plan, {job.cell.task: task})[job.cell.task, job.cell.model]
    attention = plan.model_of(job.cell).attention(settings)
    training = chosen, job.cell.seed, folder, plan.device
    watch = TensorboardProgress(progress, folder) if job.tensorboard else contextlib.nullcontext(progress)
    with watch as told:
        return train_and_evaluate(attention, task, settings, *training, told, check)


@cache
def _plan_of(root: Path) -> RunPlan:
    return read_plan(root)


def _described(error: BaseException) -> str:
    """One line: kind, message and where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"({Path(place.filename).name}:{place.lineno} in {place.name})"
    return f"{_encodable(first_line(error))[:LONGEST_MESSAGE]} {where}"


def _encodable(text: str) -> str:
    """The text as UTF-8 can hold it: a file's name in a message may have bytes that are none."""
    return text.encode(errors="backslashreplace").decode()


def _result(record: CellRecord) -> str:
    if record.result is None:
        return record.reason
    metric = metric_of(record)
    value = metric.read(record.result, "test_{}_best")
    split = "test" if record.cell.trial is None else "validation"
    shown = "not known" if value is None else metric.shown(value)
    return f"{split} {metric.title} {shown} (of epoch {record.result['best_epoch']})"


def verified_cell(root: Path, cell: Cell) -> CellRecord:
    """A cell as its folder has it, "done" only where its result is whole."""
    record = read_cell(root, cell)
    why = _why_not_done(record) if record.state == "done" else ""
    return replace(record, state="failed", reason=why, result=None, damaged=True) if why else record


def _why_not_done(record: CellRecord) -> str:
    """What the result of a cell lacks whose state is "done"; empty where it is whole."""
    result = record.result or {}
    if result.get("schema_version") != SCHEMA_VERSION:
        return f"result.json has schema version {result.get('schema_version')!r}, not {SCHEMA_VERSION}"
    try:
        metric = metric_of(record)
    except InputError as error:
        return f"result.json: {error}"
    if metric.read(result, "test_{}_best") is None:
        return f"result.json has no test_{metric.source}_best"
    for name in ("test_accuracy_best", "test_accuracy_last"):
        share = number(result.get(name))
        if share is None or not 0 <= share <= 1:
            return f"result.json has no {name}"
    epochs = result.get("epochs_run")
    if epochs != len(record.metrics) or epochs == 0:
        return f"result.json tells of {epochs} epochs, metrics.jsonl of {len(record.metrics)}"
    return ""
