"""Checkpoints that can be relied on: verified before they replace one, and two of them at any time.

    write_checkpoint(folder, state)
    for path, state in usable_checkpoints(folder, note=print):    # the newest first
        ...                                                       # or set_aside(path, why, print)

`checkpoint_last.pt` is the newest; `checkpoint_previous.pt` the one before, which is replaced once the newest
is verified. A checkpoint is a PyTorch archive of tensors and plain values, read with `weights_only=True`:
nothing in it is executed. Behind it stands the sha256 of all before, since PyTorch would not notice most
damages; `torch.load` reads such a file as any other.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from command_line import first_line, one_line
from results_folder import write_atomic

LAST, PREVIOUS, BEST = "checkpoint_last.pt", "checkpoint_previous.pt", "checkpoint_best.pt"
ASIDE = ".set_aside"
CHECKPOINT_VERSION = 3
SEAL = b"\nsha256:"
SEAL_BYTES = len(SEAL) + 64

Note = Callable[[str], None]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why."""


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Make `state` the newest checkpoint; the newest until now becomes the one before."""

    def verify(temporary: Path) -> None:
        try:
            read_checkpoint(temporary)
        except CheckpointError as error:
            raise OSError(f"the checkpoint just written cannot be read back: {error}") from error
        with contextlib.suppress(FileNotFoundError):
            (folder / LAST).replace(folder / PREVIOUS)

    contents = _serialized({"checkpoint_version": CHECKPOINT_VERSION, **state})
    write_atomic(folder / LAST, lambda file: file.write(contents), verify)


def write_weights(path: Path, state: dict[str, Any]) -> None:
    contents = _serialized(state)
    write_atomic(path, lambda file: file.write(contents))


def _serialized(state: dict[str, Any]) -> bytes:
    # In memory first: where a disk is full, a Python file raises OSError, PyTorch's own writer anything.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    archive = buffer.getvalue()
    return archive + _seal(archive)


def _seal(archive: bytes) -> bytes:
    return SEAL + hashlib.sha256(archive).hexdigest().encode()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU. Raises CheckpointError where it cannot be used."""
    contents = path.read_bytes()
    archive, seal = contents[:-SEAL_BYTES], contents[-SEAL_BYTES:]
    if not seal.startswith(SEAL):
        raise CheckpointError("it has no checksum at its end: it is truncated, or of an earlier version")
    if seal != _seal(archive):
        raise CheckpointError("its checksum is wrong: it is damaged")
    try:
        state = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever an archive that is none of ours makes of its reader
        raise CheckpointError(f"it is no checkpoint of ours ({first_line(error)[:200]})") from error
    version = state.get("checkpoint_version") if isinstance(state, dict) else None
    if version != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"it was written by another version of this program (format {version or 1}, this one reads "
            f"{CHECKPOINT_VERSION})"
        )
    return state


def usable_checkpoints(folder: Path, note: Note) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The readable checkpoints of a folder, the newest first; others are set aside, which is noted."""
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            state = read_checkpoint(path)
        except FileNotFoundError:
            continue
        except CheckpointError as error:
            set_aside(path, str(error), note)
            continue
        yield path, state


def set_aside(path: Path, why: str, note: Note) -> None:
    """Rename a checkpoint that cannot be used, so that it is spoken of once."""
    path.replace(path.with_name(path.name + ASIDE))
    note(one_line(f"{path} cannot be used and is set aside as {path.name}{ASIDE}: {why}"))
