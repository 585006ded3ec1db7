"""Each attention module computes its formula: outputs and all gradients against plain float64 PyTorch, with
explicit (L, S, D) differences, and against values that a person can check."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_module import AttentionModule
from conventional_attention import ConventionalAttention
from gravitational_attention import GravitationalAttention
from gravitational_multi_timescale_attention import GravitationalMultiTimescaleAttention
from multi_timescale_attention import MultiTimescaleAttention
from timescales import default_gammas, laplace_mixing

N, L, S, E, H = 3, 6, 7, 20, 4  # and D = 5
GAMMAS = {1: (0.7,), 2: (0.6, 0.95), 3: (0.5, 0.8, 0.99)}
MASKS = ("none", "padding", "causal")

each_power = pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
each_normalization = pytest.mark.parametrize("normalization", ["softmax", "force"])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def randomised(module: AttentionModule) -> AttentionModule:
    """Every parameter drawn, biases too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def make_inputs(batch: int = N, queries: int = L, keys: int = S, width: int = E) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "query": (batch, queries, width),
        "key": (batch, keys, width),
        "value": (batch, keys, width),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_masks(kind: str, batch: int, queries: int, keys: int) -> tuple[dict[str, Any], Tensor]:
    """The arguments of `forward` and the pairs (N, L, S) that they block; no row is blocked altogether."""
    blocked = torch.zeros(batch, queries, keys, dtype=torch.bool)
    if kind == "padding":
        padding = torch.arange(keys) >= keys - torch.arange(batch)[:, None] * 2
        return {"key_padding_mask": padding}, blocked | padding[:, None, :]
    if kind == "causal":
        return {"is_causal": True}, blocked | torch.ones(queries, keys, dtype=torch.bool).triu(1)
    return {}, blocked


def plain_weights(
    module: AttentionModule,
    parameters: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    inputs: Mapping[str, Tensor],
    t: int,
    h: int,
    blocked: Tensor,
) -> Tensor:
    """Attention weights (N, L, S) of timescale t and head h, as the class docstrings write them."""
    distance = (torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])).abs()
    gamma = torch.ones(())
    elapsed = torch.zeros(())
    if "discounts.rho" in parameters:
        row = t * module.num_heads + h
        start = module.get_buffer("discounts.start")[row]
        if "discounts.rate.weight" in parameters:
            rate = parameters["discounts.rate.weight"][row]
            rho = parameters["discounts.rho"][row] + start
            # Rates of blocked keys do not count where a whole column is blocked: padding.
            padded = blocked.all(1) if blocked.any() and not blocked[0].any() else torch.zeros(())
            of_keys = (F.softplus(inputs["key"] @ rate + rho) * (1 - padded * 1.0)).cumsum(-1)
            of_queries = F.softplus(inputs["query"] @ rate + rho).cumsum(-1)
            elapsed = (of_queries[:, :, None] - of_keys[:, None]).abs()
        else:
            gamma = (-F.softplus(parameters["discounts.rho"][row] + start)).exp()
    of_logits = getattr(getattr(module, "discounts", None), "discount", "weights") == "logits"
    on_logits, on_weights = (gamma**distance, 0.0) if of_logits else (1.0, distance * gamma.log() - elapsed)
    if isinstance(module, ConventionalAttention | MultiTimescaleAttention):
        logits = q @ k.mT / module.head_dim**0.5 * on_logits + on_weights
        return logits.masked_fill(blocked, -math.inf).softmax(-1)
    assert isinstance(module, GravitationalAttention | GravitationalMultiTimescaleAttention)

    def mass(role: str, x: Tensor) -> Tensor:
        row = t * module.num_heads + h
        weight, bias = parameters[f"field.{role}_mass.weight"], parameters[f"field.{role}_mass.bias"]
        return F.softplus(x @ weight[row] + bias[row] + math.log(math.e - 1))

    field = module.field
    softening: Any = field.softening
    row, power = t * module.num_heads + h, torch.tensor(field.distance_power)
    if "field.log_power" in parameters:
        power = power * parameters["field.log_power"][row].exp()
    if "field.log_softening" in parameters:
        least = 1e-6
        softening = least + (softening - least) * parameters["field.log_softening"][row].exp()
    if field.distance == "cosine":
        r2 = 1 - F.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
    elif field.distance == "manhattan":
        r2 = ((q[:, :, None] - k[:, None]).abs().sum(-1) / module.head_dim) ** 2
    else:
        r2 = (q[:, :, None] - k[:, None]).square().sum(-1) / module.head_dim  # (N, L, S, D) -> (N, L, S)
    force = mass("key", inputs["key"])[:, None] / (r2 + softening) ** (power / 2)
    if field.normalization == "force":
        force = (force * gamma**distance * (-elapsed).exp()).masked_fill(blocked, 0.0)
        return force / force.sum(-1, keepdim=True)
    strength = parameters["field.log_gravity"][t * module.num_heads + h].exp() * mass(
        "query", inputs["query"]
    )
    logits = strength[:, :, None] * force * on_logits + on_weights
    return logits.masked_fill(blocked, -math.inf).softmax(-1)


