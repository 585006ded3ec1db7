"""What a model costs on paper: its matrix products for each example, and widths that equalise parameters.

    flops = forward_flops(model, lengths)               # the mean over examples of these lengths
    settings = matched_settings(factories, ...)         # one ModelSettings for each model, of equal size

Floating point operations are counted by PyTorch's `FlopCounterMode` (2 for a multiplication and an addition)
in one forward pass by the dense formula, so that they do not depend on the backend, on tiles or on keys that
are skipped. Only matrix products are counted: exponentials, divisions, norms and dropout are not. A training
step costs about three times the forward.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiment.transformer_classifier import AttentionFactory, ModelSettings, TransformerClassifier

COUNTED_LENGTHS = (8, 16, 24)  # a quadratic is fixed by three points
MATCHED_WITHIN = 0.01  # of the parameters of the largest model


def forward_flops(model: TransformerClassifier, lengths: np.ndarray) -> float:
    """The mean over examples of `lengths` (n,) tokens; exact where the cost is a quadratic in the length."""
    counts = [_flops_at(model, length) for length in COUNTED_LENGTHS]
    quadratic = np.linalg.solve(np.vander(COUNTED_LENGTHS, 3).astype(float), np.array(counts, float))
    return float(np.polyval(quadratic, lengths.astype(float)).mean())


def _flops_at(model: TransformerClassifier, length: int) -> int:
    """Of one example of that many tokens."""

    def dense(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"need_weights": True}

    hooks = [attention.register_forward_pre_hook(dense, with_kwargs=True) for attention in model.attentions]
    device = next(model.parameters()).device
    tokens = torch.ones(1, length, dtype=torch.long, device=device)
    was_training = model.training
    try:
        model.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def matched_settings(
    factory_of: Callable[[str, ModelSettings], AttentionFactory],
    models: tuple[str, ...],
    vocab_size: int,
    num_classes: int,
    settings: ModelSettings,
) -> dict[str, ModelSettings]:
    """For each model the settings with a feed-forward width that gives it the parameters of the largest,
    within 1 %. The encoder's parameters are linear in that width, and attention does not see it.

    Raises ValueError where one step of the width is more than that."""

    def parameters(model: str, chosen: ModelSettings) -> int:
        return count_parameters(
            TransformerClassifier(factory_of(model, chosen), vocab_size, num_classes, chosen)
        )

    counts = {model: parameters(model, settings) for model in models}
    target = max(counts.values())
    wider = replace(settings, feed_forward_dim=settings.feed_forward_dim + 1)
    step = parameters(models[0], wider) - counts[models[0]]
    matched = {}
    for model, count in counts.items():
        width = settings.feed_forward_dim + round((target - count) / step)
        matched[model] = replace(settings, feed_forward_dim=width)
        found = parameters(model, matched[model])
        if abs(found - target) > MATCHED_WITHIN * target:
            raise ValueError(f"{model} cannot be matched: {found} parameters instead of {target}")
    return matched
