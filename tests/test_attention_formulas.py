"""Each attention module computes its formula: outputs and all gradients against plain float64 PyTorch, with
explicit (L, S, D) differences, and against values that a person can check."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import E, Factory, H, Inputs, drawn, make_inputs, run
from torch import Tensor

from attention_module import AttentionModule
from conventional_attention import ConventionalAttention
from gravitational_attention import GravitationalAttention
from gravitational_multi_timescale_attention import GravitationalMultiTimescaleAttention
from multi_timescale_attention import MultiTimescaleAttention
from timescales import default_gammas, laplace_mixing

UNIT_MASS = math.log(math.e - 1)
Settings = dict[str, Any]
ONE, TWO, THREE = {"gammas": (0.7,)}, {"gammas": (0.6, 0.95)}, {"gammas": (0.5, 0.8, 0.99)}
SOFTMAX, FORCE = {"normalization": "softmax"}, {"normalization": "force"}


# --- the formulas in plain PyTorch, as the class docstrings write them ------------------------------------


def plain_log_discount(module: Any, row: int, query: Tensor, key: Tensor, padding: Tensor) -> Tensor:
    """By distance or time, of a timescale and head: (L, S) or (N, L, S)."""
    distance = (torch.arange(query.shape[1])[:, None] - torch.arange(key.shape[1])).abs()
    if getattr(module, "discounts", None) is None:
        return distance * 0.0
    rho = module.discounts.rho[row] + module.discounts.start[row]
    if module.discounts.rate is None:
        return -F.softplus(rho) * distance
    rate = module.discounts.rate.weight[row]
    of_queries = F.softplus(query @ rate + rho).cumsum(-1)
    of_keys = (F.softplus(key @ rate + rho) * ~padding).cumsum(-1)
    return -(of_queries[:, :, None] - of_keys[:, None]).abs()


def plain_force(field: Any, row: int, query: Tensor, key: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """(N, L, S), without G and the query's mass where they cancel."""
    if field.distance == "cosine":
        r2 = 1 - F.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
    else:
        differences = q[:, :, None] - k[:, None]  # (N, L, S, D)
        euclidean = field.distance == "euclidean"
        r2 = differences.square().mean(-1) if euclidean else differences.abs().mean(-1) ** 2
    softening, power = field.softening, torch.tensor(field.distance_power)
    if field.log_softening is not None:
        softening = 1e-6 + (softening - 1e-6) * field.log_softening[row].exp()
    if field.log_power is not None:
        power = power * field.log_power[row].exp()
    of_keys = F.softplus(key @ field.key_mass.weight[row] + field.key_mass.bias[row] + UNIT_MASS)
    force = of_keys[:, None] / (r2 + softening) ** (power / 2)
    if field.normalization == "force":
        return force
    of_queries = F.softplus(query @ field.query_mass.weight[row] + field.query_mass.bias[row] + UNIT_MASS)
    return field.log_gravity[row].exp() * of_queries[:, :, None] * force


def plain_weights(
    module: Any, row: int, inputs: tuple[Tensor, Tensor], q: Tensor, k: Tensor, padding: Tensor, causal: bool
) -> Tensor:
    """(N, L, S) of row t * H + h: timescale t and head h."""
    blocked = padding[:, None] | torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1) & causal
    log_discount = plain_log_discount(module, row, *inputs, padding)
    if isinstance(module, ConventionalAttention | MultiTimescaleAttention):
        logits = q @ k.mT / module.head_dim**0.5
    else:
        logits = plain_force(module.field, row, *inputs, q, k)
        if module.field.normalization == "force":
            force = (logits * log_discount.exp()).masked_fill(blocked, 0.0)
            return force / force.sum(-1, keepdim=True)
    of_logits = getattr(getattr(module, "discounts", None), "discount", "weights") == "logits"
    logits = logits * log_discount.exp() if of_logits else logits + log_discount
    return logits.masked_fill(blocked, -math.inf).softmax(-1)


