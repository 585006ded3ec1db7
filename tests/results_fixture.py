"""Results folders as run_experiment.py writes them, with seeded random numbers and no training."""

import functools
import json
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import analyze_results
from reporting.metrics import ACCURACY
from results_folder import Cell

MODELS = ("conventional", "gravitational", "multi_timescale", "gravitational_multi_timescale")
TITLES = {"listops": "ListOps (LRA)", "imdb": "IMDb bytes (LRA Text)"}
EDGES = np.concatenate([[0], 2 ** np.arange(11)])
LAYERS, EXAMPLES, HEADS = 2, 3, 2
LENGTHS = 17, 13, 8  # of the examples with patterns
HOLES = {
    Cell("listops", "multi_timescale", 1): "diverged",
    Cell("listops", "gravitational", 0): "failed",
    Cell("listops", "gravitational", 1): "missing",
    Cell("listops", "gravitational", 2): "failed",
}
REASONS = {"failed": "RuntimeError: out of memory (x.py:1 in f)", "diverged": "the loss is nan in epoch 3"}
TEXT = "the film was not bad, but its end is a mess"
Row = dict[str, Any]


def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an analysis draw nothing: drawing takes nearly all of its time."""
    monkeypatch.setattr(analyze_results, "all_figures", lambda analysis, only=None: iter(()))


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """What is below a folder, by its path: the content of files, nothing of links, folders and pipes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")


def rewrite(path: Path, **values: Any) -> None:
    """Change entries of a JSON file."""
    write(path, json.loads(path.read_text(encoding="utf-8")) | values)


