"""One cell in its folder: run to its fate, which is noted, or verified where it is said to be done.

    state, reason = run_cell(make_attention, task, model_settings, training_settings, seed, folder, device)
    why_not = why_not_done(read_cell(root, cell))

A cell goes on from its folder's last checkpoint. An error in it ends it alone: its reason is in status.json,
its traceback in error.txt. Who runs it holds its lock (cell_lock.py), if more than one process may.
"""

import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline import TaskData
from experiment.cell_lock import LockLostError
from experiment.checkpoints import PREVIOUS
from experiment.distributed import world_size
from experiment.stop_request import StoppedError
from experiment.training_progress import DivergedError, Progress
from experiment.transformer_classifier import AttentionFactory
from results_folder import (
    SCHEMA_VERSION,
    CellRecord,
    WriteError,
    as_json,
    remove_unfinished,
    write_json,
    write_status,
    write_text,
)
from train_and_evaluate import ModelSettings, TrainingSettings, train_and_evaluate

ERROR = "error.txt"
LONGEST_MESSAGE = 500


def run_cell(
    make_attention: AttentionFactory,
    task: TaskData,
    model_settings: ModelSettings,
    training: TrainingSettings,
    seed: int,
    folder: Path,
    device: torch.device,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
) -> tuple[str, str]:
    """`train_and_evaluate` with its fate in status.json. Returns the state and, where it has one, the reason.

    An error in a cell, lack of memory included, makes it "failed", losses that are not finite "diverged".
    StoppedError (from `check`) and KeyboardInterrupt are noted as "interrupted" and passed on. Passed on and
    not noted are WriteError, for want of a place, and LockLostError (from `check`): the folder is another's;
    and of several ranks every error, the others being left in the middle of a step: the cell stays "running".
    """
    remove_unfinished(folder)
    (folder / ERROR).unlink(missing_ok=True)
    write_status(folder, "running")
    try:
        result = train_and_evaluate(
            make_attention, task, model_settings, training, seed, folder, device, progress, check
        )
        write_json(folder / "result.json", as_json(result))
        state, reason = "done", ""
    except StoppedError as stopped:
        write_status(folder, "interrupted", str(stopped))
        raise
    except KeyboardInterrupt:
        write_status(folder, "interrupted", "interrupted by the user or the system")
        raise
    except DivergedError as error:
        state, reason = "diverged", str(error)
    except (WriteError, LockLostError):
        raise
    except (Exception, SystemExit) as error:  # a model of the user's may also try to end the program
        if world_size() > 1:
            raise
        state, reason = "failed", _describe(error)
        write_text(folder / ERROR, _encodable(traceback.format_exc()))
    write_status(folder, state, reason)
    if state == "done":
        (folder / PREVIOUS).unlink(missing_ok=True)
    return state, reason


def follow_cell(*arguments: Any) -> tuple[str, str]:
    """`run_cell` for the ranks other than the first: takes part in its work, and notes nothing."""
    try:
        train_and_evaluate(*arguments)
    except DivergedError as error:
        return "diverged", str(error)
    return "done", ""


def _describe(error: BaseException) -> str:
    """One line: kind, message and where it was raised."""
    message = str(error).strip().splitlines()
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"({Path(place.filename).name}:{place.lineno} in {place.name})"
    first = _encodable(message[0])[:LONGEST_MESSAGE] if message else "no message"
    return f"{type(error).__name__}: {first} {where}"


def _encodable(text: str) -> str:
    """The text as UTF-8 can hold it: a file's name in a message may have bytes that are none."""
    return text.encode(errors="backslashreplace").decode()


def why_not_done(record: CellRecord) -> str:
    """Why a cell whose state is "done" is not: what its result lacks. Empty where it is done."""
    result = record.result or {}
    if result.get("schema_version") != SCHEMA_VERSION:
        return f"result.json has schema version {result.get('schema_version')!r}, not {SCHEMA_VERSION}"
    for name in ("test_accuracy_best", "test_accuracy_last"):
        if not _is_share(result.get(name)):
            return f"result.json has no {name}"
    epochs = result.get("epochs_run")
    if epochs != len(record.metrics) or epochs == 0:
        return f"result.json tells of {epochs} epochs, metrics.jsonl of {len(record.metrics)}"
    return ""


def _is_share(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= 1
