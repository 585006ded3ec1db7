"""The attention engine: `attend` weighs values by a score, with the fastest backend that honours the request.

    query, key, value (N, L, E) -> module: q, k, v and a Score -> attend -> (N, T, H, L, D)

Backends, all exact:
- "dense": the formula itself, in O(L S) memory. The reference, and what makes weights when asked for.
- "tiled": `tiled_attention`, O(L + S) memory, any device, any score but with discounted logits.
- "native": `native_attention`, O(L + S) memory, float32 on the CPU: compiled by your own compiler at its
  first use. Where float32 does not hold the gradients it is "tiled", which goes to float64.
- "sdpa": `F.scaled_dot_product_attention`, the dot product without decay only.
- "triton": `triton_attention`, O(L + S) memory, the scores of "tiled" without clocks, queries from position
  0 on, CUDA (or Triton's interpreter, for tests), in the inputs' own type. Triton is imported only when it is
  asked for.

Under `torch.func` and in forward-mode differentiation "auto" is "dense"; a backward that is differentiated or
batched itself is that of the dense formula, too.

Symbols and masks: see attention_module.py.
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_engine import native_attention, uncompiled
from attention_engine.attention_scores import DotProduct, Gravity, Mask, Score
from attention_engine.dense_attention import dense_weights, only_dense_derivatives
from attention_engine.tiled_attention import tiled_attention

BACKENDS = ("auto", "dense", "tiled", "native", "sdpa", "triton")
# What "auto" chooses from, fastest first where there is no mask.
AUTO_BACKENDS = ("native", "sdpa", "triton", "tiled", "dense")
TRITON_LARGEST_HEAD_DIM = 256
_chosen = ["auto"]  # by `use_backend`, the innermost last


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Attend with a backend wherever "auto" would choose one, as inside the modules:

        with use_backend("dense"):
            output, _ = attention(x, x, x)

    Raises ValueError where it is none of BACKENDS; `attend` does where it cannot do what is asked for."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    _chosen.append(backend)
    try:
        yield
    finally:
        _chosen.pop()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast off on a device; the meta device has none."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Score,
    mask: Mask,
    *,
    dropout: float = 0.0,
    need_weights: bool = False,
    backend: str = "auto",
    skip_far_keys: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Weigh the values by the score, softmax-normalised over the keys that the mask leaves.

    q (N, T', H, L, D), k and v (N, T', H, S, D) -> the output (N, T, H, L, D) in q's dtype and, with
    `need_weights`, the weights (N, T, H, L, S) before dropout. A row with no key gives zeros. Distances,
    exponentials and sums are in float32 at least, with autocast off.

    dropout: the probability of dropping a weight. backend: one of BACKENDS, "auto" being that of
    `use_backend` or else the fastest; ValueError where it cannot do what is asked for. skip_far_keys: whether
    "tiled", "native" and "triton" leave out keys that decay makes negligible. torch.compile looks into
    "dense" alone.
    """
    if backend == "auto":
        backend = _chosen[-1]
    arguments = q, k, v, score, mask, dropout, need_weights, backend, skip_far_keys
    if backend != "dense" and not need_weights and torch.compiler.is_compiling():
        found: tuple[Tensor, Tensor | None] = uncompiled.call(_attend, *arguments)
        return found
    return _attend(*arguments)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Score,
    mask: Mask,
    dropout: float,
    need_weights: bool,
    backend: str,
    skip_far_keys: bool,
) -> tuple[Tensor, Tensor | None]:
    empty = not (q.numel() and k.numel())
    if backend == "auto":
        backend = "dense" if empty else fastest_backend(q, score, mask, dropout, need_weights)
    reason = cannot(backend, q, score, mask, dropout, need_weights)
    if reason:
        raise ValueError(f"backend {backend!r} {reason}")
    if empty:
        backend = "dense"  # there is no tile
    with without_autocast(q.device):
        if isinstance(score, Gravity) and backend != "dense":
            q, k, score = score.as_euclidean(q, k)
        if backend == "sdpa":
            return sdpa_attention(q, k, v, score, mask), None
        if backend == "triton":
            from attention_engine.triton_attention import (
                triton_attention,  # needs Triton, which nothing else does
            )

            return triton_attention(q, k, v, score, mask, skip_far_keys), None
        dtype = torch.promote_types(q.dtype, torch.float32)
        if backend == "native":
            found = native_attention.native_attention(q, k, v, score, mask, skip_far_keys)
            if found is not None:
                return found, None
            backend, dtype = "tiled", torch.float64
        q_, k_, v_ = q.to(dtype), k.to(dtype), v.to(dtype)
        if backend == "tiled":
            return tiled_attention(q_, k_, v_, score, mask, dropout, skip_far_keys).to(q.dtype), None
        weights = dense_weights(q_, k_, score, mask)
        output = F.dropout(weights, dropout) @ v_
    return output.to(q.dtype), weights if need_weights else None