def plain_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output (N, L, E) and the weights (N, T, H, L, S)."""
    padding = torch.zeros(key.shape[:2], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
    of_projections = zip(
        (query, key, value), module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True
    )
    projected = [(x @ weight.T + bias).split(module.head_dim, -1) for x, weight, bias in of_projections]
    maps, reads = [], []
    for row in range(module.num_timescales * module.num_heads):
        own = isinstance(module, MultiTimescaleAttention)  # q, k and v of each timescale
        q, k, v = (part[row if own else row % module.num_heads] for part in projected)
        maps.append(plain_weights(module, row, (query, key), q, k, padding, is_causal))
        reads.append(maps[-1] @ v)
    shape = module.num_timescales, module.num_heads
    read = torch.stack(reads, 2).unflatten(2, shape).flatten(3)  # (N, L, T, E)
    if hasattr(module, "decoder") and module.decoder.kind == "laplace":
        read = torch.einsum("bt,nlte->nlbe", module.decoder.mixing, read)
    joined = read.flatten(2)
    if hasattr(module, "decoder") and module.decoder.kind == "mlp":
        joined = F.gelu(joined @ module.decoder.hidden.weight.T + module.decoder.hidden.bias)
    output = joined @ module.out_proj.weight.T + module.out_proj.bias
    return output, torch.stack(maps, 1).unflatten(1, shape)


def plain(module: AttentionModule, dtype: torch.dtype) -> AttentionModule:
    """A copy of the module that computes the formula instead."""
    copied = copy.deepcopy(module).to(dtype)

    def forward(
        query: Tensor, key: Tensor, value: Tensor, need_weights: bool, **masks: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, maps = plain_attention(copied, query, key, value, **masks)
        return output, maps.mean((1, 2)) if need_weights else None

    def attention_maps(query: Tensor, key: Tensor, **masks: Any) -> Tensor:
        return plain_attention(copied, query, key, key, **masks)[1]

    copied.forward, copied.attention_maps = forward, attention_maps  # type: ignore[method-assign, assignment]
    return copied


def check(module: AttentionModule, inputs: Inputs, need_weights: bool, tolerance: float) -> None:
    """Everything within the tolerance of the plain float64 formula, relative to its norm. A sum that nearly
    cancels, such as the gradient of a single number, may err by a digit more than the plain formula does in
    float32: its distances are of differences, the module's of matrix products."""
    single, double = plain(module, torch.float32), plain(module, torch.float64)
    all_masks: list[dict[str, Any]] = [{}, {"key_padding_mask": inputs.padding}, {"is_causal": True}]
    for masks in all_masks:
        found, rounded, exact = (
            run(version, leaves, need_weights=need_weights, **masks)
            | {"attention maps": version.attention_maps(leaves[0], leaves[1], **masks).detach()}
            for version, leaves in (
                (module, inputs[:3]),
                (single, inputs[:3]),
                (double, tuple(x.double() for x in inputs[:3])),
            )
        )
        assert found.keys() == exact.keys()
        wrong = {}
        for name, value in exact.items():
            error = float((found[name].double() - value).norm() / value.norm())
            unavoidable = float((rounded[name].double() - value).norm() / value.norm())
            if not error < max(tolerance, 10 * unavoidable):
                wrong[name] = (error, unavoidable)
        assert wrong == {}, list(masks)


def both_gravities(*settings: Settings) -> list[tuple[Factory, Settings]]:
    alone = [(GravitationalAttention, given) for given in settings]
    return [*alone, *((GravitationalMultiTimescaleAttention, TWO | given) for given in settings)]


FORMULAS: list[tuple[Factory, Settings]] = [
    (ConventionalAttention, {}),
    *((MultiTimescaleAttention, THREE | {"decoder": decoder}) for decoder in ("laplace", "linear", "mlp")),
    (MultiTimescaleAttention, ONE),
    (MultiTimescaleAttention, {"timescales": "heads"}),
    (MultiTimescaleAttention, {"timescales": "heads", "adaptive": True}),
    (MultiTimescaleAttention, TWO | {"adaptive": True}),
    (MultiTimescaleAttention, TWO | {"discount": "logits"}),
    (GravitationalMultiTimescaleAttention, TWO | {"discount": "logits"}),
    (GravitationalMultiTimescaleAttention, ONE | {"decoder": "mlp", **FORCE}),
    (GravitationalMultiTimescaleAttention, THREE | {"decoder": "linear", "distance_power": 1.0}),
    (GravitationalMultiTimescaleAttention, THREE | {"decoder": "mlp", "distance_power": 4.0, **FORCE}),
    *both_gravities({"adaptive": True}, {"adaptive": True, **FORCE}),
    *both_gravities(
        *(
            {"softening": softening, "distance_power": power, **normalization}
            for normalization in (SOFTMAX, FORCE)
            for power, softening in ((1.0, 0.01), (2.0, 2.0), (4.0, 0.01))
        )
    ),
]


