"""Gravitational attention: tokens attract each other by their masses and the distance of query and key.

    attention = GravitationalAttention(embed_dim=128, num_heads=4, normalization="softmax")
    output, weights = attention(x, x, x, key_padding_mask=mask)
    attention.masses(x, x)["key"]   # (N, 1, H, L): how strongly each token attracts

A token's mass is its weight as a source ("key" role) or as a receiver ("query" role) of attraction. Other
symbols, and masks: see attention_module.py.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_engine.attention_scores import Clock, Gravity
from attention_module import AttentionModule
from timescales import Discounts

NORMALIZATIONS = ("softmax", "force")
DISTANCES = ("euclidean", "cosine", "manhattan")
LEAST_SOFTENING = 1e-6  # r2 is exact to about 1e-7 at best
UNIT_MASS = math.log(math.e - 1)  # softplus of it is 1


def least_softening(distance_power: float) -> float:
    """The least softening for which a coincident pair is within float32: the slope of a force, at most
    softening^-(p / 2 + 1), has to stay below 1e30."""
    return max(LEAST_SOFTENING, 1e-30 ** (1 / (distance_power / 2 + 1)))


class GravitationalField(nn.Module):
    """Masses, G and law for T timescales: everything of a gravitational score but the positions q and k.

    `m = softplus(W x + b + log(e - 1)) > 0` for each token, head and timescale, with separate W, b for the
    query and the key role; b starts at 0, so that masses start around 1. `G = exp(log_gravity)` for each
    timescale and head, (T H,), 1 at the start. With normalization "force" G and the query mass cancel and do
    not exist. A learned power is `p exp(log_power)`, a learned softening `least + (softening - least)
    exp(log_softening)`, which never gets below `least_softening`; both logarithms (T H,) are 0 at the start.
    """

    log_gravity: Tensor | None
    log_power: Tensor | None
    log_softening: Tensor | None
    query_mass: nn.Linear | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_timescales: int,
        softening: float,
        distance_power: float | None,
        normalization: Literal["softmax", "force"],
        distance: Literal["euclidean", "cosine", "manhattan"],
        learned_power: bool,
        learned_softening: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if distance_power is None:
            distance_power = embed_dim // num_heads if learned_power else 2.0
        for name, value in (("softening", softening), ("distance_power", distance_power)):
            if not (0.0 < value < math.inf):
                raise ValueError(f"{name} must be above 0 and finite, got {value}")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {DISTANCES}, got {distance!r}")
        if learned_power and normalization == "softmax":
            raise ValueError(
                'learned_power=True needs normalization="force": exponentials of a steep force overflow'
            )
        # With a learned power only logarithms of forces are computed.
        self.least_softening = LEAST_SOFTENING if learned_power else least_softening(distance_power)
        if softening < self.least_softening:
            raise ValueError(
                f"softening must be at least {self.least_softening:.3g} for distance_power={distance_power}, "
                f"got {softening}"
            )
        self.softening, self.distance_power = float(softening), float(distance_power)
        self.normalization: Literal["softmax", "force"] = normalization
        self.distance: Literal["euclidean", "cosine", "manhattan"] = distance
        self.shape = (num_timescales, num_heads)

        def mass_projection() -> nn.Linear:
            return nn.Linear(embed_dim, num_timescales * num_heads, device=device, dtype=dtype)

        def number(exists: bool) -> nn.Parameter | None:
            empty = torch.empty(num_timescales * num_heads, device=device, dtype=dtype)
            return nn.Parameter(empty) if exists else None

        self.key_mass = mass_projection()
        self.query_mass = mass_projection() if normalization == "softmax" else None
        self.register_parameter("log_gravity", number(normalization == "softmax"))
        self.register_parameter("log_power", number(learned_power))
        self.register_parameter("log_softening", number(learned_softening))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in (self.key_mass, self.query_mass):
            if projection is not None:
                projection.reset_parameters()
                nn.init.zeros_(projection.bias)
        for number in (self.log_gravity, self.log_power, self.log_softening):
            if number is not None:
                nn.init.zeros_(number)

    def _exp(self, number: Tensor) -> Tensor:
        """(T H,) -> (T, H), in float32 at least."""
        return number.to(torch.promote_types(number.dtype, torch.float32)).exp().view(self.shape)

    def law(self) -> tuple[float | Tensor, float | Tensor]:
        """Softening and power, (T, H) where they are learned."""
        least = self.least_softening
        softening, power = self.log_softening, self.log_power
        return (
            self.softening if softening is None else least + (self.softening - least) * self._exp(softening),
            self.distance_power if power is None else self.distance_power * self._exp(power),
        )

    def mass(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """(N, L, E) -> (N, T, H, L), above 0 also where softplus underflows."""
        # Under autocast x may be narrower than the parameters; a quantised projection has none.
        x = x.to(next(projection.parameters(), torch.empty(0, dtype=torch.float32)).dtype)
        mass = F.softplus(projection(x).to(torch.promote_types(x.dtype, torch.float32)) + UNIT_MASS)
        return mass.clamp(min=1e-30).unflatten(-1, self.shape).permute(0, 2, 3, 1)

    def score(
        self,
        query: Tensor,
        key: Tensor,
        log_decay: Tensor | None = None,
        discount: Literal["weights", "logits"] = "weights",
    ) -> Gravity:
        softening, distance_power = self.law()
        return Gravity(
            key_mass=self.mass(self.key_mass, key),
            query_mass=None if self.query_mass is None else self.mass(self.query_mass, query),
            log_gravity=None if self.log_gravity is None else self.log_gravity.view(self.shape),
            softening=softening,
            distance_power=distance_power,
            normalization=self.normalization,
            log_decay=log_decay,
            discount=discount,
            distance=self.distance,
        )

    def masses(self, query: Tensor, key: Tensor) -> dict[str, Tensor]:
        """{"key": (N, T, H, S)} and, but for "force", {"query": (N, T, H, L)}; detached."""
        with torch.no_grad():
            found = {"key": self.mass(self.key_mass, key)}
            return found if self.query_mass is None else found | {"query": self.mass(self.query_mass, query)}

    def learned_scalars(self) -> dict[str, Tensor]:
        softening, power = self.law()
        found = {"softening": softening, "power": power}
        if self.log_gravity is not None:
            found["gravity"] = self._exp(self.log_gravity)
        return {name: x.detach() for name, x in found.items() if isinstance(x, Tensor)}


class GravitationalAttention(AttentionModule):
    """`output_i = sum_j softmax_j(F_ij) v_j`, `F_ij = G m_i m_j / (|q_i - k_j|^2 / D + softening)^(p / 2)`.

    The difference from softmax attention: the logit is a gravitational force, not a dot product. In plain
    PyTorch, for one head::

        q, k, v = x @ W_q.T + b_q, x @ W_k.T + b_k, x @ W_v.T + b_v
        m_q, m_k = F.softplus(x @ w_mq + b_mq + c), F.softplus(x @ w_mk + b_mk + c)   # c = log(e - 1)
        r2 = (q[:, None] - k[None]).square().sum(-1) / D
        force = G * m_q[:, None] * m_k / (r2 + softening) ** (p / 2)
        weights = force.softmax(-1)                     # normalization="softmax"
        weights = force / force.sum(-1, keepdim=True)   # normalization="force"
        output = weights @ v @ W_o.T + b_o

    With "softmax", G m_i is an inverse temperature per query. With "force", G and m_i scale a whole row and
    cancel: the module then has neither, and no exponential is needed.

    embed_dim: E, a positive multiple of num_heads. num_heads: H.
    dropout: probability of dropping an attention weight in training, in [0, 1); default 0.
    bias: whether the four projections have biases (masses always have).
    softening: Plummer softening of N-body simulation, at least `least_softening(p)`: 1e-6, and more for p
        above 8; default 0.1, a tenth of the mean r2 at the start. Without it a coincident pair has infinite
        force.
    distance_power: p, above 0; default 2, the inverse square law, or D where it is learned.
    normalization: "softmax" (default) or "force".
    distance: "euclidean" (default), "cosine": `r2 = 1 - cos(q, k)`, the Euclidean distance of `q / (2 *
        q.square().mean(-1, keepdim=True) + 1e-6) ** 0.5` and k alike, as fast; or "manhattan": `r2 =
        (q[:, None] - k[None]).abs().mean(-1) ** 2`, which is slower.
    learned_power: whether p is trained, for each head, from `distance_power` on; default False. With "force"
        only. A steep force looks up one key, as a dot product can; the inverse square law is too flat for it.
    learned_softening: whether the softening is trained, for each head; default False.
    adaptive: whether the pull fades with time, which passes at a rate of each token's own, head by head;
        default False. The weights are then multiplied by `exp(-(time[:, None] - time).abs())` and normalised,
        `time = F.softplus(x @ w + b).cumsum(0)`, horizons log-spaced over the heads at the start: see
        `Discounts`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        softening: float = 0.1,
        distance_power: float | None = None,
        normalization: Literal["softmax", "force"] = "softmax",
        distance: Literal["euclidean", "cosine", "manhattan"] = "euclidean",
        learned_power: bool = False,
        learned_softening: bool = False,
        adaptive: bool = False,
        batch_first: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, batch_first=batch_first, device=device, dtype=dtype
        )
        self.out_proj = self.make_out_proj(embed_dim, bias, device, dtype)
        law = softening, distance_power, normalization, distance, learned_power, learned_softening
        self.field = GravitationalField(embed_dim, num_heads, 1, *law, device, dtype)
        self.discounts: Discounts | None = None
        if adaptive:
            rates: dict[str, Any] = {"over_heads": True, "adaptive": True, "embed_dim": embed_dim}
            self.discounts = Discounts(1, num_heads, None, True, device=device, dtype=dtype, **rates)

    def score(self, query: Tensor, key: Tensor) -> Gravity:
        return self.field.score(query, key)

    def clock(self, query: Tensor, key: Tensor, padding: Tensor | None) -> Clock | None:
        return None if self.discounts is None else self.discounts.clock(query, key, padding)

    def masses(self, query: Tensor, key: Tensor) -> dict[str, Tensor]:
        """Masses of the inputs query (N, L, E) and key (N, S, E), by role: each (N, 1, H, L or S)."""
        return self.field.masses(query, key)

    def learned_scalars(self) -> dict[str, Tensor]:
        scalars = self.field.learned_scalars()
        return scalars if self.discounts is None else scalars | self.discounts.learned_scalars()
