"""The Triton kernels, run on the CPU by Triton's interpreter, are the dense formula: outputs and gradients.

`test_triton_attention` runs this file in a process of its own, because TRITON_INTERPRET=1 must be set before
Triton is imported. By hand: `TRITON_INTERPRET=1 python -m pytest tests/interpreted_triton.py`.
"""

import math
from typing import Any

import pytest
import torch
from triton_cases import KINDS, Case, Kind, beyond, errors, masks

from attention_engine import far_keys, triton_attention
from attention_engine.attention_scores import DotProduct, Mask
from attention_kernels import attend

OUTPUT, GRADIENT = 2e-6, 2e-5


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles at tiny sizes, of the smallest sides there are; rows and keys are mistaken by none."""
    monkeypatch.setattr(triton_attention, "tile_shape", lambda q: (16, 32))


# Each line changes what the others leave as it is: one timescale of one head, at two tiles by two.
CASES: dict[str, tuple[tuple[Kind, ...], dict[str, Any]]] = {
    "timescales that share q, k and v": (KINDS, {"batch": 1, "timescales": 2, "shared": True}),
    "timescales of their own": (("dot product", "gravity"), {"batch": 1, "timescales": 2}),
    "no decay, heads": (("dot product", "force"), {"batch": 1, "heads": 2, "decay": None}),
    "decay near 0": (("gravity",), {"batch": 1, "decay": (1e-30, 1e-30)}),
    "decay near 1": (("force",), {"batch": 1, "decay": (1 - 1e-7, 1 - 1e-7)}),
    "one pair": (("gravity",), {"queries": 1, "keys": 1}),
    "one query": (("dot product",), {"queries": 1, "keys": 40}),
    "few keys": (("force",), {"queries": 40, "keys": 3, "mask": Mask(causal=True)}),
    "narrow heads": (("gravity",), {"batch": 1, "head_dim": 1}),
    "wide heads": (("gravity",), {"batch": 1, "head_dim": 48}),
    "power 1": (("gravity",), {"batch": 1, "power": 1.0}),
    "power 3": (("force",), {"batch": 1, "power": 3.0}),
    "power 4": (("gravity",), {"batch": 1, "power": 4.0}),
}


@pytest.mark.parametrize(
    ("kind", "changes"), [(kind, changes) for kinds, changes in CASES.values() for kind in kinds]
)
def test_kernels_are_the_dense_formula(kind: Kind, changes: dict[str, Any]) -> None:
    assert beyond(Case(kind, **{"timescales": 1} | changes), OUTPUT, GRADIENT) == {}


@pytest.mark.parametrize(
    ("kind", "mask"),
    [("dot product", "pairs, padding and causal"), ("force", "causal, padding in front")]
    + [("gravity", mask) for mask in ("an example of padding only", "float pairs", "float padding")],
)
def test_masks_are_those_of_the_dense_formula(kind: Kind, mask: str) -> None:
    """Padding is poisoned, rows of which every key is blocked give zeros, and their gradients are finite."""
    case = Case(kind, timescales=1, mask=masks(2, 1, 19, 35)[mask])
    assert beyond(case, OUTPUT, GRADIENT) == {}


@pytest.mark.parametrize("kind", ["gravity", "force"])
def test_coincident_tokens_far_out(kind: Kind) -> None:
    """r2 is 0 on the diagonal, and a thousand off it were it not for the common centre."""
    case = Case(kind, batch=1, timescales=1, keys=19, duplicates=True, offset=100.0, softening=0.05)
    assert beyond(case, 1e-5, 1e-4) == {}


@pytest.mark.parametrize("kind", ["dot product", "gravity"])
def test_half_precision_stays_within_its_rounding(kind: Kind) -> None:
    """float16, which the interpreter computes with, stands in for bfloat16, which it does not."""
    assert beyond(Case(kind, batch=1, timescales=1, dtype=torch.float16), 2e-3, 6e-3) == {}


def test_skipping_far_keys_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At fast decays the reach is shorter than the sequence, and what is beyond is not missed."""
    chosen = masks(1, 1, 50, 50)["causal, padding in front"]
    case = Case(
        "gravity", batch=1, timescales=1, queries=50, keys=50, decay=(0.02, 0.05), softening=0.5, mask=chosen
    )
    reach: list[torch.Tensor] = []
    of_rows = far_keys.reach_of_rows

    def observed(*args: Any) -> torch.Tensor:
        found = of_rows(*args)
        assert found is not None
        reach.append(found)
        return found

    monkeypatch.setattr(triton_attention, "reach_of_rows", observed)
    skipped = case.evaluate("triton")
    assert reach[0].shape == (1, 1, 1)
    assert int(reach[0].max()) < 25
    everything = case.evaluate("triton", skip_far_keys=False)
    assert max(errors(skipped, everything).values()) < 1e-6
    assert max(errors(skipped, case.evaluate("dense")).values()) < GRADIENT


