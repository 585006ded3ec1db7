"""ListOps of the Long Range Arena (LRA): nested list operations on digits, made here and labelled.

    [MAX 2 9 [MIN 4 7 ] 0 ]   ->   9

An expression is a random tree: a node at depth 1..max_depth - 1 is an operator with probability 1/4, with
2..max_args arguments (uniform), else a digit 0..9; a node at max_depth is a digit. It is kept if
min_length < length < max_length, where length counts `[OP`, `]` and digits. MED is the floor of the median,
SM the sum modulo 10. The root has depth 1; no expression comes twice within or across splits.
Source: lra_benchmarks/data/listops.py of google-research/long-range-arena; the trees have its distribution.

How it is made fast: the shapes of many trees are drawn level by level, without tokens; those of a wrong
length are dropped (with LRA's settings 11 of 12); only then operators and digits are drawn, values computed
from the lowest level up, and positions of tokens from the root down. No loop runs over nodes.

The bytes follow from the settings and the seed alone (see random_draws.py). The test set is made first, then
validation, then training, each from its own stream: another --train leaves the test set as it is.

    splits = generate_splits(ListOpsSettings(), {"train": 96000, "val": 2000, "test": 2000}, seed=0)
    write_tsv(Path("basic_train.tsv"), splits["train"])
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from command_line import InputError
from tasks.random_draws import RandomDraws
from tasks.token_dataset import TokenDataset, concatenate, offsets_of

SYMBOLS = ("<pad>", "<unk>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
UNK_ID, DIGIT_0, FIRST_OPERATOR, CLOSE = 1, 2, 12, 16
MIN, MAX, MED, SM = range(4)

OPERATOR_BYTES = 64  # a byte below this makes an operator: 64 / 256 = LRA's 0.25
TREES_AT_ONCE = 8192
NODES_AT_ONCE = 1 << 24
WINDOW = 1 << 18  # trees looked at to tell that hardly any fits
SCARCE = 10_000  # give up where fewer than one tree in this many brings a new expression

Array = NDArray[np.int64]


@dataclass(frozen=True)
class ListOpsSettings:
    """Which expressions are kept. min_length, max_length: exclusive, in tokens. max_depth: of the deepest
    digit, the root being 1. max_args: of an operator. Raises InputError where no expression can fit."""

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10

    def __post_init__(self) -> None:
        if self.min_length < 0 or self.max_length < self.min_length + 2:
            raise InputError(
                "the shortest and the longest length are exclusive, so --max-length must be at least "
                f"--min-length + 2, got --min-length {self.min_length} and --max-length {self.max_length}"
            )
        if not 1 <= self.max_depth <= 100 or not 2 <= self.max_args <= 1000:
            raise InputError(
                "ListOps needs a depth of 1..100 and 2..1000 arguments, "
                f"got depth {self.max_depth} and {self.max_args} arguments"
            )
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = min(2 + self.max_args * longest, self.max_length)
        if longest <= self.min_length:
            raise InputError(
                f"no expression is longer than {longest} tokens at depth {self.max_depth} with "
                f"{self.max_args} arguments; --min-length {self.min_length} leaves none"
            )

    def fits(self, length: Array) -> NDArray[np.bool_]:
        return (length > self.min_length) & (length < self.max_length)


@dataclass(frozen=True)
class Level:
    """The nodes of one depth, tree after tree and from left to right.

    trees: (t,) the trees that reach this depth. counts: (t,) their nodes here. is_operator: (nodes,) bool.
    arity: (operators,) arguments of each operator; they are, in this order, the nodes of the next level.
    """

    trees: Array
    counts: Array
    is_operator: NDArray[np.bool_]
    arity: Array


def generate_splits(settings: ListOpsSettings, sizes: dict[str, int], seed: int) -> dict[str, TokenDataset]:
    """Labelled expressions for "train", "val" and "test", as many as `sizes` says, none of them twice.

    Tokens are uint8 ids into SYMBOLS. Raises InputError where hardly any tree fits the settings."""
    seen: set[bytes] = set()
    made = {}
    progress: tqdm[Any]
    with tqdm(total=sum(sizes.values()), desc="ListOps", unit=" expressions", disable=None) as progress:
        for name in ("test", "val", "train"):
            made[name] = _generate(settings, sizes[name], RandomDraws(seed, "listops", name), seen, progress)
    return {name: made[name] for name in ("train", "val", "test")}


def _generate(
    settings: ListOpsSettings, size: int, draws: RandomDraws, seen: set[bytes], progress: "tqdm[Any]"
) -> TokenDataset:
    """`size` expressions that are not in `seen`, to which theirs are added."""
    trees_at_once = max(1, min(TREES_AT_ONCE, NODES_AT_ONCE // settings.max_length))
    parts = [TokenDataset(np.zeros(0, np.uint8), np.zeros(1, np.int64), np.zeros(0, np.int64))]
    found = trees = found_before = 0
    while found < size:
        part = _new_only(draw_expressions(settings, trees_at_once, draws), seen, size - found)
        parts.append(part)
        found += len(part)
        progress.update(len(part))
        trees += trees_at_once
        if trees >= WINDOW and found < size:
            if (found - found_before) * SCARCE < trees:
                raise InputError(
                    f"of {trees} random trees only {found - found_before} gave a new expression of more than "
                    f"{settings.min_length} and less than {settings.max_length} tokens; "
                    f"{found} of {size} are made; widen --min-length and --max-length or ask for fewer"
                )
            trees, found_before = 0, found
    return concatenate(parts)


def _new_only(drawn: TokenDataset, seen: set[bytes], limit: int) -> TokenDataset:
    """The first `limit` expressions that are not in `seen`, to which they are added."""
    data, offsets = drawn.tokens.tobytes(), drawn.offsets.tolist()
    new: list[int] = []
    for index in range(len(drawn)):
        if len(new) == limit:
            break
        digest = hashlib.blake2b(data[offsets[index] : offsets[index + 1]], digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            new.append(index)
    return drawn if len(new) == len(drawn) else drawn.take(np.array(new, np.int64))


def draw_expressions(settings: ListOpsSettings, trees: int, draws: RandomDraws) -> TokenDataset:
    """The expressions of a fitting length among `trees` random ones, labelled."""
    levels, lengths = draw_shapes(settings, trees, draws)
    fits = settings.fits(lengths)
    kept = [_keep(level, fits) for level in levels]
    kept = [level for level in kept if len(level.is_operator)]
    symbols = [_draw_symbols(level, draws) for level in kept]
    values, sizes = evaluate(kept, symbols)
    labels = values[0].astype(np.int64) if kept else np.zeros(0, np.int64)
    offsets = offsets_of(lengths[fits])
    return TokenDataset(_lay_out(kept, symbols, sizes, offsets), offsets, labels)


def draw_shapes(settings: ListOpsSettings, trees: int, draws: RandomDraws) -> tuple[list[Level], Array]:
    """The shapes of random trees, level by level, and their lengths (trees,).

    A tree is followed only until it is sure not to fit; its length is then known not to fit, no more."""
    length = np.ones(trees, np.int64)  # of the nodes so far, a node not yet drawn counting 1, its least
    alive = np.arange(trees)
    counts = np.ones(trees, np.int64)
    levels = []
    for depth in range(1, settings.max_depth + 1):
        nodes = int(counts.sum())
        if depth < settings.max_depth:
            is_operator = draws.bytes(nodes) < OPERATOR_BYTES
        else:
            is_operator = np.zeros(nodes, np.bool_)
        operator = np.flatnonzero(is_operator)
        arity = 2 + draws.below(settings.max_args - 1, len(operator))
        levels.append(Level(alive, counts, is_operator, arity))
        before = np.searchsorted(operator, offsets_of(counts))  # (alive + 1,) operators before each tree
        children = np.diff(offsets_of(arity)[before])
        length[alive] += np.diff(before) + children  # an operator is two tokens where it counted one
        follow = (children > 0) & (length[alive] < settings.max_length)
        # The children of a tree that is given up are not drawn: its operators here lose their meaning.
        alive, counts = alive[follow], children[follow]
    return levels, length


def _keep(level: Level, fits: NDArray[np.bool_]) -> Level:
    """The level without the trees that do not fit."""
    kept = fits[level.trees]
    nodes = np.repeat(kept, level.counts)
    return Level(
        level.trees[kept],
        level.counts[kept],
        level.is_operator[nodes],
        level.arity[nodes[level.is_operator]],
    )


def _draw_symbols(level: Level, draws: RandomDraws) -> NDArray[np.uint8]:
    """(nodes,) the operator 0..3 or the digit 0..9 of each node."""
    symbols = np.empty(len(level.is_operator), np.uint8)
    symbols[level.is_operator] = draws.bytes(len(level.arity)) & 3
    symbols[~level.is_operator] = draws.below(10, len(symbols) - len(level.arity))
    return symbols


def evaluate(
    levels: list[Level], symbols: list[NDArray[np.uint8]]
) -> tuple[list[NDArray[np.uint8]], list[Array]]:
    """Value 0..9 and length in tokens of each node's sub-expression, level by level, from the lowest up."""
    values: list[NDArray[np.uint8]] = []
    sizes: list[Array] = []
    for level, symbol in zip(reversed(levels), reversed(symbols), strict=True):
        value, size = symbol.copy(), np.ones(len(symbol), np.int64)
        if len(level.arity):
            size[level.is_operator] = 2 + np.add.reduceat(sizes[0], offsets_of(level.arity)[:-1])
            value[level.is_operator] = apply_operators(symbol[level.is_operator], level.arity, values[0])
        values.insert(0, value)
        sizes.insert(0, size)
    return values, sizes


