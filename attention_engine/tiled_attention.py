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
call is computed in float64, see `needs_float64`. Far keys are skipped, see far_keys.py.

Symbols and masks: see attention_module.py. B problems are (example, head).
"""

import itertools
import math
from collections.abc import Iterator
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
VANISHED = 1e-25  # a smaller weight becomes 0: arithmetic on denormal numbers is a hundred times slower
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
    def forward(ctx: Any, call: Call, q: Tensor, *others: Any) -> Tensor:
        output, log_sum = _forward(lower(call, q, *others))
        ctx.call = call
        ctx.save_for_backward(q, *others, output, log_sum)
        return output.unflatten(1, (len(q), q.shape[2])).transpose(0, 1).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        *tensors, output, log_sum = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if backward_is_differentiated(doutput):
            if call.dropout:
                raise RuntimeError("backend 'tiled' has no double backward with dropout: use 'dense'")
            return None, *dense_gradients(call.score, call.mask, tensors, needed, doutput)
        leaves: list[Any] = [None if x is None else x.detach() for x in tensors]
        wanted = [x.requires_grad_() for x in itertools.compress(leaves, needed) if x is not None]
        with torch.autocast(doutput.device.type, enabled=False):
            with torch.enable_grad():
                p = lower(call, *leaves)
            sums = _backward(p, output, doutput.transpose(0, 1).flatten(1, 2).to(output.dtype), log_sum)
            made = [x is not None and x.requires_grad for x in p.factors]
            outputs, upstream = ([*itertools.compress(x, made)] for x in (p.factors, sums))
            found = iter(torch.autograd.grad(outputs, wanted, upstream))
        return None, *(next(found) if need else None for need in needed)


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
        places = zip(self, [rows] * 3 + [keys] * 5 + [problems] * 3, strict=True)  # in the fields' order
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
    # A learned law is beyond that from its start: there the gradients of masses are as good as nothing.
    if not isinstance(power, Tensor) and softening ** (-power / 2) > LARGEST_UNIT_FORCE:
        return True
    if score.distance == "manhattan":
        return False
    q, k = centred(q, k, mask.padding, by_median=False)
    largest = q.square().sum(-1).amax() + k.square().sum(-1).amax()
    return not bool(largest * torch.finfo(q.dtype).eps <= ROUNDING * q.shape[-1] * softening)


def centred(q: Tensor, k: Tensor, padding: Tensor | None, by_median: bool) -> tuple[Tensor, Tensor]:
    """q and k less the middle of the keys that are not padding (N, S), which become 0: their mean, or their
    median, which a few outliers do not move."""
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
        bias = k.new_zeros(padding.shape).masked_fill_(padding, -math.inf)[:, None, None]
        bias = bias.expand(-1, 1, heads, -1)
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
        key_mass = key_mass.log() if strength is None else key_mass
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
    given = join_score(call.score, of_score)  # which tells whether its decay is learned
    mask = replace(call.mask, padding=padding, pairs=pairs)
    found = reach_of_rows(q, k, given, mask) if call.skip_far_keys else None
    everything = [max(mask.query_offset + query_length, k.shape[3])] * (batch * heads)
    everywhere = [everything] * max(len(x) for x in factors if x is not None)
    reach = everywhere if found is None else found.transpose(0, 1).flatten(1).tolist()
    pairs = None if pairs is None else pairs[:, 0].expand(batch, heads, query_length, -1)
    return Problems(call, factors, pairs, ends, reach)


def _rows_of(p: Problems) -> Iterator[tuple[int, slice, slice]]:
    """A timescale, problems and queries that are worked on together."""
    count, length, keys = *p.factors.a.shape[1:3], p.factors.b.shape[2]
    size = max(1, TILE_PAIRS // (min(BLOCK, length) * min(BLOCK, keys)))
    starts = itertools.product(range(len(p.reach)), range(0, count, size), range(0, length, BLOCK))
    for t, first, row in starts:
        yield t, slice(first, min(first + size, count)), slice(row, min(row + BLOCK, length))


def _tiles_of(p: Problems, t: int, problems: slice, rows: slice) -> Iterator[Tile]:
    """The tiles of some queries, but those of which every key is padding, far, or if causal after them."""
    mask, reach = p.call.mask, max(p.reach[t][problems])
    first, behind = (mask.query_offset + x for x in (rows.start, rows.stop))  # positions
    end = min(max(p.ends[problems]), behind + (0 if mask.causal else reach))
    for key in range(max(0, first - reach), end, BLOCK):
        yield Tile(t, problems, rows, slice(key, min(key + BLOCK, end)))


def _distance(p: Problems, tile: Tile) -> Tensor:
    """i - j (rows, keys)."""
    like = p.factors.a
    i, j = (torch.arange(x.start, x.stop, dtype=like.dtype, device=like.device) for x in tile[2:])
    return i[:, None] + (p.call.mask.query_offset - j)


def _logits(p: Problems, f: Factors, tile: Tile) -> tuple[Tensor, Any, Any]:
    """The logits (B, rows, keys), masked; and for gravity the forces ("softmax") and 1 / (r2 + softening)."""
    score, mask, forces, inverse = p.call.score, p.call.mask, None, None
    if isinstance(score, DotProduct):
        x = torch.bmm(f.a, f.b.mT)
    else:
        if score.distance == "manhattan":
            x = torch.cdist(f.a, f.b, p=1.0).square_().add_(f.softening)
        else:
            x = torch.baddbmm(f.softening, f.a, f.b.mT)
            torch.maximum(x, f.softening, out=x)
        inverse = x.reciprocal()
        if f.strength is None:
            x = x.log_().mul_(-f.power).add_(f.key_mass.mT)
        else:
            forces = x.copy_(inverse) if score.distance_power == 2.0 else x.pow_(-f.power)
            x = forces.mul_(f.strength).mul_(f.key_mass.mT).clone()
    if f.log_decay is not None:
        x.addcmul_(_distance(p, tile).abs_(), f.log_decay)
    if f.query_clock is not None:
        x.sub_((f.query_clock - f.key_clock.mT).abs_())
    if f.bias is not None:
        x.add_(f.bias.mT)
    if p.pairs is not None:
        problem, heads = torch.arange(len(p.ends), device=x.device)[tile.problems], p.pairs.shape[1]
        pairs = p.pairs[:, :, tile.rows, tile.keys][problem // heads, problem % heads]
        x = x.masked_fill_(pairs, -math.inf) if pairs.dtype == torch.bool else x.add_(pairs)
    if mask.causal and tile.keys.stop > mask.query_offset + tile.rows.start + 1:
        x.masked_fill_(_distance(p, tile) < 0, -math.inf)
    return x, forces, inverse


def _kept(call: Call, tile: Tile, like: Tensor) -> Tensor:
    """The tile's mask of dropout, the same in forward and backward: 0, or 1 / (1 - dropout)."""
    generator = torch.Generator(like.device)
    generator.manual_seed(hash((call.seed, tile.t, *(x.start for x in tile[1:]))) % 2**63)
    return torch.empty_like(like).bernoulli_(1 - call.dropout, generator=generator).div_(1 - call.dropout)


