"""Attention on a CPU by the compiled kernel of native_attention.cpp: scores in its form, and autograd.

Memory is O(L + S), for float32, on the threads that PyTorch has (`torch.set_num_threads`), with the same bits
for any number of them. Numbers that are too small for a float32 of full precision count as 0.

- Distances of near pairs are made from differences. Where float32 does not hold the gradients of a call
  `native_attention` returns None: see `needs_float64`.
- A_i = G m_i is made here: the kernel gives its gradient row by row, autograd those of G and m_i.
- Far keys are skipped where decay makes them negligible, see far_keys.py.

Symbols and masks: see attention_module.py. The names are those of triton_attention.py.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention_engine import native_build
from attention_engine.attention_scores import DotProduct, Gravity, Mask, Score, split_score, with_strength
from attention_engine.dense_attention import backward_is_differentiated, dense_gradients
from attention_engine.far_keys import reach_of_rows
from attention_engine.native_build import Call, Extent, View

DOT_PRODUCT, GRAVITY, FORCE = 0, 1, 2
LARGEST_HEAD_DIM = 256
DISTANCE_POWERS = (1.0, 2.0, 4.0)
LARGEST_TO_SOFTENED, LARGEST_TO_NEAREST = 12.0, 80.0  # |q| beside |q - k|: errors of 2e-5 in gradients
LARGEST_UNIT_FORCE = (
    50.0  # (r2 + softening)^(-p/2): beyond it one key takes all, and what else there is cancels
)
SHORTEST_TO_SKIP, NEGLIGIBLE = 512, 20.0  # keys; -log of a weight


class Float64NeededError(ArithmeticError):
    """Float32 is not enough."""


@dataclass(frozen=True)
class Plan:
    """What the kernel needs to know besides tensors."""

    kind: int
    scale: float
    timescales: int
    score: Score  # without tensors
    mask: Mask  # without tensors
    softening: float = 0.0
    power: float = 2.0


def cannot(q: Tensor, score: Score, mask: Mask, dropout: float) -> str:
    """Why the kernel cannot do what is asked for, or nothing. May build it."""
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return f"is for float32 on the CPU, got {q.dtype} on {q.device.type}: use 'tiled'"
    if q.shape[-1] > LARGEST_HEAD_DIM:
        return f"is for heads of at most {LARGEST_HEAD_DIM} wide, got {q.shape[-1]}: use 'tiled'"
    if dropout:
        return "has no dropout of weights: use 'tiled'"
    if score.clock is not None and score.log_decay is not None:
        return "has no clocks beside constant rates: use 'tiled'"
    if mask.pairs is not None and mask.pairs.dtype != torch.bool:
        return "adds no float mask: use 'tiled'"
    if isinstance(score, Gravity) and score.distance_power not in DISTANCE_POWERS:
        return f"is for distance powers {DISTANCE_POWERS}, got {score.distance_power}: use 'tiled'"
    reason = native_build.unavailable(*_library_of(q, score))
    return f"{reason}: use 'tiled'" if reason else ""


def _library_of(q: Tensor, score: Score) -> tuple[int, int]:
    return q.shape[-1], int(score.distance_power) if isinstance(score, Gravity) else 2


def native_attention(
    q: Tensor, k: Tensor, v: Tensor, score: Score, mask: Mask, skip_far_keys: bool = True
) -> Tensor | None:
    """q (N, T', H, L, D), k and v (N, T', H, S, D), T' = T or 1 -> (N, T, H, L, D), or None where float32 is
    not enough."""
    projections = max(q.shape[1], k.shape[1], v.shape[1])
    q, k, v = (x.float().expand(-1, projections, -1, -1, -1) for x in (q, k, v))
    score = with_strength(score) if isinstance(score, Gravity) else score
    without, of_pairs = split_score(score)
    tensors = [None if x is None else x.float().contiguous() for x in of_pairs]
    log_decay, reach = score.log_decay, None
    if isinstance(score, DotProduct):
        of_clock = projections if score.clock is None else score.clock.query.shape[1]
        timescales = of_clock if log_decay is None else len(log_decay)
        plan = Plan(DOT_PRODUCT, score.scale, timescales, without, mask.without_tensors())
    else:
        kind = GRAVITY if score.normalization == "softmax" else FORCE
        shape = float(score.softening), float(score.distance_power)
        plan = Plan(kind, 1.0, score.key_mass.shape[1], without, mask.without_tensors(), *shape)
    if skip_far_keys and _may_pay(q, k, log_decay):
        reach = reach_of_rows(q, k, score, mask)
    try:
        output: Tensor = NativeAttention.apply(plan, reach, q, k, v, *tensors, mask.padding, mask.pairs)
    except Float64NeededError:
        return None
    return output


def _may_pay(q: Tensor, k: Tensor, log_decay: Tensor | None) -> bool:
    """Whether it can pay to look for far keys: the sequence is long, the fastest decay is soon nothing."""
    longest = max(q.shape[-2], k.shape[-2])
    if log_decay is None:
        return False
    return longest >= SHORTEST_TO_SKIP and bool(-longest * log_decay.detach().min() > 2 * NEGLIGIBLE)


def needs_float64(extent: Extent, plan: Plan, head_dim: int) -> bool:
    """Whether float32 is not enough for the gradients of a pair that is as near as the closest: by masses,
    where one key may take all weight of a row, or by q and k, sums of terms of size |q| that leave q - k.
    These are too much rounded where the largest are beyond both bounds times |q - k|, softened and not."""
    if extent.closest ** (plan.power / 2) > LARGEST_UNIT_FORCE:
        return True
    square = extent.largest / head_dim
    softened = 1 / extent.closest if extent.closest else math.inf
    return square > LARGEST_TO_SOFTENED**2 * softened and square > LARGEST_TO_NEAREST**2 * (
        softened - plan.softening
    )


class NativeAttention(torch.autograd.Function):
    """`NativeAttention.apply(plan, reach, q, k, v, *tensors of the score, padding, pairs)`, an output
    (N, T, H, L, D).

    q, k, v (N, T', H, L or S, D), T' = T or 1; the tensors are float32, in the order of `split_score`, with
    A_i for the masses of queries. Saves its inputs, the output and the log-sum-exp of each row. Double
    backward is that of the dense formula.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, reach: Tensor | None, *tensors: Tensor | None) -> Tensor:
        q = tensors[0]
        assert q is not None
        output = _heads_last(len(q), plan.timescales, *q.shape[2:])
        log_sum = torch.empty(output.shape[:-1])
        call = Arguments(plan, reach, tensors)
        call.views(output=output)
        call.pointers(log_sum=log_sum)
        extent = call.run(is_backward=False)
        if plan.kind != DOT_PRODUCT and needs_float64(extent, plan, q.shape[-1]):
            raise Float64NeededError
        ctx.plan = plan
        ctx.save_for_backward(*tensors, reach, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, reach, output, log_sum = ctx.saved_tensors
        plan: Plan = ctx.plan
        if backward_is_differentiated(upstream):
            needed = ctx.needs_input_grad[2:]
            return None, None, *dense_gradients(plan.score, plan.mask, tensors, needed, upstream)
        q, k, v, key_mass, strength, _, log_decay, _, _, query_clock, key_clock, padding, _ = tensors
        dq, dk, dv = (_heads_last(*x.shape) for x in (q, k, v))
        dmass, dstrength, dquery_clock, dkey_clock = (
            None if x is None else torch.empty_like(x) for x in (key_mass, strength, query_clock, key_clock)
        )
        drate = None if log_decay is None else torch.empty(len(q), *log_decay.shape)
        for x in (dk, dv, dmass, dkey_clock) if padding is not None else ():
            if x is not None:  # the kernel leaves what is padding as it is
                x.zero_()
        call = Arguments(plan, reach, tensors)
        call.views(output=output, upstream=_last_contiguous(upstream), dq=dq, dk=dk, dv=dv)
        call.pointers(log_sum=log_sum, dstrength=dstrength, dmass=dmass, drate=drate)
        call.pointers(dquery_clock=dquery_clock, dkey_clock=dkey_clock)
        call.run(is_backward=True)
        drate = None if drate is None else drate.sum(0)
        of_score = dmass, dstrength, None, drate, None, None, dquery_clock, dkey_clock
        return None, None, dq, dk, dv, *of_score, None, None


def _heads_last(batch: int, timescales: int, heads: int, length: int, width: int) -> Tensor:
    """An empty (N, T, H, L, D), in memory as the projections make and read it: (N, L, T, H, D)."""
    return torch.empty(batch, length, timescales, heads, width).permute(0, 2, 3, 1, 4)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Arguments:
    """A call of the kernel, and what it points to."""

    def __init__(self, plan: Plan, reach: Tensor | None, tensors: Sequence[Tensor | None]) -> None:
        q, k, v, key_mass, strength, _, log_decay, _, _, query_clock, key_clock, padding, pairs = tensors
        assert q is not None and k is not None and v is not None
        batch, projections, heads, queries, head_dim = q.shape
        self.library = native_build.library(head_dim, int(plan.power))
        self.held: list[Tensor] = []
        self.call = Call(
            kind=plan.kind,
            shared=projections != plan.timescales,
            causal=plan.mask.causal,
            offset=plan.mask.query_offset,
            batch=batch,
            timescales=plan.timescales,
            heads=heads,
            queries=queries,
            keys=k.shape[-2],
            head_dim=head_dim,
            threads=torch.get_num_threads() if os.getpid() == self.library.process else 1,
            scale=plan.scale,
            softening=plan.softening,
        )
        self.views(q=_last_contiguous(q), k=_last_contiguous(k), v=_last_contiguous(v))
        self.pointers(reach=reach, strength=strength, key_mass=key_mass, log_decay=log_decay)
        self.pointers(query_clock=query_clock, key_clock=key_clock)
        self.pointers(padding=None if padding is None else padding.contiguous())
        if pairs is not None:
            pairs = pairs[:, 0].expand(batch, heads, queries, k.shape[-2])
            self.held.append(pairs)
            self.call.pairs = pairs.data_ptr()
            self.call.pair_strides[:] = pairs.stride()

    def views(self, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            self.held.append(x)
            setattr(self.call, name, View(x.data_ptr(), *x.stride()[:4]))

    def pointers(self, **tensors: Tensor | None) -> None:
        for name, x in tensors.items():
            if x is not None:
                self.held.append(x)
                setattr(self.call, name, x.data_ptr())

    def run(self, is_backward: bool) -> Extent:
        workspace = torch.empty(self.library.workspace_bytes(self.call, is_backward), dtype=torch.uint8)
        self.pointers(workspace=workspace)
        return self.library.attention(self.call, is_backward)
