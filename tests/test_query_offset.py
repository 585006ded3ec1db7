"""Queries placed behind the first position, as in generation with a cache: one token, or some, are those of
the whole forward, by every module and backend."""

from typing import Any

import pytest
import torch
from attention_cases import (
    FACTORIES,
    E,
    assert_same,
    has_backend,
    make,
    make_inputs,
    relative,
    with_gradients,
)
from torch import Tensor
from triton_cases import KINDS, Case, Kind, errors

from attention_engine.attention_scores import Mask
from attention_kernels import use_backend

N, L = 3, 11
BACKENDS = ("auto", "dense", "tiled", "native", "sdpa")
CASES = [(name, backend) for name in FACTORIES for backend in BACKENDS if has_backend(name, backend)]


def tokens() -> Tensor:
    return make_inputs(self_attention=True, sizes=(N, L, L, E)).query


@pytest.mark.parametrize(("name", "backend"), CASES)
@pytest.mark.parametrize(
    ("padded", "causal", "first", "end"), [(False, False, 4, 8), (True, True, 4, 8), (False, True, 10, 11)]
)
def test_some_queries_and_their_gradients_are_those_of_the_whole_forward(
    name: str, backend: str, padded: bool, causal: bool, first: int, end: int
) -> None:
    module, x, rows = make(name), tokens(), slice(first, end)
    in_front = torch.arange(L) < torch.arange(N)[:, None]  # of all but the first example
    asked: dict[str, Any] = {"key_padding_mask": in_front if padded else None, "is_causal": causal}
    with use_backend("dense"):
        maps = module.attention_maps(x, x, **asked)[..., rows, :]
        expected = with_gradients(module, module(x, x, x, **asked)[0][:, rows])
    asked["query_offset"] = first
    with use_backend(backend):
        found = with_gradients(module, module(x[:, rows], x, x, need_weights=False, **asked)[0])
    assert_same(found, expected, 2e-5)
    assert relative(found["output"], expected["output"]) < 1e-5
    torch.testing.assert_close(module.attention_maps(x[:, rows], x, **asked), maps)
    torch.testing.assert_close(module(x[:, rows], x, x, **asked)[1], maps.mean((1, 2)))


@pytest.mark.parametrize("backend", ["native", "tiled"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [None, (0.5, 0.9)])
@pytest.mark.parametrize(
    ("causal", "queries", "keys", "offset"),
    [
        (True, 19, 35, 16),
        (False, 19, 35, 300),  # behind all keys
        (False, 1, 700, 699),
        (True, 270, 620, 330),  # several tiles, far keys
        (False, 270, 620, 330),
        (True, 530, 40, 20),
    ],
)
def test_fused_backends_follow_the_formula_wherever_queries_stand(
    backend: str, kind: Kind, decay: Any, causal: bool, queries: int, keys: int, offset: int
) -> None:
    padding = torch.arange(keys) >= torch.tensor([keys, keys - 9])[:, None]
    mask = Mask(padding, causal=causal, query_offset=offset)
    case = Case(kind, queries=queries, keys=keys, decay=decay, timescales=2, mask=mask)
    found = errors(case.evaluate(backend), case.evaluate("dense"))
    assert {key: error for key, error in found.items() if not error < (1e-3 if "log_" in key else 2e-5)} == {}


@pytest.mark.parametrize("offset", [-1, 1.0, True, "1", None, 2**24, 2**40])
def test_an_offset_that_is_no_position_is_refused_in_one_line(offset: Any) -> None:
    module, x = make("gravitational"), tokens()
    message = rf"^query_offset must be a whole number from 0 .*got {offset!r}$"
    with pytest.raises(ValueError, match=message):
        module(x, x, x, query_offset=offset)
    with pytest.raises(ValueError, match=message):
        module.attention_maps(x, x, query_offset=offset)


def test_clocks_need_the_keys_of_all_queries() -> None:
    module, x = make("gravitational adaptive"), tokens()
    with pytest.raises(ValueError, match=r"query_offset \+ L must be at most S = 11 .*got 12: pass the keys"):
        module(x[:, :2], x, x, query_offset=10)
