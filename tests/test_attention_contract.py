"""Every attention module is a drop-in for `nn.MultiheadAttention(batch_first=True)`: signatures, results,
state, types, dropout, imports. Masks have a file of their own, and so has PyTorch's encoder."""

import copy
import inspect
import io
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import (
    FACTORIES,
    TIMESCALES,
    E,
    H,
    L,
    N,
    S,
    assert_same,
    each_module,
    gradients,
    make,
    make_inputs,
    nothing_read,
    relative,
    run,
    with_and_without_weights,
)
from torch import Tensor, nn

from attention_module import AttentionModule
from gravitational_attention import GravitationalAttention
from gravitational_multi_timescale_attention import GravitationalMultiTimescaleAttention

FILES = (
    "conventional_attention",
    "gravitational_attention",
    "multi_timescale_attention",
    "gravitational_multi_timescale_attention",
)


@each_module
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


ILLEGAL: list[tuple[tuple[str, ...], list[tuple[dict[str, Any], str]]]] = [
    (
        tuple(FACTORIES),
        [
            ({"batch_first": False}, "batch_first"),
            ({"embed_dim": 21}, "embed_dim=21"),
            ({"embed_dim": 0}, "embed_dim=0"),
            ({"num_heads": 0}, "num_heads=0"),
            ({"num_heads": -4}, "num_heads=-4"),
            ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
            ({"dropout": math.nan}, "dropout"),
        ],
    ),
    (
        ("gravitational", "gravitational multi-timescale"),
        [
            ({"softening": 0.0}, "softening must be above 0.*got 0.0"),
            ({"softening": -0.1}, "softening must be above 0.*got -0.1"),
            ({"softening": math.inf}, "softening"),
            ({"softening": math.nan}, "softening"),
            ({"distance_power": 0.0}, "distance_power must be above 0.*got 0.0"),
            ({"distance_power": -2.0}, "distance_power must be above 0.*got -2.0"),
            ({"distance_power": math.nan}, "distance_power"),
            (
                {"softening": 1e-3, "distance_power": 20.0},
                "softening must be at least 0.00187 for .*",
            ),
            ({"softening": 1e-7}, "softening must be at least 1e-06 for distance_power=2.0, got 1e-07"),
            ({"distance": "hamming"}, "distance must be one of .*'cosine', 'manhattan'.*got 'hamming'"),
            ({"learned_power": True}, 'learned_power=True needs normalization="force"'),
            (
                {"learned_power": True, "normalization": "force", "softening": 1e-7},
                "softening must be at least",
            ),
            ({"normalization": "Softmax"}, "normalization must be one of .*'softmax', 'force'"),
        ],
    ),
    (
        ("multi-timescale", "gravitational multi-timescale"),
        [
            ({"gammas": (0.0, 0.5)}, r"gammas must be in \(0, 1\), got \(0.0, 0.5\)"),
            ({"gammas": (0.5, 1.0)}, r"gammas must be in \(0, 1\)"),
            ({"gammas": (0.5, 1.5)}, r"gammas must be in \(0, 1\)"),
            ({"gammas": (0.5, math.nan)}, r"gammas must be in \(0, 1\)"),
            ({"gammas": (0.5, 0.6, 0.7)}, "gammas must have one entry per timescale, got 3 for 2"),
            ({"gammas": ()}, "gammas must have one entry per timescale, got 0 for 2"),
            ({"adaptive": True, "learn_gammas": False}, "adaptive=True needs .*learn_gammas=True"),
            ({"adaptive": True, "discount": "logits"}, 'adaptive=True needs discount="weights"'),
            ({"discount": "logit"}, r"discount must be one of \('weights', 'logits'\), got 'logit'"),
            ({"num_timescales": 0, "gammas": None}, "num_timescales must be at least 1, got 0"),
            ({"decoder": "fourier"}, "decoder must be one of .*'laplace', 'linear', 'mlp'.*got 'fourier'"),
        ],
    ),
    (
        ("heads",),
        [
            ({"timescales": "tokens"}, r"timescales must be one of .*'heads'.*got 'tokens'"),
            ({"num_timescales": 3}, "needs num_timescales=1, got 3"),
            ({"gammas": (0.5, 0.6)}, "gammas must have one entry per head, got 2 for 4"),
        ],
    ),
]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [(name, kwargs, message) for names, rows in ILLEGAL for name in names for kwargs, message in rows],
)
def test_an_illegal_setting_raises_a_value_error_that_names_it(
    name: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FACTORIES[name](**kwargs)


@each_module
def test_output_and_weights_have_pytorchs_shapes(name: str) -> None:
    module = make(name)
    query, key, value, _ = make_inputs()
    output, weights = module(query, key, value)
    assert output.shape == (N, L, E)
    assert weights is not None
    assert weights.shape == (N, L, S)
    output, weights = module(query, key, value, average_attn_weights=False)
    assert weights is not None
    assert weights.shape == (N, H, L, S)
    output, weights = module(query, key, value, need_weights=False)
    assert output.shape == (N, L, E)
    assert weights is None


@each_module
def test_attention_maps_are_the_weights_of_each_timescale_and_head(name: str) -> None:
    module = make(name).eval()
    query, key, value, padding = make_inputs()
    maps = module.attention_maps(query, key, key_padding_mask=padding)
    assert maps.shape == (N, TIMESCALES[name], H, L, S)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert bool((maps >= 0).all())
    assert bool((maps[padding[:, None, None, None, :].expand_as(maps)] == 0).all())
    _, averaged = module(query, key, value, key_padding_mask=padding)
    _, per_head = module(query, key, value, key_padding_mask=padding, average_attn_weights=False)
    torch.testing.assert_close(averaged, maps.mean((1, 2)))
    torch.testing.assert_close(per_head, maps.mean(1))


@each_module
def test_weights_are_those_before_dropout(name: str) -> None:
    module = make(name, dropout=0.5)
    query, key, value, _ = make_inputs()
    _, training = module.train()(query, key, value)
    _, evaluating = module.eval()(query, key, value)
    torch.testing.assert_close(training, evaluating)
    maps = module.train().attention_maps(query, key)
    torch.testing.assert_close(maps.mean((1, 2)), evaluating)


@each_module
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state dict", "torch.save"])
def test_a_copy_computes_the_same(name: str, how: str) -> None:
    module = make(name)
    inputs = make_inputs()[:3]
    if how == "deepcopy":
        copied = copy.deepcopy(module)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(module))
    elif how == "state dict":
        copied = FACTORIES[name]()
        copied.load_state_dict(module.state_dict())
    else:
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        copied = FACTORIES[name]()
        copied.load_state_dict(torch.load(file, weights_only=True))
    assert_same(run(copied, inputs), run(module, inputs), tolerance=0.0)