def plain_attention(
    module: AttentionModule, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor], blocked: Tensor
) -> tuple[Tensor, Tensor]:
    """The output (N, L, E) and the weights (N, T, H, L, S)."""
    width, timescales = module.embed_dim, module.num_timescales
    projected = []
    for name, weight, bias in zip(
        ("query", "key", "value"),
        parameters["in_proj_weight"].chunk(3),
        parameters["in_proj_bias"].chunk(3),
        strict=True,
    ):
        projected.append((inputs[name] @ weight.T + bias).split(module.head_dim, dim=-1))  # by (t, h)
    reads, weights = [], []
    for t in range(timescales):
        for h in range(module.num_heads):
            index = h + (t * module.num_heads if module.num_projections > 1 else 0)
            q, k, v = (part[index] for part in projected)
            weights.append(plain_weights(module, parameters, q, k, inputs, t, h, blocked))
            reads.append(weights[-1] @ v)
    read = torch.stack(reads, 1).unflatten(1, (timescales, module.num_heads))  # (N, T, H, L, D)
    read = read.transpose(2, 3).flatten(3)  # (N, T, L, E)
    if "decoder.mixing" in parameters:
        read = torch.einsum("bt,ntle->nble", parameters["decoder.mixing"], read)
    joined = torch.cat(list(read.unbind(1)), -1)
    if "decoder.hidden.weight" in parameters:
        joined = F.gelu(joined @ parameters["decoder.hidden.weight"].T + parameters["decoder.hidden.bias"])
    assert joined.shape[-1] == module.out_proj.in_features
    assert width == module.out_proj.out_features
    output = joined @ parameters["out_proj.weight"].T + parameters["out_proj.bias"]
    return output, torch.stack(weights, 1).unflatten(1, (timescales, module.num_heads))


