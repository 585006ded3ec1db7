"""Checkpoints that can be relied on: verified before they replace one, and two of them at any time.

    write_checkpoint(folder, state)
    trainer = resume(folder, trainer_from, note=print)      # trainer_from(state), by the newest that fits

`checkpoint_last.pt` is the newest; `checkpoint_previous.pt` the one before, which is replaced once the newest
is verified. A checkpoint is a PyTorch archive of tensors and plain values, read with `weights_only=True`:
nothing in it is executed. Behind it stands the sha256 of all before, since PyTorch would not notice most
damages; `torch.load` reads such a file as any other.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from command_line import first_line, one_line
from results_folder import write_atomic

LAST, PREVIOUS, BEST = "checkpoint_last.pt", "checkpoint_previous.pt", "checkpoint_best.pt"
ASIDE = ".set_aside"
CHECKPOINT_VERSION = 3
SEAL = b"\nsha256:"
SEAL_BYTES = len(SEAL) + 64

Resumed = TypeVar("Resumed")


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

    write_weights(folder / LAST, {"checkpoint_version": CHECKPOINT_VERSION, **state}, verify)


def write_weights(path: Path, state: dict[str, Any], verify: Callable[[Path], None] | None = None) -> None:
    contents = _serialized(state)
    write_atomic(path, lambda file: file.write(contents), verify)


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


def resume(
    folder: Path, take_up: Callable[[dict[str, Any]], Resumed], note: Callable[[str], None]
) -> Resumed | None:
    """What `take_up` makes of the newest checkpoint that can be used; None where there is none.

    A checkpoint that cannot be read, or that `take_up` refuses by CheckpointError, is renamed, so that it is
    spoken of once, and that is noted."""
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            try:
                return take_up(read_checkpoint(path))
            except CheckpointError as error:
                aside = path.with_name(path.name + ASIDE)
                path.replace(aside)
                note(one_line(f"{path} cannot be used and is set aside as {aside.name}: {error}"))
    return None
