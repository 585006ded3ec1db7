"""Tasks made of draws: labels by a slow solver, draws as defined, streams apart, bad settings refused."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from attention_kernels import use_backend
from command_line import InputError
from data_pipeline import DataSettings, load_task
from experiment.models import MODELS, Model, build
from tasks.generated_tasks import GENERATED
from tasks.random_draws import RandomDraws
from tasks.task_data import TaskData
from tasks.token_dataset import IGNORED, TokenDataset
from train_and_evaluate import ModelSettings, TransformerClassifier

SETTINGS = DataSettings(max_length=24, train_size=17, val_size=15, test_size=16)
Example = list[Any]  # ids, or lists of ids


def examples(split: TokenDataset) -> list[tuple[Example, list[int]]]:
    spans = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    return [(split.tokens[a:b].tolist(), split.labels[a:b].tolist()) for a, b in spans]


def splits(task: TaskData) -> list[TokenDataset]:
    return [task.val, task.test, *task.longer_tests.values()]


# Solvers, in plain Python


def recalled(tokens: Example) -> list[int]:
    pairs = len(tokens) // 3
    memory = {tokens[2 * i]: tokens[2 * i + 1] - 33 for i in range(pairs)}
    return [IGNORED] * (2 * pairs) + [memory[key] for key in tokens[2 * pairs :]]


def held(tokens: Example) -> list[int]:
    found, last = [], IGNORED
    for value, flag in tokens:
        last = value - 1 if flag == 18 else last
        found.append(last)
    return found


def last_written(tokens: Example) -> list[int]:
    memory: dict[int, int] = {}
    found: list[int] = []
    for token, after in zip(tokens, [*tokens[1:], 0], strict=True):
        is_read = token <= 8 and after <= 8
        if token <= 8 and after > 8:
            memory[token] = after - 9
        found.append(memory[token] if is_read else IGNORED)
    return found


def label_of_nearest(tokens: Example) -> list[int]:
    points = [(divmod(place - 1, 16), mark - 257) for place, mark in tokens if mark != 265]
    found = []
    for place, mark in tokens:
        near = sorted((math.dist(divmod(place - 1, 16), point), label) for point, label in points)
        tied = len(near) > 1 and near[0][0] == near[1][0]
        found.append(IGNORED if mark != 265 or tied else near[0][1])
    return found


def looked_up(tokens: Example) -> list[int]:
    memory = {key: mark - 257 for key, mark in tokens if mark != 265}
    return [memory[key] if mark == 265 else IGNORED for key, mark in tokens]


@pytest.mark.parametrize(
    ("name", "solve", "least"),
    [
        *(("recall", recalled, 3), ("hold", held, 1), ("latest", last_written, 3)),
        *(("nearest", label_of_nearest, 3), ("lookup", looked_up, 2)),
    ],
)
def test_every_label_is_what_a_slow_solver_finds_at_every_length_also_the_shortest(
    name: str, solve: Callable[[Example], list[int]], least: int
) -> None:
    task = load_task(name, SETTINGS)
    shortest = load_task(name, replace(SETTINGS, max_length=least, train_size=40)).train
    for split in (task.train_of(5, 2), *splits(task), shortest):
        assert all(labels == solve(tokens) for tokens, labels in examples(split))
    assert all(set(labels) != {IGNORED} for _, labels in examples(shortest))
    longer = {length: set(part.lengths) for length, part in task.longer_tests.items()}
    assert longer == {str(24 * times): {24 * times} for times in ((4, 16) if name == "hold" else (2, 4))}


# Draws as defined


def drawn(name: str, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    return GENERATED[name].draw(RandomDraws(3, "test of a draw"), count, length)


def assert_even(numbers: np.ndarray, kinds: int) -> None:
    """Each of 0..kinds - 1 as often as the others, to within five standard deviations."""
    counts = np.bincount(numbers.ravel(), minlength=kinds)
    assert len(counts) == kinds
    assert np.abs(counts - counts.mean()).max() < 5 * math.sqrt(counts.mean())


def all_different(rows: np.ndarray) -> bool:
    return all(len(set(row)) == len(row) for row in rows.tolist())


def test_gaps_of_hold_are_log_uniform_from_1_to_the_length() -> None:
    length = 60
    tokens, labels = drawn("hold", 4000, length)
    first = (tokens[..., 1] == 18).argmax(1)  # the first gap is cut by no end
    expected = 4000 * np.diff(np.log(np.arange(1, length + 2))) / math.log(length + 1)
    assert np.abs(np.bincount(first, minlength=length) - expected).max() < 5 * math.sqrt(expected.max())
    assert_even(tokens[..., 0] - 1, 16)
    assert ((labels == IGNORED).sum(1) == first).all()


def test_latest_writes_and_reads_evenly_and_reads_what_any_earlier_write_was_of() -> None:
    length = 30
    tokens, labels = drawn("latest", 6000, length)
    reads, values = labels != IGNORED, tokens > 8
    writes = np.roll(values, -1, 1) & ~values
    begins = writes[:, 1:-2] | reads[:, 1:-2]  # but for the ends, which are fixed
    assert_even(writes[:, 1:-2][begins].astype(int), 2)
    assert writes[:, 0].all() and reads[:, -1].all()
    assert_even(tokens[writes] - 1, 8)
    assert_even(tokens[values] - 9, 16)
    two = tokens[reads[:, 4] & writes[:, 2] & (tokens[:, 0] != tokens[:, 2])]  # two writes before a read
    assert_even((two[:, 4] == two[:, 2]).astype(int), 2)


def test_nearest_has_different_points_and_even_labels_and_queries_and_few_ties() -> None:
    tokens, labels = drawn("nearest", 2000, 48)
    places = tokens[..., 0] - 1
    assert all_different(places[:, :16]) and (tokens[:, 16:, 1] == 265).all()
    assert_even(places[:, :16], 256)
    assert_even(places[:, 16:], 256)
    assert_even(tokens[:, :16, 1] - 257, 8)
    assert 0.02 < (labels[:, 16:] == IGNORED).mean() < 0.3


@pytest.mark.parametrize("name", ["recall", "lookup"])
def test_recall_and_lookup_ask_once_for_each_of_their_different_keys_in_any_order(name: str) -> None:
    tokens, labels = drawn(name, 3000, 24)
    if name == "recall":
        keys, asked, kinds, answers = tokens[:, :16:2], tokens[:, 16:], 32, 32
    else:
        keys, asked, kinds, answers = tokens[:, :12, 0], tokens[:, 12:, 0], 256, 8
    pairs = keys.shape[1]
    assert all_different(keys) and np.array_equal(np.sort(keys), np.sort(asked))
    assert_even(keys - 1, kinds)
    assert_even(labels[:, -pairs:], answers)
    assert_even((keys == asked[:, :1]).argmax(1), pairs)


# Streams


@pytest.mark.parametrize("name", GENERATED)
def test_training_data_differ_by_epoch_and_seed_and_from_what_is_tested_and_can_be_drawn_again(
    name: str,
) -> None:
    task, again = load_task(name, SETTINGS), load_task(name, SETTINGS)
    drawn = [task.train_of(seed, epoch) for seed, epoch in ((0, 1), (0, 2), (1, 1))]
    seen = [repr(example) for part in (*drawn, *splits(task)) for example in examples(part)]
    assert len(set(seen)) == len(seen)
    assert examples(again.train_of(0, 2)) == examples(drawn[1])


def test_the_bytes_are_those_of_every_other_machine_and_hash_seed() -> None:  # each process has its own
    digest = hashlib.sha256()
    for task in (load_task(name, SETTINGS) for name in GENERATED):
        for part in (task.train_of(5, 2), *splits(task)):
            digest.update(part.tokens.astype("<u2").tobytes() + part.labels.astype("<i8").tobytes())
    assert digest.hexdigest()[:32] == "01c8dec04f696738a2840cc4bca873a7"


# What an encoder sees


def encoder_of(model: str, task: TaskData) -> TransformerClassifier:
    settings = ModelSettings(embed_dim=16, num_heads=2, feed_forward_dim=24, dropout=0.0)
    return build(Model.parse(model), settings, task.vocab_size, task.num_classes, task.form).eval()


ENCODERS = [("latest", model, backend) for model in MODELS for backend in ("dense", "tiled", "native")]
ENCODERS += [("hold", "conventional", "sdpa"), ("hold", "torch.nn:MultiheadAttention", "dense")]


@pytest.mark.parametrize(("name", "model", "backend"), ENCODERS)
def test_a_later_token_changes_no_earlier_logit(name: str, model: str, backend: str) -> None:
    task = load_task(name, DataSettings(max_length=150, train_size=1, val_size=1, test_size=1))
    encoder = encoder_of(model, task)
    tokens = torch.from_numpy(task.val.tokens.astype(np.int64))[None]
    changed = tokens.clone()
    changed[:, 77:] = 1 + tokens[:, 77:] % 5
    padding = torch.zeros(1, 150, dtype=torch.bool)
    with use_backend(backend):
        before, after = encoder(tokens, padding), encoder(changed, padding)
    torch.testing.assert_close(before[:, :77], after[:, :77])
    assert not torch.allclose(before[:, 77:], after[:, 77:])


@pytest.mark.parametrize(("name", "model"), [("nearest", "gravitational"), ("lookup", "conventional")])
def test_a_set_has_no_order(name: str, model: str) -> None:
    task = load_task(name, SETTINGS)
    tokens = torch.from_numpy(task.val.example(0).astype(np.int64))[None]
    order = torch.from_numpy(RandomDraws(1, "order").order(24))
    padding = torch.zeros(1, 24, dtype=torch.bool)
    encoder = encoder_of(model, task)
    torch.testing.assert_close(encoder(tokens[:, order], padding), encoder(tokens, padding)[:, order])


# Bad input


@pytest.mark.parametrize(
    ("name", "length", "legal"),
    [
        *(("recall", 22, "3 from 3 to 96"), ("recall", 99, "3 from 3 to 96")),
        *(("latest", 2, "1 from 3 to 65,536"), ("nearest", 771, "3 from 3 to 768")),
        ("lookup", 5, "2 from 2 to 512"),
    ],
)
def test_a_length_that_a_task_has_not_is_refused(name: str, length: int, legal: str) -> None:
    with pytest.raises(InputError, match=f"{name}: --max-length must be a multiple of {legal}, got {length}"):
        load_task(name, DataSettings(max_length=length))
