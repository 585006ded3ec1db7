"""The encoder that every attention mechanism is compared in, its training, and its one test.

    model = TransformerClassifier(make_attention, vocab_size=257, num_classes=2, settings=ModelSettings())
    logits = model(tokens, key_padding_mask)         # (N, L), (N, L) True = pad -> (N, num_classes)
    result = train_and_evaluate(make_attention, task, model_settings, training_settings, seed, folder, device)

The mechanism is handed in as a factory of modules with the interface of `nn.MultiheadAttention(
batch_first=True)`; nothing here knows which it is. With one seed all models have the same starting weights
outside attention, and see the same batches in the same order and the same dropout stream. Every random
number comes from (seed, purpose, epoch), so an epoch can be repeated from the weights before it.

Selection is on validation, by accuracy or by bits per byte as the task has it; the test split is read when
training has ended, and never before. Losses and accuracies are sums over predictions, divided once.
Training resumes from the folder's last checkpoint, written after each epoch: on the CPU to the same bits as
without the interruption.

Symbols: see attention_module.py; C num_classes.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command_line import check_settings, first_line, setting
from data_pipeline import Batch, TaskData, TokenDataset, evaluation_batches, training_batches
from results_folder import PATTERNS, SCHEMA_VERSION, WriteError, as_json, write_arrays, write_json_lines
from tasks.task_data import TaskForm
from training.attention_patterns import attention_patterns, causal_arguments, learned_scalars
from training.checkpoints import BEST, CheckpointError, resume, write_checkpoint, write_weights
from training.device_memory import PeakMemory
from training.model_cost import count_parameters, forward_flops
from training.random_stream import random_stream
from training.training_progress import DivergedError, Progress, StepMeter

AttentionFactory = Callable[[], nn.Module]


@dataclass(frozen=True)
class ModelSettings:
    """Model

    The encoder's, the same for all models; a mechanism's own settings are those of its constructor."""

    embed_dim: int = setting(128, "width of the model, a multiple of --num-heads", minimum=1)
    num_heads: int = setting(4, "attention heads", minimum=1)
    num_layers: int = setting(2, "encoder layers", minimum=1)
    feed_forward_dim: int = setting(512, "hidden width of the feed-forward blocks", minimum=1)
    match_parameters: bool = setting(
        False, "widen the feed-forward blocks until each model has the parameters of the largest"
    )
    dropout: float = setting(
        0.1, "dropout on embedding, residual branches and feed-forward", minimum=0, below=1
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class TrainingSettings:
    """Training"""

    batch_size: int = setting(32, "examples per optimizer step", minimum=1)
    learning_rate: float = setting(
        1e-4,
        "AdamW learning rate, constant; of several each model and task takes the best on validation",
        above=0,
        several=True,
    )
    weight_decay: float = setting(1e-5, "AdamW weight decay", minimum=0)
    max_epochs: int = setting(20, "epochs at most", minimum=1)
    patience: int = setting(10, "stop after this many epochs without a better validation result", minimum=1)
    gradient_clip: float = setting(1.0, "largest norm of the gradient", above=0)
    pad_to: str = setting(
        "longest", "pad to the longest of a batch, or of the task", choices=("longest", "max")
    )
    precision: str = setting(
        "auto", "arithmetic; auto is bf16 autocast on CUDA, else fp32", choices=("auto", "fp32", "bf16")
    )
    compile: bool = setting(False, "compile the model with torch.compile")
    divergence_steps: int = setting(
        3, "end as diverged after this many steps in a row with a loss that is not finite", minimum=1
    )

    def __post_init__(self) -> None:
        check_settings(self)


# The encoder


def sinusoidal_positions(length: int, width: int, device: torch.device) -> Tensor:
    """(L, E): sines and cosines of wavelengths from 2 pi to 10,000 * 2 pi (Vaswani et al. 2017, 3.5)."""
    position = torch.arange(length, device=device).float()
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = position[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


class EncoderLayer(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

    Deviation from the 2017 encoder: the norm is before each block, not after the sum ("pre-norm"), which
    trains without a learning rate warm-up.
    """

    def __init__(
        self, make_attention: AttentionFactory, settings: ModelSettings, purpose: tuple[object, ...]
    ) -> None:
        super().__init__()
        cpu = torch.device("cpu")
        # Streams of their own: how much a mechanism draws must not shift the weights of anything else.
        with random_stream(cpu, *purpose, "attention"):
            self.attention = make_attention()
        with random_stream(cpu, *purpose, "feed-forward"):
            self.feed_forward = nn.Sequential(
                nn.Linear(settings.embed_dim, settings.feed_forward_dim),
                nn.ReLU(),
                nn.Dropout(settings.dropout),
                nn.Linear(settings.feed_forward_dim, settings.embed_dim),
            )
        self.attention_norm = nn.LayerNorm(settings.embed_dim)
        self.feed_forward_norm = nn.LayerNorm(settings.embed_dim)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, key_padding_mask: Tensor, causal: bool = False) -> Tensor:
        y = self.attention_norm(x)
        only = causal_arguments(self.attention, y) if causal else {}
        y, _ = self.attention(y, y, y, key_padding_mask=key_padding_mask, need_weights=False, **only)
        x = x + self.dropout(y)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class TransformerClassifier(nn.Module):
    """Token and sinusoidal position embedding, encoder layers, a final norm, mean pooling, a linear map.

    Deviations from the 2017 encoder: pre-norm, hence the final norm; and it classifies, from the mean of
    the final vectors over the true tokens. Neither the amount nor the content of padding changes a logit.

    make_attention: called once per layer; returns a module that is called as
        `module(x, x, x, key_padding_mask=mask, need_weights=False)` and returns `(output, None)`.
    vocab_size: token ids are 0 (pad) to vocab_size - 1. num_classes: C.
    seed: starting weights are drawn from (seed, part), each part's apart from the others'.
    form: whether it predicts at every token, is causal and adds positions.
    """

    def __init__(
        self,
        make_attention: AttentionFactory,
        vocab_size: int,
        num_classes: int,
        settings: ModelSettings,
        seed: int = 0,
        form: TaskForm | None = None,
    ) -> None:
        super().__init__()
        cpu = torch.device("cpu")
        self.form = form or TaskForm()
        self.embed_dim = settings.embed_dim
        with random_stream(cpu, seed, "embedding"):
            self.embedding = nn.Embedding(vocab_size, settings.embed_dim)
        self.layers = nn.ModuleList(
            EncoderLayer(make_attention, settings, (seed, "layer", index))
            for index in range(settings.num_layers)
        )
        self.final_norm = nn.LayerNorm(settings.embed_dim)
        self.dropout = nn.Dropout(settings.dropout)
        with random_stream(cpu, seed, "classifier"):
            self.classifier = nn.Linear(settings.embed_dim, num_classes)

    @property
    def attentions(self) -> list[nn.Module]:
        """The attention of each layer."""
        return [layer.get_submodule("attention") for layer in self.layers]

    def forward(self, tokens: Tensor, key_padding_mask: Tensor) -> Tensor:
        """tokens (N, L) or (N, L, I) int64, key_padding_mask (N, L) bool, True = pad -> logits in float32:
        (N, C), or (N, L, C) for token targets."""
        x = self.embedding(tokens)
        if tokens.dim() == 3:
            x = x.sum(2)  # (N, L, I, E) -> (N, L, E)
        if self.form.positions:
            x = x + sinusoidal_positions(tokens.shape[1], self.embed_dim, tokens.device)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, key_padding_mask, self.form.causal)
        x = self.final_norm(x).float().masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
        if self.form.target == "sequence":
            true_tokens = (~key_padding_mask).sum(1, keepdim=True).clamp(min=1)
            x = x.sum(1) / true_tokens  # (N, L, E) -> (N, E)
        # In float32: in bf16 the logits of two classes are often equal.
        with torch.autocast(tokens.device.type, enabled=False):
            return self.classifier(x)  # (N, C) or (N, L, C)