def evaluate(
    module: AttentionModule,
    inputs: dict[str, Tensor],
    need_weights: bool,
    mask: str,
    plain: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Output, weights and every gradient of the module, or of the plain formula in the given dtype."""
    batch, queries, keys = *inputs["query"].shape[:2], inputs["key"].shape[1]
    kwargs, blocked = make_masks(mask, batch, queries, keys)
    leaves = {name: value.to(plain, copy=True).requires_grad_() for name, value in inputs.items()}
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    if plain is None:
        module.zero_grad()
        output, weights = module(*leaves.values(), need_weights=need_weights, **kwargs)
    else:
        parameters = {
            name: p.detach().to(plain, copy=True).requires_grad_() for name, p in parameters.items()
        }
        output, maps = plain_attention(module, parameters, leaves, blocked)
        weights = maps.mean((1, 2)) if need_weights else None
    results = {"output": output}
    if weights is not None:
        results["weights"] = weights
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results.values()]
    torch.autograd.backward(list(results.values()), upstream)
    found = {name: value.detach() for name, value in results.items()}
    for name, leaf in (leaves | parameters).items():
        assert leaf.grad is not None, name
        found[f"gradient of {name}"] = leaf.grad.clone()
    if plain is not None:
        found["attention maps"] = maps.detach()
    else:
        found["attention maps"] = module.attention_maps(inputs["query"], inputs["key"], **kwargs).detach()
    return found


def check(
    module: AttentionModule,
    inputs: dict[str, Tensor],
    need_weights: bool,
    mask: str = "none",
    tolerance: float = 1e-5,
) -> None:
    """Everything within the tolerance of the plain float64 formula, relative to its norm. A sum that nearly
    cancels, such as the gradient of a single number, may err by a digit more than the plain formula does in
    float32: its distances are of differences, the module's of matrix products."""
    found = evaluate(module, inputs, need_weights, mask)
    exact = evaluate(module, inputs, need_weights, mask, torch.float64)
    single = evaluate(module, inputs, need_weights, mask, torch.float32)
    assert found.keys() == exact.keys()
    wrong = {}
    for name, value in exact.items():
        error = float((found[name].double() - value).norm() / value.norm())
        unavoidable = float((single[name].double() - value).norm() / value.norm())
        if not error < max(tolerance, 10 * unavoidable):
            wrong[name] = (error, unavoidable)
    assert wrong == {}


# --- the formulas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_conventional_attention_is_its_formula(mask: str, need_weights: bool) -> None:
    check(randomised(ConventionalAttention(E, H)), make_inputs(), need_weights, mask)


@each_normalization
@each_power
@pytest.mark.parametrize("softening", [0.01, 2.0])
def test_gravitational_attention_is_its_formula(
    normalization: Any, power: float, softening: float, need_weights: bool
) -> None:
    module = randomised(
        GravitationalAttention(E, H, softening=softening, distance_power=power, normalization=normalization)
    )
    for mask in MASKS:
        check(module, make_inputs(), need_weights, mask)


@pytest.mark.parametrize("timescales", [1, 3])
@pytest.mark.parametrize("decoder", ["laplace", "linear", "mlp"])
@pytest.mark.parametrize("mask", MASKS)
def test_multi_timescale_attention_is_its_formula(
    timescales: int, decoder: Any, need_weights: bool, mask: str
) -> None:
    module = MultiTimescaleAttention(
        E, H, num_timescales=timescales, gammas=GAMMAS[timescales], decoder=decoder
    )
    check(randomised(module), make_inputs(), need_weights, mask)


@each_normalization
@pytest.mark.parametrize("timescales", [1, 3])
@pytest.mark.parametrize(("power", "decoder"), [(1.0, "laplace"), (2.0, "linear"), (4.0, "mlp")])
def test_gravitational_multi_timescale_attention_is_its_formula(
    normalization: Any, power: float, timescales: int, decoder: Any, need_weights: bool
) -> None:
    module = GravitationalMultiTimescaleAttention(
        E,
        H,
        num_timescales=timescales,
        gammas=GAMMAS[timescales],
        decoder=decoder,
        softening=0.2,
        distance_power=power,
        normalization=normalization,
    )
    randomised(module)
    for mask in MASKS:
        check(module, make_inputs(), need_weights, mask)


@pytest.mark.usefixtures("each_fused_backend")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("module_class", "kwargs"),
    [
        (ConventionalAttention, {}),
        (GravitationalAttention, {}),
        (GravitationalAttention, {"normalization": "force"}),
        (MultiTimescaleAttention, {"num_timescales": 2, "gammas": GAMMAS[2]}),
        (GravitationalMultiTimescaleAttention, {"num_timescales": 2, "gammas": GAMMAS[2]}),
        (
            GravitationalMultiTimescaleAttention,
            {"num_timescales": 2, "gammas": GAMMAS[2], "normalization": "force"},
        ),
    ],
    ids=["conventional", "gravity", "force", "timescales", "both", "both force"],
)
def test_sequences_longer_than_a_tile_follow_the_formula(
    module_class: Callable[..., AttentionModule], kwargs: dict[str, Any], mask: str
) -> None:
    module = randomised(module_class(6, 2, **kwargs))
    # Some of so many pairs are so near that r2 from a matrix product loses a digit against a difference.
    check(module, make_inputs(1, 260, 290, 6), need_weights=False, mask=mask, tolerance=1e-4)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("module_class", "kwargs"),
    [
        (MultiTimescaleAttention, {"timescales": "heads"}),
        (MultiTimescaleAttention, {"timescales": "heads", "adaptive": True}),
        (MultiTimescaleAttention, {"num_timescales": 2, "adaptive": True}),
        (GravitationalAttention, {"adaptive": True}),
        (GravitationalAttention, {"adaptive": True, "normalization": "force"}),
        (GravitationalMultiTimescaleAttention, {"num_timescales": 2, "adaptive": True}),
        (MultiTimescaleAttention, {"num_timescales": 2, "gammas": GAMMAS[2], "discount": "logits"}),
        (
            GravitationalMultiTimescaleAttention,
            {"num_timescales": 2, "gammas": GAMMAS[2], "discount": "logits"},
        ),
    ],
)
def test_heads_as_timescales_adaptive_ones_and_discounted_logits_are_their_formulas(
    module_class: Callable[..., AttentionModule], kwargs: dict[str, Any], mask: str, need_weights: bool
) -> None:
    check(randomised(module_class(E, H, **kwargs)), make_inputs(), need_weights, mask)