def _forward(p: Problems) -> tuple[Tensor, Tensor]:
    """The output (T, B, L, D) and the log-sum-exp of its rows (T, B, L, 1); inf without a key."""
    v, shape = p.factors.v, (len(p.reach), *p.factors.a.shape[1:3])
    output, log_sum = v.new_empty(*shape, v.shape[-1]), v.new_empty(*shape, 1)
    for rows in _rows_of(p):
        top = torch.full_like(log_sum[rows], -math.inf)
        total, read = torch.zeros_like(top), torch.zeros_like(output[rows])
        for tile in _tiles_of(p, *rows):
            f = p.factors.of(tile)
            x, _, _ = _logits(p, f, tile)
            new_top = torch.maximum(top, x.amax(-1, keepdim=True))
            finite = new_top.masked_fill(new_top == -math.inf, 0.0)
            weights, rescale = torch.threshold_(x.sub_(finite).exp_(), VANISHED, 0.0), (top - finite).exp_()
            total = total * rescale + weights.sum(-1, keepdim=True)
            if p.call.dropout:
                weights.mul_(_kept(p.call, tile, weights))
            top, read = new_top, torch.baddbmm(read * rescale, weights, f.v)
        output[rows] = read / total.masked_fill(total == 0, 1.0)
        log_sum[rows] = (top + total.log()).masked_fill_(total == 0, math.inf)
    return output, log_sum


@torch.no_grad()
def _backward(p: Problems, output: Tensor, doutput: Tensor, log_sum: Tensor) -> Factors:
    """The gradients by the factors. output and doutput (T, B, L, D), log_sum (T, B, L, 1)."""
    sums = Factors(*(x if x is None else torch.zeros_like(x) for x in p.factors))  # type: ignore
    for rows in _rows_of(p):
        delta = (doutput[rows] * output[rows]).sum(-1, keepdim=True)
        for tile in _tiles_of(p, *rows):
            by = sums.of(tile)
            for name, gradient in _gradients(p, tile, doutput[rows], log_sum[rows], delta).items():
                getattr(by, name).add_(gradient)
    return sums


def _gradients(p: Problems, tile: Tile, doutput: Tensor, log_sum: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """Those by the factors of a tile, by name. doutput (B, rows, D), log_sum and delta (B, rows, 1)."""
    score, f = p.call.score, p.factors.of(tile)
    x, forces, inverse = _logits(p, f, tile)
    weights = torch.threshold_(x.sub_(log_sum).exp_(), VANISHED, 0.0)
    ds, used = torch.bmm(doutput, f.v.mT), weights
    if p.call.dropout:
        kept = _kept(p.call, tile, weights)
        ds, used = ds.mul_(kept), weights * kept
    found = {"v": torch.bmm(used.mT, doutput)}
    ds.sub_(delta).mul_(weights)
    if f.log_decay is not None:
        found["log_decay"] = (ds.flatten(1) @ _distance(p, tile).abs_().flatten())[:, None, None]
    if f.query_clock is not None:
        signed = (f.query_clock - f.key_clock.mT).sign_().mul_(ds)
        found["query_clock"], found["key_clock"] = -signed.sum(-1, keepdim=True), signed.sum(-2).unsqueeze(-1)
    if isinstance(score, Gravity):
        if f.strength is not None:
            found["strength"] = ds.mul_(forces).sum(-1, keepdim=True) / f.strength
        found["key_mass"] = ds.sum(-2).unsqueeze(-1) / (1.0 if f.strength is None else f.key_mass)
        if score.distance_power is None:  # it is learned
            found["power"] = (inverse.log() * ds).sum((1, 2), keepdim=True)
        ds.mul_(inverse)
        if score.softening is None:
            found["softening"] = ds.sum((1, 2), keepdim=True) * -f.power
    if isinstance(score, Gravity) and score.distance == "manhattan":
        with torch.enable_grad():
            places = f.a.detach().requires_grad_(), f.b.detach().requires_grad_()
            distance = torch.cdist(*places, p=1.0)
        of_a, of_b = torch.autograd.grad(distance, places, distance.detach() * ds * 2)
    else:
        of_a, of_b = torch.bmm(ds, f.b), torch.bmm(ds.mT, f.a)
    slope = 1.0 if f.power is None else -f.power
    return found | {"a": of_a * slope, "b": of_b * slope}
