"""What is kept of a model's attention: true weights of true tokens, and shares of weight by distance."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cell_cases import CPU, SETTINGS, attention_of
from torch import Tensor, nn

from data_pipeline import TaskData, TokenDataset
from tasks.task_data import TaskForm
from train_and_evaluate import TransformerClassifier
from training.attention_patterns import (
    DISTANCE_EDGES,
    NoAttentionMapsError,
    attention_patterns,
    choose_examples,
)


def make_task(lengths: list[int]) -> TaskData:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = (np.arange(offsets[-1]) % 5 + 1).astype(np.uint8)
    split = TokenDataset(tokens=tokens, offsets=offsets, labels=np.arange(len(lengths)) % 3)
    names = ("a", "b", "c")
    return TaskData("tiny", "Tiny", 6, 3, names, split, split, split, lambda token: f"<{token}>", {})


def extract(make_attention: Any, lengths: list[int], form: TaskForm | None = None) -> dict[str, np.ndarray]:
    task = replace(make_task(lengths), form=form or TaskForm())
    model = TransformerClassifier(make_attention, 6, 3, SETTINGS, form=task.form).eval()
    patterns = attention_patterns(model, model.attentions, task, 0, CPU)
    assert not any(attention._forward_pre_hooks for attention in model.attentions)
    return patterns


class UniformAttention(nn.Module):
    """The interface of nn.MultiheadAttention and no more: every key has the same weight."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Any]:
        n, length, _ = query.shape
        weights = torch.full((n, 2, length, length), 1 / length) if options["need_weights"] else None
        return torch.zeros_like(query), weights


class SecretiveAttention(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(query), None


@pytest.mark.parametrize("name", ["conventional", "torch.nn:MultiheadAttention"])
def test_maps_of_a_causal_task_see_no_later_token_also_of_pytorchs_own_attention(name: str) -> None:
    maps = extract(attention_of(name), [7, 6], TaskForm(causal=True))["maps"]
    assert maps.shape == (2, 2, 1, 2, 7, 7)
    assert not np.triu(maps, 1).any()
    np.testing.assert_allclose(maps[:, 0].astype(np.float64).sum(-1), 1, atol=2e-3)


def test_maps_are_weights_over_true_tokens_and_zero_elsewhere() -> None:
    patterns = extract(attention_of("gravitational_multi_timescale"), [7, 3, 5, 1])
    assert patterns["maps"].shape == (2, 4, 3, 2, 7, 7)
    assert patterns["maps"].dtype == np.float16
    for example, length in enumerate(patterns["lengths"]):
        maps = patterns["maps"][:, example].astype(np.float64)
        np.testing.assert_allclose(maps[..., :length, :length].sum(-1), 1, atol=2e-3)
        assert not maps[..., length:, :].any()
        assert not maps[..., length:].any()


def test_masses_are_there_where_the_mechanism_has_them() -> None:
    patterns = extract(attention_of("gravitational"), [7, 3, 5, 2])
    for name in ("key_mass", "query_mass"):
        assert patterns[name].shape == (2, 4, 1, 2, 7)
        assert (patterns[name][:, 1, :, :, :3] > 0).all()
        assert not patterns[name][:, 1, :, :, 3:].any()
    assert "key_mass" not in extract(attention_of("conventional"), [7, 3, 5, 2])
    assert "query_mass" not in extract(attention_of("gravitational,normalization=force"), [7, 3, 5, 2])


def test_distance_shares_of_uniform_attention_are_those_counted_by_hand() -> None:
    # Of the 9 pairs of 3 tokens, 3 are at distance 0, 4 at 1 and 2 at 2.
    share = extract(UniformAttention, [3, 3, 3, 3])["distance_share"]
    assert share.shape == (2, 1, 2, len(DISTANCE_EDGES) - 1)
    np.testing.assert_allclose(share[1, 0, 1, :3], [3 / 9, 4 / 9, 2 / 9], rtol=1e-6)
    assert not share[..., 3:].any()


def test_distance_shares_come_from_long_examples_of_at_most_1024_tokens() -> None:
    share = extract(UniformAttention, [1500, 3, 4, 2, 5, 1100, 2000, 1024])["distance_share"]
    np.testing.assert_allclose(share.sum(-1), 1, rtol=1e-6)
    distance = np.abs(np.arange(1024)[:, None] - np.arange(1024))
    expected = (distance >= 512).mean()
    np.testing.assert_allclose(share[..., -1], expected, rtol=1e-5)


def test_tokens_symbols_and_labels_belong_together_and_long_examples_are_cut() -> None:
    assert extract(UniformAttention, [100, 70, 66, 90, 80])["tokens"].shape == (4, 64)
    patterns = extract(UniformAttention, [2, 4, 3])
    np.testing.assert_array_equal(patterns["tokens"], [[1, 2, 0, 0], [3, 4, 5, 1], [2, 3, 4, 0]])
    np.testing.assert_array_equal(patterns["labels"], [0, 1, 2])
    assert patterns["symbols"].tolist()[0] == ["<1>", "<2>", "", ""]


def test_the_seed_alone_chooses_the_examples() -> None:
    wanted = np.arange(40) % 2 == 0
    chosen = choose_examples(wanted, 3)
    np.testing.assert_array_equal(chosen, choose_examples(wanted, 3))
    assert len(set(chosen.tolist())) == 4
    assert wanted[chosen].all()
    assert chosen.tolist() != choose_examples(wanted, 4).tolist()


def test_a_module_without_weights_is_named() -> None:
    with pytest.raises(NoAttentionMapsError, match="SecretiveAttention gives no weights of shape"):
        extract(SecretiveAttention, [3, 4, 5, 6])
