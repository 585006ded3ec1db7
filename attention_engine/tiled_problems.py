"""A call of tiled attention as problems: what scores are made of, by timescale, as sums over tiles.

The softened distance of gravity is one product of vectors that carry their squared norm, less a centre that
no distance sees: `r2 = [-2 q / D, |q|^2 / D, 1] . [k, 1, |k|^2 / D]`. Where float32 is not enough for it the
call is computed in float64, see `needs_float64`. Far keys are skipped where decay makes them negligible
(far_keys.py), but with Manhattan distances and learned powers or softening.

Symbols and masks: see attention_module.py. B problems are (example, head).
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_engine.attention_scores import DotProduct, Gravity, Mask, Score, join_score
from attention_engine.far_keys import reach_of_rows

ROUNDING = 2e-5  # the most that float32 may err in the softened distance, relative to the softening
LARGEST_UNIT_FORCE = 50.0  # of a coincident pair: beyond it, float32 rounds the gradients of masses away


@dataclass(frozen=True)
class Call:
    """What a call asks for, besides its tensors."""

    score: Score  # without tensors
    mask: Mask  # without tensors
    wide: bool  # whether it is computed in float64
    dropout: float
    seed: int
    skip_far_keys: bool


class Tile(NamedTuple):
    """Some queries and keys of some problems of a timescale, t."""

    t: int
    problems: slice
    rows: slice
    keys: slice


class Factors(NamedTuple):
    """What logits are made of, each (T or 1, B, ...), or of one tile (B, ...); or the gradients by it. What a
    score does not have is None."""

    a: Tensor  # (B, L, A): logits, or r2, are a_i . b_j, or with "manhattan" |a_i - b_j|_1^2
    strength: Any  # (B, L, 1): G m_i
    query_clock: Any  # (B, L, 1)
    b: Tensor  # (B, S, A)
    v: Tensor  # (B, S, D)
    key_mass: Any  # (B, S, 1): m_j, or log m_j with "force"
    key_clock: Any  # (B, S, 1)
    bias: Any  # (B, S, 1): -inf where a key is padding
    softening: Any  # (B, 1, 1)
    power: Any  # (B, 1, 1): p / 2
    log_decay: Any  # (B, 1, 1)

    def of(self, tile: Tile) -> "Factors":
        """Views of a tile's."""
        t, problems, *rows_and_keys = tile
        rows, keys = ((problems, x) for x in rows_and_keys)
        places = zip(self, [rows] * 3 + [keys] * 5 + [problems] * 3, strict=True)
        return Factors(*(x if x is None else x[min(t, len(x) - 1)][place] for x, place in places))  # type: ignore


@dataclass(frozen=True)
class Problems:
    """A call in the form of its tiles."""

    call: Call
    factors: Factors
    pairs: Tensor | None  # (N, H, L, S)
    ends: list[int]  # for each problem a position after its last key
    reach: list[list[int]]  # for each timescale and problem the largest |i - j| to look at


@torch.no_grad()
def needs_float64(q: Tensor, k: Tensor, score: Gravity, mask: Mask) -> bool:
    """Whether float32 is not enough: for `|q|^2 - 2 q . k + |k|^2`, which cancels terms of the size of |q|^2,
    beside the softening; or for the gradients of masses, where one key may take all weight of a row."""
    softening, power = float(torch.as_tensor(score.softening).min()), score.distance_power
    # A learned power starts far beyond that: there the gradients of masses are as good as nothing.
    if not isinstance(power, Tensor) and softening ** (-power / 2) > LARGEST_UNIT_FORCE:
        return True
    if score.distance == "manhattan":
        return False
    q, k = centred(q, k, mask.padding, by_median=False)
    largest = q.square().sum(-1).amax() + k.square().sum(-1).amax()
    return not bool(largest * torch.finfo(q.dtype).eps <= ROUNDING * q.shape[-1] * softening)


