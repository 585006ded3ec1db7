"""Attention in O(L + S) memory, in plain PyTorch: any device and float type, every mask, dropout.

A tile of scores is made, used and forgotten (online softmax, Milakov and Gimelshein 2018; Dao et al. 2022):

    forward, for each block of queries, over the blocks of keys:
        s = logits;  m' = max(m, max_j s)
        z, o = z e^(m - m') + sum_j e^(s - m'), o e^(m - m') + e^(s - m') v
        at the end output = o / z, log_sum = m + log z
    backward, for each tile:
        w = e^(s - log_sum);  dv += w^T doutput
        ds = w (doutput v^T - delta), delta_i = doutput_i . output_i
        ds -> q, k, masses, decay and clocks, by the sums of its rows and columns

The softened distance of gravity is one product of vectors that carry their squared norm, less a centre that
no distance sees: `r2 = [-2 q / D, |q|^2 / D, 1] . [k, 1, |k|^2 / D]`. Where float32 is not enough for it the
call is computed in float64, see `needs_float64`. Far keys are skipped where decay makes them negligible
(far_keys.py), but with Manhattan distances and learned powers or softening.

Symbols and masks: see attention_module.py. B problems are (example, head).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_engine.attention_scores import DotProduct, Gravity, Mask, Score, join_score, split_score
from attention_engine.dense_attention import backward_is_differentiated, dense_gradients
from attention_engine.far_keys import reach_of_rows

BLOCK = 256  # queries and keys of a tile, at most
TILE_PAIRS = 2**17  # of a tile of all its problems: 512 KiB in float32, a few of which stay in a core's cache
ROUNDING = 2e-5  # the most that float32 may err in the softened distance, relative to the softening
VANISHED = 1e-25  # a weight of nothing: arithmetic on denormal numbers is a hundred times slower
LARGEST_UNIT_FORCE = 50.0  # of a coincident pair: beyond it, float32 rounds the gradients of masses away


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, score: Score, mask: Mask, dropout: float, skip_far_keys: bool
) -> Tensor:
    """q (N, T', H, L, D), k and v (N, T', H, S, D), T' = T or 1 -> (N, T, H, L, D), as `attend` has it."""
    without, tensors = split_score(score)
    seed = int(torch.randint(2**31, ()).item()) if dropout else 0
    wide = isinstance(score, Gravity) and needs_float64(q, k, score, mask)
    call = Call(without, mask.without_tensors(), wide, dropout, seed, skip_far_keys)
    output: Tensor = TiledAttention.apply(call, q, k, v, *tensors, mask.padding, mask.pairs)
    return output


@dataclass(frozen=True)
class Call:
    """What a call asks for, besides its tensors."""

    score: Score  # without tensors
    mask: Mask  # without tensors
    wide: bool  # whether it is computed in float64
    dropout: float
    seed: int
    skip_far_keys: bool


