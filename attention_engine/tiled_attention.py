"""Attention in O(L + S) memory, in plain PyTorch: any device and float type, every mask, dropout.

The scores are never held at once. A tile of them, BLOCK queries by BLOCK keys of a few problems, is made,
used and forgotten (online softmax, Milakov and Gimelshein 2018; Dao et al. 2022):

    for each block of queries:                       # forward
        for each block of keys:
            s = logits                               # (B, rows, keys)
            m' = max(m, max_j s)
            z, o = z e^(m - m') + sum_j e^(s - m'), o e^(m - m') + e^(s - m') v
        output, log_sum = o / z, m + log z
    for each tile:                                   # backward
        w = e^(s - log_sum)
        dv += w^T doutput
        ds = w (doutput v^T - delta), delta_i = doutput_i . output_i
        ds -> q, k, masses, decay and clocks, by the sums of its rows and columns

The softened distance of gravity is one matrix product of queries and keys that each carry their squared norm:
`r2 + softening = [-2 q / D, |q|^2 / D + softening, 1] . [k, 1, |k|^2 / D]`. A centre, which no distance sees,
is taken off both, so that norms are small. Where float32 is not enough the call is computed in float64, see
`needs_float64`: always where a coincident pair of unit masses pulls with more than LARGEST_UNIT_FORCE.

Far keys are skipped where a fixed decay makes them negligible (far_keys.py).

Symbols and masks: see attention_module.py. B problems are (example, head) of one timescale.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_engine.attention_scores import DotProduct, Gravity, Mask, Score, join_score, split_score
from attention_engine.dense_attention import backward_is_differentiated, dense_gradients
from attention_engine.far_keys import reach_of_rows

BLOCK = 256  # queries and keys of a tile, at most
TILE_PAIRS = 2**17  # of a tile of all its problems: 512 KiB in float32, a few of which stay in a core's cache
ROUNDING = 2e-5  # the most that float32 may err in the softened distance, relative to the softening
# Masses' gradients are differences of weights times forces: beyond this, rounding in float32 is all of them.
LARGEST_UNIT_FORCE = 50.0


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
    without, tensors = split_score(score)
    seed = int(torch.randint(2**31, ()).item()) if dropout else 0
    wide = isinstance(score, Gravity) and needs_float64(q, k, score, mask)
    call = Call(without, mask.causal, wide, dropout, seed, skip_far_keys)
    output: Tensor = TiledAttention.apply(call, q, k, v, *tensors, mask.padding, mask.pairs)
    return output


@dataclass(frozen=True)
class Call:
    """What a call asks for, besides its tensors."""

    score: Score  # without tensors
    causal: bool
    wide: bool  # whether it is computed in float64
    dropout: float
    seed: int
    skip_far_keys: bool


class TiledAttention(torch.autograd.Function):
    """`TiledAttention.apply(call, q, k, v, *tensors of the score, padding, pairs)` -> (N, T, H, L, D)."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        q, _, _, key_mass, _, _, log_decay, clock, *_ = tensors
        assert q is not None
        timescales = [x.shape[1] for x in (q, key_mass, clock) if x is not None]
        timescales += [] if log_decay is None else [len(log_decay)]
        found = [_forward(call, t, of_timescale(call, tensors, t)) for t in range(max(timescales))]
        output, log_sum = (torch.stack([x.unflatten(0, (len(q), -1)) for x in part], 1) for part in zip(*found))
        ctx.call = call
        ctx.save_for_backward(*tensors, output, log_sum)
        return output.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        *tensors, output, log_sum = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if backward_is_differentiated():
            return None, *_dense_gradients(call, tensors, needed, doutput)
        gradients = [torch.zeros_like(x) if wanted else None for x, wanted in zip(tensors, needed, strict=True)]
        with torch.autocast(doutput.device.type, enabled=False):
            for t in range(output.shape[1]):
                p = of_timescale(call, tensors, t)
                of_rows = (x[:, t].flatten(0, 1).to(p.v.dtype) for x in (output, doutput, log_sum))
                found = _of_tensors(call, tensors, t, p, _backward(call, t, p, *of_rows))
                for total, part in zip(gradients, found, strict=False):
                    if total is None or part is None:
                        continue
                    part = part.unflatten(0, (len(output), -1))
                    if total.dim() == 2:  # (T, H)
                        total[t] += part.flatten(1).sum(0)
                    else:
                        total[:, min(t, total.shape[1] - 1)] += part
        return None, *gradients


