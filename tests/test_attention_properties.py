"""Any legal configuration of any attention module works."""

import math
from typing import Any

import pytest
import torch
from attention_cases import FACTORIES, make, make_inputs, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_engine.attention_scores import DotProduct, Mask
from attention_kernels import attend, use_backend
from gravitational_attention import least_softening

SHARED_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "num_heads": st.integers(1, 3),
    "head_dim": st.integers(1, 4),
    "dropout": st.sampled_from([0.0, 0.3]),
    "bias": st.booleans(),
}
GRAVITY_OPTIONS = {
    "softening": st.floats(1e-9, 1e6) | st.sampled_from([0.1, 1e-3]),
    "distance_power": st.floats(1e-2, 20) | st.sampled_from([1.0, 2.0, 4.0]),
}
TIMESCALE_OPTIONS = {
    "gammas": st.lists(st.floats(0, 1), min_size=1, max_size=3),
    "learn_gammas": st.booleans(),
    "decoder": st.sampled_from(["laplace", "linear", "mlp"]),
}


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """A module's name, its settings, sizes, scale of the inputs and masks."""
    name = draw(st.sampled_from(list(FACTORIES)))
    options = dict(SHARED_OPTIONS)
    if "gravitational" in name:
        options |= GRAVITY_OPTIONS
    if "multi" in name:
        options |= TIMESCALE_OPTIONS
    kwargs: dict[str, Any] = {key: draw(strategy) for key, strategy in options.items()}
    kwargs["embed_dim"] = kwargs["num_heads"] * kwargs.pop("head_dim")
    if "gammas" in kwargs:
        kwargs["num_timescales"] = len(kwargs["gammas"])
    return {
        "name": name,
        "kwargs": kwargs,
        "sizes": tuple(draw(st.integers(1, 5)) for _ in range(3)),
        "scale": draw(st.sampled_from([0.0, 1e-3, 1.0, 1.0, 30.0, 1e4])),
        "offset": draw(st.sampled_from([0.0, 0.0, 100.0])),
        "padded": draw(st.sampled_from([None, "bool", "float"])),
        "paired": draw(st.sampled_from([None, "bool", "float"])),
        "need_weights": draw(st.booleans()),
        "is_causal": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def check_configuration(case: dict[str, Any]) -> None:
    """Finite outputs and gradients, or a ValueError that names the setting."""
    generator = torch.Generator().manual_seed(case["seed"])
    torch.manual_seed(case["seed"])
    try:
        module = FACTORIES[case["name"]](**case["kwargs"])
    except ValueError as error:
        assert any(setting in str(error) for setting in case["kwargs"]), error
        return
    batch, queries, keys = case["sizes"]
    width = case["kwargs"]["embed_dim"]
    query, key, value = (
        (torch.randn(batch, length, width, generator=generator) * case["scale"] + case["offset"])
        for length in (queries, keys, keys)
    )
    masks: dict[str, Tensor] = {}
    for argument, kind, shape in (
        ("key_padding_mask", case["padded"], (batch, keys)),
        ("attn_mask", case["paired"], (queries, keys)),
    ):
        if kind:
            blocked = torch.rand(shape, generator=generator) < 0.4
            masks[argument] = (
                blocked if kind == "bool" else torch.zeros(shape).masked_fill(blocked, -math.inf)
            )
    asked = {"need_weights": case["need_weights"], "is_causal": case["is_causal"]}
    found = run(module, (query, key, value), **masks, **asked)
    unusual = [name for name, part in found.items() if not bool(part.isfinite().all())]
    assert unusual == []


@pytest.mark.parametrize("normalization", ["softmax", "force"])
@pytest.mark.parametrize("power", [0.1, 1.0, 2.0, 4.0, 20.0])
@pytest.mark.parametrize("need_weights", [True, False])
def test_coincident_pairs_are_finite_at_the_least_softening(
    normalization: str, power: float, need_weights: bool
) -> None:
    """Tokens of zeros have the same q and k, without biases: their r2 is 0."""
    for name in ("gravitational", "gravitational multi-timescale"):
        torch.manual_seed(0)
        module = FACTORIES[name](
            softening=least_softening(power),
            distance_power=power,
            normalization=normalization,
        )
        x = torch.zeros(2, 4, module.embed_dim)
        x[:, 2:] = torch.randn(2, 2, module.embed_dim)
        found = run(module, (x, x, x), need_weights=need_weights)
        assert [key for key, part in found.items() if not bool(part.isfinite().all())] == []


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(configurations())
def test_any_configuration_is_finite_or_refused_by_name(case: dict[str, Any]) -> None:
    check_configuration(case)


def test_a_chosen_backend_is_that_of_all_modules_until_its_block_ends() -> None:
    attention, x = make("gravitational"), make_inputs().query

    def attended() -> Tensor:
        return attention(x, x, x, need_weights=False)[0]

    def refused() -> Any:
        return pytest.raises(ValueError, match="backend 'sdpa' is for the dot product")

    with refused(), use_backend("sdpa"):
        attended()
    fastest = attended()  # an error has ended the choice
    with use_backend("sdpa"):
        with use_backend("dense"):
            dense = attended()
        with refused():
            attended()
        with use_backend("auto"):
            torch.testing.assert_close(attended(), fastest)
    torch.testing.assert_close(dense, attention(x, x, x)[0], rtol=0, atol=0)  # weights are made by "dense"


def test_a_backend_that_is_named_is_taken_whatever_is_chosen() -> None:
    q = torch.randn(1, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    score = DotProduct(0.5, log_decay=torch.full((1, 2), -0.1))
    expected = attend(q, q, q, score, Mask(), backend="dense")[0]
    with use_backend("sdpa"):
        found = attend(q, q, q, score, Mask(), backend="dense")[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_unknown_backend_is_refused_with_those_that_there_are() -> None:
    with (
        pytest.raises(ValueError, match=r"backend must be one of \('auto', .*got 'denes'"),
        use_backend("denes"),
    ):
        pass
