"""Queries placed behind the first position, as in generation with a cache: tokens attended one by one, or in
chunks, are those of the full causal forward, by every module and backend."""

from typing import Any

import pytest
import torch
from attention_cases import (
    FACTORIES,
    E,
    assert_same,
    each_module,
    gradients,
    has_backend,
    make,
    make_inputs,
    relative,
)
from torch import Tensor
from triton_cases import KINDS, Case, Kind, errors

from attention_engine.attention_scores import Mask
from attention_kernels import use_backend
from attention_module import AttentionModule

N, L = 3, 11
BACKENDS = ("auto", "dense", "tiled", "native", "sdpa")
CASES = [(name, backend) for name in FACTORIES for backend in BACKENDS if has_backend(name, backend)]


def tokens() -> Tensor:
    return make_inputs(self_attention=True, sizes=(N, L, L, E)).query


def attend_in_chunks(module: AttentionModule, x: Tensor, padding: Tensor, size: int) -> Tensor:
    """`size` queries at a time, which see the keys so far."""
    found = []
    for first in range(0, L, size):
        keys, seen = x[:, : first + size], padding[:, : first + size]
        queries = keys if first == 0 else keys[:, first:]
        asked: dict[str, Any] = {"query_offset": first, "is_causal": True, "need_weights": False}
        found.append(module(queries, keys, keys, seen, **asked)[0])
    return torch.cat(found, 1)


@pytest.mark.parametrize(("name", "backend"), CASES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", [1, 4])
def test_chunks_of_tokens_and_their_gradients_are_those_of_the_causal_forward(
    name: str, backend: str, padded: bool, size: int
) -> None:
    module, x = make(name), tokens()
    padding = (torch.arange(L) < torch.arange(N)[:, None]) & padded  # in front of all but the first example
    slope = torch.linspace(-1, 2, x.numel()).view_as(x).masked_fill(padding.unsqueeze(-1), 0.0)

    def with_gradients(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        (output * slope).sum().backward()
        return output[~padding], gradients(module)

    with use_backend("dense"):
        whole = module(x, x, x, padding, need_weights=False, is_causal=True)[0]
        expected, expected_gradients = with_gradients(whole)
    with use_backend(backend):
        found, found_gradients = with_gradients(attend_in_chunks(module, x, padding, size))
    assert relative(found, expected) < 1e-5
    assert_same(found_gradients, expected_gradients, 2e-5)


@each_module
def test_weights_and_maps_are_those_of_the_causal_forward(name: str) -> None:
    module, x, first = make(name), tokens(), 6
    for causal in (True, False):
        maps = module.attention_maps(x, x, is_causal=causal)
        found = module.attention_maps(x[:, first:], x, is_causal=causal, query_offset=first)
        torch.testing.assert_close(found, maps[..., first:, :])
        shown = module(x[:, first:], x, x, is_causal=causal, query_offset=first)[1]
        torch.testing.assert_close(shown, maps.mean((1, 2))[:, first:])


@pytest.mark.parametrize("backend", ["native", "tiled"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("causal", "decay"), [(False, None), (True, None), (False, (0.5, 0.9)), (True, (0.5, 0.9))]
)
@pytest.mark.parametrize(
    ("queries", "keys", "offset"),
    [
        (19, 35, 16),
        (19, 35, 300),  # behind all keys
        (1, 700, 699),
        (530, 1300, 700),  # several tiles, far keys
        (530, 40, 20),
    ],
)
def test_fused_backends_follow_the_formula_wherever_queries_stand(
    backend: str, kind: Kind, causal: bool, decay: Any, queries: int, keys: int, offset: int
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