def put(path: Path, place: str, value: Any) -> None:
    """Set one entry of a JSON file. place: the keys that lead to it, with spaces between them."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    *parents, last = place.split()
    functools.reduce(operator.getitem, parents, whole)[last] = value
    write(path, whole)


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def rows_of(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def report_of(root: Path) -> str:
    return (root / "analysis" / "report.md").read_text(encoding="utf-8")


def tidy(values: dict[str, list[float]], metric: str = ACCURACY, task: str = "listops") -> pd.DataFrame:
    """The tidy table of one metric, from the values by seed of each model."""
    rows = [(model, seed, value) for model, found in values.items() for seed, value in enumerate(found)]
    return pd.DataFrame(rows, columns=["model", "seed", "value"]).assign(task=task, metric=metric)


def task_info(task: str) -> Row:
    title = TITLES.get(task, task.replace("_", " ").capitalize())
    classes, majority = (10, 0.175) if task == "listops" else (2, 0.5)
    provenance = {"source": "generated", "seed": 0, "sha256": "0" * 64}
    return {
        **{"title": title, "num_classes": classes, "chance": 1 / classes, "majority": majority},
        **{"test_size": 2000, "provenance": provenance},
    }


def make_results(
    root: Path,
    *,
    tasks: tuple[str, ...] = ("listops",),
    models: tuple[str, ...] = MODELS,
    seeds: tuple[int, ...] = (0, 1, 2),
    states: dict[Cell, str] | None = None,
    preset: str = "full",
    unavailable: dict[str, str] | None = None,
    epochs: int = 6,
    patterns: bool = True,
    data: Row | None = None,
) -> Path:
    """A results folder at `root`. `states`: of cells that are not done; "missing" leaves no file behind.
    data: settings of the data of every task, over those of the full preset."""
    cells = [Cell(task, model, seed) for seed in seeds for task in tasks for model in models]
    settings = {
        **{"model": {"embed_dim": 128}, "training": {"learning_rate": 1e-4}},
        "data": {task: {"tokenizer": "byte", "max_length": None} | (data or {}) for task in tasks},
    }
    config = {
        "schema_version": 1,
        **{"preset": preset, "command": f"python run_experiment.py --preset {preset}", "settings": settings},
        **{"models": models, "tasks": tasks, "seeds": seeds, "cells": [cell.named() for cell in cells]},
        **{"task_info": {task: task_info(task) for task in tasks}, "unavailable": unavailable or {}},
    }
    write(root / "config.json", config)
    environment = {
        **{"python": "3.11.7", "torch": "2.13.0", "cpu": "A CPU", "cores": 2, "threads": 2, "device": "cpu"},
        **{"device_name": "A CPU", "git_commit": "c0ffee" * 6 + "c0ff", "git_dirty": False},
    }
    write(root / "environment.json", environment)
    for cell in cells:
        if (state := (states or {}).get(cell, "done")) != "missing":
            make_cell(cell.folder(root), cell, models.index(cell.model), state, epochs, patterns)
    return root


def make_cell(folder: Path, cell: Cell, number: int, state: str, epochs: int, patterns: bool) -> None:
    """One cell; `number` is the model's place, which sets its level."""
    write(folder / "status.json", {"state": state, "reason": REASONS.get(state, ""), "time": "2026-01-02"})
    write(folder / "config.json", {"schema_version": 1, "task": cell.task, "model": cell.model})
    if state == "pending":
        return
    draws = np.random.default_rng([cell.seed, number, len(cell.task)])
    chance, level = (0.1, 0.36) if cell.task == "listops" else (0.5, 0.62)
    top = float(level + 0.015 * number + draws.normal(0, 0.006))
    rows: list[Row] = []
    for epoch in range(1, 1 + (max(1, epochs // 2) if state == "diverged" else epochs)):
        reached = 1 - np.exp(-epoch / (1.5 + 0.5 * number))
        accuracy = float(chance + (top - chance) * reached + draws.normal(0, 0.003))
        learned = {f"layer{layer}": learned_scalars(epoch, cell.model, draws) for layer in range(LAYERS)}
        train_loss = float(2 - reached + draws.normal(0, 0.01))
        val_loss = float(2.02 - 0.95 * reached + draws.normal(0, 0.01))
        row = {
            **{"epoch": epoch, "train_loss": train_loss, "train_accuracy": accuracy + 0.01},
            **{"val_loss": val_loss, "val_accuracy": accuracy},
            **{"train_seconds": 10.0 * (1 + number), "train_tokens": 100_000},
            "learned": {layer: scalars for layer, scalars in learned.items() if scalars},
        }
        rows.append(row)
    write_rows(folder, rows)
    if state == "done":
        size = 50_000 * number
        result = {
            **{"schema_version": 1, "test_accuracy_best": top, "test_accuracy_last": top - 0.004},
            **{"best_epoch": len(rows), "epochs_run": len(rows)},
            "convergence_epoch": 99,  # of an older version: not read
            "seconds_per_epoch": float(10 * (1 + number) + draws.random()),
            "tokens_per_second": float(1e4 / (1 + number) + draws.random()),
            "peak_memory_bytes": int(2**29 * (1 + 0.3 * number)),
            **{"parameters": 300_000 + size, "attention_parameters": 130_000 + size},
        }
        write(folder / "result.json", result)
        if patterns:
            arrays = pattern_arrays(cell.model, draws)
            np.savez_compressed(folder / "attention_patterns.npz", allow_pickle=False, **arrays)


def learned_scalars(epoch: int, model: str, draws: np.random.Generator) -> Row:
    scalars: Row = {}
    if "timescale" in model:
        rho = np.array([[0.9], [0.99], [0.999]]) + np.zeros((3, HEADS))
        scalars["gamma"] = (1 - (1 - rho) * np.exp(-0.03 * epoch * draws.random(rho.shape))).tolist()
    if "gravitational" in model:
        timescales = 3 if "timescale" in model else 1
        scalars["gravity"] = np.exp(0.02 * epoch * draws.normal(size=(timescales, HEADS))).tolist()
    if model == "gravitational_multi_timescale":
        law = {"power": 8 + 0.1 * epoch, "softening": 0.1 - 0.001 * epoch}
        scalars |= {name: [[value] * HEADS] * 3 for name, value in law.items()}
    return scalars


def pattern_arrays(
    model: str, draws: np.random.Generator, *, heads: int = HEADS, longest_first: tuple[int, ...] = LENGTHS
) -> dict[str, np.ndarray]:
    timescales = 3 if "timescale" in model else 1
    lengths, size = np.array(longest_first), longest_first[0]
    tokens = np.zeros((EXAMPLES, size), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = [ord(letter) + 1 for letter in TEXT[:length]]
    true = np.arange(size) < lengths[:, None]
    logits = draws.normal(size=(LAYERS, EXAMPLES, timescales, heads, size, size))
    pair = true[:, None, None, :, None] & true[:, None, None, None, :]
    weights = np.where(pair, np.exp(logits), 0)
    maps = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    shares = draws.random((LAYERS, timescales, heads, len(EDGES) - 1)) + 0.2
    symbols = [[chr(token - 1).replace(" ", "␣") if token else "" for token in row] for row in tokens]
    arrays = {
        **{"tokens": tokens, "symbols": np.array(symbols), "lengths": lengths},
        **{"labels": np.arange(EXAMPLES), "predictions": np.zeros(EXAMPLES, np.int64)},
        "maps": maps.astype(np.float16),
        "distance_edges": EDGES,
        "distance_share": shares / shares.sum(-1, keepdims=True),
    }
    if "gravitational" in model:
        for role in ("key_mass", "query_mass"):
            mass = draws.random(maps.shape[:-1]) + (tokens % 7)[:, None, None, :] / 5
            arrays[role] = np.where(true[:, None, None, :], mass, 0).astype(np.float32)
    return arrays
