"""Tasks made of draws: labels by a slow solver, streams that differ, bad settings refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from command_line import InputError
from data_pipeline import TASKS, DataSettings, load_task
from experiment.models import MODELS, Model, build
from tasks.token_dataset import IGNORED, TokenDataset
from train_and_evaluate import ModelSettings

SETTINGS = DataSettings(max_length=21, train_size=7, val_size=5, test_size=6)
GENERATED = ("recall", "hold")


def examples(split: TokenDataset) -> list[tuple[list, list]]:
    spans = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    return [(split.tokens[a:b].tolist(), split.labels[a:b].tolist()) for a, b in spans]


def recalled(tokens: list[int]) -> list[int]:
    pairs = len(tokens) // 3
    memory = {tokens[2 * i]: tokens[2 * i + 1] - 33 for i in range(pairs)}
    return [IGNORED] * (2 * pairs) + [memory[key] for key in tokens[2 * pairs :]]


def held(tokens: list[list[int]]) -> list[int]:
    found, last = [], IGNORED
    for value, flag in tokens:
        last = value - 1 if flag == 18 else last
        found.append(last)
    return found


@pytest.mark.parametrize(("name", "solve"), [("recall", recalled), ("hold", held)])
def test_every_label_is_what_a_slow_solver_finds(name: str, solve: Callable[[list[Any]], list[int]]) -> None:
    task = load_task(name, SETTINGS)
    for split in (task.train, task.val, task.test, *task.longer_tests.values()):
        for tokens, labels in examples(split):
            assert labels == solve(tokens)


@pytest.mark.parametrize("name", GENERATED)
def test_training_data_differ_by_epoch_and_seed_and_from_what_is_tested_and_can_be_drawn_again(
    name: str,
) -> None:
    task = load_task(name, SETTINGS)
    splits = [task.train_of(s, e) for s, e in ((0, 1), (0, 2), (1, 1))] + [task.val, task.test]
    seen = [example for split in splits for example in map(repr, examples(split))]
    assert len(set(seen)) == len(seen)
    again = load_task(name, SETTINGS).train_of(0, 2)
    assert np.array_equal(again.tokens, splits[1].tokens)


@pytest.mark.parametrize("model", [*MODELS, "torch.nn:MultiheadAttention"])
@pytest.mark.parametrize("name", GENERATED)
def test_a_later_token_changes_no_earlier_logit(name: str, model: str) -> None:
    task = load_task(name, SETTINGS)
    settings = ModelSettings(embed_dim=16, num_heads=2, feed_forward_dim=24, dropout=0.0)
    encoder = build(Model.parse(model), settings, task.vocab_size, task.num_classes, task.form).eval()
    tokens = torch.from_numpy(task.val.example(0).astype(np.int64))[None]
    changed = tokens.clone()
    changed[:, 13:] = 1 + tokens[:, 13:] % 5
    padding = torch.zeros(1, 21, dtype=torch.bool)
    before, after = encoder(tokens, padding), encoder(changed, padding)
    torch.testing.assert_close(before[:, :13], after[:, :13])
    assert not torch.allclose(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("hold", {"min_length": 3}, "--min-length means nothing to hold"),
        ("recall", {"max_length": 22}, "3 times its pairs"),
    ],
)
def test_what_a_task_has_not_is_refused(name: str, given: dict[str, Any], message: str) -> None:
    assert name in TASKS
    with pytest.raises(InputError, match=message):
        load_task(name, DataSettings(**given))
