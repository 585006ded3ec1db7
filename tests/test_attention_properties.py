"""Any legal configuration of any attention module works."""

import math
from typing import Any

import pytest
import torch
from attention_cases import FACTORIES, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gravitational_attention import least_softening

SHARED: dict[str, Any] = {
    "num_heads": st.integers(1, 3),
    "head_dim": st.integers(1, 4),
    "dropout": st.sampled_from([0.0, 0.3]),
    "bias": st.booleans(),
}
GRAVITY: dict[str, Any] = {
    "softening": st.floats(1e-9, 1e6) | st.sampled_from([0.1, 1e-3]),
    "distance_power": st.floats(1e-2, 20) | st.sampled_from([1.0, 2.0, 4.0]),
}
TIMESCALES: dict[str, Any] = {
    "gammas": st.lists(st.floats(0, 1), min_size=1, max_size=3),
    "learn_gammas": st.booleans(),
    "decoder": st.sampled_from(["laplace", "linear", "mlp"]),
}
ASKED = st.fixed_dictionaries({"need_weights": st.booleans(), "is_causal": st.booleans()})


def unusual(found: dict[str, Tensor]) -> list[str]:
    return [name for name, part in found.items() if not bool(part.isfinite().all())]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_configuration_is_finite_or_refused_by_name(data: st.DataObject) -> None:
    draw = data.draw
    name = draw(st.sampled_from(list(FACTORIES)))
    of_law, of_timescales = GRAVITY if "gravitational" in name else {}, TIMESCALES if "multi" in name else {}
    kwargs = draw(st.fixed_dictionaries(SHARED | of_law | of_timescales))
    kwargs["embed_dim"] = width = kwargs["num_heads"] * kwargs.pop("head_dim")
    if "gammas" in kwargs:
        kwargs["num_timescales"] = len(kwargs["gammas"])
    torch.manual_seed(draw(st.integers(0, 2**16)))
    try:
        module = FACTORIES[name](**kwargs)
    except ValueError as error:
        assert any(setting in str(error) for setting in kwargs), error
        return
    batch, queries, keys = draw(st.tuples(*[st.integers(1, 5)] * 3))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 1.0, 30.0, 1e4]))
    offset = draw(st.sampled_from([0.0, 0.0, 100.0]))
    inputs = tuple(torch.randn(batch, length, width) * scale + offset for length in (queries, keys, keys))
    masks: dict[str, Tensor] = {}
    for argument, shape in (("key_padding_mask", (batch, keys)), ("attn_mask", (queries, keys))):
        blocked = torch.rand(shape) < 0.4
        floats = torch.zeros(shape).masked_fill(blocked, -math.inf)
        kind = draw(st.sampled_from(["none", "boolean", "float"]))
        if kind != "none":
            masks[argument] = blocked if kind == "boolean" else floats
    assert unusual(run(module, inputs, **masks, **draw(ASKED))) == []


@pytest.mark.parametrize("normalization", ["softmax", "force"])
@pytest.mark.parametrize("power", [0.1, 1.0, 2.0, 4.0, 20.0])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ["gravitational", "gravitational multi-timescale"])
def test_coincident_pairs_are_finite_at_the_least_softening(
    name: str, normalization: str, power: float, need_weights: bool
) -> None:
    """Tokens of zeros have the same q and k, without biases: their r2 is 0."""
    torch.manual_seed(0)
    law = {"softening": least_softening(power), "distance_power": power, "normalization": normalization}
    module = FACTORIES[name](**law)
    x = torch.zeros(2, 4, module.embed_dim)
    x[:, 2:] = torch.randn(2, 2, module.embed_dim)
    assert unusual(run(module, (x, x, x), need_weights=need_weights)) == []