DISTANCES = [{"distance": distance} for distance in ("cosine", "manhattan")]
LEARNED: Settings = {"learned_power": True, "learned_softening": True, **FORCE, "distance_power": 3.0}
LAWS = both_gravities(
    *(distance | normalization for distance in DISTANCES for normalization in (SOFTMAX, FORCE)),
    *(distance | {"learned_softening": True} for distance in ({}, *DISTANCES)),
    *(distance | LEARNED for distance in ({}, *DISTANCES)),
    {"distance_power": 4.0, "distance": "manhattan"},
    {"distance_power": 4.0, "distance": "cosine", **FORCE},
    {"learned_power": True, **FORCE},
)


def name_of(part: Any) -> str:
    return part.__name__ if isinstance(part, type) else str(part)


@pytest.mark.parametrize(
    ("module", "settings", "tolerance"),
    [(*case, 1e-5) for case in FORMULAS] + [(*case, 3e-5) for case in LAWS],
    ids=name_of,
)
def test_each_module_is_its_formula(
    module: Factory, settings: Settings, tolerance: float, need_weights: bool
) -> None:
    check(drawn(module, embed_dim=E, num_heads=H, **settings), make_inputs(), need_weights, tolerance)


# --- values by hand ---------------------------------------------------------------------------------------


def plainest(width: int, **settings: Any) -> GravitationalAttention:
    """One head, softening 1, masses 1; q, k and v are the input itself."""
    module = GravitationalAttention(width, 1, softening=1.0, **settings)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(width).repeat(3, 1))
        for mass in (module.field.key_mass, module.field.query_mass):
            if mass is not None:
                mass.weight.zero_()
    return module


@pytest.mark.parametrize(
    ("settings", "tokens", "shares"),
    [
        ({"distance_power": 2.0}, [[0.0], [2.0]], [5, 1]),  # r2 + softening: 1 and 5
        ({"distance_power": 1.0}, [[0.0], [2.0]], [5**0.5, 1]),
        ({"distance_power": 4.0}, [[0.0], [2.0]], [25, 1]),
        ({"distance": "cosine"}, [[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]], [6, 3, 2]),  # 1 - cos: 0, 1 and 2
        # zeros are as far as half of the way
        ({"distance": "cosine"}, [[1.0, 0.0], [5.0, 0.0], [0.0, 0.0]], [3, 3, 2]),
        # 4 / D and 2 / D, squared
        ({"distance": "manhattan"}, [[0.0, 0.0], [1.0, 3.0], [-2.0, 0.0]], [10, 2, 5]),
    ],
)
def test_forces_on_the_first_token_by_hand(
    settings: Settings, tokens: list[list[float]], shares: list[float]
) -> None:
    x = torch.tensor(tokens)
    weights = plainest(x.shape[1], **settings, **FORCE)(x, x, x)[1]
    torch.testing.assert_close(weights[0], torch.tensor(shares) / sum(shares))


def test_softmax_gravity_of_two_tokens() -> None:
    """G = 2, query mass 3, key mass 0.5, forces 3 / 1 and 3 / 5: their difference is 2.4."""
    module = plainest(1)
    masses = ((module.field.key_mass, 0.5), (module.field.query_mass, 3.0))
    with torch.no_grad():
        for layer, mass in masses:
            assert layer is not None
            layer.bias.fill_(math.log(math.expm1(mass)) - UNIT_MASS)
        module.get_parameter("field.log_gravity").fill_(math.log(2.0))
    x = torch.tensor([[0.0], [2.0]])
    share = 1 / (1 + math.exp(-2.4))
    torch.testing.assert_close(module(x, x, x)[1], torch.tensor([[share, 1 - share], [1 - share, share]]))
    torch.testing.assert_close(module.learned_scalars()["gravity"], torch.tensor([[2.0]]))


