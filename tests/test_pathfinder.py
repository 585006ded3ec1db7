"""Pathfinder: what joins two discs is a path, nothing else tells, and the bytes follow from the seed."""

import hashlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline import DataSettings, load_task
from tasks import pathfinder
from tasks.pathfinder import PIXELS, SIDE, cached_splits, draw_pairs, generate_splits, render
from tasks.random_draws import RandomDraws

SIZES, FEW = {"train": 61, "val": 20, "test": 31}, {"train": 9, "val": 3, "test": 4}
SCALE = 3
AS_IT_IS, LARGE = (70, 2.25), (128, 5.0)  # what is lit, and the pixels between two that are of one path

Pictures = NDArray[np.uint8]


def draws(seed: int) -> RandomDraws:
    return RandomDraws(seed, "test of pathfinder")


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    """Some hundred pairs: a joined picture, then one that is not."""
    return render(*draw_pairs(1024, draws(4)))


def discs(picture: Pictures) -> list[NDArray[np.int64]]:
    """The places (n, 2) of the squares of four bright pixels, which only discs have, disc by disc."""
    bright = picture >= 170
    square = np.argwhere(bright[:-1, :-1] & bright[1:, :-1] & bright[:-1, 1:] & bright[1:, 1:])
    near = np.hypot(*(square - square[0]).T) < 4
    return [square[near], square[~near]]


def is_joined(picture: Pictures, drawn_large: Pictures | None = None) -> bool:
    """Whether one disc is reached from the other over lit pixels, each near the one before; on the
    picture itself, or on the same one drawn `SCALE` times as large."""
    scale, lit_from, gap = (1, *AS_IT_IS) if drawn_large is None else (SCALE, *LARGE)
    first, second = ((disc.mean(0) + 1) * scale - 0.5 for disc in discs(picture))
    lit = np.argwhere((picture if drawn_large is None else drawn_large) >= lit_from)
    near = ((lit[:, None] - lit) ** 2).sum(-1) <= gap**2
    reached = np.hypot(*(lit - first).T) <= scale
    while (further := near[reached].any(0)).sum() > reached.sum():
        reached = further
    return bool((reached & (np.hypot(*(lit - second).T) <= scale)).any())


def test_a_solver_that_sees_the_strokes_large_finds_every_label_and_needs_the_path() -> None:
    strokes, marked = draw_pairs(256, draws(8))
    both = zip(render(strokes, marked), render(strokes, marked, SCALE), strict=True)
    assert [is_joined(picture, large) for picture, large in both] == [True, False] * (len(strokes) // 2)
    strokes[::2, [2, 8]] = -1  # the third dash of both long paths
    assert not any(is_joined(picture) for picture in render(strokes, marked)[::2])


def test_a_solver_that_sees_only_the_pixels_finds_nearly_every_label(pictures: Pictures) -> None:
    labels = np.arange(len(pictures)) % 2 == 0
    assert len(pictures) > 250
    assert np.mean([is_joined(picture) for picture in pictures] == labels) > 0.99


def statistics(pictures: Pictures) -> NDArray[np.float64]:
    """(n, features) what can be counted without following a path."""
    centres = np.array([[disc.mean(0) for disc in discs(picture)] for picture in pictures])
    centre, grey = centres.mean(1) - SIDE / 2, pictures.astype(float)
    found = [grey, grey > 0, grey > 127, grey[:, 8:24, 8:24]]
    found += [np.abs(np.diff(grey, axis=axis)) for axis in (1, 2)]
    means = [part.mean((1, 2)) for part in found]
    return np.stack([*means, np.hypot(*(centres[:, 0] - centres[:, 1]).T), np.hypot(*centre.T)], 1)


def test_what_can_be_counted_does_not_tell_the_label(pictures: Pictures) -> None:
    features = statistics(pictures)
    features = (features - features.mean(0)) / features.std(0)
    features = np.concatenate([features, features**2, np.ones((len(features), 1))], 1)
    labels = 1 - 2.0 * (np.arange(len(features)) % 2)
    right = 0
    for fold in range(5):  # pairs stay together
        held = np.arange(len(features)) // 2 % 5 == fold
        weights = np.linalg.lstsq(features[~held], labels[~held], rcond=None)[0]
        right += int(((features[held] @ weights > 0) == (labels[held] > 0)).sum())
    assert 0.35 < right / len(features) < 0.65


def test_the_discs_of_a_pair_are_equally_far_apart_and_not_too_near() -> None:
    _, marked = draw_pairs(512, draws(6))
    far = np.hypot(*(marked[:, 0] - marked[:, 1]).T) / pathfinder.UNIT
    assert np.abs(far[::2] - far[1::2]).max() < 0.5 and far.min() >= pathfinder.DISCS_APART
    assert far[: len(far) // 2].max() > 15 and far[len(far) // 2 :].max() > 15  # in no order


def test_splits_are_balanced_and_disjoint_and_those_of_every_other_machine() -> None:
    splits = generate_splits(SIZES, seed=0)
    for name, size in SIZES.items():
        assert len(splits[name]) == size and (splits[name].lengths == PIXELS).all()
        assert splits[name].labels.sum() == (size + 1) // 2
    rows = [row.tobytes() for split in splits.values() for row in split.tokens.reshape(-1, PIXELS)]
    assert len(set(rows)) == sum(SIZES.values())
    digest = hashlib.sha256(splits["test"].tokens[: 8 * PIXELS].tobytes()).hexdigest()
    assert digest[:32] == "80bc8d06872dde73fff3076fa00eea22"


def test_pictures_follow_from_the_seed_and_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Mock(side_effect=generate_splits)
    monkeypatch.setattr(pathfinder, "generate_splits", made)
    monkeypatch.setattr(pathfinder, "LAYOUTS_AT_ONCE", 64)
    first, again = (cached_splits(tmp_path, FEW, seed=0) for _ in range(2))
    assert made.call_count == 1
    for name in FEW:
        np.testing.assert_array_equal(first[name].tokens, again[name].tokens)
        np.testing.assert_array_equal(first[name].labels, again[name].labels)
    more, another = cached_splits(tmp_path, FEW | {"train": 20}, seed=0), cached_splits(tmp_path, FEW, seed=1)
    np.testing.assert_array_equal(first["test"].tokens, more["test"].tokens)
    np.testing.assert_array_equal(first["train"].tokens, more["train"].tokens[: 9 * PIXELS])
    assert not np.array_equal(first["test"].tokens, another["test"].tokens)


def test_the_task_has_a_token_for_each_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder, "LAYOUTS_AT_ONCE", 64)
    settings = DataSettings(cache_dir=str(tmp_path), train_size=12, val_size=4, test_size=6, data_seed=1)
    task = load_task("pathfinder", settings)
    assert [len(split) for split in (task.train, task.val, task.test)] == [12, 4, 6]
    assert (task.vocab_size, task.num_classes) == (257, 2)
    assert task.train.tokens.min() == 1 and task.train.tokens.max() == 256
    assert [task.symbols(token) for token in (0, 1, 256)] == ["<pad>", "0", "255"]
    first = (task.val.example(0) - 1).astype(np.uint8).reshape(SIDE, SIDE)
    assert task.class_names[task.val.labels[0]] == "joined" and is_joined(first)
