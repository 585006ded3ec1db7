"""Pathfinder of the Long Range Arena (LRA): are two marked points joined by a dashed path? Made here.

    splits = cached_splits(default_cache_folder(), {"train": 40_000, "val": 4_000, "test": 4_000}, seed=0)
    splits["test"].example(0).reshape(32, 32)      # grey values 0..255

A picture has two long dashed paths among short ones. Two ends of long paths are marked by discs: the two of
one path (joined, label 1), or one of each (not joined, label 0). After Linsley et al. 2018 ("Learning
long-range spatial dependencies with horizontal gated recurrent units"), Kim et al. 2020 and Tay et al. 2021
(LRA, 32 x 32 pixels); lengths, gaps and distances are our own.

What must not tell the label: all paths are laid before it is drawn, so both kinds have the same paths,
and pictures are taken in pairs, one joined and one not, with discs equally far apart to half a pixel.
What makes it decidable: two paths, and two stretches of one, stay `APART` pixels from one another, which is
more than the gap between two dashes.

Places are integers in 1/256 pixel and directions a table of 256, so that the bytes follow from the seed alone
(see random_draws.py). The test set is made first, then validation, then training, each from its own stream.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tasks.array_cache import Arrays, cached_arrays
from tasks.random_draws import RandomDraws
from tasks.token_dataset import TokenDataset, offsets_of

SIDE = 32  # pixels
PIXELS = SIDE * SIDE
CLASS_NAMES = ("not joined", "joined")
UNIT = 256  # of a pixel's side, in which places are counted
DASH, GAP = 4, 4  # steps of half a pixel
LONG, SHORT = 6, 2  # dashes of a path
SHORT_PATHS = 8  # at most: those that find room
SHARPEST_TURN = 6  # 1/256 of a full turn, at each step
BORDER = 2 * UNIT + UNIT // 2
APART = 4.5  # pixels between the lines of two paths, to within half a pixel
DISC_RADIUS, DASH_WIDTH = 1.6, 1.0  # pixels
DISCS_APART = 6  # pixels at least
LAYOUTS_AT_ONCE = 512
CANDIDATES = 24  # paths drawn for one that fits
SPLITS = ("train", "val", "test")
VERSION = 1  # part of the cache's keys: to be raised when other pictures are made

CELL = UNIT // 2  # of the grid that tells where there is no room
EDGE = 10  # cells around it that no path enters, so that what is taken near a border has a place
CELLS = SIDE * UNIT // CELL + 2 * EDGE
_ANGLES = np.arange(256) * (2 * np.pi / 256)
_STEPS = np.rint(np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1) * (UNIT / 2)).astype(np.int64)
_AROUND = np.indices([2 * EDGE + 1] * 2).reshape(2, -1).T - EDGE
_AROUND = _AROUND[(_AROUND**2).sum(1) * CELL**2 <= (APART * UNIT) ** 2] @ np.array([CELLS, 1])

Array = NDArray[np.int64]


def cached_splits(cache: Path, sizes: dict[str, int], seed: int) -> dict[str, TokenDataset]:
    """`generate_splits`, which makes some 500 pictures a second, kept in the cache."""
    key = "-".join(["pathfinder", *(str(sizes[name]) for name in SPLITS), f"seed{seed}", f"v{VERSION}"])

    def make() -> Arrays:
        splits = generate_splits(sizes, seed)
        return {name: splits[name].tokens.reshape(-1, PIXELS) for name in SPLITS}

    kept = cached_arrays(cache, key, make)
    return {name: _dataset(kept[name]) for name in SPLITS}


def generate_splits(sizes: dict[str, int], seed: int) -> dict[str, TokenDataset]:
    """Labelled pictures for "train", "val" and "test", as many as `sizes` says, none of them twice."""
    seen: set[bytes] = set()
    made = {}
    progress: tqdm[Any]
    with tqdm(total=sum(sizes.values()), desc="Pathfinder", unit=" pictures", disable=None) as progress:
        for name in reversed(SPLITS):
            made[name] = _generate(sizes[name], RandomDraws(seed, "pathfinder", name), seen, progress)
    return {name: made[name] for name in SPLITS}


def _generate(size: int, draws: RandomDraws, seen: set[bytes], progress: "tqdm[Any]") -> TokenDataset:
    """`size` pictures that are not in `seen`, to which theirs are added; joined and not joined in turn."""
    parts = [np.zeros((0, PIXELS), np.uint8)]
    found = 0
    while found < size:
        strokes, marked = draw_pairs(LAYOUTS_AT_ONCE, draws)
        pairs = render(strokes, marked).reshape(-1, 2 * PIXELS)
        new = [index for index, pair in enumerate(pairs) if _is_new(pair.tobytes(), seen)]
        pictures = pairs[new].reshape(-1, PIXELS)[: size - found]
        parts.append(pictures)
        found += len(pictures)
        progress.update(len(pictures))
    return _dataset(np.concatenate(parts))


def _dataset(grey: NDArray[np.uint8]) -> TokenDataset:
    """Pictures (n, 1024), of which each second one is not joined."""
    return TokenDataset(grey.ravel(), offsets_of([PIXELS] * len(grey)), 1 - np.arange(len(grey)) % 2)


def _is_new(pair: bytes, seen: set[bytes]) -> bool:
    """Whether neither picture of a pair was seen; both are then."""
    half = len(pair) // 2
    digests = {hashlib.blake2b(part, digest_size=16).digest() for part in (pair[:half], pair[half:])}
    is_new = len(digests) == 2 and not digests & seen
    seen |= digests
    return is_new


def draw_pairs(layouts: int, draws: RandomDraws) -> tuple[Array, Array]:
    """Pictures of `layouts` random ones of which one joined and one not have their discs equally far apart.

    Returns the dashes' ends (pictures, dashes, 2, 2), -1 where there is none, and the discs (pictures, 2, 2),
    as (x, y) in 1/256 pixel; the joined ones stand at even places, each before its partner."""
    strokes, ends = draw_layouts(layouts, draws)
    joined = draws.below(3, len(ends)) == 0  # fewer: the ends of one path are rarely very near or far
    first, second, path = draws.below(2, len(ends)), draws.below(2, len(ends)), draws.below(2, len(ends))
    row = np.arange(len(ends))
    of_one = ends[row, path]  # (pictures, 2 ends, 2)
    of_two = np.stack([ends[row, 0, first], ends[row, 1, second]], 1)
    marked = np.where(joined[:, None, None], of_one, of_two)
    far = np.sqrt(((marked[:, 0] - marked[:, 1]) ** 2).sum(-1)).astype(np.int64) // (UNIT // 2)
    apart = np.flatnonzero(far >= 2 * DISCS_APART)
    pairs = apart[np.stack(_equal_pairs(far[apart], joined[apart]), 1)]
    pairs = pairs[draws.order(len(pairs))].ravel()
    return strokes[pairs], marked[pairs]


def _equal_pairs(value: Array, kind: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Positions of the one kind and of the other, with equal values, each at most once."""
    positions: list[Array] = []
    keys: list[Array] = []
    for members in (np.flatnonzero(kind), np.flatnonzero(~kind)):
        members = members[np.argsort(value[members], kind="stable")]
        ordered = value[members]
        rank = np.arange(len(members)) - np.searchsorted(ordered, ordered)  # among its equals
        positions.append(members)
        keys.append(ordered * (len(value) + 1) + rank)
    _, one, other = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    return positions[0][one], positions[1][other]


