"""A running epoch, step by step: what its watcher is told, what its losses sum up to, when they are hopeless.

meter = StepMeter(epoch, progress, divergence_steps=3)
for batch in batches:
    meter.add(step(batch), len(batch.labels))       # DivergedError where losses are not finite
loss, accuracy = meter.means()
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

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
        """A line about something unusual, as a checkpoint that training goes on from."""


class StepMeter:
    """Sums of loss and correct answers over an epoch's examples.

    They stay on the device and are read about once a second and at the end, so that steps are queued
    without waiting; every step's loss is then looked at, in order. Raises DivergedError where
    `divergence_steps` losses in a row are not finite; `streak` is how many they are, and where they began.
    """

    def __init__(
        self, epoch: int, progress: Progress, divergence_steps: int, streak: tuple[int, str] = (0, "")
    ) -> None:
        self.epoch, self.progress, self.divergence_steps = epoch, progress, divergence_steps
        self.streak = streak
        self.waiting: list[Tensor] = []
        self.steps = self.examples = 0
        self.loss_sum = self.correct = 0.0
        self.last_read = time.perf_counter()

    def add(self, sums: Tensor, examples: int) -> None:
        """Take a step's (summed loss, correct answers), a tensor (2,), and the number of the whole batch."""
        self.waiting.append(sums)
        self.examples += examples
        if time.perf_counter() - self.last_read >= READ_EVERY_SECONDS:
            self.progress.steps_done(1, *self.means())
        else:
            self.progress.steps_done(1, None, None)

    def means(self) -> tuple[float, float]:
        """Mean loss and accuracy so far, in one read; added up step by step, whenever reads happen."""
        for loss, correct in torch.stack(self.waiting).tolist() if self.waiting else []:
            self.steps += 1
            self._watch(loss)
            self.loss_sum += loss
            self.correct += correct
        self.waiting.clear()
        self.last_read = time.perf_counter()
        return self.loss_sum / self.examples, self.correct / self.examples

    def _watch(self, loss: float) -> None:
        if math.isfinite(loss):
            self.streak = (0, "")
            return
        count, began = self.streak
        began = began or f"the training loss is {loss} in epoch {self.epoch}, step {self.steps}"
        self.streak = (count + 1, began)
        if count + 1 >= self.divergence_steps:
            raise DivergedError(began)
