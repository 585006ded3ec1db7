"""How a model is trained, selected and tested: one cell of the comparison, equal for every mechanism.

    state, reason = run_cell(make_attention, task, model_settings, training_settings, seed, folder, device)

With one seed all models see the same batches in the same order and the same dropout stream, from the same
starting weights (`TransformerClassifier`). Every random number comes from (seed, purpose, epoch), so an
epoch can be repeated from the weights before it. Selection is on validation accuracy; the test split is
read once, when training has ended. Losses and accuracies are sums over examples, divided once.

Symbols: N batch, L length. True in a boolean mask means blocked.
"""

import contextlib
import copy
import math
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_patterns import NoAttentionMapsError, attention_patterns
from command_line import check_settings, setting
from data_pipeline import Batch, TaskData, TokenDataset, evaluation_batches, training_batches
from device_memory import PeakMemory
from evaluate_performance import convergence_epoch
from results_folder import (
    SCHEMA_VERSION,
    write_atomic,
    write_json,
    write_json_lines,
    write_status,
    write_text,
)
from transformer_classifier import AttentionFactory, ModelSettings, TransformerClassifier, random_stream

__all__ = ["ModelSettings", "TrainingSettings", "TransformerClassifier", "run_cell", "train_and_evaluate"]

READ_EVERY_SECONDS = 1.0  # how often a running epoch's losses are read, which waits for the device


@dataclass(frozen=True)
class TrainingSettings:
    """Training"""

    batch_size: int = setting(32, "examples per optimizer step", minimum=1)
    learning_rate: float = setting(1e-4, "AdamW learning rate, constant", above=0)
    weight_decay: float = setting(1e-5, "AdamW weight decay", minimum=0)
    max_epochs: int = setting(20, "epochs at most", minimum=1)
    patience: int = setting(10, "stop after this many epochs without a better validation accuracy", minimum=1)
    gradient_clip: float = setting(1.0, "largest norm of the gradient", above=0)
    pad_to: str = setting(
        "longest", "pad to the longest of a batch, or of the task", choices=("longest", "max")
    )
    precision: str = setting(
        "auto", "arithmetic; auto is bf16 autocast on CUDA, else fp32", choices=("auto", "fp32", "bf16")
    )
    compile: bool = setting(False, "compile the model with torch.compile")

    def __post_init__(self) -> None:
        check_settings(self)


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


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy over the examples of a split, and the predictions (n,) in the split's order."""

    loss: float
    accuracy: float
    predictions: np.ndarray