def draw_layouts(count: int, draws: RandomDraws) -> tuple[Array, Array]:
    """The paths of at most `count` pictures, before any label: two long ones, then short ones where there is
    room. Returns the dashes' ends as `draw_pairs`, and the ends of the long paths (pictures, 2, 2, 2)."""
    no_room = np.zeros((count, CELLS * CELLS), np.bool_)
    strokes: list[Array] = []
    ends: list[Array] = []
    for dashes in (LONG, LONG, *[SHORT] * SHORT_PATHS):
        path, fits = _lay_path(no_room, dashes, draws)
        if dashes == LONG:
            no_room, path = no_room[fits], path[fits]
            strokes, ends = [part[fits] for part in strokes], [part[fits] for part in ends]
            fits = fits[fits]
            ends.append(path[:, [0, -1]])
        _take_room(no_room, path, fits)
        starts = np.arange(dashes) * (DASH + GAP)
        dashes_of_path = np.stack([path[:, starts], path[:, starts + DASH]], 2)
        strokes.append(np.where(fits[:, None, None, None], dashes_of_path, -1))
    return np.concatenate(strokes, 1), np.stack(ends, 1)


def _lay_path(no_room: NDArray[np.bool_], dashes: int, draws: RandomDraws) -> tuple[Array, NDArray[np.bool_]]:
    """For each picture the first of some random paths (pictures, steps + 1, 2) that fits, and whether any
    does: within the border, where there is room, and not near itself."""
    pictures, total = len(no_room), len(no_room) * CANDIDATES
    turns = draws.below(2 * SHARPEST_TURN + 1, total * dashes).reshape(total, dashes) - SHARPEST_TURN
    turns = np.repeat(turns, DASH + GAP, axis=1)[:, :-GAP]
    headings = (draws.below(256, total)[:, None] + np.cumsum(turns, 1)) % 256
    start = BORDER + draws.below(SIDE * UNIT - 2 * BORDER, 2 * total).reshape(total, 1, 2)
    path = np.concatenate([start, start + np.cumsum(_STEPS[headings], 1)], 1)
    fits = np.asarray(((path >= BORDER) & (path < SIDE * UNIT - BORDER)).all((1, 2)))
    inside = np.flatnonzero(fits)
    fits[inside] = ~no_room[inside[:, None] // CANDIDATES, _cells(path[inside])].any(1)
    inside = np.flatnonzero(fits)
    fits[inside] = ~_comes_near_itself(path[inside])
    by_picture = fits.reshape(pictures, CANDIDATES)
    chosen = np.arange(pictures) * CANDIDATES + by_picture.argmax(1)
    return path[chosen], np.asarray(by_picture.any(1))


def _comes_near_itself(path: Array) -> NDArray[np.bool_]:
    """Whether two places of a path, twice `APART` from one another along it, are nearer than `APART`."""
    steps = int(4 * APART)
    near = np.zeros(len(path), np.bool_)
    for later in range(steps, path.shape[1]):
        away = ((path[:, later:] - path[:, :-later]) ** 2).sum(-1)
        near |= (away < (APART * UNIT) ** 2).any(1)
    return near


def _take_room(no_room: NDArray[np.bool_], path: Array, fits: NDArray[np.bool_]) -> None:
    """Mark the cells within `APART` of each picture's path."""
    picture = np.flatnonzero(fits)
    cell = _cells(path[picture, ::2])  # each second: a step is as long as a cell
    no_room[picture[:, None, None], cell[:, :, None] + _AROUND] = True


def _cells(path: Array) -> Array:
    """(paths, places) the position in the flattened grid of the cell that a place lies in."""
    cell = path // CELL + EDGE
    return cell[..., 1] * CELLS + cell[..., 0]


def render(strokes: Array, marked: Array, scale: int = 1) -> NDArray[np.uint8]:
    """(pictures, SIDE * scale, SIDE * scale) grey values: white dashes and discs with soft edges on black."""
    picture = np.zeros((len(strokes), SIDE * scale, SIDE * scale))
    for dash in np.moveaxis(strokes, 1, 0):
        drawn = np.flatnonzero(dash[:, 0, 0] >= 0)
        _draw(picture, drawn, dash[drawn] * (scale / UNIT), DASH_WIDTH * scale / 2)
    for disc in np.moveaxis(marked, 1, 0):
        ends = np.stack([disc, disc], 1) * (scale / UNIT)
        _draw(picture, np.arange(len(picture)), ends, DISC_RADIUS * scale)
    return np.rint(picture * 255).astype(np.uint8)


def _draw(picture: NDArray[Any], index: Array, ends: NDArray[Any], radius: float) -> None:
    """Brighten the pixels of pictures[index] within `radius` of the straight line between two ends
    (index, 2, 2), in pixels; at the edge a pixel is as bright as its centre lies inside."""
    start, along = ends[:, 0], ends[:, 1] - ends[:, 0]
    reach = int(np.ceil(np.abs(along).max(initial=0) / 2 + radius + 1))
    middle = np.floor(ends.mean(1)).astype(np.int64)
    offsets = np.arange(-reach, reach + 1)
    x, y = (middle[:, axis, None] + offsets for axis in (0, 1))
    x, y = x[:, None, :], y[:, :, None]
    right, down = x + 0.5 - start[:, 0, None, None], y + 0.5 - start[:, 1, None, None]
    run, fall = along[:, 0, None, None], along[:, 1, None, None]
    share = ((right * run + down * fall) / np.maximum(run**2 + fall**2, 1e-9)).clip(0, 1)
    away = np.sqrt((right - share * run) ** 2 + (down - share * fall) ** 2)
    light = (radius + 0.5 - away).clip(0, 1)
    last = picture.shape[1] - 1
    light[np.broadcast_to((x < 0) | (x > last) | (y < 0) | (y > last), light.shape)] = 0
    place = index[:, None, None], y.clip(0, last), x.clip(0, last)
    np.maximum.at(picture, place, light)
