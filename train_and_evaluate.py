"""How a model is trained, selected and tested: one cell of the comparison, equal for every mechanism.

    result = train_and_evaluate(make_attention, task, model_settings, training_settings, seed, folder, device)

With one seed all models see the same batches in the same order and the same dropout stream, from the same
starting weights (`TransformerClassifier`). Every random number comes from (seed, purpose, epoch), so an
epoch can be repeated from the weights before it. Selection is on validation accuracy; the test split is
read once, when training has ended. Losses and accuracies are sums over examples, divided once.

Training goes on from the folder's last checkpoint, if it has one: on the CPU to the same bits as without
the interruption. A checkpoint is written after each epoch, and within one that is asked to stop.

Under torchrun (experiment/distributed.py) the processes divide each batch among them: the batches, and up to
the order of float sums the losses and the weights, are those of one process, as long as dropout is 0; with
dropout each process draws masks of its own. A batch of an evaluation is one process's as a whole, and none is
read twice. Rank 0 alone writes, and the times and the peak memory are its own.

Symbols: N batch, L length. True in a boolean mask means blocked.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command_line import check_settings, setting
from data_pipeline import Batch, TaskData, TokenDataset, evaluation_batches, training_batches
from evaluate_performance import convergence_epoch
from experiment.attention_patterns import NoAttentionMapsError, attention_patterns
from experiment.checkpoints import (
    BEST,
    CheckpointError,
    Note,
    generators,
    set_aside,
    set_generators,
    usable_checkpoints,
    write_checkpoint,
    write_weights,
)
from experiment.device_memory import PeakMemory
from experiment.distributed import by_first, dealt, from_first, parallel, rank, shard, world_size
from experiment.evaluation import Evaluation, evaluate
from experiment.model_cost import count_parameters, forward_flops
from experiment.stop_request import StoppedError
from experiment.training_progress import DivergedError, Progress, StepMeter
from experiment.transformer_classifier import (
    AttentionFactory,
    ModelSettings,
    TransformerClassifier,
    random_stream,
)
from results_folder import SCHEMA_VERSION, as_json, write_atomic, write_json_lines

__all__ = ["ModelSettings", "TrainingSettings", "TransformerClassifier", "evaluate", "train_and_evaluate"]


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
    divergence_steps: int = setting(
        3, "end as diverged after this many steps in a row with a loss that is not finite", minimum=1
    )

    def __post_init__(self) -> None:
        check_settings(self)


def use_bf16(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


class Trainer:
    """A model in training on a task: its optimizer, its batches and what is kept of its epochs.

    check: called after each step and each batch of an evaluation, raises StoppedError to stop there.
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
    ) -> None:
        self.model, self.task, self.settings, self.seed = model.to(device), task, settings, seed
        self.device, self.progress, self.check = device, progress, check
        self.forward = torch.compile(model, dynamic=True) if settings.compile else model
        self.forward_in_step = parallel(self.forward)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        # What a checkpoint must agree in to be gone on from.
        self.fingerprint = as_json({"seed": seed, "task": task.name, "training": asdict(settings)})
        self.bf16 = use_bf16(settings.precision, device)
        splits = (task.train, task.val, task.test)
        longest = max(int(np.max(split.lengths, initial=1)) for split in splits)
        self.pad_to: Any = longest if settings.pad_to == "max" else "longest"
        self.rows: list[dict[str, Any]] = []
        self.best_epoch, self.best_val_accuracy = 0, -1.0
        self.best_weights: dict[str, Tensor] = {}
        self.streak = (0, "")  # see StepMeter
        self.begun: dict[str, Any] | None = None  # of an epoch that was stopped: see `save_stopped_epoch`
        self.meter: StepMeter | None = None
        self.warm = False
        self.earlier_seconds, self.started = 0.0, time.perf_counter()
        self.earlier_peak = 0

    def fit(self, folder: Path, memory: PeakMemory) -> None:
        """Train until the epochs or the patience are used up; after each epoch the folder is complete."""
        steps = math.ceil(len(self.task.train) / self.settings.batch_size)
        if self.rows:
            _write_metrics(folder, self.rows)
        while not self.finished:
            epoch = len(self.rows) + 1
            self.progress.epoch_started(epoch, steps)
            try:
                row = {"epoch": epoch, **self.train_epoch(epoch), **self.validate(epoch)}
            except StoppedError:
                self.save_stopped_epoch(folder, memory)
                raise
            row |= {"learning_rate": self.settings.learning_rate, "peak_memory_bytes": self.peak(memory)}
            row["learned"] = self.learned_scalars()
            self.rows.append(row)
            self.meter = None
            improved = row["val_accuracy"] > self.best_val_accuracy
            if improved:
                self.best_epoch, self.best_val_accuracy = epoch, row["val_accuracy"]
                self.best_weights = {
                    name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()
                }
            # The last checkpoint comes last: whoever reads it finds all that led to it.
            _write_metrics(folder, self.rows)
            if improved:
                write_weights(folder / BEST, self.best_state())
            write_checkpoint(folder, self.state(memory))
            self.progress.epoch_ended(row)

    @property
    def finished(self) -> bool:
        epochs = len(self.rows)
        tired = epochs > 0 and epochs - self.best_epoch >= self.settings.patience
        return epochs >= self.settings.max_epochs or tired

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train on every example once, or on the rest of them where the epoch was stopped before.

        Timing leaves out the first step of a process, which warms up."""
        self.model.train()
        train = self.task.train
        self.meter = meter = StepMeter(epoch, self.progress, self.settings.divergence_steps, self.streak)
        meter.timed_tokens = int(train.lengths.sum())
        with random_stream(self.device, self.seed, "dropout", epoch, *([rank()] if rank() else [])):
            if self.begun is not None:
                meter.restore(self.begun["meter"])
                set_generators(self.begun["generators"], self.device)
                self.begun = None
            batches = training_batches(
                train,
                self.settings.batch_size,
                seed=self.seed,
                epoch=epoch,
                pad_to=self.pad_to,
                device=self.device,
                skip=meter.steps,
            )
            started = time.perf_counter() - meter.seconds
            for batch in batches:
                meter.add(self.step(batch), len(batch.labels))
                if not self.warm:
                    meter.timed_tokens -= int((~batch.key_padding_mask).sum())
                    self.synchronize()
                    self.warm, started = True, time.perf_counter() - meter.seconds
                try:
                    self.check()
                except StoppedError:
                    self.synchronize()
                    meter.seconds = time.perf_counter() - started
                    self.begun = {"meter": meter.state(), "generators": generators(self.device)}
                    raise
            self.synchronize()
            meter.seconds = time.perf_counter() - started
        loss, accuracy = meter.means()
        self.streak = meter.streak
        timed = meter.timed_tokens > 0
        return {
            "train_loss": loss,
            "train_accuracy": accuracy,
            "train_seconds": meter.seconds if timed else None,
            "train_tokens": int(train.lengths.sum()),
            "train_examples": len(train),
            "tokens_per_second": meter.timed_tokens / meter.seconds if timed else None,
        }

    def step(self, batch: Batch) -> Tensor:
        """One optimizer step; of this rank's share of the batch, on the device: (summed loss, correct)."""
        own = shard(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.forward_in_step(own.tokens, own.key_padding_mask)
        loss_sum = F.cross_entropy(logits, own.labels, reduction="sum")
        # The mean over the ranks, which the gradients become, is then the mean over the batch.
        (loss_sum / len(batch.labels) * world_size()).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_clip)
        self.optimizer.step()
        return torch.stack([loss_sum.detach(), (logits.argmax(-1) == own.labels).sum()])

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
        with random_stream(self.device, self.seed, "evaluation", len(self.rows)):
            return evaluate(models, self._checked(batches), self.autocast)

    def _checked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in dealt(batches):
            if batch is not None:
                yield batch
            self.check()

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

    def peak(self, memory: PeakMemory) -> int | None:
        """The peak memory of the cell, whose earlier processes are remembered."""
        found = memory.read()
        return None if found is None else max(found, self.earlier_peak)

    def state(self, memory: PeakMemory) -> dict[str, Any]:
        """All that is needed to go on: a checkpoint's content."""
        return {
            "fingerprint": self.fingerprint,
            "epoch": len(self.rows),
            "rows": as_json(self.rows),
            "best_epoch": self.best_epoch,
            "best_val_accuracy": self.best_val_accuracy,
            "best_model": self.best_weights,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "streak": self.streak,
            "begun": self.begun,
            "seconds": self.earlier_seconds + time.perf_counter() - self.started,
            "peak": self.peak(memory) or 0,
        }

    def best_state(self) -> dict[str, Any]:
        return {"epoch": self.best_epoch, "val_accuracy": self.best_val_accuracy, "model": self.best_weights}

    def save_stopped_epoch(self, folder: Path, memory: PeakMemory) -> None:
        """A checkpoint within the epoch, so that nothing is lost; none where the last losses were not finite:
        the checkpoint of the epoch before is then a better place to go on from."""
        assert self.meter is not None
        if self.begun is None:  # stopped in validation: no step is left
            self.begun = {"meter": self.meter.state(), "generators": generators(self.device)}
        self.streak = self.meter.streak
        if self.streak[0] == 0:
            write_checkpoint(folder, self.state(memory))

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state. Raises CheckpointError, and may be left half changed, where it is of
        another cell, other settings or another model."""
        if _with_defaults(state.get("fingerprint")) != self.fingerprint:
            raise CheckpointError("it is of another cell or of other settings")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.rows, self.best_weights = state["rows"], state["best_model"]
            self.best_epoch, self.best_val_accuracy = state["best_epoch"], state["best_val_accuracy"]
            self.streak, self.begun = tuple(state["streak"]), state["begun"]
            self.earlier_seconds, self.earlier_peak = state["seconds"], state["peak"]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise CheckpointError(f"it does not fit the model ({first})") from error

    def best_model(self) -> TransformerClassifier:
        """The model with the best epoch's weights, in eval mode: this one, or a copy."""
        self.model.eval()  # a process that found the training finished has not evaluated yet
        if self.best_epoch == len(self.rows):
            return self.model
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.best_weights)
        return model


