"""A running epoch, step by step: what its watcher is told, what its losses sum up to, when they are hopeless.

meter = StepMeter(epoch, tokens, progress, divergence_steps=3)
for batch in batches:
    meter.add(step(batch), batch.predictions, len(batch.index))  # DivergedError where losses are not finite
meter.row()                                         # {"train_loss": ...}
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

from data_pipeline import Batch

READ_EVERY_SECONDS = 1.0  # how often a running epoch's losses are read, which waits for the device


class DivergedError(ArithmeticError):
    """A loss was not finite; the message says where."""


class Progress:
    """What a cell in training tells whoever watches; this watcher is silent."""

    def epoch_started(self, epoch: int, steps: int) -> None:
        """`steps` optimizer steps are to come."""

    def steps_done(self, steps: int, loss: float | None, accuracy: float | None) -> None:
        """Steps since the last call; the epoch's mean loss and accuracy so far, where they were just read."""

    def epoch_ended(self, row: dict[str, Any]) -> None:
        """The epoch's line of metrics.jsonl."""

    def note(self, text: str) -> None:
        """A line about something unusual, as a checkpoint that training resumes from."""


class StepMeter:
    """Sums of loss and right answers over an epoch's predictions, and the time that the epoch took.

    The sums stay on the device and are read about once a second and at the end, so that steps are queued
    without waiting; every step's loss is then looked at, in order. Raises DivergedError where
    `divergence_steps` losses in a row are not finite.

    tokens: of all the epoch's examples.
    """

    def __init__(self, epoch: int, tokens: int, progress: Progress, divergence_steps: int) -> None:
        self.epoch, self.progress, self.divergence_steps = epoch, progress, divergence_steps
        self.tokens = self.timed_tokens = tokens
        self.waiting: list[Tensor] = []
        self.not_finite: list[str] = []  # the last steps' losses, in words
        self.steps = self.examples = self.predictions = 0
        self.loss_sum = self.correct = 0.0
        self.started = self.last_read = time.perf_counter()

    def add(self, sums: Tensor, predictions: int, examples: int) -> None:
        """Take a step's (summed loss, right answers), a tensor (2,), over so many predictions of examples."""
        self.waiting.append(sums)
        self.predictions += predictions
        self.examples += examples
        if time.perf_counter() - self.last_read >= READ_EVERY_SECONDS:
            self.progress.steps_done(1, *self.means())
        else:
            self.progress.steps_done(1, None, None)

    def start_clock(self, without: Batch) -> None:
        """Time from here on; this batch, the last that was added, is in no rate."""
        self.means()  # waits for the device
        self.timed_tokens -= int((~without.key_padding_mask).sum())
        self.started = time.perf_counter()

    def means(self) -> tuple[float, float]:
        """Mean loss and accuracy so far, in one read; added up step by step, whenever reads happen."""
        for loss, correct in torch.stack(self.waiting).tolist() if self.waiting else []:
            self.steps += 1
            self._watch(loss)
            self.loss_sum += loss
            self.correct += correct
        self.waiting.clear()
        self.last_read = time.perf_counter()
        count = max(1, self.predictions)
        return self.loss_sum / count, self.correct / count

    def _watch(self, loss: float) -> None:
        if math.isfinite(loss):
            self.not_finite.clear()
            return
        self.not_finite.append(f"the training loss is {loss} in epoch {self.epoch}, step {self.steps}")
        if len(self.not_finite) == self.divergence_steps:
            raise DivergedError(self.not_finite[0])

    def row(self) -> dict[str, Any]:
        """What metrics.jsonl says of the epoch's training; no times where its only step warmed up."""
        loss, accuracy = self.means()
        seconds = time.perf_counter() - self.started if self.timed_tokens else None
        return {
            "train_loss": loss,
            "train_accuracy": accuracy,
            "train_seconds": seconds,
            "train_tokens": self.tokens,
            "train_examples": self.examples,
            "train_predictions": self.predictions,
            "tokens_per_second": self.timed_tokens / seconds if seconds else None,
        }
