"""A tiny task, cells trained on it, and what two equal runs of a cell have in common."""

import contextlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from conventional_attention import ConventionalAttention
from data_pipeline import TaskData, TokenDataset
from experiment.cells import noted
from experiment.models import Model
from train_and_evaluate import ModelSettings, TrainingSettings, train_and_evaluate

VOCABULARY, CLASSES = 11, 3
SETTINGS = ModelSettings(embed_dim=8, num_heads=2, num_layers=2, feed_forward_dim=12)
TRAINING = TrainingSettings(batch_size=8, learning_rate=1e-2, max_epochs=3)
CPU = torch.device("cpu")
CONVENTIONAL = partial(ConventionalAttention, 8, 2)
TIMES = ("train_seconds", "eval_seconds", "tokens_per_second", "seconds_per_epoch", "wall_seconds")
MEMORY = ("peak_memory_bytes", "memory_kind", "memory_reason")


@contextlib.contextmanager
def meanwhile(action: Callable[[], object]) -> Iterator[None]:
    """Let another thread do something while this one is in the run."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(action)
        yield
    done.result()


def make_split(size: int, seed: int) -> TokenDataset:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 10, size)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = generator.integers(1, VOCABULARY, offsets[-1]).astype(np.uint8)
    return TokenDataset(tokens=tokens, offsets=offsets, labels=generator.integers(0, CLASSES, size))


def make_task(train: int = 37) -> TaskData:
    """37 training examples: 5 steps an epoch. 19 validation and 23 test examples: 3 batches each."""
    return TaskData(
        name="tiny",
        title="Tiny",
        vocab_size=VOCABULARY,
        num_classes=CLASSES,
        class_names=("a", "b", "c"),
        train=make_split(train, 1),
        val=make_split(19, 2),
        test=make_split(23, 3),
        symbols=str,
        provenance={},
    )


def run_tiny(
    folder: Path,
    attention: Callable[[], nn.Module] = CONVENTIONAL,
    training: TrainingSettings = TRAINING,
    seed: int = 0,
    task: TaskData | None = None,
    **options: Any,
) -> tuple[str, str]:
    """Train a cell of a task, or of `make_task`, in the folder; its state and the reason."""
    folder.mkdir(exist_ok=True)
    arguments = attention, task or make_task(), SETTINGS, training, seed, folder, CPU
    return noted(folder, lambda: train_and_evaluate(*arguments, **options))


def attention_of(name: str, settings: ModelSettings = SETTINGS) -> Callable[[], nn.Module]:
    """The factory of a model's attention."""
    return Model.parse(name).attention(settings)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_of(folder: Path) -> tuple[str, str]:
    status = json.loads((folder / "status.json").read_text())
    return status["state"], status["reason"]


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMES + MEMORY}


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished cell holds but times and memory, comparable with ==: arrays as their bytes."""
    found: dict[str, Any] = {"metrics": [_timeless(row) for row in metrics_of(folder)]}
    found["result"] = _timeless(json.loads((folder / "result.json").read_text()))
    for name in ("last", "best"):
        saved = torch.load(folder / f"checkpoint_{name}.pt", weights_only=True)
        found[name] = {key: value.numpy().tobytes() for key, value in saved["model"].items()}
    with np.load(folder / "attention_patterns.npz", allow_pickle=False) as arrays:
        found["patterns"] = {key: arrays[key].tobytes() for key in arrays.files}
    return found