# Its training


def use_bf16(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def loss_and_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits (..., C), labels (...): the summed cross-entropy where a label counts, and right answers."""
    logits, labels = logits.flatten(0, -2), labels.flatten()
    return F.cross_entropy(logits.float(), labels, reduction="sum"), (logits.argmax(-1) == labels).sum()


class Evaluation(NamedTuple):
    """Mean loss and accuracy over the predictions of a split: one an example, or one a marked token."""

    loss: float
    accuracy: float


class Trainer:
    """A model in training on a task: its optimizer, its batches and what is kept of its epochs.

    check: called after each step and each batch of an evaluation; what it raises ends training there, and
        the epoch is lost.
    fingerprint: what a checkpoint must agree in to be resumed from.
    """

    def __init__(
        self,
        model: TransformerClassifier,
        task: TaskData,
        settings: TrainingSettings,
        seed: int,
        device: torch.device,
        progress: Progress,
        check: Callable[[], None] = lambda: None,
        fingerprint: str = "",
    ) -> None:
        self.started, self.memory = time.perf_counter(), PeakMemory(device)
        self.model, self.task, self.settings, self.seed = model.to(device), task, settings, seed
        self.device, self.progress, self.check, self.fingerprint = device, progress, check, fingerprint
        self.forward = torch.compile(model, dynamic=True) if settings.compile else model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Weights decay, biases, norms, horizons and other single numbers do not.
        matrices = [parameter for parameter in self.parameters if parameter.dim() > 1]
        others = [parameter for parameter in self.parameters if parameter.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        self.optimizer = torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"), **options)
        self.bf16 = use_bf16(settings.precision, device)
        longest = max(int(np.max(split.lengths, initial=1)) for split in (task.train, task.val, task.test))
        self.pad_to: Any = longest if settings.pad_to == "max" else "longest"
        self.steps = math.ceil(len(task.train) / settings.batch_size)  # of an epoch
        self.warm = False
        self.rows: list[dict[str, Any]] = []
        self.best_weights: dict[str, Tensor] = {}
        self.earlier_seconds, self.earlier_peak = 0.0, 0  # of processes before this one

    def step(self, batch: Batch) -> Tensor:
        """One optimizer step. Of the batch, on the device: (summed loss, right answers)."""
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self.forward(batch.tokens, batch.key_padding_mask)
        loss, correct = loss_and_correct(logits, batch.labels)
        (loss / max(1, batch.predictions)).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_clip)
        self.optimizer.step()
        return torch.stack([loss.detach(), correct])

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train on every example once. Returns what metrics.jsonl says of it."""
        train = self.task.train_of(self.seed, epoch)
        order = {"seed": self.seed, "epoch": epoch, "pad_to": self.pad_to, "device": self.device}
        batches = training_batches(train, self.settings.batch_size, **order)
        self.model.train()
        self.progress.epoch_started(epoch, self.steps)
        meter = StepMeter(epoch, int(train.lengths.sum()), self.progress, self.settings.divergence_steps)
        with random_stream(self.device, self.seed, "dropout", epoch):
            for batch in self._checked(batches):
                meter.add(self.step(batch), batch.predictions, len(batch.index))
                if not self.warm:  # a process's first step compiles, allocates and tunes
                    meter.start_clock(without=batch)
                    self.warm = True
            return meter.row()

    @torch.no_grad()
    def evaluate(self, model: Callable[[Tensor, Tensor], Tensor], split: TokenDataset) -> Evaluation:
        """Evaluate `self.model`, or `self.forward`, which may be compiled; sums are over examples."""
        self.model.eval()
        beyond = self.pad_to != "longest" and int(np.max(split.lengths, initial=1)) > self.pad_to
        pad_to = "longest" if beyond else self.pad_to
        batches = evaluation_batches(split, self.settings.batch_size, pad_to=pad_to, device=self.device)
        sums, predictions = [], 0
        with random_stream(self.device, self.seed, "evaluation", len(self.rows)):
            for batch in self._checked(batches):
                with self.autocast():
                    logits = model(batch.tokens, batch.key_padding_mask)
                predictions += batch.predictions
                sums.append(torch.stack(loss_and_correct(logits, batch.labels)))
        loss, correct = torch.stack(sums).cpu().double().sum(0).tolist()
        return Evaluation(loss / predictions, correct / predictions)

    def validate(self, epoch: int) -> dict[str, Any]:
        started = time.perf_counter()
        validation = self.evaluate(self.forward, self.task.val)
        if not math.isfinite(validation.loss):
            raise DivergedError(f"the validation loss is {validation.loss} after epoch {epoch}")
        seconds = time.perf_counter() - started
        return {"val_loss": validation.loss, "val_accuracy": validation.accuracy, "eval_seconds": seconds}

    def fit(self, folder: Path) -> None:
        """Train until the epochs or the patience are used up; after each epoch the folder is complete."""
        if self.rows:
            write_json_lines(folder / "metrics.jsonl", as_json(self.rows))
        while not self.finished:
            epoch = len(self.rows) + 1
            row = {"epoch": epoch, **self.train_epoch(epoch), **self.validate(epoch)}
            row |= {"steps": epoch * self.steps, "learning_rate": self.settings.learning_rate}
            row |= {"peak_memory_bytes": self.peak_memory, "learned": learned_scalars(self.model.attentions)}
            self.rows.append(row)
            improved = self.best_epoch == epoch
            if improved:
                weights = self.model.state_dict()
                self.best_weights = {name: value.detach().cpu().clone() for name, value in weights.items()}
            # The last checkpoint comes last: whoever reads it finds all that led to it.
            write_json_lines(folder / "metrics.jsonl", as_json(self.rows))
            if improved:
                best = {"epoch": epoch, "val_accuracy": row["val_accuracy"], "model": self.best_weights}
                write_weights(folder / BEST, best)
            write_checkpoint(folder, self.state())
            self.progress.epoch_ended(self.rows[-1])

    @property
    def best_epoch(self) -> int:
        """The first of those that are best by the task's metric on validation; 0 before the first."""
        by_loss = self.task.form.metric == "bits_per_byte"
        scores = [-row["val_loss"] if by_loss else row["val_accuracy"] for row in self.rows]
        return int(np.argmax(scores)) + 1 if scores else 0

    @property
    def finished(self) -> bool:
        epochs = len(self.rows)
        return epochs >= self.settings.max_epochs or epochs - self.best_epoch >= self.settings.patience

    def test(self) -> tuple[Evaluation, Evaluation]:
        """Of the best epoch's weights, which the model is left with, and of the last epoch's."""
        best = last = self.evaluate(self.model, self.task.test)
        if self.best_epoch < len(self.rows):
            self.model.load_state_dict(self.best_weights)
            best = self.evaluate(self.model, self.task.test)
        return best, last

    def _checked(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with a check when the work on each is done."""
        for batch in batches:
            yield batch
            self.check()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    @property
    def peak_memory(self) -> int | None:
        """Bytes, the peak of all the cell's processes; None where it cannot be measured."""
        found = self.memory.read()
        return None if found is None else max(found, self.earlier_peak)

    @property
    def seconds(self) -> float:
        """Wall time, that of earlier processes up to their last checkpoint included."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def state(self) -> dict[str, Any]:
        """All that the next epoch needs: a checkpoint's content."""
        return {
            "fingerprint": self.fingerprint,
            "epoch": len(self.rows),
            "rows": as_json(self.rows),
            "best_model": self.best_weights,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.seconds,
            "peak": self.peak_memory or 0,
        }

    def resumed(self, state: dict[str, Any]) -> Self:
        """This trainer with a checkpoint's state. Raises CheckpointError, and may be left half changed, where
        that is of another cell, other settings or another model."""
        if state.get("fingerprint") != self.fingerprint:
            raise CheckpointError("it is of another cell or of other settings")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.rows, self.best_weights = state["rows"], state["best_model"]
            self.earlier_seconds, self.earlier_peak = state["seconds"], state["peak"]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"it does not fit the model ({first_line(error)})") from error
        self.progress.note(f"resumes after epoch {len(self.rows)}")
        return self


def train_and_evaluate(
    make_attention: AttentionFactory,
    task: TaskData,
    model_settings: ModelSettings,
    training: TrainingSettings,
    seed: int,
    folder: Path,
    device: torch.device,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train one model on one task with one seed, then test it. Returns result.json.

    Writes metrics.jsonl and the checkpoints after each epoch, attention_patterns.npz at the end. Raises
    DivergedError where losses are not finite, and what `check` raises, which is called after each step.
    """
    progress = progress or Progress()
    # With the mechanism's own settings, if a partial holds them: they need leave no trace in the weights.
    own = getattr(make_attention, "keywords", {})
    fingerprint = repr([seed, task.name, asdict(training), asdict(model_settings), own])

    def make_trainer() -> Trainer:
        sizes = task.vocab_size, task.num_classes
        model = TransformerClassifier(make_attention, *sizes, model_settings, seed, task.form)
        return Trainer(model, task, training, seed, device, progress, check, fingerprint)

    trainer = resume(folder, lambda state: make_trainer().resumed(state), progress.note) or make_trainer()
    trainer.fit(folder)
    best, last = trainer.test()
    model = trainer.model  # with the best epoch's weights

    def patterns() -> str:
        write_arrays(folder / PATTERNS, attention_patterns(model, model.attentions, task, seed, device))
        return PATTERNS

    result = summary(trainer, best, last)
    if task.longer_tests:
        tests = {str(int(task.test.lengths.max())): best}
        tests |= {length: trainer.evaluate(model, split) for length, split in task.longer_tests.items()}
        result["test_by_length"] = {length: found._asdict() for length, found in tests.items()}
    # A trained cell is not lost to what comes after training: a user's model may not be countable or shown.
    result |= _if_possible("forward_flops", lambda: forward_flops(model, model.attentions, task.test.lengths))
    result |= _if_possible("attention_patterns", patterns)
    return result | {"wall_seconds": trainer.seconds}


def _if_possible(name: str, make: Callable[[], Any]) -> dict[str, Any]:
    """A value of the result, or null and the reason why there is none."""
    try:
        return {name: make(), f"{name}_reason": ""}
    except WriteError:
        raise
    except Exception as error:
        return {name: None, f"{name}_reason": first_line(error)}


def summary(trainer: Trainer, best: Evaluation, last: Evaluation) -> dict[str, Any]:
    """The figures of a finished cell, from its epochs and its two test results."""
    rows, model = trainer.rows, trainer.model
    seconds = [row["train_seconds"] for row in rows if row["train_seconds"] is not None]
    rates = [row["tokens_per_second"] for row in rows if row["tokens_per_second"] is not None]
    return {
        "schema_version": SCHEMA_VERSION,
        "metric": trainer.task.form.metric,
        "test_accuracy_best": best.accuracy,
        "test_accuracy_last": last.accuracy,
        "test_loss_best": best.loss,
        "test_loss_last": last.loss,
        "best_epoch": trainer.best_epoch,
        "best_val_accuracy": rows[trainer.best_epoch - 1]["val_accuracy"],
        "epochs_run": len(rows),
        "stopped_early": len(rows) < trainer.settings.max_epochs,
        "seconds_per_epoch": float(np.mean(seconds)) if seconds else None,
        "tokens_per_second": float(np.mean(rates)) if rates else None,
        "peak_memory_bytes": rows[-1]["peak_memory_bytes"],
        "memory_kind": trainer.memory.kind,
        "memory_reason": trainer.memory.reason,
        "parameters": count_parameters(model),
        "attention_parameters": count_parameters(nn.ModuleList(model.attentions)),
        "precision": "bf16" if trainer.bf16 else "fp32",
    }
