"""Loss and accuracy of models on a split, in one pass, divided among the processes of a cell.

[validation] = evaluate([model], batches)      # the model in eval mode
validation.accuracy, validation.predictions
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline import Batch
from experiment.distributed import joined


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy over the examples of a split, and the predictions (n,) in the split's order."""

    loss: float
    accuracy: float
    predictions: np.ndarray


@torch.no_grad()
def evaluate(
    models: Sequence[Callable[[Tensor, Tensor], Tensor]],
    batches: Iterable[Batch],
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[Evaluation]:
    """Evaluate models, in eval mode, in one pass over the batches, those of all ranks together. Sums are over
    examples, not batches."""
    losses: list[list[Tensor]] = [[] for _ in models]
    predicted: list[list[Tensor]] = [[] for _ in models]
    labels, index = [], []
    for batch in batches:
        labels.append(batch.labels)
        index.append(batch.index)
        for number, model in enumerate(models):
            with autocast():
                logits = model(batch.tokens, batch.key_padding_mask)
            losses[number].append(F.cross_entropy(logits.float(), batch.labels, reduction="sum").reshape(1))
            predicted[number].append(logits.argmax(-1))
    order, truth = joined(index).numpy(), joined(labels).numpy()
    evaluations = []
    for model_losses, model_predicted in zip(losses, predicted, strict=True):
        found = joined(model_predicted).numpy()
        predictions = np.empty_like(found)
        predictions[order] = found
        loss = joined(model_losses).double().sum().item() / len(truth)
        evaluations.append(Evaluation(loss, float((found == truth).mean()), predictions))
    return evaluations