def apply_operators(
    operators: NDArray[np.uint8], arity: Array, arguments: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """(operators,) the value of each operator of its arguments, which lie one after the other."""
    starts = offsets_of(arity)[:-1]
    value = np.empty(len(operators), np.uint8)
    reduced: dict[int, NDArray[np.integer]] = {
        MIN: np.minimum.reduceat(arguments, starts),
        MAX: np.maximum.reduceat(arguments, starts),
        SM: np.add.reduceat(arguments, starts, dtype=np.int64) % 10,
    }
    for operator, values in reduced.items():
        chosen = operators == operator
        value[chosen] = values[chosen]
    median = np.flatnonzero(operators == MED)
    value[median] = _medians(arguments, starts[median], arity[median])
    return value


def _medians(arguments: NDArray[np.uint8], starts: Array, arity: Array) -> NDArray[np.uint8]:
    """(lists,) the floor of the median of each list."""
    column = np.arange(arity.max(initial=1))
    beyond = column >= arity[:, None]  # (lists, longest)
    rows = arguments[np.where(beyond, 0, starts[:, None] + column)]
    rows[beyond] = 255  # sorts behind the digits
    rows.sort(axis=1)
    row = np.arange(len(rows))
    return (rows[row, (arity - 1) // 2] + rows[row, arity // 2]) // 2


def _lay_out(
    levels: list[Level], symbols: list[NDArray[np.uint8]], sizes: list[Array], offsets: Array
) -> NDArray[np.uint8]:
    """(total,) token ids: each node's tokens at its place, from the roots down."""
    tokens = np.empty(offsets[-1], np.uint8)
    position = offsets[:-1]
    for depth, (level, symbol) in enumerate(zip(levels, symbols, strict=True)):
        leaf = ~level.is_operator
        tokens[position[leaf]] = symbol[leaf] + DIGIT_0
        opens = position[level.is_operator]
        tokens[opens] = symbol[level.is_operator] + FIRST_OPERATOR
        tokens[opens + sizes[depth][level.is_operator] - 1] = CLOSE
        if len(level.arity):
            # A node stands behind its parent's opening and its elder siblings.
            before = offsets_of(sizes[depth + 1])[:-1]
            first = offsets_of(level.arity)[:-1]
            position = before + np.repeat(opens + 1 - before[first], level.arity)
    return tokens
