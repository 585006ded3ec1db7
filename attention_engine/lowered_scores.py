"""A score brought into the form that `tile_sums` sums.

- The dot product: a = q * scale, b = k, e(x) = exp(x).
- Gravity: the softened distance is a dot product of augmented vectors,
  `r2 + softening = [-2 q, |q|^2 + D softening, 1] . [k, 1, |k|^2] / D`. Masses and G are divided into a and
  b, so that the force is x^(-p/2) and their gradients come out of ordinary autograd on a and b. With
  normalization "force" the weight itself is that power, no exponential at all; the key mass goes into u, so
  that all timescales share one tile.
- u = [v, 1], zero where a key is padding.

Symbols as in `attention_kernels`; B problems are (timescale, example, head), in this order, or (example,
head) with U weightings each.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from attention_engine.attention_scores import DotProduct, Gravity, Mask, Score
from attention_engine.tile_plan import PairWeight

ROUNDING = 1e-4  # the most that float32 may err in the softened distance, relative to the softening
LARGEST_FORCE = 1e30
LARGEST_LOG_32, LARGEST_LOG = 40.0, 300.0  # of the masses' roots, in float32 and at all


class LoweredScore(NamedTuple):
    """A score in the form of `tile_sums`."""

    a: Tensor  # (B, L, A)
    b: Tensor  # (B, S, A)
    u: Tensor  # (B, U (D + 1), S)
    log_decay: Tensor | None  # (B, U)
    weight: PairWeight
    log_largest: Tensor  # (B, U) bound on the logarithm of a weight, detached
    padding: Tensor | None  # (B, S) bool, True = blocked
    weightings: int


def shares_tiles(score: Score, projections: int, dropout: float) -> bool:
    """Whether the timescales of a score are weightings of one tile: where their weights differ by factors of
    the key and of the distance only. A weight is dropped for one timescale, not for all."""
    force = isinstance(score, Gravity) and score.normalization == "force"
    return force and projections == 1 and not dropout


def lower(q: Tensor, k: Tensor, v: Tensor, score: Score, mask: Mask, share: bool) -> LoweredScore:
    """q (N, T', H, L, D), k and v (N, T', H, S, D), T' = T or 1. share: see `shares_tiles`."""
    batch, _, heads = q.shape[:3]
    if mask.padding is not None:
        k = k.masked_fill(mask.padding[:, None, None, :, None], 0.0)
    if isinstance(score, DotProduct):
        a, b, u, weight, log_largest = _lower_dot_product(q, k, v, score)
    else:
        a, b, u, weight, log_largest = _lower_gravity(q, k, v, score, mask, share)
    weightings = log_largest.shape[1]
    padding = None
    if mask.padding is not None:
        timescales = len(a) // (batch * heads)
        padding = mask.padding[None, :, None].expand(timescales, -1, heads, -1).flatten(0, 2)
        u = u.masked_fill(padding.unsqueeze(1), 0.0)
    log_decay = None
    if score.log_decay is not None:
        rates = score.log_decay.to(a.dtype)[:, None].expand(-1, batch, -1)  # (T, N, H)
        log_decay = rates.flatten(1).mT if share else rates.reshape(-1, 1)
    return LoweredScore(a, b, u, log_decay, weight, log_largest, padding, weightings)


Parts = tuple[Tensor, Tensor, Tensor, PairWeight, Tensor]


def _problems(x: Tensor, timescales: int) -> Tensor:
    """(N, T or 1, H, ...) -> (B, ...)."""
    return x.transpose(0, 1).expand(timescales, *([-1] * (x.dim() - 1))).flatten(0, 2)


def _with_ones(v: Tensor) -> Tensor:
    """(..., S, D) -> (..., D + 1, S)."""
    v = v.mT
    return torch.cat([v, torch.ones_like(v[..., :1, :])], -2)


def _lower_dot_product(q: Tensor, k: Tensor, v: Tensor, score: DotProduct) -> Parts:
    timescales = q.shape[1] if score.log_decay is None else len(score.log_decay)
    a, b = _problems(q * score.scale, timescales), _problems(k, timescales)
    with torch.no_grad():
        largest = a.norm(dim=-1).amax(-1, keepdim=True) * b.norm(dim=-1).amax(-1, keepdim=True)
    return a, b, _problems(_with_ones(v), timescales), PairWeight(None, True), largest