def use_bf16(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


@torch.no_grad()
def evaluate(
    models: Sequence[Callable[[Tensor, Tensor], Tensor]],
    batches: Iterable[Batch],
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[Evaluation]:
    """Evaluate models, in eval mode, in one pass over the batches. Sums are over examples, not batches."""
    losses: list[list[Tensor]] = [[] for _ in models]
    predicted: list[list[Tensor]] = [[] for _ in models]
    labels, index = [], []
    for batch in batches:
        labels.append(batch.labels)
        index.append(batch.index)
        for number, model in enumerate(models):
            with autocast():
                logits = model(batch.tokens, batch.key_padding_mask)
            losses[number].append(F.cross_entropy(logits.float(), batch.labels, reduction="sum"))
            predicted[number].append(logits.argmax(-1))
    order = torch.cat(index).cpu().numpy()
    truth = torch.cat(labels).cpu().numpy()
    evaluations = []
    for model_losses, model_predicted in zip(losses, predicted, strict=True):
        found = torch.cat(model_predicted).cpu().numpy()
        predictions = np.empty_like(found)
        predictions[order] = found
        loss = torch.stack(model_losses).cpu().double().sum().item() / len(truth)
        evaluations.append(Evaluation(loss, float((found == truth).mean()), predictions))
    return evaluations


class StepMeter:
    """Sums of loss and correct answers over an epoch's examples.

    They stay on the device and are read about once a second and at the end, so that steps are queued
    without waiting; every step's loss is then looked at, in order. Raises DivergedError at the first that is
    not finite.
    """

    def __init__(self, epoch: int, progress: Progress) -> None:
        self.epoch, self.progress = epoch, progress
        self.waiting: list[Tensor] = []
        self.steps = self.examples = 0
        self.loss_sum = self.correct = 0.0
        self.last_read = time.perf_counter()

    def add(self, sums: Tensor, examples: int) -> None:
        """Take a step's (summed loss, correct answers), a tensor (2,)."""
        self.waiting.append(sums)
        self.examples += examples
        if time.perf_counter() - self.last_read < READ_EVERY_SECONDS:
            self.progress.steps_done(1, None, None)
        else:
            self.progress.steps_done(1, *self.means())

    def means(self) -> tuple[float, float]:
        """Mean loss and accuracy so far, in one read; added up step by step, whenever reads happen."""
        for loss, correct in torch.stack(self.waiting).tolist() if self.waiting else []:
            self.steps += 1
            if not math.isfinite(loss):
                raise DivergedError(f"the training loss is {loss} in epoch {self.epoch}, step {self.steps}")
            self.loss_sum += loss
            self.correct += correct
        self.waiting.clear()
        self.last_read = time.perf_counter()
        return self.loss_sum / self.examples, self.correct / self.examples


class Trainer:
    """A model in training on a task: its optimizer, its batches and what is kept of its epochs."""

    def __init__(
        self,
        model: TransformerClassifier,
        task: TaskData,
        settings: TrainingSettings,
        seed: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.model, self.task, self.settings, self.seed = model.to(device), task, settings, seed
        self.device, self.progress = device, progress
        self.forward = torch.compile(model, dynamic=True) if settings.compile else model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self.bf16 = use_bf16(settings.precision, device)
        splits = (task.train, task.val, task.test)
        longest = max(int(np.max(split.lengths, initial=1)) for split in splits)
        self.pad_to: Any = longest if settings.pad_to == "max" else "longest"
        self.rows: list[dict[str, Any]] = []
        self.best_epoch, self.best_val_accuracy = 0, -1.0
        self.warm = False

    def fit(self, folder: Path, memory: PeakMemory) -> None:
        """Train until the epochs or the patience are used up; after each epoch the folder is complete."""
        steps = math.ceil(len(self.task.train) / self.settings.batch_size)
        for epoch in range(1, self.settings.max_epochs + 1):
            self.progress.epoch_started(epoch, steps)
            row = {"epoch": epoch, **self.train_epoch(epoch), **self.validate(epoch)}
            row |= {"learning_rate": self.settings.learning_rate, "peak_memory_bytes": memory.read()}
            row["learned"] = self.learned_scalars()
            self.rows.append(row)
            improved = row["val_accuracy"] > self.best_val_accuracy
            if improved:
                self.best_epoch, self.best_val_accuracy = epoch, row["val_accuracy"]
            # The last checkpoint comes last: whoever reads it finds all that led to it.
            write_json_lines(folder / "metrics.jsonl", [as_json(row) for row in self.rows])
            for name in ("checkpoint_best.pt", "checkpoint_last.pt")[0 if improved else 1 :]:
                self.save(folder / name)
            self.progress.epoch_ended(row)
            if epoch - self.best_epoch >= self.settings.patience:
                break

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train on every example once. Timing leaves out the first step of all, which warms up."""
        self.model.train()
        train = self.task.train
        tokens = timed_tokens = int(train.lengths.sum())
        meter = StepMeter(epoch, self.progress)
        batches = training_batches(
            train,
            self.settings.batch_size,
            seed=self.seed,
            epoch=epoch,
            pad_to=self.pad_to,
            device=self.device,
        )
        with random_stream(self.device, self.seed, "dropout", epoch):
            started = time.perf_counter()
            for batch in batches:
                meter.add(self.step(batch), len(batch.labels))
                if not self.warm:
                    timed_tokens -= int((~batch.key_padding_mask).sum())
                    self.synchronize()
                    self.warm, started = True, time.perf_counter()
            self.synchronize()
            seconds = time.perf_counter() - started
        loss, accuracy = meter.means()
        timed = timed_tokens > 0
        return {
            "train_loss": loss,
            "train_accuracy": accuracy,
            "train_seconds": seconds if timed else None,
            "train_tokens": tokens,
            "train_examples": len(train),
            "tokens_per_second": timed_tokens / seconds if timed else None,
        }

    def step(self, batch: Batch) -> Tensor:
        """One optimizer step; the batch's (summed loss, correct answers), on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.forward(batch.tokens, batch.key_padding_mask)
        loss_sum = F.cross_entropy(logits, batch.labels, reduction="sum")
        (loss_sum / len(batch.labels)).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_clip)
        self.optimizer.step()
        return torch.stack([loss_sum.detach(), (logits.argmax(-1) == batch.labels).sum()])

    def validate(self, epoch: int) -> dict[str, Any]:
        started = time.perf_counter()
        [validation] = self.evaluate([self.forward], self.task.val)
        if not math.isfinite(validation.loss):
            raise DivergedError(f"the validation loss is {validation.loss} after epoch {epoch}")
        seconds = time.perf_counter() - started
        return {"val_loss": validation.loss, "val_accuracy": validation.accuracy, "eval_seconds": seconds}

    def evaluate(
        self, models: Sequence[Callable[[Tensor, Tensor], Tensor]], split: TokenDataset
    ) -> list[Evaluation]:
        self.model.eval()
        batches = evaluation_batches(split, self.settings.batch_size, pad_to=self.pad_to, device=self.device)
        return evaluate(models, batches, self.autocast)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def learned_scalars(self) -> dict[str, dict[str, list[list[float]]]]:
        """What the mechanism shows of itself, by layer: each (T, H)."""
        found = {}
        for index, attention in enumerate(self.model.attentions):
            scalars: dict[str, Tensor] = getattr(attention, "learned_scalars", dict)()
            found[f"layer{index}"] = {name: value.tolist() for name, value in scalars.items()}
        return {layer: scalars for layer, scalars in found.items() if scalars}

    def save(self, path: Path) -> None:
        state = {
            "schema_version": SCHEMA_VERSION,
            "seed": self.seed,
            "epoch": len(self.rows),
            "best_epoch": self.best_epoch,
            "best_val_accuracy": self.best_val_accuracy,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_atomic(path, lambda file: torch.save(state, file))

    def best_model(self, folder: Path) -> TransformerClassifier:
        """The model with the best epoch's weights: this one, or a copy."""
        if self.best_epoch == len(self.rows):
            return self.model
        model = copy.deepcopy(self.model)
        saved = torch.load(folder / "checkpoint_best.pt", map_location=self.device, weights_only=True)
        model.load_state_dict(saved["model"])
        return model


def train_and_evaluate(
    make_attention: AttentionFactory,
    task: TaskData,
    model_settings: ModelSettings,
    training: TrainingSettings,
    seed: int,
    folder: Path,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train one model on one task with one seed, then read the test split, once. Returns result.json.

    Writes metrics.jsonl and the checkpoints after each epoch, test_predictions.npz and
    attention_patterns.npz at the end. Raises DivergedError where a loss is not finite.
    """
    started = time.perf_counter()
    memory = PeakMemory(device)
    model = TransformerClassifier(make_attention, task.vocab_size, task.num_classes, model_settings, seed)
    trainer = Trainer(model, task, training, seed, device, progress or Progress())
    trainer.fit(folder, memory)

    best = trainer.best_model(folder)
    models = [model] if best is model else [best, model]
    evaluations = trainer.evaluate(models, task.test)
    labels = np.asarray(task.test.labels)
    _save_arrays(
        folder / "test_predictions.npz", {"predictions": evaluations[0].predictions, "labels": labels}
    )
    result = summary(trainer, evaluations[0], evaluations[-1])
    result |= {"memory_kind": memory.kind, "memory_reason": memory.reason}
    try:
        patterns = attention_patterns(best, best.attentions, task, seed, device)
        _save_arrays(folder / "attention_patterns.npz", patterns)
        result |= {"attention_patterns": "attention_patterns.npz", "attention_patterns_reason": ""}
    except NoAttentionMapsError as error:
        result |= {"attention_patterns": None, "attention_patterns_reason": str(error)}
    return result | {"wall_seconds": time.perf_counter() - started}


def summary(trainer: Trainer, best: Evaluation, last: Evaluation) -> dict[str, Any]:
    """The figures of a finished cell, from its epochs and its two test results."""
    rows, model = trainer.rows, trainer.model
    accuracies = [row["val_accuracy"] for row in rows]
    seconds = [row["train_seconds"] for row in rows if row["train_seconds"] is not None]
    rates = [row["tokens_per_second"] for row in rows if row["tokens_per_second"] is not None]
    attention_parameters = {
        id(parameter): parameter.numel()
        for attention in model.attentions
        for parameter in attention.parameters()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "test_accuracy_best": best.accuracy,
        "test_accuracy_last": last.accuracy,
        "test_loss_best": best.loss,
        "test_loss_last": last.loss,
        "best_epoch": trainer.best_epoch,
        "best_val_accuracy": trainer.best_val_accuracy,
        "epochs_run": len(rows),
        "stopped_early": len(rows) < trainer.settings.max_epochs,
        "convergence_epoch": convergence_epoch(accuracies),
        "convergence_epoch_above_chance": convergence_epoch(accuracies, 1 / trainer.task.num_classes),
        "seconds_per_epoch": float(np.mean(seconds)) if seconds else None,
        "tokens_per_second": float(np.mean(rates)) if rates else None,
        "peak_memory_bytes": rows[-1]["peak_memory_bytes"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "attention_parameters": sum(attention_parameters.values()),
        "precision": "bf16" if trainer.bf16 else "fp32",
        "test_predictions_best": "test_predictions.npz",
    }


def run_cell(
    make_attention: AttentionFactory,
    task: TaskData,
    model_settings: ModelSettings,
    training: TrainingSettings,
    seed: int,
    folder: Path,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[str, str]:
    """`train_and_evaluate` with its fate in status.json. Returns the state and, where it has one, the reason.

    An error in a cell, lack of memory included, ends that cell only: state "failed", and its traceback is
    in error.txt. KeyboardInterrupt is noted and passed on.
    """
    write_status(folder, "running")
    try:
        result = train_and_evaluate(
            make_attention, task, model_settings, training, seed, folder, device, progress
        )
        write_json(folder / "result.json", as_json(result))
        state, reason = "done", ""
    except DivergedError as error:
        state, reason = "diverged", str(error)
    except KeyboardInterrupt:
        write_status(folder, "interrupted", "interrupted by the user or the system")
        raise
    except Exception as error:
        state, reason = "failed", _describe(error)
        write_text(folder / "error.txt", traceback.format_exc())
    write_status(folder, state, reason)
    return state, reason


def _describe(error: Exception) -> str:
    """One line: kind, message and where it was raised."""
    message = str(error).strip().splitlines()
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"({Path(place.filename).name}:{place.lineno} in {place.name})"
    return f"{type(error).__name__}: {message[0] if message else 'no message'} {where}"


def as_json(value: Any) -> Any:
    """The value with null for each number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    write_atomic(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
