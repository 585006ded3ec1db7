"""What mechanisms with timescales share: discounts of distance or of time, and the decoder that joins what
several timescales read (after the multi-timescale agents of Masset et al. 2025, Nature).

A lag bin is a range of distances |i - j|. Symbols: see attention_module.py.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_engine.attention_scores import Clock

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
    """T x H discounts in (0, 1): `log gamma = -softplus(rho + start)`, so that any real rho is legal.

    For long horizons rho + start is minus the logarithm of the horizon: a step of the optimizer changes the
    horizon by a factor, whatever its length. rho (T H) is 0 at the start and of one dimension, so that
    neither weight decay nor an initialisation of all matrices moves the horizons.

    gammas: the start, of each timescale for all heads, or with `over_heads` (T = 1) of each head.
    adaptive: time passes at a rate of each token's own, `softplus(w . x + rho + start)`, w = 0 at the start,
        in place of the constant -log gamma. The time at a token is the sum of the rates up to and with it; a
        padded token's rate is 0, and a weight is multiplied by `exp(-|time_i - time_j|)`. In cross-attention
        the time at a query is the sum over queries, that at a key the sum over keys; self-attention, where
        padding counts for queries too, is told by query and key being the same tensor.

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
        *,
        over_heads: bool = False,
        adaptive: bool = False,
        embed_dim: int = 0,
    ) -> None:
        super().__init__()
        if adaptive and (discount == "logits" or not learn_gammas):
            raise ValueError('adaptive=True needs discount="weights" and learn_gammas=True: it learns rates')
        if discount not in DISCOUNTS:
            raise ValueError(f"discount must be one of {DISCOUNTS}, got {discount!r}")
        if num_timescales < 1:
            raise ValueError(f"num_timescales must be at least 1, got {num_timescales}")
        count, of = (num_heads, "head") if over_heads else (num_timescales, "timescale")
        gammas = default_gammas(count) if gammas is None else tuple(gammas)
        if len(gammas) != count:
            raise ValueError(f"gammas must have one entry per {of}, got {len(gammas)} for {count}")
        if not all(0.0 < gamma < 1.0 for gamma in gammas):
            raise ValueError(f"gammas must be in (0, 1), got {gammas}")
        self.initial_gammas = gammas
        self.discount: Literal["weights", "logits"] = discount
        self.over_heads, self.shape = over_heads, (num_timescales, num_heads)
        empty = functools.partial(torch.empty, num_timescales * num_heads, device=device, dtype=dtype)
        self.start: Tensor
        self.register_buffer("start", empty())
        self.rho = nn.Parameter(empty(), requires_grad=learn_gammas)
        self.rate: nn.Linear | None = None
        if adaptive:
            self.rate = nn.Linear(embed_dim, len(self.rho), bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the gammas of the constructor, the same for all tokens."""
        start = [math.log1p(-gamma) - math.log(gamma) for gamma in self.initial_gammas]
        with torch.no_grad():
            repeats = 1 if self.over_heads else self.shape[1]
            self.start.copy_(torch.tensor(start, dtype=torch.float64).repeat_interleave(repeats))
        for learned in self.parameters():
            nn.init.zeros_(learned)

    def log_gamma(self) -> Tensor:
        """log gamma (T, H), below 0, in float32 at least; of a token with w . x = 0 where `adaptive`."""
        dtype = torch.promote_types(self.rho.dtype, torch.float32)
        return -F.softplus(self.rho.to(dtype) + self.start.to(dtype)).view(self.shape)

    def log_decay(self) -> Tensor | None:
        """The constant rates, or none where there is a clock."""
        return self.log_gamma() if self.rate is None else None

    def clock(self, query: Tensor, key: Tensor, padding: Tensor | None) -> Clock | None:
        """From query (N, L, E), key (N, S, E) and padding (N, S); None where rates are constant."""
        if self.rate is None:
            return None
        of_keys = self._time(self.rate, key, padding)
        return Clock(of_keys if query is key else self._time(self.rate, query, None), of_keys)

    def _time(self, rate: nn.Linear, x: Tensor, padding: Tensor | None) -> Tensor:
        """(N, L, E) -> (N, T, H, L), in float32 at least."""
        dtype = torch.promote_types(self.rho.dtype, torch.float32)
        logits = rate(x.to(self.rho.dtype)).to(dtype)
        rates = F.softplus(logits + self.rho.to(dtype) + self.start.to(dtype))
        if padding is not None:
            rates = rates.masked_fill(padding.unsqueeze(-1), 0.0)
        return rates.cumsum(1).unflatten(-1, self.shape).permute(0, 2, 3, 1)

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


def unit_gain(mixing: Tensor, shared: bool) -> Tensor:
    """The mixing (B, T) scaled so that it keeps the mean square of what the timescales read.

    Over equal tokens every timescale reads the token's value: the same one where they share v, so that the
    bins' mean square is `|M 1|^2 / B` times it, else T independent ones, and it is `|M|_F^2 / B` times it.
    """
    of_bins = mixing.sum(1) if shared else mixing
    return mixing * math.sqrt(len(mixing)) / of_bins.norm()


class TimescaleDecoder(nn.Module):
    """Joins what T timescales read into what `out_proj` projects: (N, L, T E) -> (N, L, `out_features`).

    "laplace": a learnable mixing matrix (B x T, B = T), started at `laplace_mixing` scaled to `unit_gain`,
    turns the T outputs into B lag bins. The attention outputs are normalised sums where the transform has
    plain ones, so the matrix is a start, not an inverse. "linear": no mixing, as for T = 1. "mlp": a hidden
    layer of width E with GELU, as the paper's agents have.

    All start with the output scale of softmax attention: the mean square of what is projected is that of a
    value, 1/2 for inputs of unit variance.
    """

    # E[gelu(z)^2] = 1/2 for a normal z of this deviation.
    HIDDEN_DEVIATION = 1.0737

    def __init__(
        self,
        embed_dim: int,
        gammas: Sequence[float],
        decoder: Literal["laplace", "linear", "mlp"],
        shared: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {DECODERS}, got {decoder!r}")
        self.kind = "linear" if decoder == "laplace" and len(gammas) == 1 else decoder
        self.gammas, self.shared = tuple(gammas), shared
        self.out_features = embed_dim if decoder == "mlp" else len(gammas) * embed_dim
        if self.kind == "laplace":
            self.mixing = nn.Parameter(torch.empty(len(gammas), len(gammas), device=device, dtype=dtype))
        elif self.kind == "mlp":
            self.hidden = nn.Linear(len(gammas) * embed_dim, embed_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.kind == "laplace":
            with torch.no_grad():
                self.mixing.copy_(unit_gain(laplace_mixing(self.gammas), self.shared))
        elif self.kind == "mlp":
            deviation = self.HIDDEN_DEVIATION * (2 / self.hidden.in_features) ** 0.5
            nn.init.normal_(self.hidden.weight, std=deviation)
            nn.init.zeros_(self.hidden.bias)

    def forward(self, read: Tensor) -> Tensor:
        if self.kind == "laplace":
            by_timescale = read.unflatten(-1, (len(self.mixing), -1))  # (N, L, T E) -> (N, L, T, E)
            return (self.mixing @ by_timescale).flatten(-2)
        return F.gelu(self.hidden(read)) if self.kind == "mlp" else read