def cannot(backend: str, q: Tensor, score: Score, mask: Mask, dropout: float, need_weights: bool) -> str:
    """Why a backend cannot do what is asked for, or nothing."""
    if backend not in BACKENDS:
        return f"is unknown: use one of {BACKENDS}"
    if backend == "dense":
        return ""
    if need_weights:
        return "makes no weights: use 'dense'"
    if only_dense_derivatives():
        return "has no rules for torch.func and forward-mode differentiation: use 'dense'"
    if mask.pairs is not None and mask.pairs.requires_grad:
        return "has no gradient for a mask: use 'dense'"
    decays = score.log_decay is not None or score.clock is not None
    if backend == "sdpa" and (not isinstance(score, DotProduct) or decays):
        return "is for the dot product without decay only: use 'tiled'"
    if score.clock is not None and backend == "triton":
        return "has no clocks: use 'tiled'"
    if isinstance(score, Gravity) and backend in ("native", "triton"):
        if score.distance == "manhattan":
            return "has no Manhattan distance: use 'tiled'"
        if isinstance(score.softening, Tensor) or isinstance(score.distance_power, Tensor):
            return "has no learned power and softening: use 'tiled'"
    if mask.query_offset and backend == "triton":
        return "places the first query at position 0: use 'tiled'"
    if score.log_decay is not None and score.discount == "logits":
        return "discounts weights, not logits: use 'dense'"
    if backend == "sdpa" and dropout:
        return "has no dropout on every device: use 'tiled'"
    if backend == "native":
        return native_attention.cannot(q, score, mask, dropout)
    return _triton_cannot(q, dropout) if backend == "triton" else ""


def _triton_cannot(q: Tensor, dropout: float) -> str:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed: use 'tiled'"
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"is for CUDA tensors, got {q.device.type} (TRITON_INTERPRET=1 interprets it): use 'tiled'"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"is for float32 and half precision, got {q.dtype}: use 'tiled'"
    if q.shape[-1] > TRITON_LARGEST_HEAD_DIM:
        return f"is for heads of at most {TRITON_LARGEST_HEAD_DIM} wide, got {q.shape[-1]}: use 'tiled'"
    if dropout:
        return "has no dropout of weights: use 'tiled'"
    return ""


def fastest_backend(q: Tensor, score: Score, mask: Mask, dropout: float, need_weights: bool) -> str:
    """The first of AUTO_BACKENDS that can do what is asked for; "triton" before "sdpa" where there is a mask,
    which costs PyTorch's own kernels on CUDA several times their time, and Triton's nothing."""
    masked = mask.padding is not None or mask.pairs is not None
    names = sorted(AUTO_BACKENDS, key=lambda name: masked and name not in ("native", "triton"))
    return next(name for name in names if not cannot(name, q, score, mask, dropout, need_weights))


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, score: Score, mask: Mask) -> Tensor:
    """Softmax attention by PyTorch's fused kernel: (N, T, H, L, D) in q's dtype."""
    assert isinstance(score, DotProduct)
    batch, timescales = q.shape[:2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if mask.padding is None and mask.pairs is None and not (mask.causal and mask.query_offset):
        output = F.scaled_dot_product_attention(q, k, v, is_causal=mask.causal, scale=score.scale)
        return output.unflatten(0, (batch, timescales))
    blocked, added = mask.dense(q.shape[2], k.shape[2], q.device)
    no_key = blocked.expand(*blocked.shape[:-1], k.shape[2]).all(-1, keepdim=True)
    # A row of which every key is blocked has no softmax: it attends to all, and is zeroed afterwards.
    blocked = blocked & ~no_key
    bias = q.new_zeros(blocked.shape) if added is None else added.to(q.dtype)
    bias = bias.masked_fill(blocked, -math.inf)
    bias = bias.expand(-1, timescales, -1, -1, -1).flatten(0, 1) if len(bias) > 1 else bias[0]
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=score.scale)
    return output.unflatten(0, (batch, timescales)).masked_fill(no_key, 0.0)
