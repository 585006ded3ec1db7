"""The task `bytes`: the next byte of texts joined by zero bytes, seen through windows.

    task = bytes_task({"train": [b"...", ...], "val": [...], "test": [...]}, settings, about)

Every byte of a window is asked for the one that follows. Training windows are drawn anew each epoch from
anywhere in the training texts; those of validation and test are fixed. Measured in bits per byte, less is
better.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from command_line import InputError
from tasks.drawn_tasks import SPLITS, Draw, Ids, drawn_task
from tasks.random_draws import RandomDraws
from tasks.task_data import DataSettings, TaskData, TaskForm
from tasks.text_tokenizers import BYTE_SYMBOLS, encode_bytes

WINDOW = 128  # bytes
LONGER = (2, 16)  # times a window
SIZES = {"train": 1600, "val": 256, "test": 512}


def bytes_task(texts: dict[str, list[bytes]], settings: DataSettings, about: dict[str, Any]) -> TaskData:
    """The task of the texts of each split; --max-length is the length of a window. A text of training or
    validation that is in the test split too is left out."""
    tested = set(texts["test"])

    def joined(split: str) -> NDArray[np.uint8]:
        kept = (text for text in texts[split] if split == "test" or text not in tested)
        return np.frombuffer(b"\0".join(kept), np.uint8)

    streams = {split: joined(split) for split in SPLITS}
    sizes = {split: len(stream) for split, stream in streams.items()}
    length, shortest = settings.max_length or WINDOW, min(sizes.values())
    if length >= shortest:
        raise InputError(f"bytes: --max-length must be below a split's {shortest:,} bytes, got {length}")
    return drawn_task(
        settings,
        name="bytes",
        title=f"Next byte of IMDb, windows of {length}",
        form=TaskForm("token", causal=True, metric="bits_per_byte"),
        draw=lambda split: _windows_of(streams[split]),
        symbols=BYTE_SYMBOLS,
        class_names=BYTE_SYMBOLS[1:],
        sizes=SIZES,
        length=length,
        longer=tuple(times * length for times in LONGER if times * length < shortest),
        about={**about, "tokenizer": "byte", "bytes": sizes},
    )


def _windows_of(stream: NDArray[np.uint8]) -> Draw:
    """Ids: a byte plus 1; a label is a byte."""

    def draw(draws: RandomDraws, count: int, length: int) -> tuple[Ids, Ids]:
        starts = draws.below(len(stream) - length, count)
        windows = stream[starts[:, None] + np.arange(length + 1)]
        return encode_bytes(windows[:, :-1]), windows[:, 1:].astype(np.int64)

    return draw
