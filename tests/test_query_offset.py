"""Queries placed behind the first position, as in generation with a cache: tokens attended one by one, or in
chunks, are those of the full causal forward, by every model and backend."""

from typing import Any

import pytest
import torch
from attention_cases import assert_same, has_backend, relative
from torch import Tensor
from triton_cases import KINDS, Case, Kind, errors

from attention_engine.attention_scores import Mask
from attention_kernels import use_backend
from attention_module import AttentionModule
from experiment.models import MODELS, Model
from train_and_evaluate import ModelSettings

N, L, E, H = 3, 11, 20, 4
VARIANTS = (
    *MODELS,
    "gravitational,normalization=force",
    "gravitational,adaptive=true",
    "gravitational_multi_timescale,normalization=force",
    "gravitational_multi_timescale,adaptive=true",
    "gravitational_multi_timescale,distance=manhattan",
    "gravitational_multi_timescale,normalization=force,learned_power=true,learned_softening=true",
)
CASES = [
    (name, backend)
    for name in VARIANTS
    for backend in ("auto", "dense", "tiled", "native", "sdpa")
    if has_backend(name, backend)
]
each_case = pytest.mark.parametrize(("name", "backend"), CASES)
each_model = pytest.mark.parametrize("name", VARIANTS)
is_padded = pytest.mark.parametrize("padded", [False, True])


def make(name: str) -> AttentionModule:
    """The model's attention with every parameter drawn."""
    torch.manual_seed(3)
    module = Model.parse(name).attention(ModelSettings(embed_dim=E, num_heads=H))()
    assert isinstance(module, AttentionModule)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def tokens(padded: bool = False) -> tuple[Tensor, Tensor | None]:
    """x (N, L, E) and, in front of all but the first example, padding (N, L)."""
    x = torch.randn(N, L, E, generator=torch.Generator().manual_seed(7))
    return x, torch.arange(L) < torch.arange(N)[:, None] if padded else None


def attend_in_chunks(
    module: AttentionModule, x: Tensor, padding: Tensor | None, size: int, **kwargs: Any
) -> list[Tensor]:
    """By chunk, the output and weights of `size` queries at a time, which see the keys so far."""
    found = []
    for first in range(0, x.shape[1], size):
        keys = x[:, : first + size]
        seen = None if padding is None else padding[:, : first + size]
        queries = keys if first == 0 else keys[:, first:]
        found.append(module(queries, keys, keys, seen, query_offset=first, is_causal=True, **kwargs))
    return found


@each_case
@is_padded
@pytest.mark.parametrize("size", [1, 4])
def test_chunks_of_tokens_are_those_of_the_causal_forward(
    name: str, backend: str, padded: bool, size: int
) -> None:
    module, (x, padding) = make(name), tokens(padded)
    with use_backend("dense"):
        expected = module(x, x, x, padding, need_weights=False, is_causal=True)[0]
    with use_backend(backend), torch.no_grad():
        chunks = attend_in_chunks(module, x, padding, size, need_weights=False)
    kept = torch.ones(N, L, dtype=torch.bool) if padding is None else ~padding
    assert relative(torch.cat([output for output, _ in chunks], 1)[kept], expected[kept]) < 1e-5


@each_model
def test_weights_and_maps_are_those_of_the_causal_forward(name: str) -> None:
    module, (x, _) = make(name), tokens()
    maps, weights = module.attention_maps(x, x, is_causal=True), module(x, x, x, is_causal=True)[1]
    first = 6
    found = module.attention_maps(x[:, first:], x, is_causal=True, query_offset=first)
    torch.testing.assert_close(found, maps[..., first:, :])
    shown = module(x[:, first:], x, x, is_causal=True, query_offset=first)[1]
    torch.testing.assert_close(shown, weights[:, first:])
    without = module.attention_maps(x[:, first:], x, query_offset=first)
    torch.testing.assert_close(without, module.attention_maps(x, x)[..., first:, :])


@each_case
def test_gradients_of_chunks_are_those_of_the_causal_forward(name: str, backend: str) -> None:
    module, (x, _) = make(name), tokens()
    slope = torch.linspace(-1, 2, x.numel()).view_as(x)

    def gradients(chunks: list[Tensor]) -> dict[str, Tensor]:
        module.zero_grad()
        (torch.cat([output for output, _ in chunks], 1) * slope).sum().backward()
        return {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}

    with use_backend("dense"):
        expected = gradients([module(x, x, x, need_weights=False, is_causal=True)])
    with use_backend(backend):
        assert_same(gradients(attend_in_chunks(module, x, None, 4, need_weights=False)), expected, 2e-5)


@pytest.mark.parametrize("backend", ["native", "tiled"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("decay", [None, (0.5, 0.9)])
@pytest.mark.parametrize(
    ("sizes", "offset"),
    [
        ((19, 35), 16),
        ((19, 35), 300),  # behind all keys
        ((1, 700), 699),
        ((530, 1300), 700),  # several tiles, far keys
        ((530, 40), 20),
    ],
)
def test_fused_backends_follow_the_formula_wherever_queries_stand(
    backend: str, kind: Kind, causal: bool, decay: Any, sizes: tuple[int, int], offset: int
) -> None:
    queries, keys = sizes
    padding = torch.arange(keys) >= torch.tensor([keys, keys - 9])[:, None]
    mask = Mask(padding, causal=causal, query_offset=offset)
    case = Case(kind, queries=queries, keys=keys, decay=decay, timescales=2, mask=mask)
    found = errors(case.evaluate(backend), case.evaluate("dense"))
    assert {key: error for key, error in found.items() if not error < (1e-3 if "log_" in key else 2e-5)} == {}


@each_model
@pytest.mark.parametrize("offset", [-1, 1.0, True, "1", None, 2**24, 2**40])
def test_an_offset_that_is_no_position_is_refused_in_one_line(name: str, offset: Any) -> None:
    module, (x, _) = make(name), tokens()
    for call in (
        lambda: module(x, x, x, query_offset=offset),
        lambda: module.attention_maps(x, x, query_offset=offset),
    ):
        with pytest.raises(
            ValueError, match=rf"^query_offset must be a whole number from 0 .*got {offset!r}$"
        ):
            call()


@each_model
def test_only_clocks_need_the_keys_of_all_queries(name: str) -> None:
    module, (x, _) = make(name), tokens()
    if "adaptive" in name:
        with pytest.raises(
            ValueError, match=r"query_offset \+ L must be at most S = 11 .*got 12: pass the keys"
        ):
            module(x[:, :2], x, x, query_offset=10)
    else:
        assert bool(module(x[:, :2], x, x, query_offset=10)[0].isfinite().all())


def test_kernels_on_a_gpu_say_that_they_start_at_position_0() -> None:
    module, (x, _) = make("gravitational"), tokens()
    with use_backend("triton"), pytest.raises(ValueError, match="first query at position 0: use 'tiled'"):
        module(x, x, x, need_weights=False, query_offset=3)
