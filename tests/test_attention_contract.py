"""Every attention module is a drop-in for `nn.MultiheadAttention(batch_first=True)`: signatures, results,
state, types, dropout, imports, PyTorch's own encoder. Masks have a file of their own."""

import copy
import inspect
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from attention_cases import (
    FACTORIES,
    FORCE,
    POISON,
    TIMESCALES,
    E,
    H,
    L,
    N,
    S,
    each_module,
    gradients,
    make,
    make_inputs,
    nothing_read,
    relative,
    run,
)
from torch import Tensor, nn

from attention_kernels import use_backend
from attention_module import AttentionModule
from gravitational_attention import GravitationalAttention
from gravitational_multi_timescale_attention import GravitationalMultiTimescaleAttention

EVERY = ("conventional", "gravitational", "multi-timescale", "gravitational multi-timescale")
GRAVITATIONAL, MULTI, HEADS = EVERY[1::2], EVERY[2:], ("heads",)
with_and_without_weights = pytest.mark.parametrize("need_weights", [True, False])


@pytest.mark.parametrize("name", EVERY)
def test_constructor_and_forward_have_the_names_order_and_defaults_of_pytorch(name: str) -> None:
    module = type(make(name))
    theirs = inspect.signature(nn.MultiheadAttention.forward).parameters
    ours = inspect.signature(module.forward).parameters
    assert list(ours) == [*theirs, "query_offset"]
    assert [p.default for p in ours.values()] == [*(p.default for p in theirs.values()), 0]
    assert ours["query_offset"].kind is inspect.Parameter.KEYWORD_ONLY
    created = inspect.signature(module.__init__).parameters
    leading = ["self", "embed_dim", "num_heads", "dropout", "bias"]
    assert list(created)[:5] == leading
    assert all(p.kind is p.KEYWORD_ONLY for key, p in created.items() if key not in leading)
    assert list(created)[-3:] == ["batch_first", "device", "dtype"]
    assert all(p.default is not p.empty for p in list(created.values())[3:])


