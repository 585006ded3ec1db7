"""Tasks made of random draws, each for one ability of attention; training data are drawn anew each epoch.

recall: D pairs key value key value ..., then the D keys in another order; at each the value is asked for
    (multi-query associative recall, Arora et al. 2023). N = 3 D tokens, 32 keys, 32 values.
hold: N values, some flagged; gaps between flags log-uniform from 1 to N; at each position from the first flag
    on, the value last flagged is asked for. A position has two ids, value and flag; no positions are added.
latest: 8 variables are written, variable value, and read, variable, in random order, half and half; at a read
    the value last written to it is asked for. A read is of the variable of any earlier write.
nearest: a set of D points of a 16 x 16 grid, each with one of 8 labels, and of 2 D queries; at a query the
    label of the Euclidean nearest point is asked for, unless two are equally near. N = 3 D; two ids a point.
lookup: a set of D keys of 256, each with one of 8 values, and of the D keys again, at which it is asked for.
    N = 2 D; two ids a key.

Each is tested at longer lengths, too: of a set, with more points or keys at once. A set has no positions, and
its attention is not causal.
Symbols: n examples, N tokens, D pairs.
"""

from dataclasses import dataclass

import numpy as np

from command_line import InputError
from tasks.drawn_tasks import SPLITS, Draw, Ids, drawn_task
from tasks.random_draws import RandomDraws
from tasks.task_data import DataSettings, TaskData, TaskForm
from tasks.token_dataset import IGNORED

KEYS = RECALL_VALUES = 32
HOLD_VALUES = 16
PLAIN, FLAGGED = 1 + HOLD_VALUES, 2 + HOLD_VALUES  # ids, after pad and the values
VARIABLES, LATEST_VALUES = 8, 16
SIDE = 16
PLACES, LABELS = SIDE * SIDE, 8  # points of the grid, or keys, and what they have
ASKED = 1 + PLACES + LABELS  # the id in place of a label


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


def draw_latest(draws: RandomDraws, count: int, length: int) -> tuple[Ids, Ids]:
    """Ids: variables 1 to 8, values 9 to 24; a label is a value's number, 0 to 15. The first token begins a
    write, the last one is a read."""
    place = np.arange(length)
    heads = draws.below(2, count * length).reshape(count, length) == 1
    heads[:, 0], heads[:, -2:] = True, False
    # A write where the coin says so and none began at the token before: every other one of a run of heads.
    run = place - np.maximum.accumulate(np.where(heads, -1, place), 1)
    writes = heads & (run % 2 == 1)
    stores = np.roll(writes, 1, 1)  # the value of a write
    reads = ~(writes | stores)
    variables = draws.below(VARIABLES, count * length).reshape(count, length)
    values = draws.below(LATEST_VALUES, count * length).reshape(count, length)
    chosen = draws.below(2**31, count * length).reshape(count, length) * np.cumsum(writes, 1) >> 31
    of_write = np.take_along_axis(np.argsort(~writes, 1, kind="stable"), chosen, 1)
    variables = np.where(reads, np.take_along_axis(variables, of_write, 1), variables)
    written = writes[:, None] & (variables[:, None] == np.arange(VARIABLES)[:, None])
    last = np.maximum.accumulate(np.where(written, place, 0), 2)  # (n, variables, N): its last write's place
    answers = np.take_along_axis(values, np.take_along_axis(last, variables[:, None], 1)[:, 0] + 1, 1)
    tokens = np.where(stores, 1 + VARIABLES + values, 1 + variables)
    return tokens, np.where(reads, answers, IGNORED)


def draw_nearest(draws: RandomDraws, count: int, length: int) -> tuple[Ids, Ids]:
    points = length // 3
    stored = draws.distinct(PLACES, count, points)
    labels = draws.below(LABELS, count * points).reshape(count, points)
    queries = draws.below(PLACES, count * 2 * points).reshape(count, 2 * points)
    (x, y), (u, v) = (np.divmod(at.astype(np.int16), SIDE) for at in (queries, stored))
    squared = (x[:, :, None] - u[:, None]) ** 2 + (y[:, :, None] - v[:, None]) ** 2  # (n, 2 D, D)
    tied = (squared == squared.min(2, keepdims=True)).sum(2) > 1
    answers = np.take_along_axis(labels, squared.argmin(2), 1)
    return _set_of(stored, labels, queries, np.where(tied, IGNORED, answers))