class TiledAttention(torch.autograd.Function):
    """`TiledAttention.apply(call, q, k, v, *tensors of the score, padding, pairs)` -> (N, T, H, L, D)."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        problems = lower(call, tensors)
        timescales = max(len(x) for x in problems.factors if x is not None)
        found = [_forward(call, problems, t) for t in range(timescales)]
        joined = (torch.stack(x).unflatten(1, (-1, problems.heads)) for x in zip(*found, strict=True))
        output, log_sum = joined  # (T, N, H, L, D) and (T, N, H, L, 1)
        ctx.call = call
        ctx.save_for_backward(*tensors, output, log_sum)
        assert tensors[0] is not None
        return output.transpose(0, 1).to(tensors[0].dtype)

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        *tensors, output, log_sum = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if backward_is_differentiated(doutput):
            if call.dropout:
                raise RuntimeError("backend 'tiled' has no double backward with dropout: use 'dense'")
            return None, *dense_gradients(call.score, call.mask, tensors, needed, doutput)
        leaves = [None if x is None else x.detach() for x in tensors]
        wanted = [x.requires_grad_() for x in itertools.compress(leaves, needed) if x is not None]
        with torch.autocast(doutput.device.type, enabled=False):
            with torch.enable_grad():
                problems = lower(call, leaves)
            doutput = doutput.transpose(0, 1).to(output.dtype)
            sums = Factors(*(None if x is None else torch.zeros_like(x) for x in problems.factors))  # type: ignore
            for t, of_t in enumerate(zip(output, doutput, log_sum, strict=True)):
                _backward(call, problems, t, sums.of(t), *(x.flatten(0, 1) for x in of_t))
            made = [x is not None and x.requires_grad for x in problems.factors]
            outputs, upstream = ([*itertools.compress(x, made)] for x in (problems.factors, sums))
            found = iter(torch.autograd.grad(outputs, wanted, upstream))  # type: ignore[arg-type]
        return None, *(next(found) if need else None for need in needed)


# --- a score as sums over tiles ---------------------------------------------------------------------------


class Factors(NamedTuple):
    """What logits are made of, (T or 1, B, ...), or of one timescale (B, ...); or the gradients by it."""

    a: Tensor  # (B, L, A): logits, or r2, are a_i . b_j, or with "manhattan" |a_i - b_j|_1^2
    b: Tensor  # (B, S, A)
    v: Tensor  # (B, S, D)
    strength: Tensor | None  # (B, L, 1): G m_i
    key_mass: Tensor | None  # (B, 1, S): m_j, or log m_j with "force"
    softening: Tensor | None  # (B, 1, 1)
    power: Tensor | None  # (B, 1, 1): p / 2
    log_decay: Tensor | None  # (B, 1, 1)
    query_clock: Tensor | None  # (B, L, 1)
    key_clock: Tensor | None  # (B, 1, S)

    def of(self, t: int) -> "Factors":
        """Views of a timescale's."""
        return Factors(*(None if x is None else x[min(t, len(x) - 1)] for x in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Problems:
    """A call in the form of its tiles."""

    factors: Factors
    bias: Tensor | None  # (B, 1, S): -inf where a key is padding
    pairs: Tensor | None  # (N or 1, H or 1, L or 1, S)
    heads: int
    ends: list[int]  # for each problem a position after its last key
    reach: list[list[int]]  # for each timescale and problem the largest |i - j| to look at


@torch.no_grad()
def needs_float64(q: Tensor, k: Tensor, score: Gravity, mask: Mask) -> bool:
    """Whether float32 is not enough: for `|q|^2 - 2 q . k + |k|^2`, which cancels terms of the size of |q|^2,
    beside the softening; or for the gradients of masses, where one key may take all weight of a row."""
    softening = float(torch.as_tensor(score.softening).min())
    # A learned power starts far beyond that: there the gradients of masses are as good as nothing.
    fixed_power = None if isinstance(score.distance_power, Tensor) else score.distance_power
    if fixed_power is not None and softening ** (-fixed_power / 2) > LARGEST_UNIT_FORCE:
        return True
    if score.distance == "manhattan":
        return False
    padding = None if mask.padding is None else mask.padding[:, None, None, :, None]
    q, k = centred(q, k, padding, by_median=False)
    largest = q.square().sum(-1).amax() + k.square().sum(-1).amax()
    return not bool(largest * torch.finfo(q.dtype).eps <= ROUNDING * q.shape[-1] * softening)


def centred(q: Tensor, k: Tensor, padding: Tensor | None, by_median: bool) -> tuple[Tensor, Tensor]:
    """q (..., L, D) and k (..., S, D) less the middle of the keys that are not padding (..., S, 1), 0 there:
    their mean, or their median, which no few outliers pull away."""
    true_k = k.detach() if padding is None else k.detach().masked_fill(padding, math.nan)
    middle = (true_k.nanmedian(-2, True).values if by_median else true_k.nanmean(-2, True)).nan_to_num(0.0)
    return q - middle, k - middle if padding is None else (k - middle).masked_fill(padding, 0.0)


def lower(call: Call, tensors: Sequence[Tensor | None]) -> Problems:
    """The tensors of a call as `Problems`, by operations that autograd can follow."""
    of_pairs, (padding, pairs) = tensors[:-2], tensors[-2:]
    dtype = torch.float64 if call.wide or tensors[0] is None else tensors[0].dtype
    q, k, v, key_mass, query_mass, log_gravity, log_decay, softening, power, query_clock, key_clock = (
        None if x is None else x.to(dtype) for x in of_pairs
    )
    assert q is not None and k is not None and v is not None
    heads, score, strength, absent = q.shape[2], call.score, None, None
    ends, bias, may_skip = [k.shape[3]] * (len(q) * heads), None, call.skip_far_keys
    if padding is not None:
        absent = padding[:, None, None, :, None]
        k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
        key_mass = None if key_mass is None else key_mass.masked_fill(absent.squeeze(-1), 1.0)
        bias = torch.zeros_like(k[:, 0, :, :, 0]).masked_fill_(absent[:, 0, :, :, 0], -math.inf)
        bias = bias.detach().flatten(0, 1).unsqueeze(1)
        if k.device.type == "cpu":  # elsewhere, to read it would wait for the device
            last = (~padding * torch.arange(1, k.shape[3] + 1)).amax(-1)
            ends = last.repeat_interleave(heads).tolist()
    if isinstance(score, DotProduct):
        a, b = q * score.scale, k
    else:
        if query_mass is not None and log_gravity is not None:
            strength = log_gravity.exp().unsqueeze(-1) * query_mass
        elif key_mass is not None:
            key_mass = key_mass.log()
        if score.distance == "manhattan":
            a, b = q / q.shape[-1], k / q.shape[-1]
        else:
            q, k = centred(q, k, absent, by_median=call.wide)
            norm_q, norm_k = (x.square().mean(-1, keepdim=True) for x in (q, k))  # |q|^2 / D
            a = torch.cat([q * (-2 / q.shape[-1]), norm_q, torch.ones_like(norm_q)], -1)
            b = torch.cat([k, torch.ones_like(norm_k), norm_k], -1)
        may_skip = may_skip and softening is None and power is None and score.distance != "manhattan"
        softening = k.new_full((1, heads), float(score.softening)) if softening is None else softening
        power = k.new_full((1, heads), float(score.distance_power)) if power is None else power
    reach = [[max(call.mask.query_offset + q.shape[3], k.shape[3])] * len(ends)]
    if may_skip and log_decay is not None and pairs is None and query_clock is None:
        found = reach_of_rows(q, k, join_score(score, of_pairs[3:]), replace(call.mask, padding=padding))
        reach = found.transpose(0, 1).flatten(1).tolist()
    log_decay, softening, power = (
        None if x is None else x.expand(len(q), -1, -1) for x in (log_decay, softening, power)
    )

    def by_timescale(x: Tensor | None, *shape: int) -> Any:
        """(N, T or 1, H, ...) -> (T or 1, B, *shape)."""
        return None if x is None else x.transpose(0, 1).reshape(x.shape[1], len(ends), *shape)

    row, column, number = (1, -1), (-1, 1), (1, 1)
    half_power = None if power is None else power / 2
    vectors = [(strength, column), (key_mass, row), (softening, number), (half_power, number)]
    vectors += [(log_decay, number), (query_clock, column), (key_clock, row)]
    matrices = (by_timescale(x, *x.shape[3:]) for x in (a, b, v))
    factors = Factors(*matrices, *(by_timescale(x, *shape) for x, shape in vectors))
    return Problems(factors, bias, None if pairs is None else pairs[:, 0], heads, ends, reach)


# --- tiles ------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Some problems, queries and keys."""

    problems: slice
    rows: slice
    keys: slice


def _rows_of(p: Problems) -> Iterator[tuple[slice, slice]]:
    """Problems and queries that are worked on together."""
    count, length, keys = *p.factors.a.shape[1:3], p.factors.b.shape[2]
    size = max(1, TILE_PAIRS // (min(BLOCK, length) * min(BLOCK, keys)))
    for first in range(0, count, size):
        for row in range(0, length, BLOCK):
            yield slice(first, min(first + size, count)), slice(row, min(row + BLOCK, length))


def _tiles_of(call: Call, p: Problems, t: int, problems: slice, rows: slice) -> Iterator[Tile]:
    """The tiles of some queries, but those of which every key is padding, after the queries, or far."""
    reach = max(p.reach[min(t, len(p.reach) - 1)][problems])
    first, behind = (call.mask.query_offset + x for x in (rows.start, rows.stop))  # positions
    end = min(max(p.ends[problems]), behind + (0 if call.mask.causal else reach))
    for key in range(max(0, first - reach), end, BLOCK):
        yield Tile(problems, rows, slice(key, min(key + BLOCK, end)))


def _distance(call: Call, tile: Tile, like: Tensor) -> Tensor:
    """i - j (rows, keys)."""
    i, j = (torch.arange(x.start, x.stop, dtype=like.dtype, device=like.device) for x in tile[1:])
    return i[:, None] + (call.mask.query_offset - j)


def _between(f: Factors, tile: Tile) -> Tensor:
    """The time from keys to queries, by their clocks (B, rows, keys)."""
    assert f.query_clock is not None and f.key_clock is not None
    return f.query_clock[tile.problems, tile.rows] - f.key_clock[tile.problems, :, tile.keys]


def _logits(call: Call, p: Problems, f: Factors, tile: Tile) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The logits (B, rows, keys), masked; and for gravity the forces ("softmax") and 1 / (r2 + softening)."""
    of, rows, keys = tile
    a, b = f.a[of, rows], f.b[of, keys]
    forces = inverse = None
    if isinstance(call.score, DotProduct) or f.key_mass is None or f.softening is None or f.power is None:
        x = torch.bmm(a, b.mT)
    else:
        softening, power, mass = f.softening[of], f.power[of], f.key_mass[of, :, keys]
        if call.score.distance == "manhattan":
            x = torch.cdist(a, b, p=1.0).square_().add_(softening)
        else:
            x = torch.baddbmm(softening, a, b.mT)
            torch.maximum(x, softening, out=x)
        inverse = x.reciprocal()
        if f.strength is None:
            x = x.log_().mul_(-power).add_(mass)
        else:
            forces = x.copy_(inverse) if call.score.distance_power == 2.0 else x.pow_(-power)
            x = forces.mul_(f.strength[of, rows]).mul_(mass).clone()
    if f.log_decay is not None:
        x.addcmul_(_distance(call, tile, x).abs_(), f.log_decay[of])
    if f.query_clock is not None:
        x.sub_(_between(f, tile).abs_())
    if p.bias is not None:
        x.add_(p.bias[of, :, keys])
    if p.pairs is not None:
        _add_pairs(x, p.pairs, p.heads, tile)
    if call.mask.causal and keys.stop > call.mask.query_offset + rows.start + 1:
        x.masked_fill_(_distance(call, tile, x) < 0, -math.inf)
    return x, forces, inverse


def _add_pairs(x: Tensor, pairs: Tensor, heads: int, tile: Tile) -> None:
    """Mask the tile's logits by pairs (N or 1, H or 1, L or 1, S)."""
    problem = torch.arange(tile.problems.start, tile.problems.stop, device=x.device)
    pairs = pairs[:, :, tile.rows if pairs.shape[2] > 1 else slice(None), tile.keys]
    pairs = pairs[problem // heads % len(pairs), problem % heads % pairs.shape[1]]
    if pairs.dtype == torch.bool:
        x.masked_fill_(pairs, -math.inf)
    else:
        x.add_(pairs)


def _kept(call: Call, t: int, tile: Tile, like: Tensor) -> Tensor:
    """The tile's mask of dropout, the same in forward and backward: 0, or 1 / (1 - dropout)."""
    generator = torch.Generator(like.device)
    generator.manual_seed(hash((call.seed, t, *(x.start for x in tile))) % 2**63)
    kept = torch.empty_like(like).bernoulli_(1 - call.dropout, generator=generator)
    return kept.div_(1 - call.dropout)


def _forward(call: Call, p: Problems, t: int) -> tuple[Tensor, Tensor]:
    """The output (B, L, D) of a timescale and the log-sum-exp of its rows (B, L, 1); inf without a key."""
    f = p.factors.of(t)
    output, log_sum = f.v.new_empty(*f.a.shape[:2], f.v.shape[-1]), f.v.new_empty(*f.a.shape[:2], 1)
    for of, rows in _rows_of(p):
        top = torch.full_like(log_sum[of, rows], -math.inf)
        total, read = torch.zeros_like(top), torch.zeros_like(output[of, rows])
        for tile in _tiles_of(call, p, t, of, rows):
            x, _, _ = _logits(call, p, f, tile)
            new_top = torch.maximum(top, x.amax(-1, keepdim=True))
            finite = new_top.masked_fill(new_top == -math.inf, 0.0)
            weights, rescale = torch.threshold_(x.sub_(finite).exp_(), VANISHED, 0.0), (top - finite).exp_()
            total = total * rescale + weights.sum(-1, keepdim=True)
            if call.dropout:
                weights.mul_(_kept(call, t, tile, weights))
            read = torch.baddbmm(read * rescale, weights, f.v[of, tile.keys])
            top = new_top
        output[of, rows] = read / total.masked_fill(total == 0, 1.0)
        log_sum[of, rows] = (top + total.log()).masked_fill_(total == 0, math.inf)
    return output, log_sum


@torch.no_grad()
def _backward(
    call: Call, p: Problems, t: int, by: Factors, output: Tensor, doutput: Tensor, log_sum: Tensor
) -> None:
    """Add the gradients by the factors of a timescale. output and doutput (B, L, D), log_sum (B, L, 1)."""
    f, delta = p.factors.of(t), (doutput * output).sum(-1, keepdim=True)
    of_power, of_softening = (
        x is not None and x.requires_grad for x in (p.factors.power, p.factors.softening)
    )
    for tile in (tile for of_rows in _rows_of(p) for tile in _tiles_of(call, p, t, *of_rows)):
        of, rows, keys = tile
        x, forces, inverse = _logits(call, p, f, tile)
        weights = torch.threshold_(x.sub_(log_sum[of, rows]).exp_(), VANISHED, 0.0)
        ds, used = torch.bmm(doutput[of, rows], f.v[of, keys].mT), weights
        if call.dropout:
            kept = _kept(call, t, tile, weights)
            ds, used = ds.mul_(kept), weights * kept
        by.v[of, keys] += torch.bmm(used.mT, doutput[of, rows])
        ds.sub_(delta[of, rows]).mul_(weights)
        if by.log_decay is not None:
            by.log_decay[of] += (ds.flatten(1) @ _distance(call, tile, ds).abs_().flatten())[:, None, None]
        if by.query_clock is not None and by.key_clock is not None:
            signed = _between(f, tile).sign_().mul_(ds)
            by.query_clock[of, rows] -= signed.sum(-1, keepdim=True)
            by.key_clock[of, :, keys] += signed.sum(-2, keepdim=True)
        if by.strength is not None and f.strength is not None and forces is not None:
            by.strength[of, rows] += ds.mul_(forces).sum(-1, keepdim=True) / f.strength[of, rows]
        if by.key_mass is not None and f.key_mass is not None and inverse is not None:
            of_keys = ds.sum(-2, keepdim=True)
            by.key_mass[of, :, keys] += of_keys if f.strength is None else of_keys / f.key_mass[of, :, keys]
            if by.power is not None and of_power:
                by.power[of] += (inverse.log() * ds).sum((1, 2), keepdim=True)
            ds.mul_(inverse)
        slope = 1.0 if f.power is None else -f.power[of]
        if by.softening is not None and of_softening:
            by.softening[of] += ds.sum((1, 2), keepdim=True) * slope
        of_a, of_b = _product_gradients(call, f.a[of, rows], f.b[of, keys], ds)
        by.a[of, rows] += of_a * slope
        by.b[of, keys] += of_b * slope


def _product_gradients(call: Call, a: Tensor, b: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by a (B, rows, A) and b (B, keys, A) of what is made of them, whose own is ds."""
    if isinstance(call.score, DotProduct) or call.score.distance != "manhattan":
        return torch.bmm(ds, b), torch.bmm(ds.mT, a)
    with torch.enable_grad():
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        distance = torch.cdist(a, b, p=1.0)
    of_a, of_b = torch.autograd.grad(distance, (a, b), distance.detach() * ds * 2)
    return of_a, of_b