def _with_defaults(fingerprint: Any) -> Any:
    """A checkpoint's fingerprint, with the default of each model setting that is younger than it."""
    match fingerprint:
        case {"model": dict(model)}:
            return fingerprint | {"model": as_json(asdict(ModelSettings())) | model}
    return fingerprint


def start_or_go_on(make_trainer: Callable[[], Trainer], folder: Path, note: Note) -> Trainer:
    """A trainer at the start, or where the newest checkpoint that fits left off, which is noted."""
    trainer, tried = make_trainer(), False
    checkpoints = usable_checkpoints(folder, note)
    while found := from_first(lambda: next(checkpoints, None)):
        path, state = found
        tried = True
        try:
            trainer.restore(state)
        except CheckpointError as error:
            set_aside(path, str(error), note)
            trainer = make_trainer()
            continue
        within = f", step {trainer.begun['meter']['steps']} of the next" if trainer.begun else ""
        note(f"goes on after epoch {len(trainer.rows)}{within}")
        return trainer
    if tried:
        note("starts anew: no checkpoint can be used")
    return trainer


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
    """Train one model on one task with one seed, then read the test split, once. Returns result.json.

    Writes metrics.jsonl and the checkpoints after each epoch, test_predictions.npz and
    attention_patterns.npz at the end. Raises DivergedError where losses are not finite, and StoppedError, a
    checkpoint being written, where `check`, which is called after each step, does.
    """
    progress = progress or Progress()
    memory = PeakMemory(device)

    def make_trainer() -> Trainer:
        sizes = task.vocab_size, task.num_classes
        model = TransformerClassifier(make_attention, *sizes, model_settings, seed)
        trainer = Trainer(model, task, training, seed, device, progress, check)
        trainer.fingerprint["model"] = as_json(asdict(model_settings))
        return trainer

    trainer = start_or_go_on(make_trainer, folder, progress.note)
    trainer.fit(folder, memory)

    best = trainer.best_model()
    models = [trainer.model] if best is trainer.model else [best, trainer.model]
    evaluations = trainer.evaluate(models, task.test)
    check()
    labels = np.asarray(task.test.labels)
    _save_arrays(
        folder / "test_predictions.npz", {"predictions": evaluations[0].predictions, "labels": labels}
    )
    result = summary(trainer, evaluations[0], evaluations[-1])
    result |= _flops(trainer.model, task)
    result |= {"memory_kind": memory.kind, "memory_reason": memory.reason}
    try:
        patterns = attention_patterns(best, best.attentions, task, seed, device)
        _save_arrays(folder / "attention_patterns.npz", patterns)
        result |= {"attention_patterns": "attention_patterns.npz", "attention_patterns_reason": ""}
    except NoAttentionMapsError as error:
        result |= {"attention_patterns": None, "attention_patterns_reason": str(error)}
    return result | {"wall_seconds": trainer.earlier_seconds + time.perf_counter() - trainer.started}


def _flops(model: TransformerClassifier, task: TaskData) -> dict[str, Any]:
    """Of the matrix products of a forward pass, the mean over the test examples; or why it is not known."""
    try:
        return {"forward_flops": forward_flops(model, task.test.lengths), "forward_flops_reason": ""}
    except Exception as error:  # a model of the user's may not be countable, and is trained by now
        return {"forward_flops": None, "forward_flops_reason": f"{type(error).__name__}: {error}"}


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
        "parameters": count_parameters(model),
        "attention_parameters": sum(attention_parameters.values()),
        "processes": world_size(),
        "precision": "bf16" if trainer.bf16 else "fp32",
        "test_predictions_best": "test_predictions.npz",
    }


@by_first
def _write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_json_lines(folder / "metrics.jsonl", as_json(rows))


@by_first
def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    write_atomic(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