def test_nearest_keys_by_hand() -> None:
    """Keys . X . . X of which X may be attended to, for seven rows; then causal; far; none."""
    padding = torch.tensor([[True, False, True, True, False]])
    nearest, distance = far_keys.nearest_keys(Mask(padding), 7, 5, padding.device)
    assert nearest.tolist() == [[1, 1, 1, 4, 4, 4, 4]]
    assert distance.tolist() == [[1, 0, 1, 1, 0, 1, 2]]
    nearest, distance = far_keys.nearest_keys(Mask(padding, causal=True), 7, 5, padding.device)
    assert nearest.tolist()[0][1:] == [1, 1, 1, 4, 4, 4]
    assert distance.tolist() == [[-1, 0, 1, 2, 0, 1, 2]]
    behind = torch.tensor([[False, True, True, True]])
    _, distance = far_keys.nearest_keys(Mask(behind), 20, 4, padding.device)
    assert distance.tolist() == [list(range(20))]
    _, distance = far_keys.nearest_keys(Mask(behind | ~behind), 2, 4, padding.device)
    assert distance.tolist() == [[-1, -1]]


def test_reach_of_equal_scores_by_hand() -> None:
    """No spread: all beyond W weigh 2 gamma^W / (1 - gamma) of the own key, at most 2^-24 from W = 19.5."""
    q = torch.zeros(1, 1, 1, 200, 4)
    log_decay = torch.tensor([[math.log(0.4)]])
    reach = far_keys.reach_of_rows(q, q, DotProduct(0.5, log_decay), Mask())
    assert reach is not None and reach.tolist() == [[[20]]]
    by_pairs = Mask(pairs=torch.ones(1, 1, 1, 200, 200, dtype=torch.bool))
    assert far_keys.reach_of_rows(q, q, DotProduct(0.5, log_decay), by_pairs) is None


def test_no_lengths_at_all() -> None:
    for queries, keys in ((0, 5), (5, 0)):
        found = Case("gravity", queries=queries, keys=keys).evaluate("triton")
        assert all(bool((value == 0).all()) for value in found.values())


def test_a_backward_that_is_differentiated_is_that_of_the_dense_formula() -> None:
    case = Case(
        "gravity",
        timescales=2,
        queries=9,
        keys=9,
        shared=True,
        mask=masks(2, 1, 9, 9)["pairs, padding and causal"],
    )
    found = []
    for backend in ("triton", "dense"):
        leaves = {name: x.detach().requires_grad_() for name, x in case.inputs().items()}
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        output, _ = attend(q, k, v, case.score(leaves), case.mask, backend=backend)
        slopes = torch.autograd.grad(output.square().sum(), list(leaves.values()), create_graph=True)
        torch.stack([slope.square().sum() for slope in slopes]).sum().backward()
        found.append({name: x.grad for name, x in leaves.items() if x.grad is not None})
    assert max(errors(found[0], found[1]).values()) < GRADIENT


def test_a_mask_refilled_before_backward_is_an_error() -> None:
    case = Case("gravity", timescales=1, mask=masks(2, 1, 19, 35)["pairs"])
    leaves = {name: x.detach().requires_grad_() for name, x in case.inputs().items()}
    output, _ = attend(leaves["q"], leaves["k"], leaves["v"], case.score(leaves), case.mask, backend="triton")
    for mask in (case.mask.padding, case.mask.pairs):
        if mask is not None:
            mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
