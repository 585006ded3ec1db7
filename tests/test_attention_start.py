"""How the modules start, what their parts are replaced by, and the time of adaptive timescales."""

import functools
from typing import Any

import pytest
import torch
from attention_cases import FACTORIES, E, H, L, each_module, make, make_inputs
from torch import nn

from experiment.models import MODELS, Model
from multi_timescale_attention import MultiTimescaleAttention
from train_and_evaluate import ModelSettings

OF_GRAVITY = (
    *("normalization=force", "adaptive=true", "distance=cosine", "distance=manhattan"),
    "normalization=force,learned_power=true,learned_softening=true",
)
OF_TIMESCALES = (
    *("decoder=linear", "decoder=mlp", "gammas=0.6:0.9:0.99"),
    *("num_timescales=5", "adaptive=true", "discount=logits"),
)
OF_BOTH = ("decoder=linear", "decoder=mlp", "normalization=force", "adaptive=true")
VARIANTS = (
    *MODELS,
    *(f"gravitational,{own}" for own in OF_GRAVITY),
    *(f"multi_timescale,{own}" for own in OF_TIMESCALES),
    *(f"gravitational_multi_timescale,{own}" for own in OF_BOTH),
)


@functools.cache
def output_variance(name: str) -> float:
    """At the start, over sequences of equal tokens, of which every mechanism reads the token's value; the
    mean over several drawn modules."""
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        module = Model.parse(name).attention(ModelSettings(embed_dim=128, num_heads=4))()
        x = torch.randn(64, 1, 128).expand(64, 5, 128)
        with torch.no_grad():
            found.append(module(x, x, x, need_weights=False)[0].var())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_and_variant_starts_with_conventional_attentions_output_scale(name: str) -> None:
    assert output_variance(name) == pytest.approx(output_variance("conventional"), rel=0.1)


@each_module
def test_reset_parameters_initialises_everything_also_after_the_meta_device(name: str) -> None:
    module = FACTORIES[name](device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(1e30)
    module.reset_parameters()
    assert all(bool((tensor.abs() < 100).all()) for tensor in module.state_dict().values())
    torch.testing.assert_close(module.learned_scalars(), FACTORIES[name]().learned_scalars())


@each_module
def test_hooks_and_adapters_on_the_output_projection_act(name: str) -> None:
    module, x = make(name), make_inputs().query
    calls: list[int] = []
    handle = module.out_proj.register_forward_hook(lambda *_: calls.append(1))
    before = module(x, x, x)[0]
    handle.remove()
    extra = nn.Linear(E, E)
    module.out_proj = nn.Sequential(module.out_proj, extra)  # type: ignore[assignment]
    after = module(x, x, x)[0]
    after.sum().backward()
    assert calls == [1]
    assert not torch.allclose(before, after)
    assert extra.weight.grad is not None


@each_module
def test_neither_loops_over_matrices_nor_their_decay_move_horizons_and_gravity(name: str) -> None:
    module = FACTORIES[name]()
    before = module.learned_scalars()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    assert str(module.learned_scalars()) == str(before)
    for key, parameter in module.named_parameters():
        if "log_" in key or key.endswith(("rho", "mass.bias")):
            assert parameter.dim() == 1 and not parameter.any(), key


@pytest.mark.parametrize("adaptive", [False, True])
def test_heads_start_with_horizons_log_spaced_from_ten_to_a_thousand(adaptive: bool) -> None:
    scalars = FACTORIES["heads"](adaptive=adaptive).learned_scalars()
    expected = torch.tensor([[10.0, 10 ** (5 / 3), 10 ** (7 / 3), 1000.0]])
    torch.testing.assert_close(1 / (1 - scalars["gamma"]), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kwargs", [{"timescales": "heads"}, {"num_timescales": 2}])
def test_adaptive_timescales_start_as_constant_ones(kwargs: dict[str, Any]) -> None:
    constant = MultiTimescaleAttention(E, H, **kwargs)
    adaptive = MultiTimescaleAttention(E, H, adaptive=True, **kwargs)
    adaptive.load_state_dict(constant.state_dict(), strict=False)
    x = make_inputs().query
    torch.testing.assert_close(adaptive(x, x, x), constant(x, x, x))


@pytest.mark.parametrize("name", ["heads adaptive", "gravitational adaptive", "multi-timescale adaptive"])
@pytest.mark.parametrize(("before", "after"), [(0, 3), (4, 0), (2, 5)])
@pytest.mark.parametrize("batched", [True, False])
def test_padding_on_either_side_advances_no_time(name: str, before: int, after: int, batched: bool) -> None:
    module, x = make(name), make_inputs().query[:1]
    expected = module(x, x, x, need_weights=False)[0]
    y = nn.functional.pad(x, (0, 0, before, after), value=1e4)
    padding = nn.functional.pad(torch.zeros(1, L, dtype=torch.bool), (before, after), value=True)
    if not batched:
        expected, y, padding = expected[0], y[0], padding[0]
    found = module(y, y, y, padding, need_weights=False)[0]
    torch.testing.assert_close(found[..., before : before + L, :], expected)
