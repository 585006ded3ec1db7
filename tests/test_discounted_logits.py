"""discount="logits": the logits, not the weights, are multiplied by gamma^|i - j|; for comparison."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import GAMMAS, POISON, H, L, N, S, T, make, make_inputs, relative
from torch import Tensor

from attention_engine.attention_scores import DotProduct, Gravity, Mask
from attention_kernels import attend, fastest_backend
from attention_module import AttentionModule
from gravitational_attention import UNIT_MASS
from gravitational_multi_timescale_attention import GravitationalMultiTimescaleAttention
from multi_timescale_attention import MultiTimescaleAttention
from timescales import Discounts

NAMES = ("multi-timescale", "gravitational multi-timescale")
each_module = pytest.mark.parametrize("name", NAMES)
each_score = pytest.mark.parametrize("gravity", [False, True])


def make_logits(name: str, **kwargs: Any) -> AttentionModule:
    return make(name, discount="logits", **kwargs)


def discounts_of(module: AttentionModule) -> Discounts:
    assert isinstance(module, MultiTimescaleAttention | GravitationalMultiTimescaleAttention)
    return module.discounts


def naive_weights(module: AttentionModule, query: Tensor, key: Tensor, padding: Tensor) -> Tensor:
    """Weights (N, T, H, L, S), pair by pair, in the dtype of the inputs."""
    weights = query.new_zeros(N, T, H, L, S)
    w_q, w_k, _ = module.in_proj_weight.chunk(3)
    assert module.in_proj_bias is not None
    b_q, b_k, _ = module.in_proj_bias.chunk(3)
    gamma = module.learned_scalars()["gamma"]
    for n in range(N):
        q, k = query[n] @ w_q.T + b_q, key[n] @ w_k.T + b_k
        for t in range(T):
            for h in range(H):
                part = h + (t * H if module.num_projections > 1 else 0)
                columns = slice(part * module.head_dim, (part + 1) * module.head_dim)
                for i in range(L):
                    logits = query.new_full((S,), -math.inf)
                    for j in range(S):
                        if not padding[n, j]:
                            logit = naive_logit(
                                module, q[i, columns], k[j, columns], query[n, i], key[n, j], t, h
                            )
                            logits[j] = logit * gamma[t, h] ** abs(i - j)
                    weights[n, t, h, i] = logits.softmax(-1)
    return weights


def naive_logit(
    module: AttentionModule, q: Tensor, k: Tensor, query: Tensor, key: Tensor, t: int, h: int
) -> Tensor:
    if isinstance(module, MultiTimescaleAttention):
        return q @ k / module.head_dim**0.5
    assert isinstance(module, GravitationalMultiTimescaleAttention)
    field, row = module.field, t * H + h
    assert field.query_mass is not None
    assert field.log_gravity is not None
    query_mass = F.softplus(field.query_mass.weight[row] @ query + field.query_mass.bias[row] + UNIT_MASS)
    key_mass = F.softplus(field.key_mass.weight[row] @ key + field.key_mass.bias[row] + UNIT_MASS)
    r2 = (q - k).square().sum() / module.head_dim
    force = field.log_gravity[row].exp() * query_mass * key_mass
    return force / (r2 + field.softening) ** (field.distance_power / 2)


@each_module
def test_weights_are_those_of_a_naive_loop_and_the_output_follows_them(name: str) -> None:
    module = make_logits(name).double()
    query, key, value, padding = make_inputs(torch.float64)
    with torch.no_grad():
        output, weights = module(query, key, value, padding, average_attn_weights=False)
        expected = naive_weights(module, query, key, padding)
        without, _ = module(query, key, value, padding, need_weights=False)
    assert weights is not None
    assert relative(weights, expected.mean(1)) < 1e-12
    assert relative(module.attention_maps(query, key, key_padding_mask=padding), expected) < 1e-12
    assert relative(without, output) < 1e-12


@each_module
def test_it_differs_from_the_default_and_far_tokens_keep_the_weight_of_a_zero_logit(name: str) -> None:
    query, key, _, _ = make_inputs()
    discounted, default = make_logits(name, gammas=(1e-6, 2e-6)), make(name, gammas=(1e-6, 2e-6))
    far = discounted.attention_maps(query, key)[..., 0, 2:]  # of the first query to keys two and more away
    assert torch.allclose(far, far[..., :1].expand_as(far), atol=1e-5)
    assert far.min() > 0.01
    assert default.attention_maps(query, key)[..., 0, 2:].max() < 1e-6


@each_module
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_hold_and_gradients_are_finite(name: str, need_weights: bool) -> None:
    module = make_logits(name)
    query, key, value, padding = make_inputs()
    blocked = padding.clone()
    blocked[2] = True  # an example with no key at all
    poisoned = [part.masked_fill(padding[..., None], POISON) for part in (key, value)]
    leaves = [part.clone().requires_grad_() for part in (query, key, value)]
    output, _ = module(*leaves, key_padding_mask=blocked, need_weights=need_weights, is_causal=True)
    other, _ = module(query, *poisoned, key_padding_mask=blocked, need_weights=need_weights, is_causal=True)
    assert torch.allclose(output, other, atol=1e-6)
    output.square().sum().backward()
    gradients = [leaf.grad for leaf in leaves] + [part.grad for part in module.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    slope = discounts_of(module).rho.grad
    assert slope is not None
    assert slope.abs().max() > 0
    assert leaves[1].grad is not None
    assert not leaves[1].grad[padding].any()


@each_module
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    module = make_logits(name, embed_dim=4, num_heads=2).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rho = discounts_of(module).rho

    def attention(x: Tensor, rho: Tensor) -> Tensor:
        parameters = {"discounts.rho": rho}
        return torch.func.functional_call(module, parameters, (x, x, x), {"need_weights": False})[0]

    assert torch.autograd.gradcheck(attention, (x.requires_grad_(), rho.detach().requires_grad_()))


def make_score(gravity: bool, log_decay: Tensor | None) -> DotProduct | Gravity:
    if not gravity:
        return DotProduct(1.0, log_decay, "logits")
    mass = torch.ones(1, 2, 1, 3)
    return Gravity(mass, mass, torch.zeros(2, 1), 0.1, log_decay=log_decay, discount="logits")


@each_score
@pytest.mark.parametrize("backend", ["tiled", "triton", "sdpa"])
def test_only_the_dense_formula_has_it_and_auto_takes_that(
    gravity: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.randn(1, 2, 1, 3, 4)
    score = make_score(gravity, torch.tensor([[-0.1], [-0.2]]))
    reason = (
        "dot product without decay" if backend == "sdpa" else "discounts weights, not logits: use 'dense'"
    )
    with pytest.raises(ValueError, match=reason):
        attend(q, q, q, score, Mask(), backend=backend)
    assert fastest_backend(q, score, Mask(), 0.0, False) == "dense"
    found, _ = attend(q, q, q, score, Mask())
    assert torch.equal(found, attend(q, q, q, score, Mask(), backend="dense")[0])


@each_module
@pytest.mark.parametrize("discount", ["logit", "", None])
def test_another_discount_is_refused(name: str, discount: Any) -> None:
    with pytest.raises(ValueError, match=r"discount must be one of \('weights', 'logits'\), got"):
        make(name, discount=discount)


def test_in_force_form_there_is_no_logit_to_discount() -> None:
    with pytest.raises(ValueError, match='needs normalization="softmax"'):
        make("gravitational multi-timescale force", discount="logits")


@each_module
def test_the_default_discounts_weights(name: str) -> None:
    query, key, value, _ = make_inputs()
    found, _ = make(name, discount="weights")(query, key, value)
    expected, _ = make(name)(query, key, value)
    assert torch.equal(found, expected)
    assert discounts_of(make(name)).initial_gammas == GAMMAS
