"""How long a cell would take: measured on a few real steps, not guessed.

The steps are taken on two batches of the task's own training examples, at the quartiles of their lengths,
so that a cost that grows faster than the length is seen.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline import Batch, TaskData, TokenDataset, evaluation_batches
from experiment.training_progress import Progress
from experiment.transformer_classifier import AttentionFactory, ModelSettings, TransformerClassifier
from train_and_evaluate import Trainer, TrainingSettings

QUARTILES = (0.25, 0.75)


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds: of an optimizer step, of an epoch with its validation, of a cell with all its epochs."""

    step: float
    epoch: float
    cell: float


def estimate_time(
    make_attention: AttentionFactory,
    task: TaskData,
    model_settings: ModelSettings,
    training: TrainingSettings,
    device: torch.device,
) -> TimeEstimate:
    """Time one training step and one evaluation step on each of two batches, after one to warm up."""
    model = TransformerClassifier(make_attention, task.vocab_size, task.num_classes, model_settings)
    trainer = Trainer(model, task, training, 0, device, Progress())
    parts = [examples_at(task.train, quantile, training.batch_size) for quantile in QUARTILES]

    def train(part: TokenDataset) -> None:
        model.train()
        trainer.step(_only_batch(part, trainer))

    train(parts[0])
    step = _mean_seconds(train, parts, trainer)
    evaluation_step = _mean_seconds(lambda part: trainer.evaluate([trainer.forward], part), parts, trainer)

    def steps(split: TokenDataset) -> int:
        return math.ceil(len(split) / training.batch_size)

    epoch = step * steps(task.train) + evaluation_step * steps(task.val)
    # The test split is read with the best and with the last epoch's weights.
    cell = epoch * training.max_epochs + 2 * evaluation_step * steps(task.test)
    return TimeEstimate(step, epoch, cell)


def examples_at(dataset: TokenDataset, quantile: float, count: int) -> TokenDataset:
    """Up to `count` examples whose lengths lie around a quantile of the data set's lengths."""
    order = np.argsort(dataset.lengths, kind="stable")
    start = int(np.clip(round(quantile * len(order)) - count // 2, 0, max(0, len(order) - count)))
    return dataset.take(order[start : start + count])


def _only_batch(part: TokenDataset, trainer: Trainer) -> Batch:
    [batch] = evaluation_batches(part, len(part), pad_to=trainer.pad_to, device=trainer.device)
    return batch


def _mean_seconds(
    act: Callable[[TokenDataset], object], parts: list[TokenDataset], trainer: Trainer
) -> float:
    trainer.synchronize()
    started = time.perf_counter()
    for part in parts:
        act(part)
    trainer.synchronize()
    return (time.perf_counter() - started) / len(parts)
