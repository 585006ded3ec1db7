"""What a model costs on paper: its parameters, and its matrix products for each example.

    flops = forward_flops(model, model.attentions, lengths)      # the mean over examples of these lengths

Floating point operations are counted by PyTorch's `FlopCounterMode` (2 for a multiplication and an addition)
in one forward pass by the dense formula, so that they do not depend on the backend, on tiles or on keys that
are skipped. Only matrix products are counted: exponentials, divisions, norms and dropout are not. A training
step costs about three times the forward.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

COUNTED_LENGTHS = (8, 16, 24)  # a quadratic is fixed by three points


def forward_flops(model: nn.Module, attentions: Sequence[nn.Module], lengths: np.ndarray) -> float:
    """The mean over examples of `lengths` (n,) tokens; exact where the cost is a quadratic in the length."""
    counts = [_flops_at(model, attentions, length) for length in COUNTED_LENGTHS]
    quadratic = np.linalg.solve(np.vander(COUNTED_LENGTHS, 3).astype(float), np.array(counts, float))
    return float(np.polyval(quadratic, lengths.astype(float)).mean())


def _flops_at(model: nn.Module, attentions: Sequence[nn.Module], length: int) -> int:
    """Of one example of that many tokens."""

    def dense(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"need_weights": True}

    tokens = torch.ones(1, length, dtype=torch.long, device=next(model.parameters()).device)
    counter = FlopCounterMode(display=False)
    with contextlib.ExitStack() as undone:
        undone.callback(model.train, model.training)
        for attention in attentions:
            undone.enter_context(attention.register_forward_pre_hook(dense, with_kwargs=True))
        model.eval()
        with counter, torch.no_grad():
            model(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    return counter.get_total_flops()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