def _lower_gravity(q: Tensor, k: Tensor, v: Tensor, score: Gravity, mask: Mask, share: bool) -> Parts:
    power, timescales = score.distance_power / 2, score.key_mass.shape[1]
    key_mass = score.key_mass
    if mask.padding is not None:
        key_mass = key_mass.masked_fill(mask.padding[:, None, None, :], 1.0)
    strength = None
    if score.query_mass is not None and score.log_gravity is not None:
        strength = score.log_gravity.exp().unsqueeze(-1) * score.query_mass  # G m_i: (N, T, H, L)
    near_q, near_k = _centred(q, k, mask, torch.nanmean)
    masses = [] if strength is None else [strength, key_mass]
    floor = None
    if _needs_float64(near_q, near_k, score.softening, masses, power):
        q, k, v, key_mass = q.double(), k.double(), v.double(), key_mass.double()
        strength = None if strength is None else strength.double()
        # No few outliers pull a median away; what even float64 cannot tell from 0 is held above it.
        near_q, near_k = _centred(q, k, mask, _nanmedian)
        floor = LARGEST_FORCE ** (-1 / power)
    q, k = near_q, near_k
    roots = None if strength is None else (_inverse_root(strength, power), _inverse_root(key_mass, power))
    a, b = _distance_factors(q, k, score.softening, roots)
    log_largest = key_mass.detach().amax(-1).log() - power * math.log(score.softening)  # (N, T, H)
    if strength is None:
        u = _with_ones(v) * key_mass.unsqueeze(-2)  # (N, T, H, D + 1, S)
        weight = PairWeight(power, exponential=False, floor=floor)
        if share:
            u = u.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (N H, T (D + 1), S)
            bound = log_largest.transpose(1, 2).flatten(0, 1)
            return a.flatten(0, 2), b.flatten(0, 2), u, weight, bound
    else:
        u, weight = _with_ones(v), PairWeight(power, exponential=True, floor=floor)
        log_largest = log_largest.exp() * strength.detach().amax(-1)
    bound = _problems(log_largest, timescales).unsqueeze(-1)
    a, b, u = (_problems(x, timescales) for x in (a, b, u))
    return a, b, u, weight, bound


def _inverse_root(mass: Tensor, power: float) -> Tensor:
    """mass^(-1 / power). Where that would overflow it is held: the force is nothing there."""
    return (mass.log() / -power).clamp(-LARGEST_LOG, LARGEST_LOG).exp()


def _centred(
    q: Tensor, k: Tensor, mask: Mask, centre_of: Callable[[Tensor, int, bool], Tensor]
) -> tuple[Tensor, Tensor]:
    """q and k with a common centre taken off, which no distance sees; k is 0 where it is padding."""
    padding = None if mask.padding is None else mask.padding[:, None, None, :, None]
    with torch.no_grad():
        true_k = k if padding is None else k.masked_fill(padding, math.nan)
        centre = centre_of(true_k, -2, True)
        centre = centre.masked_fill(centre.isnan(), 0.0)
    q, k = q - centre, k - centre
    return q, k if padding is None else k.masked_fill(padding, 0.0)


def _nanmedian(x: Tensor, dim: int, keepdim: bool) -> Tensor:
    return x.nanmedian(dim, keepdim).values


@torch.no_grad()
def _needs_float64(q: Tensor, k: Tensor, softening: float, masses: list[Tensor], power: float) -> bool:
    """Whether float32 is not enough for `|q|^2 - 2 q . k + |k|^2`, which cancels terms of the size of |q|^2,
    or for the masses' roots."""
    largest = q.square().sum(-1).amax() + k.square().sum(-1).amax()
    error = largest * torch.finfo(q.dtype).eps / (q.shape[-1] * softening)
    logs = sum((mass.log().abs().amax() for mass in masses), torch.zeros_like(error)) / power
    return not bool((error <= ROUNDING) & (logs <= LARGEST_LOG_32))


def _distance_factors(
    q: Tensor, k: Tensor, softening: float, scales: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """a (N, T, H, L, D + 2) and b (N, T, H, S, D + 2) with a_i . b_j = |q_i - k_j|^2 / D + softening, times
    the scales of i and j, (N, T, H, L) and (N, T, H, S), if given. T is T' without scales.

    The scales go into the parts, so that the unscaled factors need not be kept for the gradient."""
    head_dim = q.shape[-1]
    q_norm, k_norm = q.square().sum(-1, keepdim=True), k.square().sum(-1, keepdim=True)
    if scales is None:
        of_q, of_k = torch.ones_like(q_norm), torch.ones_like(k_norm)
    else:
        of_q, of_k = (scale.unsqueeze(-1) for scale in scales)
    a = torch.cat([q * (of_q * (-2 / head_dim)), (q_norm / head_dim + softening) * of_q, of_q / head_dim], -1)
    return a, torch.cat([k * of_k, of_k, k_norm * of_k], -1)
