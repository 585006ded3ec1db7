"""Attention by the formula itself, in O(L S) memory, of operations that PyTorch can differentiate any number
of times, forwards, backwards and under `torch.func`: the reference, and what the fused backends fall back on
where a derivative is asked for that they have not written by hand.

Symbols and masks: see attention_module.py.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attention_engine.attention_scores import Mask, Score, join_score


def dense_weights(q: Tensor, k: Tensor, score: Score, mask: Mask) -> Tensor:
    """Attention weights (N, T, H, L, S) by the plain formula. A row with no key is zeros."""
    logits = score.logits(q, k)
    query_length, key_length = logits.shape[-2:]
    if score.log_decay is not None:
        i, j = mask.positions(query_length, key_length, q.device)
        log_discount = (i - j).abs().to(q.dtype) * score.log_decay[:, :, None, None]
        logits = logits * log_discount.exp() if score.discount == "logits" else logits + log_discount
    if score.clock is not None:
        logits = logits + score.clock.log_discount().to(logits.dtype)
    blocked, added = mask.dense(query_length, key_length, q.device)
    if added is not None:
        logits = logits + added.to(logits.dtype)
    # A row of -inf only has no softmax and no finite gradient: it is filled with zeros before, and after.
    no_key = blocked.expand(*blocked.shape[:-1], key_length).all(-1, keepdim=True)
    logits = logits.masked_fill(blocked, -math.inf).masked_fill(no_key, 0.0)
    return logits.softmax(-1).masked_fill(blocked, 0.0)


def only_dense_derivatives() -> bool:
    """Whether what runs now is inside a transform of `torch.func` (grad, vmap, jvp ...), or forward-mode
    differentiation: an `autograd.Function` with a backward written by hand has no rule for these."""
    level: int = torch.autograd.forward_ad._current_level  # -1 outside of a `dual_level`
    return torch._C._are_functorch_transforms_active() or level >= 0


def backward_is_differentiated(upstream: Tensor) -> bool:
    """Asked inside a backward: whether it is to be differentiated itself (create_graph=True), or batched
    (vectorised Jacobians). `dense_gradients` can do both."""
    batched: bool = torch._C._functorch.is_legacy_batchedtensor(upstream)
    return batched or torch.is_grad_enabled() or only_dense_derivatives()


def dense_gradients(
    score: Score,
    mask: Mask,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    upstream: Tensor,
) -> list[Tensor | None]:
    """The gradients of dense attention by those of the tensors that are needed, in this order; each can be
    differentiated again where gradients are enabled. tensors: q, k, v, those that `split_score` took out of
    the score, and the mask's padding and pairs."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each a tensor of its own: one may come twice, and its gradient is asked for by each place.
        tensors = [None if x is None else x.view_as(x) for x in tensors]
        inputs = [x for x, need in zip(tensors, needed, strict=True) if x is not None and need]
        q, k, v, *of_score, padding, pairs = tensors
        assert q is not None and k is not None and v is not None
        dtype = torch.promote_types(q.dtype, torch.float32)
        mask = replace(mask, padding=padding, pairs=pairs)
        weights = dense_weights(q.to(dtype), k.to(dtype), join_score(score, of_score), mask)
        output, options = weights @ v.to(dtype), {"create_graph": again, "materialize_grads": True}
        found = iter(torch.autograd.grad(output, inputs, upstream.to(dtype), **options))
    return [next(found) if need else None for need in needed]
