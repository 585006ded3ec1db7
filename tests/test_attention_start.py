"""How the modules start, what their parts are replaced by, and the time of adaptive timescales."""

from typing import Any

import pytest
import torch
from attention_cases import FACTORIES, E, H, L, each_module, make, make_inputs
from torch import Tensor, nn

from attention_module import AttentionModule
from experiment.models import MODELS, Model
from multi_timescale_attention import MultiTimescaleAttention
from train_and_evaluate import ModelSettings

VARIANTS = (
    *MODELS,
    "gravitational,normalization=force",
    "gravitational,adaptive=true",
    "gravitational,distance=cosine",
    "gravitational,distance=manhattan",
    "gravitational,normalization=force,learned_power=true,learned_softening=true",
    "multi_timescale,decoder=linear",
    "multi_timescale,decoder=mlp",
    "multi_timescale,gammas=0.6:0.9:0.99",
    "multi_timescale,num_timescales=5",
    "multi_timescale,adaptive=true",
    "multi_timescale,discount=logits",
    "gravitational_multi_timescale,decoder=linear",
    "gravitational_multi_timescale,decoder=mlp",
    "gravitational_multi_timescale,normalization=force",
    "gravitational_multi_timescale,adaptive=true",
)


def output_variance(name: str) -> float:
    """At the start, over sequences of equal tokens, of which every mechanism reads the token's value; the
    mean over several drawn modules."""
    settings = ModelSettings(embed_dim=128, num_heads=4)
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        module = Model.parse(name).attention(settings)()
        x = torch.randn(64, 1, 128).expand(64, 5, 128)
        with torch.no_grad():
            found.append(module(x, x, x, need_weights=False)[0].var())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_and_variant_starts_with_conventional_attentions_output_scale(name: str) -> None:
    assert output_variance(name) == pytest.approx(output_variance("conventional"), rel=0.1)


def as_made(name: str, **kwargs: Any) -> AttentionModule:
    return FACTORIES[name](**kwargs)


@each_module
def test_reset_parameters_initialises_everything_also_after_the_meta_device(name: str) -> None:
    module = as_made(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(1e30)
    module.reset_parameters()
    assert all(bool((tensor.abs() < 100).all()) for tensor in module.state_dict().values())
    expected, found = as_made(name).learned_scalars(), module.learned_scalars()
    torch.testing.assert_close(found, expected)


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.extra = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.extra(x)


@each_module
def test_hooks_and_adapters_on_the_output_projection_act(name: str) -> None:
    module, x = make(name), make_inputs().query
    calls: list[int] = []
    with torch.no_grad():
        before = module(x, x, x)[0]
    handle = module.out_proj.register_forward_hook(lambda *_: calls.append(1))
    module(x, x, x)
    handle.remove()
    adapter = Adapter(module.out_proj)
    module.out_proj = adapter  # type: ignore[assignment]
    after = module(x, x, x)[0]
    after.sum().backward()
    assert calls == [1]
    assert not torch.allclose(before, after)
    assert adapter.extra.weight.grad is not None


@each_module
def test_neither_loops_over_matrices_nor_their_decay_move_horizons_and_gravity(name: str) -> None:
    module = as_made(name)
    before = module.learned_scalars()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    assert str(module.learned_scalars()) == str(before)
    single = [
        p for key, p in module.named_parameters() if "log_" in key or key.endswith(("rho", "mass.bias"))
    ]
    assert all(p.dim() == 1 and not p.any() for p in single)


# Adaptive timescales


def test_heads_start_with_horizons_log_spaced_from_ten_to_a_thousand() -> None:
    for adaptive in (False, True):
        module = MultiTimescaleAttention(E, H, timescales="heads", adaptive=adaptive)
        horizons = 1 / (1 - module.learned_scalars()["gamma"])
        expected = torch.tensor([[10.0, 10 ** (5 / 3), 10 ** (7 / 3), 1000.0]])
        torch.testing.assert_close(horizons, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kwargs", [{"timescales": "heads"}, {"num_timescales": 2}])
def test_adaptive_timescales_start_as_constant_ones(kwargs: dict[str, Any]) -> None:
    constant = MultiTimescaleAttention(E, H, **kwargs)
    adaptive = MultiTimescaleAttention(E, H, adaptive=True, **kwargs)
    adaptive.load_state_dict(constant.state_dict(), strict=False)
    x = make_inputs().query
    torch.testing.assert_close(adaptive(x, x, x), constant(x, x, x))


ADAPTIVE = ("heads adaptive", "gravitational adaptive", "multi-timescale adaptive")


def padded(x: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
    """One example (1, L, E) among poisoned padding on both sides."""
    poison = torch.full((1, before + x.shape[1] + after, E), 1e4)
    poison[:, before : before + x.shape[1]] = x
    padding = torch.ones(poison.shape[:2], dtype=torch.bool)
    padding[:, before : before + x.shape[1]] = False
    return poison, padding


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("sides", [(0, 3), (4, 0), (2, 5)])
@pytest.mark.parametrize("batched", [True, False])
def test_padding_on_either_side_advances_no_time(name: str, sides: tuple[int, int], batched: bool) -> None:
    module, x = make(name), make_inputs().query[:1]
    expected = module(x, x, x, need_weights=False)[0]
    y, padding = padded(x, *sides)
    if batched:
        found = module(y, y, y, padding, need_weights=False)[0]
    else:
        alone = y[0]
        found = module(alone, alone, alone, padding[0], need_weights=False)[0][None]
    torch.testing.assert_close(found[:, sides[0] : sides[0] + L], expected)


def test_the_time_between_two_tokens_is_the_sum_of_the_rates_between_them() -> None:
    """Rates of about 0, 5 and 0: the third token sees the second at once, and the first past the second."""
    module = MultiTimescaleAttention(1, 1, timescales="heads", gammas=(0.5,), adaptive=True)
    assert isinstance(module, AttentionModule)
    with torch.no_grad():
        module.in_proj_weight.zero_()
        module.get_parameter("discounts.rate.weight").fill_(1.0)
    x = torch.tensor([[-50.0], [5.0], [-50.0]])
    weights = module(x, x, x)[1]
    passed = torch.nn.functional.softplus(torch.tensor(5.0))
    expected = torch.stack([-passed, torch.tensor(0.0), torch.tensor(0.0)]).softmax(0)
    torch.testing.assert_close(weights[2], expected)
