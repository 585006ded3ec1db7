"""Exact attention in O(L + S) memory, for every score: `lowered_scores` brings it into the form that
`tile_sums` sums, for a few problems at a time, and the sums are divided.

Kept for the gradient are the inputs, the output and the sums of weights; everything else is made again, chunk
by chunk.

Far keys are skipped where decay makes their total weight provably less than 2^-24 of a row's: a weight at
distance d is at most e_max gamma^d, all beyond W together at most 2 e_max gamma^(W+1) / (1 - gamma). W is
chosen so that this is negligible against the weight of a row's own key; that each row's sum is in fact large
enough is checked afterwards, row by row.

Symbols as in `attention_kernels`; B problems as in `lowered_scores`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention_engine.attention_scores import Mask, Score
from attention_engine.lowered_scores import LoweredScore, lower, shares_tiles
from attention_engine.tile_plan import BLOCK, Plan, Terms
from attention_engine.tile_sums import backward_sums, forward_sums

SMALLEST_SUM = 1e-30
TOLERANCE, TOLERANCE_LEARNED_DECAY = 2.0**-24, 2.0**-34  # a gradient by log gamma weighs far keys by |i - j|
LOG_BLOCK_DECAY, LOG_WINDOW_DECAY = math.log(1e-15), math.log(1e-20)
CHUNK_ROWS = 2**14  # rows of all problems that are lowered at once: 2 MiB in float32 for a head width of 32
OF_SCORE = ("key_mass", "query_mass", "log_gravity", "log_decay")  # the tensors in a score
TENSORS = ("q", "k", "v", *OF_SCORE)
OF_HEADS = ("log_gravity", "log_decay")  # those of shape (T, H)


Parts = dict[str, Tensor | None]


class Chunk(NamedTuple):
    """Problems that are worked on together."""

    timescales: slice
    examples: slice
    heads: slice

    def part(self, name: str, x: Tensor) -> tuple[slice, ...]:
        """Where the chunk's part of q, k, v or the output, or of a tensor of the score, is."""
        if name in OF_HEADS:
            return self.timescales, self.heads
        return self.examples, self.timescales if x.shape[1] > 1 else slice(0, 1), self.heads

    def of(self, name: str, x: Tensor) -> Tensor:
        """That part."""
        return x[self.part(name, x)]

    def cut(self, tensors: Sequence[Tensor | None]) -> Parts:
        """The chunk's parts of all tensors of a call, by name."""
        named = zip(TENSORS, tensors, strict=True)
        return {name: None if x is None else self.of(name, x) for name, x in named}


