"""The task of bytes: windows of its own split, the byte that follows, nothing of another split."""

from typing import Any

import numpy as np
import pytest

from command_line import InputError
from data_pipeline import DataSettings
from tasks.byte_windows import bytes_task
from tasks.random_draws import RandomDraws
from tasks.task_data import TaskData
from tasks.token_dataset import TokenDataset


def texts(split: str, first: int) -> list[bytes]:
    """Of letters that no other split has."""
    draws = RandomDraws(0, split)
    return [bytes((first + draws.below(20, 30 + number)).astype(np.uint8)) for number in range(12)]


TEXTS = {split: texts(split, first) for split, first in (("train", 65), ("val", 97), ("test", 200))}


def make_task(given: dict[str, list[bytes]] | None = None, **settings: Any) -> TaskData:
    values = {"max_length": 20, "train_size": 40, "val_size": 9, "test_size": 11} | settings
    return bytes_task(TEXTS | (given or {}), DataSettings(**values), {"source": "made up"})


def windows(split: TokenDataset) -> list[bytes]:
    """Each window with the byte after it."""
    found = []
    for a, b in zip(split.offsets[:-1], split.offsets[1:], strict=True):
        ids, labels = split.tokens[a:b].astype(int) - 1, split.labels[a:b]
        assert ids[1:].tolist() == labels[:-1].tolist()
        found.append(bytes([*ids.tolist(), int(labels[-1])]))
    return found


def test_windows_are_of_their_split_joined_by_zero_bytes_and_ask_for_the_byte_that_follows() -> None:
    task = make_task()
    for name, size in (("train", 40), ("val", 9), ("test", 11)):
        found, stream = windows(getattr(task, name)), b"\0".join(TEXTS[name])
        assert len(found) == size and all(len(window) == 21 and window in stream for window in found)
    assert any(0 in window for window in windows(task.train))
    assert list(task.longer_tests) == ["40", "320"]
    assert all(len(window) == 321 for window in windows(task.longer_tests["320"]))
    assert (task.vocab_size, task.num_classes, task.form.metric) == (257, 256, "bits_per_byte")
    assert task.form.causal and task.form.positions and task.symbols(66) == "A" == task.class_names[65]


def test_every_place_of_the_stream_is_as_likely_the_first_and_the_last_too() -> None:
    task = make_task({"train": [b"abcdefg"], "val": [b"hijklmnop"]}, max_length=4, train_size=3000)
    starts, counts = np.unique(windows(task.train), return_counts=True)
    assert starts.tolist() == [b"abcde", b"bcdef", b"cdefg"] and np.abs(counts - 1000).max() < 130


def test_training_windows_are_drawn_anew_each_epoch_and_the_others_are_fixed() -> None:
    task, again = make_task(), make_task()
    epochs = [windows(task.train_of(seed, epoch)) for seed, epoch in ((0, 1), (0, 2), (1, 1))]
    assert epochs[0] != epochs[1] and epochs[0] != epochs[2]
    assert epochs[1] == windows(again.train_of(0, 2))
    sums = [one.provenance["sha256"] for one in (task, again, make_task(data_seed=1))]  # of what is tested
    assert sums[0] == sums[1] != sums[2]


def test_a_text_of_the_test_split_is_in_no_other() -> None:
    copied = TEXTS["test"][3]
    given = {"train": [*TEXTS["train"], copied], "val": [copied, *TEXTS["val"]]}
    assert make_task(given).provenance["bytes"] == make_task().provenance["bytes"]


def test_windows_that_do_not_fit_are_refused_and_tests_that_do_not_are_left_out() -> None:
    shortest = len(b"\0".join(TEXTS["train"]))
    assert list(make_task(max_length=shortest - 1).longer_tests) == []
    with pytest.raises(InputError, match=f"--max-length must be below a split's {shortest} bytes, got"):
        make_task(max_length=shortest)