ILLEGAL: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (EVERY, {"batch_first": False}, "batch_first"),
    (EVERY, {"embed_dim": 21}, "embed_dim=21"),
    (EVERY, {"embed_dim": 0}, "embed_dim=0"),
    (EVERY, {"num_heads": 0}, "num_heads=0"),
    (EVERY, {"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
    (EVERY, {"dropout": 1.0}, "dropout must be in .*got 1.0"),
    (EVERY, {"dropout": math.nan}, "dropout must be in .*got nan"),
    (GRAVITATIONAL, {"softening": 0.0}, "softening must be above 0.*got 0.0"),
    (GRAVITATIONAL, {"softening": math.inf}, "softening must be .*finite, got inf"),
    (GRAVITATIONAL, {"softening": math.nan}, "softening must be .*got nan"),
    (GRAVITATIONAL, {"distance_power": -2.0}, "distance_power must be above 0.*got -2.0"),
    (GRAVITATIONAL, {"distance_power": math.nan}, "distance_power must be .*got nan"),
    (GRAVITATIONAL, {"softening": 1e-3, "distance_power": 20.0}, "softening must be at least 0.00187 for"),
    (GRAVITATIONAL, {"softening": 1e-7}, "at least 1e-06 for distance_power=2.0, got 1e-07"),
    (GRAVITATIONAL, {"distance": "hamming"}, "distance must be one of .*'manhattan'.*got 'hamming'"),
    (GRAVITATIONAL, {"learned_power": True}, 'learned_power=True needs normalization="force"'),
    (GRAVITATIONAL, {"learned_power": True, "softening": 1e-7, **FORCE}, "softening must be at least 1e-06"),
    (GRAVITATIONAL, {"normalization": "Softmax"}, "normalization must be one of .*'softmax', 'force'"),
    (MULTI, {"gammas": (0.0, 0.5)}, r"gammas must be in \(0, 1\), got \(0.0, 0.5\)"),
    (MULTI, {"gammas": (0.5, 1.0)}, r"gammas must be in \(0, 1\)"),
    (MULTI, {"gammas": (0.5, math.nan)}, r"gammas must be in \(0, 1\)"),
    (MULTI, {"gammas": (0.5, 0.6, 0.7)}, "gammas must have one entry per timescale, got 3 for 2"),
    (MULTI, {"gammas": ()}, "gammas must have one entry per timescale, got 0 for 2"),
    (MULTI, {"adaptive": True, "learn_gammas": False}, "adaptive=True needs .*learn_gammas=True"),
    (MULTI, {"adaptive": True, "discount": "logits"}, 'adaptive=True needs discount="weights"'),
    (MULTI, {"discount": "logit"}, r"discount must be one of \('weights', 'logits'\), got 'logit'"),
    (MULTI, {"num_timescales": 0, "gammas": None}, "num_timescales must be at least 1, got 0"),
    (MULTI, {"decoder": "fourier"}, "decoder must be one of .*'mlp'.*got 'fourier'"),
    (HEADS, {"timescales": "tokens"}, r"timescales must be one of .*'heads'.*got 'tokens'"),
    (HEADS, {"num_timescales": 3}, "needs num_timescales=1, got 3"),
    (HEADS, {"gammas": (0.5, 0.6)}, "gammas must have one entry per head, got 2 for 4"),
]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [(name, kwargs, message) for names, kwargs, message in ILLEGAL for name in names],
)
def test_an_illegal_setting_raises_a_value_error_that_names_it(
    name: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FACTORIES[name](**kwargs)


@each_module
def test_weights_are_means_of_the_attention_maps_and_those_before_dropout(name: str) -> None:
    module = make(name, dropout=0.5)
    query, key, value, padding = make_inputs()
    maps = module.eval().attention_maps(query, key, padding)
    assert maps.shape == (N, TIMESCALES[name], H, L, S)
    assert maps.dtype == torch.float32
    for training in (False, True):
        module.train(training)
        torch.testing.assert_close(module.attention_maps(query, key, padding), maps)
        torch.testing.assert_close(module(query, key, value, padding)[1], maps.mean((1, 2)))
        per_head = module(query, key, value, padding, average_attn_weights=False)[1]
        torch.testing.assert_close(per_head, maps.mean(1))
    assert module(query, key, value, padding, need_weights=False)[1] is None


@each_module
def test_a_forward_keeps_nothing_on_the_module(name: str, need_weights: bool) -> None:
    module = make(name, dropout=0.1)

    def held() -> str:
        return str({path: vars(part) for path, part in module.named_modules()})

    before, parameters = held(), copy.deepcopy(module.state_dict())
    module(*make_inputs()[:3], need_weights=need_weights)
    assert held() == before
    assert all(torch.equal(value, parameters[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", MULTI)
def test_fixed_gammas_have_no_gradient_and_stay_in_the_state_dict(name: str) -> None:
    module = make(name, learn_gammas=False)
    assert "gradient of discounts.rho" not in run(module, make_inputs()[:3])
    assert not module.get_parameter("discounts.rho").requires_grad
    assert "discounts.rho" in module.state_dict()


@each_module
def test_learned_scalars_and_masses_have_their_shapes_and_no_gradient(name: str) -> None:
    module = make(name)
    scalars, timescales = module.learned_scalars(), TIMESCALES[name]
    expected = {"gamma"} if any(word in name for word in ("multi", "heads", "adaptive")) else set()
    if "gravitational" in name and "force" not in name:
        expected.add("gravity")
    if "learned" in name:
        expected |= {"power", "softening"}
    assert set(scalars) == expected
    assert all(value.shape == (timescales, H) and not value.requires_grad for value in scalars.values())
    if isinstance(module, GravitationalAttention | GravitationalMultiTimescaleAttention):
        masses = module.masses(*make_inputs()[:2])
        assert masses["key"].shape == (N, timescales, H, S)
        assert ("query" in masses) == ("force" not in name)
        assert all(bool((mass > 0).all()) and not mass.requires_grad for mass in masses.values())


@each_module
def test_unbatched_input_is_a_batch_of_one(name: str, need_weights: bool) -> None:
    module, inputs = make(name), make_inputs()
    pairs = torch.zeros(H, L, S, dtype=torch.bool)
    pairs[1, 2, 3] = True
    for average in (True, False):
        alone = module(*(x[1] for x in inputs), need_weights, pairs, average)
        one = module(*(x[1:2] for x in inputs), need_weights, pairs, average)
        torch.testing.assert_close(alone[0], one[0][0])
        if need_weights:
            torch.testing.assert_close(alone[1], one[1][0])
    x = inputs.query
    own = module(x[0], x[0], x[0], need_weights=need_weights)[0]
    torch.testing.assert_close(own, module(x, x, x, need_weights=need_weights)[0][0])


@each_module
@pytest.mark.parametrize(
    ("dtype", "autocast", "need_weights", "tolerance"),
    [
        (torch.float64, False, False, 1e-12),
        (torch.bfloat16, False, True, 0.03),
        (torch.float16, False, False, 0.005),
        (torch.float32, True, True, 0.05),
        (torch.float32, True, False, 0.05),
        (torch.bfloat16, True, False, 0.05),
    ],
)
def test_output_and_gradients_have_the_dtype_of_the_query_under_autocast_too(
    name: str, need_weights: bool, dtype: torch.dtype, autocast: bool, tolerance: float
) -> None:
    of_parameters = torch.float32 if autocast else dtype
    module = make(name).to(of_parameters)
    assert {p.dtype for p in FACTORIES[name](dtype=dtype, device="cpu").parameters()} == {dtype}
    *inputs, padding = make_inputs()
    given = [x.to(dtype).requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, weights = module(*given, padding, need_weights)
    expected = copy.deepcopy(module).double()(*(x.double() for x in given), padding, need_weights)[0]
    assert output.dtype == dtype
    assert weights is None or weights.dtype == dtype
    assert relative(output, expected) < tolerance
    output.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == dtype for x in given)
    found = gradients(module)
    assert len(found) == len(list(module.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    assert {gradient.dtype for gradient in found.values()} == {of_parameters}


@each_module
def test_under_autocast_scores_are_in_float32(name: str) -> None:
    """With projections that bfloat16 has exactly, autocast changes nothing in the weights."""
    module = make(name)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(E).repeat(3 * module.num_projections, 1))
        module.get_parameter("in_proj_bias").zero_()
    query, key, value = (part.bfloat16().float() for part in make_inputs()[:3])
    expected = module.attention_maps(query, key)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module.attention_maps(query, key), expected)
        torch.testing.assert_close(module(query, key, value)[1], expected.mean((1, 2)))


@each_module
def test_strided_inputs_and_masks_are_read_rightly(name: str, need_weights: bool) -> None:
    module, (query, key, value, padding) = make(name), make_inputs()
    pairs, expanded = torch.rand(L, S) < 0.2, padding[1].expand(N, S)

    def strided(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    for mask, other in ((padding, strided(padding)), (expanded.clone(), expanded)):
        expected = module(query, key, value, mask, need_weights, pairs)[0]
        found = module(*map(strided, (query, key, value)), other, need_weights, strided(pairs))[0]
        torch.testing.assert_close(found, expected)


@each_module
@pytest.mark.parametrize("sizes", [(0, L, S, E), (N, 0, S, E), (N, L, 0, E)])
def test_an_empty_batch_no_queries_and_no_keys_are_legal(
    name: str, need_weights: bool, sizes: tuple[int, int, int, int]
) -> None:
    module, (query, key, value, _) = make(name), make_inputs(sizes=sizes)
    for backend in ("auto",) if need_weights else ("auto", "tiled"):
        with use_backend(backend):
            output, weights = module(query, key, value, need_weights=need_weights)
        if weights is not None:
            assert weights.shape == sizes[:3]
        torch.testing.assert_close(output, nothing_read(module).expand(query.shape))
        output.sum().backward()


def make_transparent(name: str, width: int, dropout: float) -> AttentionModule:
    """A module of one head and width S that outputs the weights of its first timescale for values eye(S)."""
    decoder = {"decoder": "linear"} if "multi" in name else {}
    module = make(name, embed_dim=width, num_heads=1, dropout=dropout, **decoder)
    first = slice(2 * module.num_projections * width, (2 * module.num_projections + 1) * width)
    with torch.no_grad():
        module.in_proj_weight[first] = torch.eye(width)
        module.get_parameter("in_proj_bias")[first] = 0.0
        module.out_proj.weight.zero_()
        module.out_proj.weight[:, :width] = torch.eye(width)
        module.out_proj.bias.zero_()
    return module


@each_module
@with_and_without_weights
def test_dropout_drops_weights_and_rescales_the_rest_in_training_only(name: str, need_weights: bool) -> None:
    width, dropout, row = 16, 0.25, 3
    module = make_transparent(name, width, dropout)
    x = torch.randn(50, width, width, generator=torch.Generator().manual_seed(1))
    values = torch.eye(width).repeat(50, 1, 1).requires_grad_()
    weights = module.attention_maps(x, x)[:, 0, 0]
    evaluated = module.eval()(x, x, values, need_weights=need_weights)[0]
    torch.testing.assert_close(evaluated, weights)
    module.train()
    outputs = []
    for seed in (2, 2, 5):
        torch.manual_seed(seed)
        outputs.append(module(x, x, values, need_weights=need_weights)[0])
    trained, again, other = outputs
    assert torch.equal(again, trained)
    assert not torch.equal(other, trained)
    dropped = trained.abs() < 1e-12
    torch.testing.assert_close(trained[~dropped], weights[~dropped] / (1 - dropout))
    deviation = (dropout * (1 - dropout) / dropped.numel()) ** 0.5
    assert float(dropped.float().mean()) == pytest.approx(dropout, abs=5 * deviation)
    # Values enter linearly: the gradient by them and the output are one matrix, dropout included.
    trained[0, row].sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad[0].sum(1), trained[0, row].detach() * width)


def test_importing_has_no_effect_and_needs_no_triton() -> None:
    script = """
import random, sys, torch
sys.modules["triton"] = None  # cannot be imported
def state():
    settings = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    return torch.get_rng_state().tolist(), random.getstate(), settings
before = state()
import conventional_attention, gravitational_attention
import multi_timescale_attention, gravitational_multi_timescale_attention
assert state() == before
x = torch.zeros(1, 3, 8)
gravitational_attention.GravitationalAttention(8, 2)(x, x, x)
"""
    command, root = [sys.executable, "-W", "error", "-c", script], Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- PyTorch's encoder -------------------------------------------------------------------------------------


@each_module
@pytest.mark.parametrize(
    ("masked", "learning"), [("nothing", False), ("padding", False), ("causal", True), ("both", False)]
)
def test_pytorchs_encoder_calls_our_forward_train_equals_eval_and_padding_is_not_read(
    name: str, masked: str, learning: bool
) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    layer.self_attn = make(name)  # type: ignore[assignment]
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x, _, _, padding = make_inputs(self_attention=True)
    causal: dict[str, Any] = {"mask": nn.Transformer.generate_square_subsequent_mask(L), "is_causal": True}
    added = torch.zeros(N, L).masked_fill(padding, -math.inf)  # PyTorch wants both masks of one type
    kinds: dict[str, dict[str, Any]] = {
        "nothing": {},
        "padding": {"src_key_padding_mask": padding},
        "causal": causal,
        "both": causal | {"src_key_padding_mask": added},
    }
    masks = kinds[masked]
    kept = ~padding if "src_key_padding_mask" in masks else torch.ones_like(padding)
    original = AttentionModule.forward
    with (
        mock.patch.object(AttentionModule, "forward", autospec=True, side_effect=original) as forward,
        torch.set_grad_enabled(learning),
    ):
        trained = encoder.train()(x, **masks)
        evaluated = encoder.eval()(x, **masks)
        poisoned = encoder(x.masked_fill(~kept.unsqueeze(-1), POISON), **masks)
    assert forward.call_count == 3 * 2
    assert bool(evaluated.isfinite().all())
    torch.testing.assert_close(evaluated[kept], trained[kept])
    torch.testing.assert_close(poisoned[kept], evaluated[kept])