def _dense_gradients(
    call: Call, tensors: Sequence[Tensor | None], needed: Sequence[bool], doutput: Tensor
) -> list[Tensor | None]:
    if call.dropout:
        raise RuntimeError("backend 'tiled' has no double or batched backward with dropout: use 'dense'")
    q, k, v, *of_score, padding, pairs = tensors
    assert q is not None and k is not None and v is not None
    score, mask = join_score(call.score, of_score), Mask(padding, pairs, call.causal)
    wanted = [x if need else None for x, need in zip(tensors, needed, strict=True)]
    return dense_gradients(q, k, v, score, mask, wanted, doutput)


# --- a score as sums over tiles ---------------------------------------------------------------------------


class Problems(NamedTuple):
    """All problems of one timescale, in the type of the computation; None where a score has no such thing."""

    a: Tensor  # (B, L, A): logits, or softened distances, are a_i . b_j
    b: Tensor  # (B, S, A)
    v: Tensor  # (B, S, D)
    strength: Tensor | None  # (B, L, 1): G m_i
    key_mass: Tensor | None  # (B, 1, S): m_j, or log m_j with "force"
    log_decay: Tensor | None  # (B, 1, 1)
    query_clock: Tensor | None  # (B, L, 1)
    key_clock: Tensor | None  # (B, 1, S)
    bias: Tensor | None  # (B, 1, S): -inf where a key is padding
    pairs: Tensor | None  # (N or 1, H or 1, L or 1, S)
    heads: int
    ends: list[int]  # for each problem the position after its last key
    reach: list[int]  # for each problem the largest |i - j| to look at


