"""Exact attention in O(L + S) memory: brings every score into the form that `tile_sums` sums.

- The dot product: a = q * scale, b = k, e(x) = exp(x).
- Gravity: the softened distance is a dot product of augmented vectors,
  `r2 + softening = [-2 q, |q|^2 + D softening, 1] . [k, 1, |k|^2] / D`. Masses and G are divided into a and
  b, so that the force is x^(-p/2) and their gradients come out of ordinary autograd on a and b. With
  normalization "force" the weight itself is that power, no exponential at all; the key mass goes into u, so
  that all timescales share one tile.
- u = [v, 1], zero where a key is padding.

Far keys are skipped where decay makes their total weight provably less than 2^-24 of a row's: a weight at
distance d is at most e_max gamma^d, all beyond W together at most 2 e_max gamma^(W+1) / (1 - gamma). W is
chosen so that this is negligible against the weight of a row's own key; that each row's sum is in fact large
enough is checked afterwards, row by row.

Symbols as in `attention_kernels`; B problems are (timescale, example, head), in this order.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention_engine.attention_scores import DotProduct, Gravity, Mask, Score
from attention_engine.tile_plan import BLOCK, PairWeight, Plan
from attention_engine.tile_sums import TileSums

SMALLEST_SUM = 1e-30
TOLERANCE, TOLERANCE_LEARNED_DECAY = 2.0**-24, 2.0**-34  # a gradient by log gamma weighs far keys by |i - j|
LOG_BLOCK_DECAY, LOG_WINDOW_DECAY = math.log(1e-15), math.log(1e-20)
ROUNDING = 1e-4  # the most that float32 may err in the softened distance, relative to the softening
LARGEST_FORCE = 1e30
LARGEST_LOG_32, LARGEST_LOG = 40.0, 300.0  # of the masses' roots, in float32 and at all


class Lowered(NamedTuple):
    """A score in the form of `tile_sums`."""

    a: Tensor  # (B, L, A)
    b: Tensor  # (B, S, A)
    u: Tensor  # (B, S, U (D + 1)), not yet zeroed at padding
    weight: PairWeight
    log_largest: Tensor  # (B, U) bound on the logarithm of a weight, detached
    weightings: int = 1


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Score,
    mask: Mask,
    dropout: float = 0.0,
    skip_far_keys: bool = True,
) -> Tensor:
    """q (N, T', H, L, D), k and v (N, T', H, S, D), T' = T or 1 -> (N, T, H, L, D), as `attend` has it."""
    batch, _, heads, query_length, head_dim = q.shape
    if mask.padding is not None:
        k = k.masked_fill(mask.padding[:, None, None, :, None], 0.0)
    if isinstance(score, DotProduct):
        lowered = _lower_dot_product(q, k, v, score)
    else:
        lowered = _lower_gravity(q, k, v, score, mask, share=not dropout)
    a, b, u, weight, _, weightings = lowered
    timescales = len(a) * weightings // (batch * heads)
    padding = None
    if mask.padding is not None:
        padding = mask.padding[None, :, None].expand(timescales // weightings, -1, heads, -1).flatten(0, 2)
        u = u.masked_fill(padding.unsqueeze(-1), 0.0)
    log_decay = None
    if score.log_decay is not None:
        rates = score.log_decay.to(a.dtype)[:, None].expand(-1, batch, -1)  # (T, N, H)
        log_decay = rates.reshape(weightings, -1).mT if weightings > 1 else rates.reshape(-1, 1)
    learned = log_decay is not None and log_decay.requires_grad
    tolerance = TOLERANCE_LEARNED_DECAY if learned else TOLERANCE
    windows, least_sum = _windows(lowered, padding, mask, log_decay if skip_far_keys else None, tolerance)
    plan = Plan(
        weight,
        mask.causal,
        _lengths(padding, len(a), k.shape[3]),
        windows,
        _blocks(log_decay, windows, timescales // weightings),
        least_sum,
        tolerance,
        padding,
        None if mask.pairs is None else _pair_mask(mask.pairs, batch, heads),
        dropout,
        int(torch.randint(2**31, ()).item()) if dropout else 0,
    )
    sums = TileSums.apply(a, b, u, log_decay, plan)
    output = Normalised.apply(sums.unflatten(-1, (weightings, head_dim + 1)))  # (B, L, U, D)
    if weightings > 1:
        return output.unflatten(0, (batch, heads)).permute(0, 3, 1, 2, 4)
    return output.view(timescales, batch, heads, query_length, head_dim).transpose(0, 1)


class Normalised(torch.autograd.Function):
    """The quotient `parts[..., :-1] / parts[..., -1:]`, zeros where the sum of weights is 0; keeps no more
    for its gradient than what it returns and the sums of weights."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        total = parts[..., -1:].masked_fill(parts[..., -1:] == 0, 1.0)
        output = parts[..., :-1] / total
        ctx.save_for_backward(output, total)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor) -> Tensor:
        output, total = ctx.saved_tensors
        dparts = torch.empty(
            *output.shape[:-1], output.shape[-1] + 1, dtype=output.dtype, device=output.device
        )
        torch.div(doutput, total, out=dparts[..., :-1])
        dparts[..., -1:] = -(dparts[..., :-1] * output).sum(-1, keepdim=True)
        return dparts


def _problems(x: Tensor, timescales: int) -> Tensor:
    """(N, T or 1, H, ...) -> (B, ...)."""
    return x.transpose(0, 1).expand(timescales, *([-1] * (x.dim() - 1))).flatten(0, 2)


def _with_ones(v: Tensor) -> Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def _lower_dot_product(q: Tensor, k: Tensor, v: Tensor, score: DotProduct) -> Lowered:
    timescales = q.shape[1] if score.log_decay is None else len(score.log_decay)
    a, b = _problems(q * score.scale, timescales), _problems(k, timescales)
    with torch.no_grad():
        largest = a.norm(dim=-1).amax(-1, keepdim=True) * b.norm(dim=-1).amax(-1, keepdim=True)
    return Lowered(a, b, _problems(_with_ones(v), timescales), PairWeight(None, True), largest)


def _lower_gravity(q: Tensor, k: Tensor, v: Tensor, score: Gravity, mask: Mask, share: bool) -> Lowered:
    """share: whether timescales may share a tile where their weights differ by a factor of the key only."""
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
        u = _with_ones(v) * key_mass.unsqueeze(-1)  # (N, T, H, S, D + 1)
        weight = PairWeight(power, exponential=False, floor=floor)
        if share and a.shape[1] == 1 and timescales > 1:
            u = u.permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 1)  # (N H, S, T (D + 1))
            bound = log_largest.transpose(1, 2).flatten(0, 1)
            return Lowered(a.flatten(0, 2), b.flatten(0, 2), u, weight, bound, timescales)
    else:
        u, weight = _with_ones(v), PairWeight(power, exponential=True, floor=floor)
        log_largest = log_largest.exp() * strength.detach().amax(-1)
    bound = _problems(log_largest, timescales).unsqueeze(-1)
    a, b, u = (_problems(x, timescales) for x in (a, b, u))
    return Lowered(a, b, u, weight, bound)


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


def _lengths(padding: Tensor | None, problems: int, key_length: int) -> list[int]:
    """For each problem the position after its last key that is not padding."""
    if padding is None:
        return [key_length] * problems
    position = torch.arange(1, key_length + 1, device=padding.device)
    lengths: list[int] = ((~padding) * position).amax(-1).tolist()
    return lengths


def _pair_mask(pairs: Tensor, batch: int, heads: int) -> Callable[[slice, slice, slice], Tensor]:
    """The function of `Plan.pair_mask` for a mask (N or 1, 1, H or 1, L, S)."""

    def tile(problems: slice, rows: slice, keys: slice) -> Tensor:
        index = torch.arange(problems.start, problems.stop, device=pairs.device)
        example, head = index // heads % batch, index % heads
        part = pairs[example % pairs.shape[0], 0, head % pairs.shape[2], rows, keys]
        if part.dtype != torch.bool:
            return part
        return torch.zeros(part.shape, device=part.device).masked_fill_(part, -math.inf)

    return tile


@torch.no_grad()
def _windows(
    lowered: Lowered, padding: Tensor | None, mask: Mask, log_decay: Tensor | None, tolerance: float
) -> tuple[list[int], Tensor]:
    """For each problem the largest |i - j| to look at, and (B, U) the least sum of weights that proves, for a
    row, that what lies beyond weighs less than the tolerance."""
    a, b, u, weight, log_largest, weightings = lowered
    everything = max(a.shape[1], b.shape[1])
    least_sum = torch.full_like(log_largest, SMALLEST_SUM)
    added = mask.pairs is not None and mask.pairs.dtype != torch.bool
    if log_decay is None or added or not u.numel():
        return [everything] * len(a), least_sum
    own_keys = slice(0, min(a.shape[1], b.shape[1]))
    own = weight.log_weight((a[:, own_keys] * b[:, own_keys]).sum(-1)).unsqueeze(-1)
    if not weight.exponential:
        own = own + u.unflatten(-1, (weightings, -1))[:, own_keys, :, -1].log()
    if padding is not None:
        own = own.masked_fill(padding[:, own_keys, None], math.inf)
    log_beyond = log_largest + (2 / -log_decay.expm1()).log() - math.log(tolerance)  # of all keys, at d = 0
    window = (log_beyond - own.amin(1)) / -log_decay
    window = window.ceil().amax(1).clamp(min=0, max=everything)
    needed = (log_beyond + (window[:, None] + 1) * log_decay).exp().clamp(min=SMALLEST_SUM)
    least_sum = torch.where(window[:, None] >= everything, least_sum, needed)
    windows: list[int] = window.long().tolist()
    return windows, least_sum


def _blocks(log_decay: Tensor | None, windows: list[int], timescales: int) -> list[int]:
    """For each problem its block: a power of two, with gamma^block at least 1e-15 where that leaves 32; or
    the largest, where the window is less, since factors beyond a window are 0."""
    if log_decay is None:
        return [BLOCK] * len(windows)
    fastest = log_decay.detach().reshape(timescales, -1).amin(1).tolist()
    of_each, blocks = len(windows) // timescales, []
    for n, rate in enumerate(fastest):
        window = max(windows[n * of_each : (n + 1) * of_each])
        if window < BLOCK and window * rate > LOG_WINDOW_DECAY:
            block = BLOCK
        else:
            block = min(BLOCK, max(32, 2 ** int(math.log2(LOG_BLOCK_DECAY / rate))))
        blocks += [block] * of_each
    return blocks
