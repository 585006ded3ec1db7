"""Multi-timescale attention: several softmax attentions, each discounting distance at its own rate, joined
by a Laplace decoder (after the multi-timescale agents of Masset et al. 2025, Nature).

    attention = MultiTimescaleAttention(embed_dim=128, num_heads=4, num_timescales=3)
    output, weights = attention(x, x, x, key_padding_mask=mask)
    attention.learned_scalars()["gamma"]   # (T, H)

Symbols and masks: see attention_module.py.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from attention_engine.attention_scores import Clock, DotProduct
from attention_module import AttentionModule
from timescales import Discounts, TimescaleDecoder, number_of_timescales

TIMESCALES = ("projections", "heads")


class MultiTimescaleAttention(AttentionModule):
    """T softmax attentions, each with its own q, k, v, whose weights fall with distance as gamma_t^|i-j|.

    The difference from softmax attention: `|i - j| log gamma_t` is added to the logits of timescale t, and
    the T outputs are decoded. In plain PyTorch, for one head::

        distance = (torch.arange(L)[:, None] - torch.arange(S)).abs()
        for t in range(T):
            q, k, v = x @ W_q[t].T + b_q[t], x @ W_k[t].T + b_k[t], x @ W_v[t].T + b_v[t]
            weights = (q @ k.mT / D**0.5 + distance * gamma[t].log()).softmax(-1)
            read[t] = weights @ v
        lag_bins = torch.einsum("bt,tld->lbd", mixing, read)
        output = lag_bins.flatten(1) @ W_o.T + b_o

    embed_dim: E, a positive multiple of num_heads. num_heads: H.
    dropout: probability of dropping an attention weight in training, in [0, 1); default 0.
    bias: whether the projections have biases.
    num_timescales: T, at least 1; default: one for each of gammas, else 3.
    gammas: T discounts in (0, 1), the start for every head; default: `default_gammas`, (0.9, 0.99, 0.999)
        for T = 3. Masset et al. use (0.6, 0.9, 0.99).
    learn_gammas: whether the discounts are trained, per timescale and head; default True.
    decoder: "laplace" (default), "linear" or "mlp": see `TimescaleDecoder`.
    timescales: "projections" (default): T timescales, each with its own q, k, v in every head. "heads": one
        q, k, v, T = 1, each head a horizon of its own, from `gammas` (H of them) or log-spaced over the heads
        between the same ends: head h adds `distance * gamma[h].log()`. As in Masset et al., where each neuron
        has a horizon of its own.
    adaptive: whether time passes at a rate of each token's own, summed along the sequence; default False.
        In place of distance * gamma[t].log() then `-(time[:, None] - time).abs()`, where `time =
        F.softplus(x @ w[t] + b[t]).cumsum(0)`, padded tokens left out: see `Discounts`. By the dense formula
        where a backend has no clocks. (The Forgetting Transformer, Lin et al. 2025, has the causal form.)
    discount: "weights" (default), or for comparison "logits": `weights = (q @ k.mT / D**0.5 * gamma[t] **
        distance).softmax(-1)`. Far logits then go to 0, so that far tokens keep the weight e^0: not a
        discount of what they say. By the dense formula only, in memory quadratic in the length.
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
        discount: Literal["weights", "logits"] = "weights",
        timescales: Literal["projections", "heads"] = "projections",
        adaptive: bool = False,
        batch_first: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if timescales not in TIMESCALES:
            raise ValueError(f"timescales must be one of {TIMESCALES}, got {timescales!r}")
        over_heads = timescales == "heads"
        if over_heads and num_timescales not in (None, 1):
            raise ValueError(f'timescales="heads" needs num_timescales=1, got {num_timescales}')
        num_timescales = 1 if over_heads else number_of_timescales(num_timescales, gammas)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            num_timescales=num_timescales,
            num_projections=num_timescales,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self.discounts = Discounts(
            num_timescales,
            num_heads,
            gammas,
            learn_gammas,
            discount,
            device,
            dtype,
            over_heads=over_heads,
            adaptive=adaptive,
            embed_dim=embed_dim,
        )
        decoded = self.discounts.initial_gammas[:num_timescales]
        self.decoder = TimescaleDecoder(embed_dim, decoded, decoder, False, device, dtype)
        self.out_proj = self.make_out_proj(self.decoder.out_features, bias, device, dtype)

    def score(self, query: Tensor, key: Tensor) -> DotProduct:
        return DotProduct(self.head_dim**-0.5, self.discounts.log_decay(), self.discounts.discount)

    def clock(self, query: Tensor, key: Tensor, padding: Tensor | None) -> Clock | None:
        return self.discounts.clock(query, key, padding)

    def project_out(self, read: Tensor) -> Tensor:
        return self.out_proj(self.decoder(read))

    def learned_scalars(self) -> dict[str, Tensor]:
        return self.discounts.learned_scalars()
