"""A score brought into the form that `tile_sums` sums.

- The dot product: a = q * scale, b = k, e(x) = exp(x).
- Gravity: the softened distance is a dot product of augmented vectors,
  `r2 + softening = [-2 q, |q|^2 + D softening, 1] . [k, 1, |k|^2] / D`. Of a single timescale, masses and G
  are divided into a and b, so that the force is x^(-p/2) and their gradients come out of ordinary autograd
  on a and b. Several timescales of the same q and k share the tile of distances; their masses and G are the
  scales of rows and keys. With normalization "force" the weight itself is that power, times the mass of the
  key: no exponential at all.
- u = [v, 1], zero where a key is padding.

A chunk is lowered twice, so passes over memory count: padding is multiplied away, which takes a quarter of
the time of `masked_fill` with a mask that is broadcast.

Symbols as in `attention_kernels`, but inside this file the timescales of a tensor come first. B problems are
(timescale, example, head), in this order, or (example, head) with U weightings each.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attention_engine.attention_scores import DotProduct, Gravity, Mask, Score
from attention_engine.tile_plan import PairWeight, Terms

ROUNDING = 1e-4  # the most that float32 may err in the softened distance, relative to the softening
LARGEST_FORCE = 1e30
LARGEST_LOG_32, LARGEST_LOG = 40.0, 300.0  # of the masses' roots, in float32 and at all


class LoweredScore(NamedTuple):
    """A score in the form of `tile_sums`."""

    terms: Terms
    weight: PairWeight
    log_largest: Tensor | None  # (B, U) bound on the logarithm of a weight; None: that of a product is one
    padding: Tensor | None  # (B, S) bool, True = blocked
    weightings: int


def shares_tiles(score: Score, projections: int, dropout: float) -> bool:
    """Whether the timescales of a score are weightings of one tile: gravity, of the same q and k, whose
    timescales differ by masses and decay. A weight is dropped for one timescale, not for all. A single
    timescale with softmax is better off with its masses in a and b."""
    if not isinstance(score, Gravity) or projections > 1 or dropout:
        return False
    return score.normalization == "force" or (score.log_decay is not None and len(score.log_decay) > 1)


def lower(q: Tensor, k: Tensor, v: Tensor, score: Score, mask: Mask, share: bool) -> LoweredScore:
    """q (N, T', H, L, D), k and v (N, T', H, S, D), T' = T or 1. share: see `shares_tiles`."""
    batch, _, heads = q.shape[:3]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    kept = padding = log_decay = None
    if mask.padding is not None:
        kept = (~mask.padding).to(k.dtype)[:, None, :, None]  # (N, 1, S, 1)
        k = k * kept
    if isinstance(score, DotProduct):
        parts = Parts(q * score.scale, k, _with_ones(v, kept), PairWeight(None, True))
    else:
        parts = _lower_gravity(q, k, v, score, kept, share)
    timescales = max(len(parts.a), len(parts.u), 1 if score.log_decay is None else len(score.log_decay))
    log_largest = parts.log_largest
    if log_largest is not None:
        timescales, log_largest = len(log_largest), _by_problem(log_largest, share)
    weightings, timescales = (timescales, 1) if share else (1, timescales)
    a, b, u = (x.expand(timescales, -1, -1, -1, -1).flatten(0, 2) for x in parts[:3])
    if mask.padding is not None:
        padding = mask.padding[None, :, None].expand(timescales, -1, heads, -1).flatten(0, 2)
    if score.log_decay is not None:
        log_decay = _by_problem(score.log_decay.to(a.dtype)[:, None].expand(-1, batch, -1), share)
    terms = Terms(a, b, u, log_decay, parts.row_scale, parts.key_scale)
    return LoweredScore(terms, parts.weight, log_largest, padding, weightings)


class Parts(NamedTuple):
    """What a score contributes to a `LoweredScore`, before timescales, examples and heads are joined."""

    a: Tensor  # (T or 1, N, H, L, A)
    b: Tensor
    u: Tensor  # (T or 1, N, H, C, S)
    weight: PairWeight
    log_largest: Tensor | None = None  # (T, N, H)
    row_scale: Tensor | None = None  # as in Terms
    key_scale: Tensor | None = None


def _by_problem(x: Tensor, share: bool) -> Tensor:
    """What each weighting has: (T, N, H) -> (B, U)."""
    return x.flatten(1).mT if share else x.reshape(-1, 1)


def _with_ones(v: Tensor, scale: Tensor | None) -> Tensor:
    """(..., S, D) -> (..., D + 1, S), times the scale (..., S, 1)."""
    v = v.mT
    u = torch.cat([v, torch.ones_like(v[..., :1, :])], -2)
    return u if scale is None else u * scale.mT