@each_normalization
@pytest.mark.parametrize("distance", ["cosine", "manhattan"])
def test_other_distances_are_their_formulas(normalization: Any, distance: Any, need_weights: bool) -> None:
    kwargs = {"normalization": normalization, "distance": distance}
    for module in (
        GravitationalAttention(E, H, **kwargs),
        GravitationalMultiTimescaleAttention(E, H, gammas=GAMMAS[2], distance_power=4.0, **kwargs),
    ):
        for mask in MASKS:
            check(randomised(module), make_inputs(), need_weights, mask, tolerance=3e-5)


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "manhattan"])
@pytest.mark.parametrize(
    "learned",
    [
        {"learned_power": True, "normalization": "force"},
        {"learned_softening": True},
        {"learned_power": True, "learned_softening": True, "normalization": "force", "distance_power": 3.0},
    ],
)
def test_learned_powers_and_softening_are_their_formulas(
    learned: dict[str, Any], distance: Any, need_weights: bool
) -> None:
    for module in (
        GravitationalAttention(E, H, distance=distance, **learned),
        GravitationalMultiTimescaleAttention(E, H, gammas=GAMMAS[2], distance=distance, **learned),
    ):
        for mask in MASKS:
            check(randomised(module), make_inputs(), need_weights, mask, tolerance=3e-5)


# --- values by hand ---------------------------------------------------------------------------------------


def inverse_softplus(mass: float) -> float:
    return math.log(math.expm1(mass))


def set_mass(layer: nn.Linear, weight: float, bias: float) -> None:
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, 0] = weight
        layer.bias.fill_(bias - math.log(math.e - 1))


def make_identity(module: AttentionModule) -> AttentionModule:
    """q, k and v (of every timescale) are the input itself, or its heads."""
    with torch.no_grad():
        eye = torch.eye(module.embed_dim)
        module.in_proj_weight.copy_(eye.repeat(3 * module.num_projections, 1))
        if module.in_proj_bias is not None:
            module.in_proj_bias.zero_()
    return module


@pytest.mark.parametrize(
    ("power", "share"),
    [(2.0, 5 / 6), (1.0, 5**0.5 / (1 + 5**0.5)), (4.0, 25 / 26)],
)
def test_force_of_two_tokens_two_apart(power: float, share: float) -> None:
    """Tokens at 0 and 2, softening 1: distances squared and softened are 1 and 5, masses equal."""
    module = make_identity(
        GravitationalAttention(1, 1, softening=1.0, distance_power=power, normalization="force")
    )
    assert isinstance(module, GravitationalAttention)
    set_mass(module.field.key_mass, 0.0, 0.0)
    x = torch.tensor([[0.0], [2.0]])
    expected = torch.tensor([[share, 1 - share], [1 - share, share]])
    torch.testing.assert_close(module(x, x, x)[1], expected)


def test_softmax_gravity_of_two_tokens() -> None:
    """G = 2, query mass 3, key mass 0.5, forces 3 / 1 and 3 / 5: their difference is 2.4."""
    module = make_identity(GravitationalAttention(1, 1, softening=1.0))
    assert isinstance(module, GravitationalAttention)
    assert module.field.query_mass is not None
    assert module.field.log_gravity is not None
    set_mass(module.field.key_mass, 0.0, inverse_softplus(0.5))
    set_mass(module.field.query_mass, 0.0, inverse_softplus(3.0))
    with torch.no_grad():
        module.field.log_gravity.fill_(math.log(2.0))
    x = torch.tensor([[0.0], [2.0]])
    share = 1 / (1 + math.exp(-2.4))
    expected = torch.tensor([[share, 1 - share], [1 - share, share]])
    torch.testing.assert_close(module(x, x, x)[1], expected)
    torch.testing.assert_close(module.learned_scalars()["gravity"], torch.tensor([[2.0]]))