def centred(q: Tensor, k: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """q (..., L, D) and k (..., S, D) less the mean of the keys that are not padding (..., S, 1); 0 there."""
    if padding is None:
        centre = k.mean(-2, keepdim=True)
        return q - centre, k - centre
    count = (~padding).sum(-2, keepdim=True).clamp(min=1)
    centre = k.masked_fill(padding, 0.0).sum(-2, keepdim=True) / count
    return q - centre, (k - centre).masked_fill(padding, 0.0)


@torch.no_grad()
def needs_float64(q: Tensor, k: Tensor, score: Gravity, mask: Mask) -> bool:
    """Whether float32 is not enough: for `|q|^2 - 2 q . k + |k|^2`, which cancels terms of the size of |q|^2,
    beside the softening; or for the gradients of masses, where one key may take all weight of a row."""
    if score.softening ** (-score.distance_power / 2) > LARGEST_UNIT_FORCE:
        return True
    q, k = centred(q, k, None if mask.padding is None else mask.padding[:, None, None, :, None])
    largest = q.square().sum(-1).amax() + k.square().sum(-1).amax()
    return not bool(largest * torch.finfo(q.dtype).eps <= ROUNDING * q.shape[-1] * score.softening)


def _of_problems(x: Tensor | None, t: int, dtype: torch.dtype, batch: int) -> Tensor | None:
    """Timescale t of (N, T or 1, H, ...) -> (B, ...), or of (T, H) -> (B, 1)."""
    if x is None:
        return None
    if x.dim() == 2:
        return x[t].to(dtype).repeat(batch).unsqueeze(-1)
    return x[:, min(t, x.shape[1] - 1)].to(dtype).flatten(0, 1)


def of_timescale(call: Call, tensors: Sequence[Tensor | None], t: int) -> Problems:
    """The tensors of a call, in the form of `Problems`."""
    q, *_, padding, pairs = tensors
    assert q is not None
    batch, heads = len(q), q.shape[2]
    learned = tensors[6] is not None and tensors[6].requires_grad
    dtype = torch.float64 if call.wide else q.dtype
    q, k, v, key_mass, query_mass, log_gravity, log_decay, query_clock, key_clock = (
        _of_problems(x, t, dtype, batch) for x in tensors[:9]
    )
    assert q is not None and k is not None and v is not None
    ends, bias = [k.shape[1]] * len(k), None
    if padding is not None:
        padding = padding.repeat_interleave(heads, 0)
        ends = (~padding * torch.arange(1, k.shape[1] + 1, device=k.device)).amax(-1).tolist()
        k, v = (x.masked_fill(padding.unsqueeze(-1), 0.0) for x in (k, v))
        bias = torch.zeros_like(k[..., 0]).masked_fill_(padding, -math.inf).unsqueeze(1)
        key_mass = None if key_mass is None else key_mass.masked_fill(padding, 1.0)
    strength = None
    if key_mass is not None:
        q, k = centred(q, k, None if padding is None else padding.unsqueeze(-1))
        strength = None if log_gravity is None or query_mass is None else log_gravity.exp() * query_mass
        key_mass = key_mass if strength is not None else key_mass.log()
    reach = [max(q.shape[1], k.shape[1])] * len(k)
    if call.skip_far_keys and log_decay is not None and query_clock is None and pairs is None and not learned:
        score = call.score
        shape = (score.scale, 0.0, 1.0) if isinstance(score, DotProduct) else (1.0, score.softening, score.distance_power / 2)
        vectors = (None if x is None else x[:, None, None] for x in (q, k, strength, key_mass))
        of_rows = Mask(padding, causal=call.causal)
        reach = reach_of_rows(*vectors, log_decay.unsqueeze(-1), of_rows, *shape).flatten().tolist()
    return Problems(
        *_factors(q, k, call.score),
        v,
        None if strength is None else strength.unsqueeze(-1),
        None if key_mass is None else key_mass.unsqueeze(1),
        None if log_decay is None else log_decay.unsqueeze(-1),
        None if query_clock is None else query_clock.unsqueeze(-1),
        None if key_clock is None else key_clock.unsqueeze(1),
        bias,
        None if pairs is None else pairs[:, 0],
        heads,
        ends,
        reach,
    )


def _factors(q: Tensor, k: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """a and b of `Problems`."""
    if isinstance(score, DotProduct):
        return q * score.scale, k
    norm_q, norm_k = (x.square().sum(-1, keepdim=True) / x.shape[-1] for x in (q, k))
    a = torch.cat([q * (-2 / q.shape[-1]), norm_q + score.softening, torch.ones_like(norm_q)], -1)
    return a, torch.cat([k, torch.ones_like(norm_k), norm_k], -1)


def _of_tensors(
    call: Call, tensors: Sequence[Tensor | None], t: int, p: "Problems", sums: "Gradients"
) -> tuple[Tensor | None, ...]:
    """The gradients (B, ...) by the tensors of a call, from those by what `of_timescale` makes of them."""
    dq, dk = sums.a, sums.b
    if isinstance(call.score, DotProduct):
        dq = dq * call.score.scale
    else:
        width, power = p.a.shape[-1] - 2, call.score.distance_power / 2
        q, k = p.a[..., :width] * (-width / 2), p.b[..., :width]
        dq = (dq[..., :width] - q * dq[..., width : width + 1]) * (2 * power / width)
        dk = (k * dk[..., width + 1 :] * (2 / width) + dk[..., :width]) * -power
    key_mass, query_mass = (_of_problems(x, t, p.v.dtype, len(p.v) // p.heads) for x in tensors[3:5])
    of_rows = None if sums.log_strength is None else sums.log_strength.squeeze(-1)
    return (
        dq,
        dk,
        sums.v,
        None if key_mass is None or sums.log_key_mass is None else sums.log_key_mass.squeeze(1) / key_mass,
        None if query_mass is None or of_rows is None else of_rows / query_mass,
        None if of_rows is None else of_rows.sum(-1),
        None if sums.log_decay is None else sums.log_decay.flatten(),
        None if sums.query_clock is None else sums.query_clock.squeeze(-1),
        None if sums.key_clock is None else sums.key_clock.squeeze(1),
    )


# --- tiles ------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Some problems, queries and keys."""

    problems: slice
    rows: slice
    keys: slice


def _rows_of(p: Problems) -> Iterator[tuple[slice, slice]]:
    """Problems and queries that are worked on together."""
    count, length = p.a.shape[:2]
    size = max(1, TILE_PAIRS // (min(BLOCK, length) * min(BLOCK, p.b.shape[1])))
    for first in range(0, count, size):
        for row in range(0, length, BLOCK):
            yield slice(first, min(first + size, count)), slice(row, min(row + BLOCK, length))


def _tiles_of(p: Problems, problems: slice, rows: slice, causal: bool) -> Iterator[Tile]:
    """The tiles of some queries, but those of which every key is padding, after the queries, or far."""
    reach = max(p.reach[problems])
    end = min(max(p.ends[problems]), rows.stop + (0 if causal else reach))
    for key in range(max(0, rows.start - reach), end, BLOCK):
        yield Tile(problems, rows, slice(key, min(key + BLOCK, end)))


def _distance(tile: Tile, like: Tensor) -> Tensor:
    """i - j (rows, keys)."""
    i, j = (torch.arange(x.start, x.stop, dtype=like.dtype, device=like.device) for x in tile[1:])
    return i[:, None] - j


def _logits(call: Call, p: Problems, tile: Tile) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The logits (B, rows, keys), masked; and for gravity the forces ("softmax") and 1 / (r2 + softening)."""
    of, rows, keys = tile
    x = torch.bmm(p.a[of, rows], p.b[of, keys].mT)
    forces = inverse = None
    if isinstance(call.score, Gravity) and p.key_mass is not None:
        power, mass = call.score.distance_power / 2, p.key_mass[of, :, keys]
        x.clamp_(min=call.score.softening)
        inverse = x.reciprocal()
        if p.strength is not None:
            x = inverse.clone() if power == 1.0 else x.pow_(-power)
            forces = x.mul_(p.strength[of, rows]).mul_(mass)
            x = forces.clone()
        else:
            x = torch.add(mass, x.log_(), alpha=-power)
    if p.log_decay is not None:
        x.addcmul_(_distance(tile, x).abs_(), p.log_decay[of])
    if p.query_clock is not None and p.key_clock is not None:
        x.sub_((p.query_clock[of, rows] - p.key_clock[of, :, keys]).abs_())
    if p.bias is not None:
        x.add_(p.bias[of, :, keys])
    if p.pairs is not None:
        _add_pairs(x, p.pairs, p.heads, tile)
    if call.causal and keys.stop > rows.start + 1:
        x.masked_fill_(_distance(tile, x) < 0, -math.inf)
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


def _forward(call: Call, t: int, p: Problems) -> tuple[Tensor, Tensor]:
    """The output (B, L, D) of a timescale and the log-sum-exp of its rows (B, L, 1); inf for one of no key."""
    output = p.v.new_empty(*p.a.shape[:2], p.v.shape[-1])
    log_sum = p.v.new_empty(*p.a.shape[:2], 1)
    for of, rows in _rows_of(p):
        top = torch.full_like(log_sum[of, rows], -math.inf)
        total, read = torch.zeros_like(top), torch.zeros_like(output[of, rows])
        for tile in _tiles_of(p, of, rows, call.causal):
            x, _, _ = _logits(call, p, tile)
            new_top = torch.maximum(top, x.amax(-1, keepdim=True))
            finite = new_top.masked_fill(new_top == -math.inf, 0.0)
            weights, rescale = x.sub_(finite).exp_(), (top - finite).exp_()
            total = total * rescale + weights.sum(-1, keepdim=True)
            if call.dropout:
                weights.mul_(_kept(call, t, tile, weights))
            read = torch.baddbmm(read * rescale, weights, p.v[of, tile.keys])
            top = new_top
        output[of, rows] = read / total.masked_fill(total == 0, 1.0)
        log_sum[of, rows] = (top + total.log()).masked_fill_(total == 0, math.inf)
    return output, log_sum


class Gradients(NamedTuple):
    """Of the tensors of `Problems` that have one, and in their shapes."""

    a: Tensor
    b: Tensor
    v: Tensor
    log_strength: Tensor | None
    log_key_mass: Tensor | None
    log_decay: Tensor | None
    query_clock: Tensor | None
    key_clock: Tensor | None


def _backward(
    call: Call, t: int, p: Problems, output: Tensor, doutput: Tensor, log_sum: Tensor
) -> Gradients:
    """output and doutput (B, L, D)."""
    delta = (doutput * output).sum(-1, keepdim=True)
    sums = Gradients(*(None if x is None else torch.zeros_like(x) for x in p[:8]))
    for of, rows in _rows_of(p):
        do = doutput[of, rows]
        for tile in _tiles_of(p, of, rows, call.causal):
            keys = tile.keys
            x, forces, inverse = _logits(call, p, tile)
            weights = x.sub_(log_sum[of, rows]).exp_()
            ds = torch.bmm(do, p.v[of, keys].mT)
            used = weights
            if call.dropout:
                kept = _kept(call, t, tile, weights)
                ds.mul_(kept)
                used = weights * kept
            sums.v[of, keys] += torch.bmm(used.mT, do)
            ds.sub_(delta[of, rows]).mul_(weights)
            _add_sums_of_logits(sums, p, tile, ds)
            if forces is not None:
                ds.mul_(forces)
                sums.log_strength[of, rows] += ds.sum(-1, keepdim=True)
            if inverse is not None:
                sums.log_key_mass[of, :, keys] += ds.sum(-2, keepdim=True)
                ds.mul_(inverse)
            sums.a[of, rows] += torch.bmm(ds, p.b[of, keys])
            sums.b[of, keys] += torch.bmm(ds.mT, p.a[of, rows])
    return sums


def _add_sums_of_logits(sums: Gradients, p: Problems, tile: Tile, ds: Tensor) -> None:
    """What decay and clocks add to the logits, backwards."""
    of, rows, keys = tile
    if sums.log_decay is not None:
        sums.log_decay[of] += (ds.flatten(1) @ _distance(tile, ds).abs_().flatten())[:, None, None]
    if p.query_clock is not None and p.key_clock is not None:
        signed = (p.query_clock[of, rows] - p.key_clock[of, :, keys]).sign_().mul_(ds)
        sums.query_clock[of, rows] -= signed.sum(-1, keepdim=True)
        sums.key_clock[of, :, keys] += signed.sum(-2, keepdim=True)
