"""Tasks made of random draws, each for one ability of attention; training data are drawn anew each epoch.

recall: D pairs key value key value ..., then the D keys in another order; at each the value is asked for
    (multi-query associative recall, Arora et al. 2023). N = 3 D tokens, 32 keys, 32 values.
hold: N values, some flagged, gaps between flags log-uniform from 1 to N; at each position from the first flag
    on, the value last flagged is asked for. A position has two ids, value and flag; no positions are added.

Draws come from (seed, task, split, epoch), so training, validation and test have streams of their own.
Symbols: n examples, N tokens, D pairs.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from command_line import InputError
from tasks.random_draws import RandomDraws
from tasks.task_data import DataSettings, TaskData, TaskForm
from tasks.token_dataset import IGNORED, TokenDataset

KEYS = RECALL_VALUES = 32
HOLD_VALUES = 16
PLAIN, FLAGGED = 1 + HOLD_VALUES, 2 + HOLD_VALUES  # ids, after pad and the values
RECALL_SIZES = {"train": 1600, "val": 512, "test": 1024}
HOLD_SIZES = {"train": 800, "val": 256, "test": 512}

Ids = NDArray[np.int64]
Draw = Callable[[RandomDraws, int, int], tuple[Ids, Ids]]  # draws, n, N -> tokens (n, N[, I]), labels (n, N)


def draw_recall(draws: RandomDraws, count: int, length: int) -> tuple[Ids, Ids]:
    """Ids: keys 1 to 32, values 33 to 64; a label is a value's number, 0 to 31."""
    pairs = length // 3
    keys = np.argsort(draws.below(2**31, count * KEYS).reshape(count, KEYS), kind="stable")[:, :pairs]
    values = draws.below(RECALL_VALUES, count * pairs).reshape(count, pairs)
    order = np.argsort(draws.below(2**31, count * pairs).reshape(count, pairs), kind="stable")
    stored = np.stack([1 + keys, 1 + KEYS + values], -1).reshape(count, 2 * pairs)
    asked = np.take_along_axis(1 + keys, order, 1)
    answers = np.take_along_axis(values, order, 1)
    return np.concatenate([stored, asked], 1), np.concatenate([np.full_like(stored, IGNORED), answers], 1)


def draw_hold(draws: RandomDraws, count: int, length: int) -> tuple[Ids, Ids]:
    """Ids: values 1 to 16, then plain or flagged; a label is a value's number, 0 to 15."""
    values = draws.below(HOLD_VALUES, count * length).reshape(count, length)
    uniform = draws.below(2**31, count * length).reshape(count, length) / 2**31
    gaps = np.floor(np.exp(uniform * np.log(length + 1))).astype(np.int64)  # 1..N
    at = np.cumsum(gaps, 1) - 1
    flags = np.zeros((count, length), bool)
    row, column = np.nonzero(at < length)
    flags[row, at[row, column]] = True
    last = np.maximum.accumulate(np.where(flags, np.arange(length), -1), 1)
    held = np.take_along_axis(values, np.maximum(last, 0), 1)
    return np.stack([1 + values, np.where(flags, FLAGGED, PLAIN)], -1), np.where(last < 0, IGNORED, held)


def _split(draw: Draw, length: int, count: int, seed: int, *purpose: str | int) -> TokenDataset:
    tokens, labels = draw(RandomDraws(seed, *purpose), count, length)
    flat = tokens.reshape(count * length, *tokens.shape[2:]).astype(np.uint8)
    return TokenDataset(flat, np.arange(count + 1) * length, labels.ravel(), token_targets=True)


def _made(
    name: str,
    title: str,
    draw: Draw,
    length: int,
    longer: tuple[int, ...],
    symbols: list[str],
    classes: int,
    sizes: dict[str, int],
    form: TaskForm,
    settings: DataSettings,
) -> TaskData:
    sizes = settings.sizes(sizes)
    seed = settings.data_seed

    def drawn(cell_seed: int, epoch: int) -> TokenDataset:
        return _split(draw, length, sizes["train"], cell_seed, name, "train", seed, epoch)

    fixed = {s: _split(draw, length, sizes[s], seed, name, s) for s in ("val", "test")}
    tests = {
        str(n): _split(draw, n, max(1, sizes["test"] * length // n), seed, name, "test", n) for n in longer
    }
    digest = hashlib.sha256()
    for part in (*fixed.values(), *tests.values()):
        digest.update(part.tokens.tobytes() + part.labels.astype("<i8").tobytes())
    provenance: dict[str, Any] = {
        "task": name,
        "source": "tasks/generated_tasks.py",
        "sha256": digest.hexdigest(),
        "tokenizer": "ids",
        "tokens": length,
        "vocab_size": len(symbols),
        "data_seed": seed,
        "sizes": sizes,
    }
    return TaskData(
        name=name,
        title=title,
        vocab_size=len(symbols),
        num_classes=classes,
        class_names=tuple(map(str, range(classes))),
        train=drawn(seed, 0),
        **fixed,
        symbols=symbols.__getitem__,
        provenance=provenance,
        form=form,
        drawn=drawn,
        longer_tests=tests,
    )


def load_recall(settings: DataSettings) -> TaskData:
    """Values of stored keys, asked for in another order. --max-length is 3 tokens a pair, 24 by default."""
    length = settings.max_length or 24
    if length % 3 or length > 3 * KEYS:
        raise InputError(f"recall: --max-length must be 3 times its pairs, 3 to {3 * KEYS}, got {length}")
    symbols = ["<pad>", *(f"k{i}" for i in range(KEYS)), *(f"v{i}" for i in range(RECALL_VALUES))]
    longer = tuple(n for n in (2 * length, 4 * length) if n <= 3 * KEYS)
    title, form = f"Recall of {length // 3} pairs", TaskForm("token", causal=True)
    return _made(
        "recall", title, draw_recall, length, longer, symbols, RECALL_VALUES, RECALL_SIZES, form, settings
    )


def load_hold(settings: DataSettings) -> TaskData:
    """The value last flagged, over lags that differ. --max-length is the training length, 128 by default."""
    length = settings.max_length or 128
    symbols = ["<pad>", *map(str, range(HOLD_VALUES)), "plain", "flagged"]
    title, form = f"Sample and hold, {length} tokens", TaskForm("token", causal=True, positions=False)
    longer = (4 * length, 16 * length)
    return _made("hold", title, draw_hold, length, longer, symbols, HOLD_VALUES, HOLD_SIZES, form, settings)
