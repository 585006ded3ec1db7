"""Gravitational multi-timescale attention: gravity whose pull also fades with distance in the text, at
several rates, each with its own masses and G, joined by a Laplace decoder.

    attention = GravitationalMultiTimescaleAttention(embed_dim=128, num_heads=4, num_timescales=3)
    output, weights = attention(x, x, x, key_padding_mask=mask)

Symbols and masks: see attention_module.py.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from attention_engine.attention_scores import Clock, Gravity
from attention_module import AttentionModule
from gravitational_attention import GravitationalField
from timescales import Discounts, TimescaleDecoder, number_of_timescales


class GravitationalMultiTimescaleAttention(AttentionModule):
    """One q, k, v; per timescale t masses, G and a discount: the gravitational weight times gamma_t^|i-j|.

    The difference from softmax attention: the logit is a gravitational force plus `|i - j| log gamma_t`, for
    T timescales, whose outputs are decoded. In plain PyTorch, for one head::

        r2 = (q[:, None] - k[None]).square().sum(-1) / D
        for t in range(T):
            force = G[t] * m_q[t][:, None] * m_k[t] / (r2 + softening) ** (p / 2)
            weights = (force + distance * gamma[t].log()).softmax(-1)             # normalization="softmax"
            weights = force * gamma[t] ** distance; weights /= weights.sum(-1, keepdim=True)   # "force"
            read[t] = weights @ v
        lag_bins = torch.einsum("bt,tld->lbd", mixing, read)
        output = lag_bins.flatten(1) @ W_o.T + b_o

    embed_dim, num_heads, dropout, bias: as in `nn.MultiheadAttention`.
    num_timescales, gammas, learn_gammas, decoder, discount: as in `MultiTimescaleAttention`.
    adaptive: whether time passes at a rate of each token's own, as in `MultiTimescaleAttention`; default
        False.
    softening, distance_power, normalization, distance: as in `GravitationalAttention`.
    learned_power, learned_softening: as in `GravitationalAttention`, for each timescale and head.

    With discount="logits" the weights are `(force * gamma[t] ** distance).softmax(-1)`: far tokens pull with
    no force and keep the weight e^0. It raises with normalization="force": there the logit is log(force),
    whose zero, to which far logits would go, is a matter of the unit of force.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        num_timescales: int | None = None,
        gammas: Sequence[float] | None = None,
        learn_gammas: bool = True,
        decoder: Literal["laplace", "linear", "mlp"] = "laplace",
        softening: float = 0.1,
        distance_power: float | None = None,
        normalization: Literal["softmax", "force"] = "softmax",
        distance: Literal["euclidean", "cosine", "manhattan"] = "euclidean",
        learned_power: bool = False,
        learned_softening: bool = False,
        discount: Literal["weights", "logits"] = "weights",
        adaptive: bool = False,
        batch_first: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        num_timescales = number_of_timescales(num_timescales, gammas)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            num_timescales=num_timescales,
            batch_first=batch_first,
            **place,
        )
        if discount == "logits" and normalization == "force":
            raise ValueError(
                'discount="logits" needs normalization="softmax": log(force) has no natural zero'
            )
        self.discounts = Discounts(
            num_timescales,
            num_heads,
            gammas,
            learn_gammas,
            discount,
            adaptive=adaptive,
            embed_dim=embed_dim,
            **place,
        )
        self.decoder = TimescaleDecoder(
            embed_dim, self.discounts.initial_gammas, decoder, True, device, dtype
        )
        self.out_proj = self.make_out_proj(self.decoder.out_features, bias, device, dtype)
        law = softening, distance_power, normalization, distance, learned_power, learned_softening
        self.field = GravitationalField(embed_dim, num_heads, num_timescales, *law, **place)

    def score(self, query: Tensor, key: Tensor) -> Gravity:
        return self.field.score(query, key, self.discounts.log_decay(), self.discounts.discount)

    def clock(self, query: Tensor, key: Tensor, padding: Tensor | None) -> Clock | None:
        return self.discounts.clock(query, key, padding)

    def project_out(self, read: Tensor) -> Tensor:
        return self.out_proj(self.decoder(read))

    def masses(self, query: Tensor, key: Tensor) -> dict[str, Tensor]:
        """Masses of the inputs query (N, L, E) and key (N, S, E), by role: each (N, T, H, L or S)."""
        return self.field.masses(query, key)

    def learned_scalars(self) -> dict[str, Tensor]:
        return self.field.learned_scalars() | self.discounts.learned_scalars()