@each_module
def test_a_forward_keeps_nothing_on_the_module(name: str, need_weights: bool) -> None:
    module = make(name, dropout=0.1)

    def held() -> dict[str, dict[str, Any]]:
        return {
            path: {key: copy.copy(value) for key, value in vars(part).items()}
            for path, part in module.named_modules()
        }

    before, parameters = held(), {key: value.clone() for key, value in module.state_dict().items()}
    module(*make_inputs()[:3], need_weights=need_weights)
    assert str(held()) == str(before)
    assert all(torch.equal(value, parameters[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", ["multi-timescale", "gravitational multi-timescale"])
def test_fixed_gammas_have_no_gradient_and_stay_in_the_state_dict(name: str) -> None:
    module = make(name, learn_gammas=False)
    module(*make_inputs()[:3], need_weights=False)[0].sum().backward()
    trained = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    assert "discounts.rho" not in trained
    assert module.get_parameter("discounts.rho").grad is None
    assert "discounts.rho" in module.state_dict()


@each_module
def test_learned_scalars_and_masses_have_their_shapes_and_no_gradient(name: str) -> None:
    module = make(name)
    query, key, _, _ = make_inputs()
    scalars = module.learned_scalars()
    timescales = TIMESCALES[name]
    expected = {"gamma"} if any(word in name for word in ("multi", "heads", "adaptive")) else set()
    if "gravitational" in name and "force" not in name:
        expected.add("gravity")
    if "learned" in name:
        expected |= {"power", "softening"}
    assert set(scalars) == expected
    assert all(value.shape == (timescales, H) and not value.requires_grad for value in scalars.values())
    if isinstance(module, GravitationalAttention | GravitationalMultiTimescaleAttention):
        masses = module.masses(query, key)
        assert masses["key"].shape == (N, timescales, H, S)
        assert ("query" in masses) == ("force" not in name)
        assert all(bool((mass > 0).all()) and not mass.requires_grad for mass in masses.values())


@each_module
def test_unbatched_input_is_a_batch_of_one(name: str, need_weights: bool) -> None:
    module = make(name)
    query, key, value, padding = make_inputs()
    pairs = torch.zeros(H, L, S, dtype=torch.bool)
    pairs[1, 2, 3] = True
    for average in (True, False):
        alone = module(query[1], key[1], value[1], padding[1], need_weights, pairs, average)
        one = module(query[1:2], key[1:2], value[1:2], padding[1:2], need_weights, pairs, average)
        assert alone[0].shape == (L, E)
        torch.testing.assert_close(alone[0], one[0][0])
        if need_weights:
            assert alone[1].shape == ((L, S) if average else (H, L, S))
            torch.testing.assert_close(alone[1], one[1][0])
    own = module(query[0], query[0], query[0], need_weights=need_weights)[0]
    torch.testing.assert_close(own, module(query, query, query, need_weights=need_weights)[0][0])


@each_module
@with_and_without_weights
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_output_and_gradients_have_the_dtype_of_the_query(
    name: str, need_weights: bool, dtype: torch.dtype
) -> None:
    query, key, value, padding = make_inputs()
    precise = make(name).to(dtype).double()
    expected, _ = precise(*(part.to(dtype).double() for part in (query, key, value)), padding, need_weights)
    module = make(name).to(dtype)
    made = FACTORIES[name](dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    leaf = query.to(dtype).requires_grad_()
    output, weights = module(leaf, key.to(dtype), value.to(dtype), padding, need_weights)
    assert output.dtype == dtype
    assert weights is None or weights.dtype == dtype
    output.float().square().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert all(gradient.isfinite().all() for gradient in gradients(module))
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.03, torch.float16: 0.005}[dtype]
    assert relative(output, expected) < tolerance


@each_module
@with_and_without_weights
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_output_has_the_dtype_of_the_query(
    name: str, need_weights: bool, dtype: torch.dtype
) -> None:
    module = make(name)
    query, key, value, padding = make_inputs()
    expected, _ = module(query, key, value, padding, need_weights)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(query.to(dtype), key.to(dtype), value.to(dtype), padding, need_weights)
        maps = module.attention_maps(query.to(dtype), key.to(dtype), padding)
    assert output.dtype == dtype
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert relative(output, expected) < 0.05
    output.float().square().sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(module))
    assert {gradient.dtype for gradient in gradients(module)} == {torch.float32}


@each_module
def test_under_autocast_scores_are_in_float32(name: str) -> None:
    """With projections that bfloat16 has exactly, autocast changes nothing in the weights."""
    module = make(name)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(E).repeat(3 * module.num_projections, 1))
        assert module.in_proj_bias is not None
        module.in_proj_bias.zero_()
    query, key, value = (part.bfloat16().float() for part in make_inputs()[:3])
    expected = module.attention_maps(query, key)
    with torch.autocast("cpu", torch.bfloat16):
        maps = module.attention_maps(query, key)
        weights = module(query, key, value)[1]
    torch.testing.assert_close(maps, expected)
    assert weights is not None
    torch.testing.assert_close(weights, expected.mean((1, 2)))


@each_module
def test_strided_inputs_and_masks_are_read_rightly(name: str, need_weights: bool) -> None:
    module = make(name)
    query, key, value, padding = make_inputs()
    pairs = torch.rand(L, S) < 0.2
    expected = module(query, key, value, padding, need_weights, pairs)[0]

    def strided(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    found = module(*map(strided, (query, key, value, padding)), need_weights, strided(pairs))[0]
    torch.testing.assert_close(found, expected)
    expanded = padding[1].expand(N, S)
    torch.testing.assert_close(
        module(query, key, value, expanded, need_weights)[0],
        module(query, key, value, expanded.clone(), need_weights)[0],
    )


@each_module
@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_an_empty_batch_no_queries_and_no_keys_are_legal(name: str, need_weights: bool, empty: str) -> None:
    module = make(name)
    query, key, value, _ = make_inputs()
    if empty == "batch":
        query, key, value = query[:0], key[:0], value[:0]
    elif empty == "queries":
        query = query[:, :0]
    else:
        key, value = key[:, :0], value[:, :0]
    output, weights = module(query, key, value, need_weights=need_weights)
    assert output.shape == query.shape
    if weights is not None:
        assert weights.shape == (*query.shape[:2], key.shape[1])
    torch.testing.assert_close(output, nothing_read(module).expand(query.shape))
    output.sum().backward()


def make_transparent(name: str, width: int, dropout: float) -> AttentionModule:
    """A module of one head and width S that outputs the weights of its first timescale for values eye(S)."""
    decoder = {"decoder": "linear"} if "multi" in name else {}
    module = make(name, embed_dim=width, num_heads=1, dropout=dropout, **decoder)
    first = slice(2 * module.num_projections * width, (2 * module.num_projections + 1) * width)
    with torch.no_grad():
        assert module.in_proj_bias is not None
        module.in_proj_weight[first] = torch.eye(width)
        module.in_proj_bias[first] = 0.0
        module.out_proj.weight.zero_()
        module.out_proj.weight[:, :width] = torch.eye(width)
        module.out_proj.bias.zero_()
    return module


@each_module
@with_and_without_weights
def test_dropout_drops_weights_and_rescales_the_rest_in_training_only(name: str, need_weights: bool) -> None:
    width, dropout = 16, 0.25
    module = make_transparent(name, width, dropout)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, width, width, generator=generator)
    values = torch.eye(width).expand(50, width, width)
    weights = module.attention_maps(x, x)[:, 0, 0]
    evaluated = module.eval()(x, x, values, need_weights=need_weights)[0]
    torch.testing.assert_close(evaluated, weights)
    torch.manual_seed(2)
    trained = module.train()(x, x, values, need_weights=need_weights)[0]
    dropped = trained.abs() < 1e-12
    torch.testing.assert_close(trained[~dropped], weights[~dropped] / (1 - dropout))
    count = dropped.numel()
    assert float(dropped.float().mean()) == pytest.approx(dropout, abs=5 * (0.25 * 0.75 / count) ** 0.5)
    torch.manual_seed(2)
    again = module(x, x, values, need_weights=need_weights)[0]
    other = module(x, x, values, need_weights=need_weights)[0]
    assert torch.equal(again, trained)
    assert not torch.equal(other, trained)


@each_module
def test_dropouts_gradient_is_that_of_the_dropped_weights(name: str) -> None:
    """Values enter linearly: the gradient by them and the output are one matrix, dropout included."""
    width = 16
    module = make_transparent(name, width, 0.4).train()
    x = torch.randn(2, width, width, generator=torch.Generator().manual_seed(1))
    values = torch.eye(width).repeat(2, 1, 1).requires_grad_()
    output, _ = module(x, x, values, need_weights=False)
    row = 3
    output[0, row].sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad[0].sum(1), output[0, row].detach() * width)


def test_importing_has_no_effect() -> None:
    script = f"""
import random, sys, torch
state, python = torch.get_rng_state(), random.getstate()
def settings():
    return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
before = settings()
for name in {FILES}:
    __import__(name)
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate(), name
    assert settings() == before, name
wanted = {{"pandas", "matplotlib", "seaborn"}} & set(sys.modules)
assert not wanted, wanted
"""
    command, root = [sys.executable, "-W", "error", "-c", script], Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
