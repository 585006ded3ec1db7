"""The tiled backend equals the dense formula in float64, outputs and all gradients, at sizes around and above
a tile and on inputs that are hard for it; what the modules make of it is tested in test_attention_*."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import MASKS, Case, beyond, errors, masks

from attention_engine import tiled_attention
from attention_engine.attention_scores import Mask
from attention_engine.far_keys import reach_of_rows
from attention_kernels import attend
from benchmarks.attention_speed import MECHANISMS, SpeedSettings, peak_bytes
from benchmarks.attention_speed import Case as SpeedCase
from benchmarks.benchmarking import peak_process
from training.device_memory import PeakMemory

TOLERANCES = 2e-6, 2e-5  # of outputs and gradients in float32, relative to their norms
SIZES: dict[str, Any] = {"heads": 3, "queries": 270, "keys": 301, "head_dim": 8}  # more than a tile has
CASES = {
    "dot": Case("dot product", timescales=1, decay=None, **SIZES),
    "discounted": Case("dot product", timescales=2, **SIZES),
    "clocked": Case("dot product", timescales=2, decay=None, clock=True, **SIZES),
    "softmax": Case("gravity", timescales=1, decay=None, **SIZES),
    "force": Case("force", timescales=1, decay=None, **SIZES),
    "both softmax": Case("gravity", timescales=2, shared=True, **SIZES),
    "both force": Case("force", timescales=2, shared=True, **SIZES),
    "clocked force": Case("force", timescales=2, shared=True, decay=None, clock=True, **SIZES),
    "softmax manhattan": Case("gravity", timescales=1, decay=None, distance="manhattan", **SIZES),
    "both force learned": Case("force", timescales=2, shared=True, learned=True, **SIZES),
    "timescales that are equal": Case("gravity", timescales=3, shared=True, decay=None, **SIZES),
}
DISCOUNTED = ("discounted", "both softmax", "both force")
each_kind = pytest.mark.parametrize("kind", CASES)
each_discounted_kind = pytest.mark.parametrize("kind", DISCOUNTED)


def wrong(kind: str, tolerances: tuple[float, float] = TOLERANCES, **changes: Any) -> dict[str, float]:
    return beyond(replace(CASES[kind], **changes), *tolerances, backend="tiled")


@each_kind
@pytest.mark.parametrize(("batch", "length"), [(2, 1), (2, 65), (2, 300), (1, 300)])
def test_every_length_gives_the_dense_formula(kind: str, batch: int, length: int) -> None:
    assert wrong(kind, batch=batch, heads=1, queries=length, keys=length) == {}


@pytest.mark.parametrize(
    ("kind", "mask"),
    [(kind, mask) for kind in CASES for mask in ("pairs, padding and causal", "float pairs")]
    + [(kind, mask) for kind in ("discounted", "both force") for mask in MASKS[:5]],
)
def test_masks_hold_in_every_tile_and_a_row_with_no_key_is_zeros(kind: str, mask: str) -> None:
    assert wrong(kind, mask=masks(2, 3, 270, 301)[mask]) == {}


@pytest.mark.parametrize("kind", ["softmax", "force"])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("softening", [1e-4, 0.1])
def test_coincident_pairs_at_small_softening(kind: str, power: float, softening: float) -> None:
    """One key may take all weight of its row: the gradients of masses are what sums that cancel leave."""
    sizes: dict[str, Any] = {"heads": 1, "queries": 66, "keys": 66}
    assert wrong(kind, power=power, softening=softening, duplicates=True, **sizes) == {}


@pytest.mark.parametrize("kind", [kind for kind in CASES if "force" in kind or "softmax" in kind])
def test_an_offset_of_q_and_k_is_no_distance(kind: str) -> None:
    """Of which the inputs themselves have lost two digits."""
    assert wrong(kind, (2e-5, 2e-4), offset=100.0, queries=129, keys=129) == {}


@each_discounted_kind
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("learn_decay", [True, False])  # what is learned weighs far keys by their distance
def test_skipping_far_keys_changes_nothing(
    kind: str, causal: bool, learn_decay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reaches = []

    def observed(*args: Any) -> Tensor:
        found = reach_of_rows(*args)
        assert found is not None
        reaches.append(found)
        return found

    monkeypatch.setattr(tiled_attention, "reach_of_rows", observed)
    changes: dict[str, Any] = {"batch": 1, "heads": 2, "queries": 700, "keys": 650, "softening": 0.5}
    changes |= {"decay": (0.3, 0.5), "learn_decay": learn_decay, "mask": Mask(causal=causal)}
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-6)):
        case = replace(CASES[kind], dtype=dtype, **changes)
        skipping = case.evaluate("tiled")
        assert int(reaches[-1].min()) < 500
        count = len(reaches)
        complete = case.evaluate("tiled", skip_far_keys=False)
        assert len(reaches) == count
        found = errors(skipping, complete)
        assert found.pop("output") < 1e-6 and max(found.values()) < tolerance


@each_discounted_kind
@pytest.mark.parametrize("gamma", [1e-6, 1 - 1e-7])
def test_gammas_near_0_and_near_1(kind: str, gamma: float) -> None:
    """Near 0 each query sees one key alone, and the slopes of scores are what sums that cancel leave."""
    assert wrong(kind, (2e-6, 1e-3), decay=(gamma, gamma)) == {}


@each_kind
def test_gradients_with_dropout_are_those_of_finite_differences(kind: str) -> None:
    """In float64; its mask is the same for the same seed."""
    case = replace(CASES[kind], heads=2, queries=4, keys=5, dtype=torch.float64)
    leaves = {name: leaf.double().requires_grad_() for name, leaf in case.inputs().items()}
    mask = Mask(torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))

    def attention(*values: Tensor) -> Tensor:
        given = dict(zip(leaves, values, strict=True))
        torch.manual_seed(0)
        q, k, v = given["q"], given["k"], given["v"]
        return attend(q, k, v, case.score(given), mask, backend="tiled", dropout=0.4)[0]

    assert torch.autograd.gradcheck(attention, list(leaves.values()), fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", list(MECHANISMS))
def test_memory_grows_linearly_and_stays_small(mechanism: str) -> None:
    """Batch x heads = 4, D = 32: what is held above inputs, outputs and gradients."""
    if PeakMemory(torch.device("cpu")).kind is None:
        pytest.skip("no measure of peak memory here")
    settings, of_process = SpeedSettings(threads=1), peak_process(torch.device("cpu"))
    half, whole = (
        of_process(peak_bytes, SpeedCase(mechanism, "tiled", length), settings, "cpu")
        for length in (4096, 8192)
    )
    assert whole <= 2.2 * half
    assert whole <= 80e6  # a tensor like q has 4.2e6
