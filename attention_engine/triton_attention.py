"""Attention on a GPU by the kernels of `triton_kernels`: brings every score into their form, and autograd.

Memory is O(L + S): the backward makes the weights again from the log-sum-exp of each row. Nothing here waits
for the device. Needs Triton and CUDA tensors, or, with TRITON_INTERPRET=1 in the environment before Triton is
imported, CPU tensors at a snail's pace; `attend` imports it only when it is asked for "triton".

- Gravity: a common centre is taken off q and k, which no distance sees, so that norms stay small. What is
  left of rounding in r2 is about 2^-24 (|q_i|^2 + |k_j|^2) / D after that, whatever the inputs' type: only
  for near pairs far from the centre is that much beside the softening ("tiled" goes to float64 there, which
  it must wait for the device to know). Half precision inputs are rounded once more, around the centre.
- A_i = G m_i is made here: the kernels give its gradient row by row, autograd those of G and m_i. For the
  force form the kernels take log m_j.
- Far keys are skipped where decay makes them negligible, see far_keys.py.

Symbols and masks: see attention_module.py.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from attention_engine import triton_kernels as kernels
from attention_engine.attention_scores import DotProduct, Gravity, Mask, Score, split_score
from attention_engine.dense_attention import backward_is_differentiated, dense_gradients
from attention_engine.far_keys import reach_of_rows

ROWS_OF_A_PRODUCT = 64


@dataclass(frozen=True)
class Plan:
    """What the kernels need to know besides the tensors that have a gradient. What it holds of tensors is
    saved by autograd in between."""

    kind: int  # one of the kinds of `triton_kernels`
    scale: float
    timescales: int
    score: Score  # without tensors
    mask: Mask
    softening: float = 0.0
    power: float = 1.0
    reach: Tensor | None = None  # (N, T, H) int32


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, score: Score, mask: Mask, skip_far_keys: bool = True
) -> Tensor:
    """q (N, T', H, L, D), k and v (N, T', H, S, D), T' = T or 1 -> (N, T, H, L, D) in q's type."""
    projections = max(q.shape[1], k.shape[1], v.shape[1])
    q, k, v = (x.to(q.dtype).expand(-1, projections, -1, -1, -1) for x in (q, k, v))
    strength = key_mass = reach = None
    log_decay = None if score.log_decay is None else score.log_decay.float()
    without, causal = split_score(score)[0], Mask(causal=mask.causal)
    if isinstance(score, DotProduct):
        timescales = projections if log_decay is None else len(log_decay)
        plan = Plan(kernels.DOT_PRODUCT.value, score.scale, timescales, without, causal)
    else:
        q, k = _centred(q, k, mask)
        plan = Plan(
            kernels.GRAVITY.value if score.normalization == "softmax" else kernels.FORCE.value,
            2 / q.shape[-1],
            score.key_mass.shape[1],
            without,
            causal,
            float(score.softening),
            float(score.distance_power) / 2,
        )
        strength, key_mass = _masses(score, mask)
    if skip_far_keys and q.numel() and k.numel():
        reach = reach_of_rows(q, k, score, mask)
    tensors = [None if x is None else x.contiguous() for x in (q, k, v, strength, key_mass, log_decay)]
    output: Tensor = FusedAttention.apply(*tensors, mask.padding, mask.pairs, reach, plan)
    return output


def _centred(q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """q and k less the mean of the keys that are not padding; padding is not read."""
    count: Tensor | int = max(k.shape[-2], 1)
    if mask.padding is not None:
        padding = mask.padding[:, None, None, :, None]
        k = k.masked_fill(padding, 0.0)
        count = (~padding).sum(-2, keepdim=True).clamp(min=1)
    with torch.no_grad():
        centre = (k.sum(-2, keepdim=True, dtype=torch.float32) / count).to(k.dtype)
    return q - centre, k - centre


def _masses(score: Gravity, mask: Mask) -> tuple[Tensor | None, Tensor]:
    """A_i (N, T, H, L), or None for the force form, and m_j (N, T, H, S)."""
    key_mass = score.key_mass.float()
    if mask.padding is not None:
        key_mass = key_mass.masked_fill(mask.padding[:, None, None, :], 1.0)
    if score.query_mass is None or score.log_gravity is None:
        return None, key_mass
    return score.log_gravity.float().exp().unsqueeze(-1) * score.query_mass.float(), key_mass


def row_products(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """`a_i . b_i scale` (..., L) float32 of contiguous a and b (..., L, D), with no float32 copy of them."""
    products = torch.empty(a.shape[:-1], dtype=torch.float32, device=a.device)
    rows, head_dim = products.numel(), a.shape[-1]
    grid = (triton.cdiv(rows, ROWS_OF_A_PRODUCT),)
    block = {"block_rows": ROWS_OF_A_PRODUCT, "block_dim": padded_width(head_dim)}
    if rows:
        kernels.row_product_kernel[grid](a, b, products, rows, head_dim, scale, **block)
    return products


def padded_width(head_dim: int) -> int:
    """The width of a tile: a power of two, and at least what a matrix unit takes."""
    return max(16, triton.next_power_of_2(head_dim))


def tile_shape(q: Tensor) -> tuple[int, int]:
    """Rows and keys of a tile: the largest that the compiler keeps in registers and that fit into the shared
    memory of any GPU since 2020. float32 has no matrix unit, and spills sooner."""
    side = 64 if q.dtype.itemsize == 2 else 32
    side = side if padded_width(q.shape[-1]) <= 64 else side // 2
    return side, side


class FusedAttention(torch.autograd.Function):
    """`FusedAttention.apply(q, k, v, strength, key_mass, log_decay, plan)` -> (N, T, H, L, D).

    q, k, v (N, T', H, L or S, D) of one type, T' = T or 1; strength (N, T, H, L), key_mass (N, T, H, S) and
    log_decay (T, H), each float or None. Saves its inputs, the output and the log-sum-exp of each row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        strength: Tensor | None,
        key_mass: Tensor | None,
        log_decay: Tensor | None,
        padding: Tensor | None,
        pairs: Tensor | None,
        reach: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        ctx.plan = plan
        plan = replace(plan, mask=Mask(padding, pairs, plan.mask.causal), reach=reach)
        output = q.new_empty(q.shape[0], plan.timescales, *q.shape[2:])
        log_sum = torch.empty(output.shape[:-1], dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            inputs = _inputs(q, k, v, strength, key_mass, log_decay, plan)
            launch(kernels.forward_kernel, plan, inputs, output, log_sum)
        ctx.save_for_backward(q, k, v, strength, key_mass, log_decay, padding, pairs, reach, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, strength, key_mass, log_decay, padding, pairs, reach, output, log_sum = ctx.saved_tensors
        if backward_is_differentiated(upstream):
            one = None if strength is None else strength.new_zeros(strength.shape[1:3])  # log G: A_i has G
            tensors = q, k, v, key_mass, strength, one, log_decay, *[None] * 4, padding, pairs
            of_q, of_k, of_v, of_strength, of_mass, of_decay = ctx.needs_input_grad[:6]
            needed = of_q, of_k, of_v, of_mass, of_strength, False, of_decay, *[False] * 6
            found = dense_gradients(ctx.plan.score, ctx.plan.mask, tensors, needed, upstream)
            dq, dk, dv, dmass, dstrength, _, drate, *_ = found
            return dq, dk, dv, dstrength, dmass, drate, None, None, None, None
        plan = replace(ctx.plan, mask=Mask(padding, pairs, ctx.plan.mask.causal), reach=reach)
        upstream = upstream.contiguous()
        # Timescales that share q, k and v each make a part of the gradient: those are summed in float32.
        part = q.dtype if q.shape[1] == plan.timescales else torch.float32
        dq, dk, dv = (x.new_empty(len(x), plan.timescales, *x.shape[2:], dtype=part) for x in (q, k, v))
        dstrength = None if strength is None else torch.empty_like(strength)
        dmass = None if key_mass is None else torch.empty_like(key_mass)
        parts = None
        if log_decay is not None:
            blocks = triton.cdiv(q.shape[-2], tile_shape(q)[0])
            parts = torch.empty(*output.shape[:3], blocks, dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            inputs = _inputs(q, k, v, strength, key_mass, log_decay, plan)
            delta = row_products(upstream, output)
            launch(
                kernels.query_gradient_kernel, plan, inputs, upstream, log_sum, delta, dq, dstrength, parts
            )
            launch(kernels.key_gradient_kernel, plan, inputs, upstream, log_sum, delta, dk, dv, dmass)
        drate = None if parts is None else parts.sum((0, 3))
        dq, dk, dv = (_joined(dx, x) for dx, x in ((dq, q), (dk, k), (dv, v)))
        if dmass is not None and strength is None:
            dmass = dmass / key_mass  # the kernels' is by log m_j
        return dq, dk, dv, dstrength, dmass, drate, None, None, None, None


def _joined(gradient: Tensor, x: Tensor) -> Tensor:
    """(N, T, H, L, D) -> (N, T', H, L, D) in the type of x."""
    return gradient if gradient.shape == x.shape else gradient.sum(1, keepdim=True).to(x.dtype)


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strength: Tensor | None,
    key_mass: Tensor | None,
    log_decay: Tensor | None,
    plan: Plan,
) -> kernels.Inputs:
    batch, _, heads, query_length, head_dim = q.shape
    key_length, mask = k.shape[-2], plan.mask
    pairs, strides = None, [0] * 4
    if mask.pairs is not None:
        pairs = mask.pairs.squeeze(1).expand(batch, heads, query_length, key_length)
        strides = list(pairs.stride())
        pairs = pairs.view(torch.uint8) if pairs.dtype == torch.bool else pairs
    return kernels.Inputs(
        q=q,
        k=k,
        v=v,
        query_norm=None if key_mass is None else row_products(q, q, 1 / head_dim),
        key_norm=None if key_mass is None else row_products(k, k, 1 / head_dim),
        strength=strength,
        key_mass=key_mass.log() if key_mass is not None and strength is None else key_mass,
        log_decay=log_decay,
        reach=plan.reach,
        padding=None if mask.padding is None else mask.padding.contiguous().view(torch.uint8),
        pairs=pairs,
        batch_stride=strides[0],
        head_stride=strides[1],
        row_stride=strides[2],
        key_stride=strides[3],
        query_length=query_length,
        key_length=key_length,
        timescales=plan.timescales,
        heads=heads,
        head_dim=head_dim,
        scale=plan.scale,
        softening=plan.softening,
    )


def launch(kernel: Any, plan: Plan, inputs: kernels.Inputs, *tensors: Tensor | None) -> None:
    """Run one of the three attention kernels, a program for each block of rows (or keys) of each problem."""
    q = inputs.q
    block_rows, block_keys = tile_shape(q)
    if kernel is kernels.key_gradient_kernel:
        blocks = triton.cdiv(inputs.key_length, block_keys)
    else:
        blocks = triton.cdiv(inputs.query_length, block_rows)
    programs = len(q) * plan.timescales * inputs.heads * blocks
    if not programs:
        return
    kernel[(programs,)](
        inputs,
        *tensors,
        kind=plan.kind,
        power=plan.power,
        causal=plan.mask.causal,
        shared=q.shape[1] != plan.timescales,
        block_rows=block_rows,
        block_keys=block_keys,
        block_dim=padded_width(inputs.head_dim),
    )