def draw_lookup(draws: RandomDraws, count: int, length: int) -> tuple[Ids, Ids]:
    keys = draws.distinct(PLACES, count, length // 2)
    values = draws.below(LABELS, keys.size).reshape(keys.shape)
    order = draws.distinct(length // 2, count, length // 2)
    return _set_of(keys, values, *(np.take_along_axis(part, order, 1) for part in (keys, values)))


def _set_of(stored: Ids, labels: Ids, queries: Ids, answers: Ids) -> tuple[Ids, Ids]:
    """Ids: places 1 to 256; labels 257 to 264, or ASKED at a query."""
    places = 1 + np.concatenate([stored, queries], 1)
    marks = np.concatenate([1 + PLACES + labels, np.full_like(queries, ASKED)], 1)
    return np.stack([places, marks], -1), np.concatenate([np.full_like(stored, IGNORED), answers], 1)


@dataclass(frozen=True)
class Generated:
    """A generated task.

    title: with the place of a number, N / multiple. summary: what it asks for. sizes: of training, validation
    and test. length: N by default, a multiple of `multiple` from `least` to `most`. longer: how many times N
    further tests have."""

    title: str
    summary: str
    draw: Draw
    symbols: tuple[str, ...]
    classes: int
    form: TaskForm
    sizes: tuple[int, int, int]
    length: int
    multiple: int = 1
    least: int = 1
    most: int = 1 << 16
    longer: tuple[int, ...] = (2, 4)


def _named(letter: str, count: int) -> tuple[str, ...]:
    return tuple(f"{letter}{number}" for number in range(count))


CAUSAL = TaskForm("token", causal=True)
WITHOUT_POSITIONS = TaskForm("token", causal=True, positions=False)
SET = TaskForm("token", positions=False)
POINTS = tuple(f"{place // SIDE},{place % SIDE}" for place in range(PLACES))

GENERATED = {
    "recall": Generated(
        "Recall of {} pairs",
        "Pairs of a key and a value, then the keys again: the value of each",
        draw_recall,
        ("<pad>", *_named("k", KEYS), *_named("v", RECALL_VALUES)),
        classes=RECALL_VALUES,
        form=CAUSAL,
        sizes=(1600, 512, 1024),
        length=24,
        multiple=3,
        least=3,
        most=3 * KEYS,
    ),
    "hold": Generated(
        "Sample and hold, {} tokens",
        "Values, some of them flagged: at each position the value last flagged",
        draw_hold,
        ("<pad>", *map(str, range(HOLD_VALUES)), "plain", "flagged"),
        classes=HOLD_VALUES,
        form=WITHOUT_POSITIONS,
        sizes=(800, 256, 512),
        length=128,
        longer=(4, 16),
    ),
    "latest": Generated(
        "The value last written, {} tokens",
        "Variables written and read in turn: at a read the value last written",
        draw_latest,
        ("<pad>", *_named("x", VARIABLES), *map(str, range(LATEST_VALUES))),
        classes=LATEST_VALUES,
        form=CAUSAL,
        sizes=(1600, 512, 1024),
        length=96,
        least=3,
    ),
    "nearest": Generated(
        "The nearest of {} points",
        "Points with labels: at another point the label of the nearest",
        draw_nearest,
        ("<pad>", *POINTS, *_named("v", LABELS), "?"),
        classes=LABELS,
        form=SET,
        sizes=(3200, 512, 1024),
        length=48,
        multiple=3,
        least=3,
        most=3 * PLACES,
    ),
    "lookup": Generated(
        "Lookup of {} keys",
        "A set of keys with values, and the keys again: the value of each",
        draw_lookup,
        ("<pad>", *_named("k", PLACES), *_named("v", LABELS), "?"),
        classes=LABELS,
        form=SET,
        sizes=(3200, 512, 1024),
        length=128,
        multiple=2,
        least=2,
        most=2 * PLACES,
    ),
}


def load_generated(name: str, settings: DataSettings) -> TaskData:
    """A task of GENERATED; --max-length is the length trained on."""
    task = GENERATED[name]
    length = settings.max_length or task.length
    if length % task.multiple or not task.least <= length <= task.most:
        raise InputError(
            f"{name}: --max-length must be a multiple of {task.multiple} from {task.least} to {task.most:,}, "
            f"got {length}"
        )
    return drawn_task(
        settings,
        name=name,
        title=task.title.format(length // task.multiple),
        form=task.form,
        draw=lambda split: task.draw,
        symbols=task.symbols,
        class_names=tuple(map(str, range(task.classes))),
        sizes=dict(zip(SPLITS, task.sizes, strict=True)),
        length=length,
        longer=tuple(times * length for times in task.longer if times * length <= task.most),
        about={"source": "tasks/generated_tasks.py", "tokenizer": "ids"},
    )