@pytest.mark.parametrize(
    ("distance", "tokens", "shares"),
    [
        ("cosine", [[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]], [6, 3, 2]),  # 1 - cos: 0, 1 and 2
        ("cosine", [[1.0, 0.0], [5.0, 0.0], [0.0, 0.0]], [3, 3, 2]),  # zeros are as far as half of the way
        ("manhattan", [[0.0, 0.0], [1.0, 3.0], [-2.0, 0.0]], [10, 2, 5]),  # 4 / D and 2 / D, squared
    ],
)
def test_forces_of_other_distances_by_hand(
    distance: Any, tokens: list[list[float]], shares: list[float]
) -> None:
    """Seen from the first token, softening 1, masses equal."""
    module = make_identity(
        GravitationalAttention(2, 1, softening=1.0, normalization="force", distance=distance)
    )
    assert isinstance(module, GravitationalAttention)
    set_mass(module.field.key_mass, 0.0, 0.0)
    x = torch.tensor(tokens)
    expected = torch.tensor(shares) / sum(shares)
    torch.testing.assert_close(module(x, x, x)[1][0], expected)


def test_a_learned_power_starts_at_the_head_width_and_a_learned_softening_where_it_is_asked_to() -> None:
    learned: dict[str, Any] = {"learned_power": True, "learned_softening": True, "normalization": "force"}
    scalars = GravitationalAttention(E, H, softening=0.3, **learned).learned_scalars()
    torch.testing.assert_close(scalars["power"], torch.full((1, H), float(E // H)))
    torch.testing.assert_close(scalars["softening"], torch.full((1, H), 0.3))
    scalars = GravitationalAttention(E, H, distance_power=3.0, **learned).learned_scalars()
    torch.testing.assert_close(scalars["power"], torch.full((1, H), 3.0))


def test_a_learned_softening_never_gets_below_the_least() -> None:
    module = GravitationalAttention(E, H, learned_softening=True)
    with torch.no_grad():
        module.get_parameter("field.log_softening").fill_(-1e4)
    torch.testing.assert_close(module.learned_scalars()["softening"], torch.full((1, H), 1e-6))
    x = make_inputs()["query"]
    x[:, 1] = x[:, 0]
    output = module(x, x, x, need_weights=False)[0]
    output.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)


@pytest.mark.usefixtures("each_fused_backend")
@pytest.mark.parametrize("mechanism", ["dot product", "gravity", "force"])
def test_equal_scores_leave_gamma_to_the_power_of_the_distance(mechanism: str) -> None:
    """gamma 1/2 over 3 tokens: 4 : 2 : 1 seen from the end, 1 : 2 : 1 from the middle."""
    module: AttentionModule
    if mechanism == "dot product":
        module = MultiTimescaleAttention(2, 1, num_timescales=1, gammas=(0.5,))
    else:
        normalization: Any = "softmax" if mechanism == "gravity" else "force"
        module = GravitationalMultiTimescaleAttention(
            2, 1, num_timescales=1, gammas=(0.5,), normalization=normalization
        )
    x = torch.zeros(3, 2)
    expected = torch.tensor([[4 / 7, 2 / 7, 1 / 7], [1 / 4, 1 / 2, 1 / 4], [1 / 7, 2 / 7, 4 / 7]])
    torch.testing.assert_close(module(x, x, x)[1], expected)
    values = torch.tensor([[7.0, 0.0], [0.0, 7.0], [0.0, 0.0]])
    with torch.no_grad():
        module.in_proj_weight.zero_()
        module.in_proj_weight[-2:] = torch.eye(2)
        module.out_proj.weight.copy_(torch.eye(2))
    output = module(x, x, values, need_weights=False)[0]
    torch.testing.assert_close(output, torch.tensor([[4.0, 2.0], [7 / 4, 7 / 2], [1.0, 2.0]]))


@pytest.mark.parametrize("gammas", [None, (0.6, 0.9, 0.99), (1e-6, 0.5, 1 - 1e-6), (1e-300, 0.1, 0.2)])
def test_discounts_start_where_they_are_asked_to(gammas: tuple[float, ...] | None) -> None:
    module = MultiTimescaleAttention(8, 2, gammas=gammas)
    expected = torch.tensor(gammas or (0.9, 0.99, 0.999))[:, None].expand(3, 2)
    torch.testing.assert_close(module.learned_scalars()["gamma"], expected)


def test_default_horizons_are_log_spaced_from_ten_to_a_thousand() -> None:
    assert default_gammas(3) == pytest.approx((0.9, 0.99, 0.999))
    assert default_gammas(1) == pytest.approx((0.99,))
    assert default_gammas(2) == pytest.approx((0.9, 0.999))
    horizons = [1 / (1 - gamma) for gamma in default_gammas(5)]
    assert horizons == pytest.approx([10, 10**1.5, 100, 10**2.5, 1000])


def test_masses_and_gravity_start_at_one() -> None:
    module = GravitationalMultiTimescaleAttention(E, H)
    x = torch.zeros(1, 2, E)
    masses = module.masses(x, x)
    torch.testing.assert_close(masses["key"], torch.ones(1, 3, H, 2))
    torch.testing.assert_close(masses["query"], torch.ones(1, 3, H, 2))
    torch.testing.assert_close(module.learned_scalars()["gravity"], torch.ones(3, H))


# --- relations --------------------------------------------------------------------------------------------


def test_without_discount_one_timescale_is_conventional_attention() -> None:
    discounted = MultiTimescaleAttention(
        E, H, num_timescales=1, gammas=(1 - 1e-9,), learn_gammas=False, decoder="linear"
    )
    conventional = ConventionalAttention(E, H)
    state = {name: value for name, value in discounted.state_dict().items() if "proj" in name}
    conventional.load_state_dict(state)
    inputs = make_inputs()
    for found, expected in zip(discounted(**inputs), conventional(**inputs), strict=True):
        torch.testing.assert_close(found, expected)


@each_normalization
def test_without_discount_one_timescale_is_gravitational_attention(normalization: Any) -> None:
    both = GravitationalMultiTimescaleAttention(
        E, H, num_timescales=1, gammas=(1 - 1e-9,), decoder="linear", normalization=normalization
    )
    gravity = GravitationalAttention(E, H, normalization=normalization)
    state = {name: value for name, value in randomised(both).state_dict().items() if "discounts" not in name}
    with torch.no_grad():
        both.discounts.rho.fill_(-25.0)
    gravity.load_state_dict(state)
    inputs = make_inputs()
    for found, expected in zip(both(**inputs), gravity(**inputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_only_the_multi_timescale_module_has_projections_per_timescale() -> None:
    own, shared = MultiTimescaleAttention(E, H), GravitationalMultiTimescaleAttention(E, H)
    assert own.in_proj_weight.shape == (3 * 3 * E, E)
    assert shared.in_proj_weight.shape == (3 * E, E)
    assert shared.field.key_mass.weight.shape == (3 * H, E)


@pytest.mark.parametrize("gammas", [(0.9, 0.99, 0.999), (0.6, 0.9, 0.99), (0.3, 0.8), (0.5,)])
def test_laplace_mixing_solves_the_tikhonov_normal_equations(gammas: tuple[float, ...]) -> None:
    low, high = min(1 / (1 - g) for g in gammas), max(1 / (1 - g) for g in gammas)
    count = len(gammas)
    lags = [low * (high / low) ** (b / max(1, count - 1)) for b in range(count)]
    discounts = torch.tensor([[gamma**lag for lag in lags] for gamma in gammas], dtype=torch.float64)
    for alpha in (0.01, 0.1, 1.0):
        normal = discounts.T @ discounts + alpha**2 * torch.eye(count, dtype=torch.float64)
        expected = torch.linalg.solve(normal, discounts.T)
        torch.testing.assert_close(laplace_mixing(gammas, alpha), expected)
    inverse = laplace_mixing(gammas, 1e-9) @ discounts
    torch.testing.assert_close(inverse, torch.eye(count, dtype=torch.float64), atol=1e-6, rtol=0)
    decoder = MultiTimescaleAttention(E, H, num_timescales=count, gammas=gammas).decoder
    if count > 1:
        found, start = decoder.mixing.detach(), laplace_mixing(gammas).float()
        torch.testing.assert_close(found / found.norm(), start / start.norm())
