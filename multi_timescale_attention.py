"""Multi-timescale attention: several softmax attentions, each discounting distance at its own rate, joined
by a Laplace decoder (after the multi-timescale agents of Masset et al. 2025, Nature).

    attention = MultiTimescaleAttention(embed_dim=128, num_heads=4, num_timescales=3)
    output, weights = attention(x, x, x, key_padding_mask=mask)
    attention.learned_scalars()["gamma"]   # (T, H)

A lag bin is a range of distances |i - j|. Symbols and masks: see attention_module.py.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_engine.attention_scores import DotProduct
from attention_module import AttentionModule

DECODERS = ("laplace", "linear", "mlp")
DISCOUNTS = ("weights", "logits")
SHORTEST_HORIZON, LONGEST_HORIZON = 10.0, 1000.0


def default_gammas(num_timescales: int) -> tuple[float, ...]:
    """Discounts with log-spaced horizons from 10 to 1,000 tokens: (0.9, 0.99, 0.999) for T = 3."""
    return tuple(
        (1 - 1 / horizon) for horizon in _log_spaced(SHORTEST_HORIZON, LONGEST_HORIZON, num_timescales)
    )


def number_of_timescales(num_timescales: int | None, gammas: Sequence[float] | None) -> int:
    """T as it was given, or one for each of gammas, or 3."""
    if num_timescales is not None:
        return num_timescales
    return 3 if gammas is None else len(gammas)


def _log_spaced(low: float, high: float, count: int) -> list[float]:
    """`count` numbers from low to high at equal ratios; their geometric mean for one."""
    if count == 1:
        return [math.sqrt(low * high)]
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]


class Discounts(nn.Module):
    """T x H discounts in (0, 1): `log gamma = -softplus(rho)`, so that any real rho is legal.

    For long horizons rho is minus the logarithm of the horizon: a step of the optimizer changes the horizon
    by a factor, whatever its length.

    discount: what is multiplied by gamma^|i-j|: "weights", or for comparison "logits", which takes far logits
    to 0, so that a far token keeps the weight e^0 and is not forgotten.
    """

    def __init__(
        self,
        num_timescales: int,
        num_heads: int,
        gammas: Sequence[float] | None,
        learn_gammas: bool,
        discount: Literal["weights", "logits"] = "weights",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if discount not in DISCOUNTS:
            raise ValueError(f"discount must be one of {DISCOUNTS}, got {discount!r}")
        if num_timescales < 1:
            raise ValueError(f"num_timescales must be at least 1, got {num_timescales}")
        gammas = default_gammas(num_timescales) if gammas is None else tuple(gammas)
        if len(gammas) != num_timescales:
            raise ValueError(
                f"gammas must have one entry per timescale, got {len(gammas)} for {num_timescales}"
            )
        if not all(0.0 < gamma < 1.0 for gamma in gammas):
            raise ValueError(f"gammas must be in (0, 1), got {gammas}")
        self.initial_gammas = gammas
        self.discount: Literal["weights", "logits"] = discount
        rho = torch.tensor([math.log1p(-gamma) - math.log(gamma) for gamma in gammas], dtype=torch.float64)
        rho = rho.to(device=device, dtype=dtype or torch.get_default_dtype())
        self.rho = nn.Parameter(rho[:, None].repeat(1, num_heads), requires_grad=learn_gammas)

    def log_gamma(self) -> Tensor:
        """log gamma (T, H), below 0, in float32 at least."""
        return -F.softplus(self.rho.to(torch.promote_types(self.rho.dtype, torch.float32)))

    def learned_scalars(self) -> dict[str, Tensor]:
        return {"gamma": self.log_gamma().detach().exp()}


def laplace_mixing(gammas: Sequence[float], regularization: float = 0.1) -> Tensor:
    """The Tikhonov-regularised pseudo-inverse (B, T) of the discount matrix `A[t, b] = gamma_t ** lag_b`.

    Content discounted at several gammas is a discrete Laplace transform of content over distance; this
    matrix turns it back into B = T lag bins. With A = U diag(s) V^T it is V diag(s / (s^2 + alpha^2)) U^T,
    alpha = `regularization`. The lags are log-spaced between the shortest and the longest horizon.
    Source: Masset et al. 2025, methods ("regularized pseudo-inverse of the discount matrix").
    """
    horizons = [1 / (1 - gamma) for gamma in gammas]
    lags = torch.tensor(_log_spaced(min(horizons), max(horizons), len(gammas)), dtype=torch.float64)
    discounts = torch.tensor(gammas, dtype=torch.float64)[:, None] ** lags
    u, s, vh = torch.linalg.svd(discounts)
    return vh.mT @ torch.diag(s / (s.square() + regularization**2)) @ u.mT


class TimescaleDecoder(nn.Module):
    """Joins what T timescales read, and projects it: (N, L, T E) -> (N, L, E).

    "laplace": a learnable mixing matrix (B x T, B = T), started at `laplace_mixing`, turns the T outputs into
    B lag bins. The attention outputs are normalised sums where the transform has plain ones, so the matrix
    is a start, not an inverse. Mixing and projection are both linear: the mixing matrix is multiplied into
    the projection's weight, which is small, and not into what was read. "linear": no mixing. "mlp": a hidden
    layer of width E with GELU, as the paper's agents have.
    """

    def __init__(
        self,
        embed_dim: int,
        gammas: Sequence[float],
        decoder: Literal["laplace", "linear", "mlp"],
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {DECODERS}, got {decoder!r}")
        self.kind = decoder
        self.out_features = embed_dim if decoder == "mlp" else len(gammas) * embed_dim
        if decoder == "laplace":
            mixing = laplace_mixing(gammas).to(device=device, dtype=dtype or torch.get_default_dtype())
            self.mixing = nn.Parameter(mixing)
        elif decoder == "mlp":
            self.hidden = nn.Linear(len(gammas) * embed_dim, embed_dim, device=device, dtype=dtype)

    def forward(self, read: Tensor, out_proj: nn.Linear) -> Tensor:
        if self.kind == "laplace":
            of_bins = out_proj.weight.unflatten(1, (len(self.mixing), -1))  # (E, B, E)
            weight = torch.einsum("obe,bt->ote", of_bins, self.mixing).flatten(1)
            return F.linear(read, weight, out_proj.bias)
        return out_proj(F.gelu(self.hidden(read)) if self.kind == "mlp" else read)


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
        batch_first: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        num_timescales = number_of_timescales(num_timescales, gammas)
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
        self.discounts = Discounts(num_timescales, num_heads, gammas, learn_gammas, discount, device, dtype)
        self.decoder = TimescaleDecoder(embed_dim, self.discounts.initial_gammas, decoder, device, dtype)
        self.out_proj = self.make_out_proj(self.decoder.out_features, bias, device, dtype)

    def score(self, query: Tensor, key: Tensor) -> DotProduct:
        return DotProduct(self.head_dim**-0.5, self.discounts.log_gamma(), self.discounts.discount)

    def project_out(self, read: Tensor) -> Tensor:
        return self.decoder(read, self.out_proj)

    def learned_scalars(self) -> dict[str, Tensor]:
        return self.discounts.learned_scalars()
