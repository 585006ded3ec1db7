"""The tiled backend equals the dense formula in float64, outputs and all gradients, at sizes around and above
a tile and on inputs that are hard for it; what the modules make of it is tested in test_attention_*."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from attention_cases import assert_same
from torch import Tensor

from attention_engine import tiled_attention
from attention_engine.attention_scores import Clock, DotProduct, Gravity, Mask, Score, merge_masks
from attention_engine.far_keys import reach_of_rows
from attention_kernels import attend
from benchmarks.attention_speed import MECHANISMS, Case, SpeedSettings, peak_bytes
from benchmarks.benchmarking import peak_process
from training.device_memory import PeakMemory

N, H, D, L, S = 2, 3, 8, 270, 301  # a batch with more queries and keys than a tile has
OUTPUT, GRADIENT = 2e-6, 2e-5  # what float32 may err, relative to the norm
KINDS = (
    *("dot", "discounted", "clocked", "softmax", "force", "both softmax", "both force", "clocked force"),
    *("softmax manhattan", "both force learned"),
)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_discounted_kind = pytest.mark.parametrize("kind", ["discounted", "both softmax", "both force"])


class Sizes(NamedTuple):
    batch: int = N
    heads: int = H
    queries: int = L
    keys: int = S


class Inputs(NamedTuple):
    """The leaves of a call, all seeded, and how its score is made of them."""

    leaves: dict[str, Tensor]
    make_score: Callable[[dict[str, Tensor]], Score]


def make_inputs(
    kind: str,
    sizes: Sizes,
    gammas: tuple[float, ...] = (0.6, 0.99),
    softening: float = 0.1,
    power: float = 2.0,
) -> Inputs:
    generator = torch.Generator().manual_seed(11)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, heads, queries, keys = sizes
    timescales = 1 if kind in ("dot", "softmax", "force", "softmax manhattan") else len(gammas)
    own = timescales if kind in ("discounted", "clocked") else 1
    leaves = {
        "q": drawn(batch, own, heads, queries, D),
        "k": drawn(batch, own, heads, keys, D),
        "v": drawn(batch, own, heads, keys, D),
    }
    if "clocked" in kind:
        for name, length in (("query_clock", queries), ("key_clock", keys)):
            leaves[name] = F.softplus(drawn(batch, timescales, heads, length)).cumsum(-1) * 0.1
    elif timescales > 1:
        rates = torch.tensor(gammas, dtype=torch.float64).log()[:, None]
        leaves["log_decay"] = rates.expand(-1, heads).clone()

    def decay(x: dict[str, Tensor]) -> dict[str, Any]:
        clock = Clock(x["query_clock"], x["key_clock"]) if "query_clock" in x else None
        return {"log_decay": x.get("log_decay"), "clock": clock}

    if kind in ("dot", "discounted", "clocked"):
        return Inputs(leaves, lambda x: DotProduct(D**-0.5, **decay(x)))
    leaves["key_mass"] = F.softplus(drawn(batch, timescales, heads, keys))
    if "force" not in kind:
        leaves["query_mass"] = F.softplus(drawn(batch, timescales, heads, queries))
        leaves["log_gravity"] = drawn(timescales, heads) * 0.2
    if "learned" in kind:
        leaves["softening"] = softening * (1 + drawn(timescales, heads).tanh() / 2)
        leaves["power"] = power * (2 + drawn(timescales, heads).tanh())

    def score(x: dict[str, Tensor]) -> Gravity:
        law = x.get("softening", softening), x.get("power", power)
        form: Any = "force" if "force" in kind else "softmax"
        distance: Any = "manhattan" if "manhattan" in kind else "euclidean"
        masses = x["key_mass"], x.get("query_mass"), x.get("log_gravity")
        return Gravity(*masses, *law, form, distance=distance, **decay(x))

    return Inputs(leaves, score)


def evaluate(
    inputs: Inputs,
    backend: str,
    dtype: torch.dtype = torch.float32,
    mask: Mask | None = None,
    fixed: str = "",
    **kwargs: Any,
) -> dict[str, Tensor]:
    """The output and the gradients of all leaves but the fixed, for a loss that reads the output unevenly."""
    leaves = {
        name: leaf.detach().to(dtype).requires_grad_(name != fixed) for name, leaf in inputs.leaves.items()
    }
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    output, _ = attend(q, k, v, inputs.make_score(leaves), mask or Mask(), backend=backend, **kwargs)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    output.backward(upstream.to(dtype))
    found = {"output": output.detach()}
    for name, leaf in leaves.items():
        if name != fixed:
            assert leaf.grad is not None, name
            found[name] = leaf.grad
    return found


def check(inputs: Inputs, mask: Mask | None = None, *, ill_conditioned: bool = False, **kwargs: Any) -> None:
    """Equal to the dense formula in float64; where rounding of the inputs alone errs more, within five times
    what the dense formula errs in float32."""
    found = evaluate(inputs, "tiled", mask=mask, **kwargs)
    exact = evaluate(inputs, "dense", torch.float64, mask)
    single = evaluate(inputs, "dense", torch.float32, mask) if ill_conditioned else exact
    for name, value in exact.items():
        tolerance = OUTPUT if name == "output" else GRADIENT
        unavoidable = float((single[name] - value).norm() / value.norm().clamp(min=0.1))
        assert_same({name: found[name]}, {name: value}, max(tolerance, 5 * unavoidable))


@each_kind
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 192, 704])
def test_every_length_gives_the_dense_formula(kind: str, length: int) -> None:
    check(make_inputs(kind, Sizes(2, 1, length, length)))


@each_kind
def test_a_single_problem_gives_the_dense_formula(kind: str) -> None:
    check(make_inputs(kind, Sizes(1, 1, L, S)))


def masks(kind: str) -> Mask:
    """Masks as `nn.MultiheadAttention` takes them; in each some row has no key at all."""
    generator = torch.Generator().manual_seed(2)
    blocked = torch.rand(N * H, L, S, generator=generator) < 0.5
    blocked[:, 3] = True
    padding = torch.arange(S) >= torch.tensor([S - 40, 0])[:, None]  # the second example is all padding
    added = torch.randn(L, S, generator=generator)
    added[4] = -math.inf
    key_padding, pairs, causal = {
        "boolean": (None, blocked, False),
        "float": (None, added, False),
        "lengths": (padding, None, False),
        "lengths, causal": (padding, None, True),
        "all": (padding, blocked, True),
    }[kind]
    return merge_masks(key_padding, pairs, causal, N, H, L, S)


@each_kind
@pytest.mark.parametrize("mask", ["boolean", "float", "lengths", "lengths, causal", "all"])
def test_masks_hold_in_every_tile_and_a_row_with_no_key_is_zeros(kind: str, mask: str) -> None:
    check(make_inputs(kind, Sizes()), masks(mask))


@pytest.mark.parametrize("kind", ["both softmax", "both force"])
def test_several_timescales_of_one_head_without_decay(kind: str) -> None:
    inputs = make_inputs(kind, Sizes(1, 1, 65, 70), gammas=(0.5, 0.6, 0.7))
    del inputs.leaves["log_decay"]
    check(inputs)


@pytest.mark.parametrize("kind", ["softmax", "force"])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("softening", [1e-4, 1e-3, 0.01, 0.1])
def test_coincident_pairs_at_small_softening(kind: str, power: float, softening: float) -> None:
    """One key may take all weight of its row: the gradients of masses are what sums that cancel leave."""
    inputs = make_inputs(kind, Sizes(2, 1, 66, 66), softening=softening, power=power)
    inputs.leaves["k"] = inputs.leaves["q"].clone()
    check(inputs)


@each_discounted_kind
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "fixed", ["log_decay", ""]
)  # a decay that is learned weighs far keys by their distance
def test_skipping_far_keys_changes_nothing(
    kind: str, causal: bool, fixed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reaches = []

    def observed(*args: Any, **kwargs: Any) -> Tensor:
        reaches.append(reach_of_rows(*args, **kwargs))
        return reaches[-1]

    monkeypatch.setattr(tiled_attention, "reach_of_rows", observed)
    inputs = make_inputs(kind, Sizes(1, 2, 700, 650), gammas=(0.3, 0.7, 0.9))
    # Light masses: a bound on the largest force is near the forces there are.
    for name in {"key_mass", "query_mass"} & inputs.leaves.keys():
        inputs.leaves[name].clamp_(0.2, 0.5)
    asked: dict[str, Any] = {"mask": Mask(causal=causal), "fixed": fixed}
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-6)):
        skipping = evaluate(inputs, "tiled", dtype, **asked)
        assert int(reaches[-1].min()) < 500
        count = len(reaches)
        complete = evaluate(inputs, "tiled", dtype, skip_far_keys=False, **asked)
        assert len(reaches) == count
        assert_same({"output": skipping["output"]}, {"output": complete["output"]}, 1e-6)
        assert_same(skipping, complete, tolerance)  # in float32 with the rounding of other tiles


@each_discounted_kind
def test_gammas_near_0_and_near_1(kind: str) -> None:
    check(make_inputs(kind, Sizes(), gammas=(1e-6, 0.5, 1 - 1e-7)))


@each_kind
def test_coincident_and_repeated_tokens(kind: str) -> None:
    """Every key is there twice, and every query is one of them."""
    inputs = make_inputs(kind, Sizes(2, 2, 192, 192))
    half = inputs.leaves["q"][..., :96, :]
    inputs.leaves["q"] = inputs.leaves["k"] = torch.cat([half, half], -2)
    check(inputs, ill_conditioned=True)


@each_kind
@pytest.mark.parametrize("both", [True, False])
def test_vectors_of_length_100(kind: str, both: bool) -> None:
    inputs = make_inputs(kind, Sizes(2, 2, 129, 129))
    for name in ("q", "k") if both else ("q",):
        inputs.leaves[name] *= 100 / inputs.leaves[name].norm(dim=-1, keepdim=True)
    check(inputs, ill_conditioned=True)


@each_kind
def test_strided_inputs(kind: str) -> None:
    inputs = make_inputs(kind, Sizes(2, 2, 65, 130))
    strided = {
        name: torch.stack([leaf, torch.full_like(leaf, 1e9)], -1).transpose(0, 2).contiguous().transpose(0, 2)
        for name, leaf in inputs.leaves.items()
        if leaf.dim() == 5
    }
    score = inputs.make_score({name: leaf.float() for name, leaf in inputs.leaves.items()})
    q, k, v = (strided[name].float()[..., 0] for name in ("q", "k", "v"))
    assert not q.is_contiguous()
    found, _ = attend(q, k, v, score, Mask(), backend="tiled")
    expected = evaluate(inputs, "tiled")["output"]
    assert_same({"output": found}, {"output": expected}, OUTPUT)


@each_kind
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(kind: str, dropout: float) -> None:
    """In float64; with dropout too, whose mask is the same for the same seed."""
    inputs = make_inputs(kind, Sizes(2, 2, 4, 5))
    names = list(inputs.leaves)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def attention(*values: Tensor) -> Tensor:
        leaves = dict(zip(names, values, strict=True))
        torch.manual_seed(0)
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        mask = Mask(padding)
        return attend(q, k, v, inputs.make_score(leaves), mask, backend="tiled", dropout=dropout)[0]

    leaves = [leaf.requires_grad_() for leaf in inputs.leaves.values()]
    assert torch.autograd.gradcheck(attention, leaves, fast_mode=True)


def test_dropout_repeats_for_a_seed_and_keeps_the_mean() -> None:
    inputs = make_inputs("both force", Sizes())
    inputs.leaves["v"].fill_(1.0)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(evaluate(inputs, "tiled", dropout=0.3))
    assert_same(outputs[0], outputs[1], 0.0)
    assert not torch.equal(outputs[0]["output"], outputs[2]["output"])
    assert float(outputs[0]["output"].mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", list(MECHANISMS))
def test_memory_grows_linearly_and_stays_small(mechanism: str) -> None:
    """Batch x heads = 4, D = 32: what is held above inputs, outputs and gradients."""
    if PeakMemory(torch.device("cpu")).kind is None:
        pytest.skip("no measure of peak memory here")
    settings = SpeedSettings(threads=1)
    of_process = peak_process(torch.device("cpu"))
    half, whole = (
        of_process(peak_bytes, Case(mechanism, "tiled", length), settings, "cpu") for length in (4096, 8192)
    )
    assert whole <= 2.2 * half
    assert whole <= 80e6  # a tensor like q has 4.2e6