def centred(q: Tensor, k: Tensor, padding: Tensor | None, by_median: bool) -> tuple[Tensor, Tensor]:
    """q and k less the middle of the keys that are not padding (N, S), which become 0: their mean, or their
    median, which no few outliers pull away."""
    true_k, absent = k.detach(), None if padding is None else padding[:, None, None, :, None]
    true_k = true_k if absent is None else true_k.masked_fill(absent, math.nan)
    middle = (true_k.nanmedian(-2, True).values if by_median else true_k.nanmean(-2, True)).nan_to_num(0.0)
    return q - middle, k - middle if absent is None else (k - middle).masked_fill(absent, 0.0)


def lower(call: Call, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> Problems:
    """The tensors of a call as `Problems`, by operations that autograd can follow."""
    *of_score, padding, pairs = others
    dtype = torch.float64 if call.wide else q.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    score = join_score(call.score, [None if x is None else x.to(dtype) for x in of_score])
    batch, _, heads, query_length, width = q.shape
    bias, ends = None, [k.shape[3]] * (batch * heads)
    if padding is not None:
        absent = padding[:, None, None, :, None]
        k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
        bias = k.new_zeros(padding.shape).masked_fill_(padding, -math.inf)
        bias = bias[:, None, None].expand(-1, 1, heads, -1)
        if k.device.type == "cpu":  # elsewhere, to read it would wait for the device
            last = (~padding * torch.arange(1, k.shape[3] + 1)).amax(-1)
            ends = last.repeat_interleave(heads).tolist()
    strength = key_mass = softening = power = None
    if isinstance(score, DotProduct):
        a, b = q * score.scale, k
    else:
        strength, key_mass = score.strength(), score.key_mass
        if padding is not None:
            key_mass = key_mass.masked_fill(padding[:, None, None], 1.0)
        if strength is None:
            key_mass = key_mass.log()
        law = score.softening, score.distance_power / 2
        softening, power = (x if isinstance(x, Tensor) else k.new_full((1, heads), x) for x in law)
        if score.distance == "manhattan":
            a, b = q / width, k / width
        else:
            q, k = centred(q, k, padding, by_median=call.wide)
            norm_q, norm_k = (x.square().mean(-1, keepdim=True) for x in (q, k))  # |q|^2 / D
            a = torch.cat([q * (-2 / width), norm_q, torch.ones_like(norm_q)], -1)
            b = torch.cat([k, torch.ones_like(norm_k), norm_k], -1)

    def by_timescale(x: Tensor | None) -> Any:
        """(N, T or 1, H, ...) or (T or 1, H) -> (T or 1, B, ..., ...), of four dimensions."""
        if x is None:
            return None
        x = x.expand(batch, -1, -1) if x.dim() == 2 else x
        return x.transpose(0, 1).reshape(x.shape[1], batch * heads, *(*x.shape[3:], 1, 1)[:2])

    query_clock, key_clock = (None, None) if score.clock is None else (score.clock.query, score.clock.key)
    of_queries, of_keys = (a, strength, query_clock), (b, v, key_mass, key_clock, bias)
    factors = Factors(*map(by_timescale, (*of_queries, *of_keys, softening, power, score.log_decay)))
    timescales, found = max(len(x) for x in factors if x is not None), None
    if call.skip_far_keys:  # by the score as it was given, which tells whether its decay is learned
        given = join_score(call.score, of_score)
        found = reach_of_rows(q, k, given, replace(call.mask, padding=padding, pairs=pairs))
    everything = max(call.mask.query_offset + query_length, k.shape[3])
    everywhere = [[everything] * (batch * heads)] * timescales
    reach = everywhere if found is None else found.transpose(0, 1).flatten(1).tolist()
    pairs = None if pairs is None else pairs[:, 0].expand(batch, heads, query_length, -1)
    return Problems(call, factors, pairs, ends, reach)