def test_a_learned_power_starts_at_the_head_width_and_a_learned_softening_where_it_is_asked_to() -> None:
    for given, power in ((None, E / H), (3.0, 3.0)):
        settings = LEARNED | {"softening": 0.3, "distance_power": given}
        scalars = GravitationalAttention(E, H, **settings).learned_scalars()
        torch.testing.assert_close(scalars["power"], torch.full((1, H), power))
        torch.testing.assert_close(scalars["softening"], torch.full((1, H), 0.3))


def test_a_learned_softening_never_gets_below_the_least() -> None:
    module = GravitationalAttention(E, H, learned_softening=True)
    with torch.no_grad():
        module.get_parameter("field.log_softening").fill_(-1e4)
    torch.testing.assert_close(module.learned_scalars()["softening"], torch.full((1, H), 1e-6))
    x = make_inputs().query
    x[:, 1] = x[:, 0]
    found = run(module, (x, x, x), need_weights=False)
    assert all(bool(part.isfinite().all()) for part in found.values())


@pytest.mark.usefixtures("each_fused_backend")
@pytest.mark.parametrize(
    ("factory", "settings"),
    [
        (MultiTimescaleAttention, {}),
        (GravitationalMultiTimescaleAttention, SOFTMAX),
        (GravitationalMultiTimescaleAttention, FORCE),
    ],
    ids=name_of,
)
def test_equal_scores_leave_gamma_to_the_power_of_the_distance(factory: Factory, settings: Settings) -> None:
    """gamma 1/2 over 3 tokens: 4 : 2 : 1 seen from the end, 1 : 2 : 1 from the middle."""
    module = factory(embed_dim=3, num_heads=1, gammas=(0.5,), **settings)
    with torch.no_grad():
        module.in_proj_weight[-3:] = module.out_proj.weight[:] = torch.eye(3)
    x, expected = (
        torch.zeros(3, 3),
        torch.tensor([[4, 2, 1], [2, 4, 2], [1, 2, 4]]) / torch.tensor([[7], [8], [7]]),
    )
    torch.testing.assert_close(module(x, x, x)[1], expected)
    torch.testing.assert_close(module(x, x, torch.eye(3), need_weights=False)[0], expected)


@pytest.mark.parametrize("gammas", [None, (0.6, 0.9, 0.99), (1e-6, 0.5, 1 - 1e-6), (1e-300, 0.1, 0.2)])
def test_discounts_start_where_they_are_asked_to(gammas: tuple[float, ...] | None) -> None:
    module = MultiTimescaleAttention(8, 2, gammas=gammas)
    expected = torch.tensor(gammas or (0.9, 0.99, 0.999))[:, None].expand(3, 2)
    torch.testing.assert_close(module.learned_scalars()["gamma"], expected)


@pytest.mark.parametrize(
    ("count", "horizons"), [(1, [100]), (2, [10, 1000]), (5, [10, 10**1.5, 100, 10**2.5, 1000])]
)
def test_default_horizons_are_log_spaced_from_ten_to_a_thousand(count: int, horizons: list[float]) -> None:
    assert [1 / (1 - gamma) for gamma in default_gammas(count)] == pytest.approx(horizons)


@pytest.mark.parametrize("gammas", [(0.9, 0.99, 0.999), (0.6, 0.9, 0.99), (0.3, 0.8), (0.5,)])
def test_laplace_mixing_solves_the_tikhonov_normal_equations(gammas: tuple[float, ...]) -> None:
    low, high = 1 / (1 - gammas[0]), 1 / (1 - gammas[-1])
    count = len(gammas)
    lags = [low * (high / low) ** (b / max(1, count - 1)) for b in range(count)]
    discounts = torch.tensor([[gamma**lag for lag in lags] for gamma in gammas], dtype=torch.float64)
    identity = torch.eye(count, dtype=torch.float64)
    for alpha in (0.01, 0.1, 1.0):
        expected = torch.linalg.solve(discounts.T @ discounts + alpha**2 * identity, discounts.T)
        torch.testing.assert_close(laplace_mixing(gammas, alpha), expected)
    torch.testing.assert_close(laplace_mixing(gammas, 1e-9) @ discounts, identity, atol=1e-6, rtol=0)
    if count > 1:
        found = MultiTimescaleAttention(E, H, gammas=gammas).decoder.mixing.detach()
        start = laplace_mixing(gammas).float()
        torch.testing.assert_close(found / found.norm(), start / start.norm())