@dataclass(frozen=True)
class Call:
    """What a call asks for, besides its tensors; those of the score are left out of it too."""

    score: Score
    mask: Mask
    timescales: int
    share: bool
    dropout: float
    seed: int
    skip_far_keys: bool

    def chunks(self, q: Tensor, k: Tensor) -> Iterator[Chunk]:
        """As many problems as CHUNK_ROWS allows: some heads, or some examples, or some timescales."""
        batch, _, heads, length, _ = q.shape
        room = max(1, CHUNK_ROWS // max(length, k.shape[3]))
        of_timescales = self.timescales if self.share else room // (batch * heads)
        for timescales in _parts(self.timescales, of_timescales):
            for examples in _parts(batch, room // heads):
                for of_heads in _parts(heads, room):
                    yield Chunk(timescales, examples, of_heads)

    def mask_of(self, chunk: Chunk) -> Mask:
        padding, pairs = self.mask.padding, self.mask.pairs
        if padding is not None:
            padding = padding[chunk.examples]
        if pairs is not None:
            of_examples = chunk.examples if len(pairs) > 1 else slice(None)
            pairs = pairs[of_examples, :, chunk.heads if pairs.shape[2] > 1 else slice(None)]
        return Mask(padding, pairs, self.mask.causal)

    def lowered(self, chunk: Chunk, parts: Parts) -> LoweredScore:
        """`lower` of tensors that are already cut to the chunk."""
        q, k, v = (parts[name] for name in ("q", "k", "v"))
        assert q is not None and k is not None and v is not None
        of_score: dict[str, Any] = {name: parts[name] for name in OF_SCORE if hasattr(self.score, name)}
        return lower(q, k, v, replace(self.score, **of_score), self.mask_of(chunk), self.share)

    def heads_last(self, x: Tensor, like: Tensor) -> Tensor:
        """A view: a chunk's (B, U, D, L) -> the shape of `like`, (N, T, H, L, D)."""
        batch, timescales, heads = like.shape[:3]
        if self.share:
            return x.unflatten(0, (batch, heads)).permute(0, 2, 1, 4, 3)
        return x.squeeze(1).unflatten(0, (timescales, batch, heads)).permute(1, 0, 2, 4, 3)


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
    of_score = {name: getattr(score, name, None) for name in OF_SCORE}
    masses, rates = of_score["key_mass"], of_score["log_decay"]
    timescales = max(q.shape[1], 1 if masses is None else masses.shape[1], 1 if rates is None else len(rates))
    without: dict[str, Any] = {name: None for name in OF_SCORE if hasattr(score, name)}
    share = shares_tiles(score, q.shape[1], dropout)
    seed = int(torch.randint(2**31, ()).item()) if dropout else 0
    call = Call(replace(score, **without), mask, timescales, share, dropout, seed, skip_far_keys)
    output: Tensor = TiledAttention.apply(call, q, k, v, *of_score.values())
    return output


class TiledAttention(torch.autograd.Function):
    """`TiledAttention.apply(call, q, k, v, key_mass, query_mass, log_gravity, log_decay)`, the last four None
    where a score has none -> (N, T, H, L, D)."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        q, k, v = tensors[:3]
        assert q is not None and k is not None and v is not None
        output = v.new_empty(len(q), call.timescales, *q.shape[2:4], v.shape[-1])
        learned = ctx.needs_input_grad[-1]
        ctx.call, ctx.chunks = call, []
        kept = [output]
        for number, chunk in enumerate(call.chunks(q, k)):
            lowered = call.lowered(chunk, chunk.cut(tensors))
            plan = _plan(call, chunk, lowered, learned, call.seed + number)
            y = forward_sums(plan, lowered.terms)
            parts = y.unflatten(1, (lowered.weightings, -1))  # (B, U, D + 1, L)
            total = parts[:, :, -1:].masked_fill(parts[:, :, -1:] == 0, 1.0)  # of a row with no key
            of_chunk = chunk.of("output", output)
            parts, of_parts = (call.heads_last(x, of_chunk) for x in (parts[:, :, :-1], total))
            torch.div(parts, of_parts, out=of_chunk)
            ctx.chunks.append((chunk, plan))
            kept.append(total)
        ctx.save_for_backward(*tensors, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        needed = dict(zip(TENSORS, ctx.needs_input_grad[1:], strict=True))
        tensors, (output, *kept) = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
        grads = {name: torch.empty_like(x) for name, x in zip(TENSORS, tensors, strict=True) if needed[name]}
        begun = set()
        for (chunk, plan), total in zip(ctx.chunks, kept, strict=True):
            parts = {
                name: None if x is None else x.detach().requires_grad_(needed[name])
                for name, x in chunk.cut(tensors).items()
            }
            outputs = (chunk.of("output", output), chunk.of("output", doutput))
            of_parts = _backward(ctx.call, chunk, plan, parts, *outputs, total)
            for name, grad in of_parts.items():
                index = chunk.part(name, grads[name])
                key = name, *(of_axis.start for of_axis in index)
                (grads[name][index].add_ if key in begun else grads[name][index].copy_)(grad)
                begun.add(key)
        return None, *(grads.get(name) for name in TENSORS)


def _backward(
    call: Call,
    chunk: Chunk,
    plan: Plan,
    parts: Parts,
    output: Tensor,
    doutput: Tensor,
    total: Tensor,
) -> dict[str, Tensor]:
    """The gradients of those of a chunk's parts that need one. The outputs (N, T, H, L, D) are the chunk's
    too, total is (B, U, 1, L)."""
    with torch.enable_grad():
        lowered = call.lowered(chunk, parts)
    log_decay = lowered.terms.log_decay
    learned = log_decay is not None and log_decay.requires_grad
    with torch.no_grad():
        a, b, u, *scalars = (None if x is None else x.detach() for x in lowered.terms)
        assert a is not None and b is not None and u is not None
        dy = _quotient_backward(call, output, doutput, total).flatten(1, 2)
        gradients = backward_sums(plan, Terms(a, b, u, *scalars), dy, learned)
        del dy
    outputs, upstream = [], []
    for x, dx in zip(lowered.terms, gradients, strict=True):
        if isinstance(x, Tensor) and x.requires_grad:
            outputs.append(x)
            upstream.append(dx)
    leaves = {name: x for name, x in parts.items() if x is not None and x.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(outputs, tuple(leaves.values()), upstream), strict=True))


def _quotient_backward(call: Call, output: Tensor, doutput: Tensor, total: Tensor) -> Tensor:
    """The gradient (B, U, D + 1, L) by y, from that by output = y[:D] / y[D]; total = y[D]."""
    dtotal = (doutput * output).sum(-1, keepdim=True).neg_()  # first: it makes room for dy
    dy = total.new_empty(*total.shape[:2], output.shape[-1] + 1, total.shape[3])
    of_values, of_total = (call.heads_last(part, output) for part in (dy[:, :, :-1], dy[:, :, -1:]))
    total = call.heads_last(total, output)
    torch.div(doutput, total, out=of_values)
    torch.div(dtotal, total, out=of_total)
    return dy


def _parts(count: int, size: int) -> Iterator[slice]:
    """0 to `count` in parts of `size`, at least 1."""
    size = max(1, size)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _plan(call: Call, chunk: Chunk, lowered: LoweredScore, learned: bool, seed: int) -> Plan:
    mask = call.mask_of(chunk)
    tolerance = TOLERANCE_LEARNED_DECAY if learned else TOLERANCE
    windows, least_sum = _windows(lowered, mask, tolerance, call.skip_far_keys)
    batch, heads = (part.stop - part.start for part in (chunk.examples, chunk.heads))
    problems, key_length = lowered.terms.b.shape[:2]
    return Plan(
        lowered.weight,
        mask.causal,
        _lengths(lowered.padding, problems, key_length),
        windows,
        _blocks(lowered.terms.log_decay, windows, problems // (batch * heads)),
        least_sum,
        tolerance,
        lowered.padding,
        None if mask.pairs is None else _pair_mask(mask.pairs, batch, heads),
        call.dropout,
        seed,
    )


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
    lowered: LoweredScore, mask: Mask, tolerance: float, skip_far_keys: bool
) -> tuple[list[list[int]], Tensor]:
    """For each problem and weighting the largest |i - j| to look at, and (B, U) the least sum of weights that
    proves, for a row, that what lies beyond weighs less than the tolerance."""
    (a, b, u, log_decay, row_scale, key_scale), weight, log_largest, padding, weightings = lowered
    everything = max(a.shape[1], b.shape[1])
    least_sum = a.new_full((len(a), weightings), SMALLEST_SUM)
    added = mask.pairs is not None and mask.pairs.dtype != torch.bool
    if log_decay is None or not skip_far_keys or added or everything <= BLOCK:
        return [[everything] * weightings] * len(a), least_sum
    if log_largest is None:
        log_largest = a.norm(dim=-1).amax(-1, keepdim=True) * b.norm(dim=-1).amax(-1, keepdim=True)
    near = slice(0, min(a.shape[1], b.shape[1]))
    own = weight.log_weight((a[:, near] * b[:, near]).sum(-1)).unsqueeze(-1)  # of each row's own key
    if row_scale is not None and key_scale is not None:
        own = own * (row_scale[:, :, near] * key_scale[:, :, near]).mT
    elif not weight.exponential:
        own = own + (u[:, -1:] if key_scale is None else key_scale)[:, :, near].mT.log()
    if padding is not None:
        own = own.masked_fill(padding[:, near, None], math.inf)
    log_beyond = log_largest + (2 / -log_decay.expm1()).log() - math.log(tolerance)  # of all keys, at d = 0
    window = ((log_beyond - own.amin(1)) / -log_decay).ceil().clamp(min=0, max=everything)
    needed = (log_beyond + (window + 1) * log_decay).exp().clamp(min=SMALLEST_SUM)
    least_sum = torch.where(window >= everything, least_sum, needed)
    windows: list[list[int]] = window.long().tolist()
    return windows, least_sum


def _blocks(log_decay: Tensor | None, windows: list[list[int]], timescales: int) -> list[int]:
    """For each problem its block, the same in all problems of a timescale: the least that suits one of its
    weightings."""
    if log_decay is None:
        return [BLOCK] * len(windows)
    of_each, blocks = len(windows) // timescales, []
    fastest = log_decay.detach().unflatten(0, (timescales, of_each)).amin(1).tolist()
    for n, rates in enumerate(fastest):
        of_problems = windows[n * of_each : (n + 1) * of_each]
        widest = (max(of_weighting) for of_weighting in zip(*of_problems, strict=True))
        block = min(_block(rate, window) for rate, window in zip(rates, widest, strict=True))
        blocks += [block] * of_each
    return blocks


def _block(rate: float, window: int) -> int:
    """A power of two, with gamma^block at least 1e-15 where that leaves 32; or the largest, where the window
    is less, since factors beyond a window are 0."""
    if window < BLOCK and window * rate > LOG_WINDOW_DECAY:
        return BLOCK
    return min(BLOCK, max(32, 2 ** int(math.log2(LOG_BLOCK_DECAY / rate))))