def _lower_gravity(
    q: Tensor, k: Tensor, v: Tensor, score: Gravity, kept: Tensor | None, share: bool
) -> Parts:
    power = score.distance_power / 2
    key_mass = score.key_mass.transpose(0, 1).unsqueeze(-1)  # (T, N, H, S, 1)
    if kept is not None:
        key_mass = key_mass.masked_fill(kept == 0, 1.0)
    strength = None
    if score.query_mass is not None and score.log_gravity is not None:
        gravity = score.log_gravity.exp()[:, None, :, None]
        strength = (gravity * score.query_mass.transpose(0, 1)).unsqueeze(-1)  # G m_i: (T, N, H, L, 1)
    masses = [] if strength is None else [strength, key_mass]
    near, floor = Centred.of(q, k, kept, by_median=False), None
    if near.needs_float64(score.softening, masses, power):
        q, k, v, key_mass = q.double(), k.double(), v.double(), key_mass.double()
        strength = None if strength is None else strength.double()
        kept = None if kept is None else kept.double()
        # No few outliers pull a median away; what even float64 cannot tell from 0 is held above it.
        near, floor = Centred.of(q, k, kept, by_median=True), LARGEST_FORCE ** (-1 / power)
    log_largest = key_mass.detach().squeeze(-1).amax(-1).log() - power * math.log(score.softening)
    weight = PairWeight(power, exponential=strength is not None, floor=floor)
    if strength is not None:
        log_largest = log_largest.exp() * strength.detach().squeeze(-1).amax(-1)
        if not share:
            roots = _inverse_root(strength, power), _inverse_root(key_mass, power)
            a, b = near.distance_factors(score.softening, *roots)
            return Parts(a, b, _with_ones(v, kept), weight, log_largest)
    a, b = near.distance_factors(score.softening)
    if not share:
        return Parts(a, b, _with_ones(v, key_mass if kept is None else key_mass * kept), weight, log_largest)
    row_scale, key_scale = (None if x is None else _of_weightings(x) for x in (strength, key_mass))
    return Parts(a, b, _with_ones(v, kept), weight, log_largest, row_scale, key_scale)


def _of_weightings(x: Tensor) -> Tensor:
    """(T, N, H, L, 1) -> (B, U, L)."""
    return x.squeeze(-1).permute(1, 2, 0, 3).flatten(0, 1)


def _inverse_root(mass: Tensor, power: float) -> Tensor:
    """mass^(-1 / power). Where that would overflow it is held: the force is nothing there."""
    return (mass.log() / -power).clamp(-LARGEST_LOG, LARGEST_LOG).exp()


class Centred(NamedTuple):
    """Queries and keys with a common centre taken off, which no distance sees, and their squared norms."""

    q: Tensor  # (T', N, H, L, D)
    k: Tensor  # (T', N, H, S, D), 0 where a key is padding
    q_norm: Tensor  # (T', N, H, L, 1)
    k_norm: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, kept: Tensor | None, by_median: bool) -> "Centred":
        """kept: (N, 1, S, 1), 0 where a key is padding, and k 0 with it, and 1 elsewhere; or None."""
        with torch.no_grad():
            if by_median:
                true_k = k if kept is None else k.masked_fill(kept == 0, math.nan)
                centre = true_k.nanmedian(-2, keepdim=True).values.nan_to_num(0.0)
            elif kept is None:
                centre = k.mean(-2, keepdim=True)
            else:
                centre = k.sum(-2, keepdim=True) / kept.sum(-2, keepdim=True).clamp(min=1.0)
        q = q - centre
        k = k - centre if kept is None else torch.addcmul(k, centre, kept, value=-1)
        return cls(q, k, *(x.square().sum(-1, keepdim=True) for x in (q, k)))

    @torch.no_grad()
    def needs_float64(self, softening: float, masses: list[Tensor], power: float) -> bool:
        """Whether float32 is not enough for `|q|^2 - 2 q . k + |k|^2`, which cancels terms of the size of
        |q|^2, or for the masses' roots."""
        largest = self.q_norm.amax() + self.k_norm.amax()
        error = largest * torch.finfo(self.q.dtype).eps / (self.q.shape[-1] * softening)
        logs = sum((mass.log().abs().amax() for mass in masses), torch.zeros_like(error)) / power
        return not bool((error <= ROUNDING) & (logs <= LARGEST_LOG_32))

    def distance_factors(
        self, softening: float, of_q: Tensor | None = None, of_k: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """a (T, N, H, L, D + 2) and b (T, N, H, S, D + 2) with a_i . b_j = |q_i - k_j|^2 / D + softening,
        times the scales of i and j, (T, N, H, L, 1) and (T, N, H, S, 1), if given. T is T' without."""
        head_dim = self.q.shape[-1]
        halved = (self.q_norm + head_dim * softening) / -2
        a = torch.cat([self.q, halved, torch.full_like(halved, -0.5)], -1)
        b = torch.cat([self.k, torch.ones_like(self.k_norm), self.k_norm], -1)
        a = a * (-2 / head_dim if of_q is None else of_q * (-2 / head_dim))
        return a, b if of_k is None else b * of_k
