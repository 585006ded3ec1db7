"""Loss and accuracy of models on a split, in one pass over it.

best, last = evaluate([best_model, last_model], batches)      # models in eval mode
best.accuracy
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline import Batch

Model = Callable[[Tensor, Tensor], Tensor]  # tokens (N, L), key_padding_mask (N, L) -> logits (N, C)


class Evaluation(NamedTuple):
    """Mean loss and accuracy over the examples of a split."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(
    models: Sequence[Model],
    batches: Iterable[Batch],
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[Evaluation]:
    """Evaluate models, in eval mode, in one pass over the batches. Sums are over examples, not batches."""
    losses: list[list[Tensor]] = [[] for _ in models]
    correct: list[list[Tensor]] = [[] for _ in models]
    examples = 0
    for batch in batches:
        examples += len(batch.labels)
        for number, model in enumerate(models):
            with autocast():
                logits = model(batch.tokens, batch.key_padding_mask)
            losses[number].append(F.cross_entropy(logits.float(), batch.labels, reduction="sum"))
            correct[number].append((logits.argmax(-1) == batch.labels).sum())
    return [
        Evaluation(
            torch.stack(losses[number]).cpu().double().sum().item() / examples,
            torch.stack(correct[number]).sum().item() / examples,
        )
        for number in range(len(models))
    ]
