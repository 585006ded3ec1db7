"""The tables behind the comparison: pure functions from a results folder, as read, to pandas tables.

    results = usable(read_results(folder))      # run_results.py
    table = metric_table(results, patterns)     # task, model, seed, metric, value: everything measured
    summarize(table)["recall", "gravitational", "seconds_per_epoch"].mean

Accuracies, or bits per byte, are under the name of their task's metric (metrics.py). The seed is the unit.
"""

import math
import re
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from reporting.attention_numbers import attention_entropy, share_within
from reporting.metrics import METRICS, PERCENT, Metric, number
from reporting.run_results import BASELINE, as_object, done_cells, task_facts
from reporting.seed_statistics import Estimate, estimate
from results_folder import AttentionPatterns, Cell, Results

CONVERGENCE = "convergence_epoch_above_chance"
NEAR = 16  # tokens: what counts as near in `attention_share_near`
LEARNED = {"gamma": "horizon", "gravity": "G", "power": "p", "softening": "softening"}
LEARNED_WORDS = {
    "horizon": "horizons in tokens",
    "G": "strength of gravity G",
    "p": "power of the distance p",
    "softening": "softening",
}
RESULT_METRICS = (
    "test_loss_best",
    "test_loss_last",
    "best_val_accuracy",
    "best_epoch",
    "epochs_run",
    "seconds_per_epoch",
    "tokens_per_second",
    "peak_memory_bytes",
    "parameters",
    "attention_parameters",
    "forward_flops",
    "wall_seconds",
)
# What depends on what else ran on the device.
TIMED_METRICS = (
    "seconds_per_epoch",
    "tokens_per_second",
    "peak_memory_bytes",
    "wall_seconds",
    "seconds_to_best",
    "seconds_to_target",
)
EPOCH_COLUMNS = ("steps", "train_loss", "train_accuracy", "val_loss", "val_accuracy")


def metric_in(table: pd.DataFrame) -> Metric:
    """The metric that the tidy table of a task has results of; accuracy where it has none."""
    found = set(table["metric"])
    return next((metric for metric in METRICS.values() if metric.best in found), PERCENT)


def convergence_epoch(values: Sequence[float], chance: float = 0.0, metric: Metric = PERCENT) -> int | None:
    """The first epoch, counted from 1, with (value - chance) / (best - chance) >= 0.9.

    With chance = 0 this is 90 % of the best, a rule that guessing meets on two classes. None where no epoch
    is better than chance. The tolerance of 1e-9 is for rounding: accuracies are shares of far fewer examples.
    """
    gains = [metric.gain(value - chance) for value in values]
    best = max(gains, default=0.0)
    return (
        next(epoch for epoch, gain in enumerate(gains, 1) if gain >= 0.9 * best - 1e-9) if best > 0 else None
    )


def metric_table(results: Results, patterns: dict[Cell, AttentionPatterns]) -> pd.DataFrame:
    """Everything measured: task, model, seed, metric, value. `done` (1 or 0) is there for every cell."""
    rows = []
    for record in results.cells:
        values: dict[str, float | None] = {"done": float(record.state == "done")}
        if record.state == "done":
            result = record.result or {}
            values |= {metric: number(result.get(metric)) for metric in RESULT_METRICS}
            facts = task_facts(results, record.cell.task)
            metric, level = facts.metric, facts.level
            values[metric.best] = metric.read(result, "test_{}_best")
            values[metric.last] = metric.read(result, "test_{}_last")
            by_length = quality_by_length(result, metric)
            values |= {metric.at_length(length): value for length, value in by_length.items()}
            read = [metric.read(row, "val_{}") for row in record.metrics]
            worst = 0.0 if metric.more_is_better else math.inf
            curve = [worst if value is None else value for value in read]
            if metric.more_is_better:
                values["convergence_epoch"] = number(convergence_epoch(curve))
            values[CONVERGENCE] = None if level is None else number(convergence_epoch(curve, level, metric))
        if record.cell in patterns:
            one = patterns[record.cell]
            values["attention_entropy"] = number(float(attention_entropy(one).mean()))
            values["attention_share_near"] = float(share_within(one, NEAR).mean())
        cell = (record.cell.task, record.cell.model, record.cell.seed)
        rows += [(*cell, metric, value) for metric, value in values.items() if value is not None]
    return pd.DataFrame(rows, columns=["task", "model", "seed", "metric", "value"])


def quality_by_length(result: dict[str, Any], metric: Metric) -> dict[int, float]:
    """The test metric by the length of the examples, ascending, where result.json has `test_by_length`."""
    found = {
        int(length): value
        for length, row in as_object(result.get("test_by_length")).items()
        if re.fullmatch(r"[1-9]\d{0,8}", length) and isinstance(row, dict)
        if (value := metric.read(row, "{}")) is not None
    }
    return dict(sorted(found.items()))


def length_table(table: pd.DataFrame) -> pd.DataFrame:
    """Of a task's tidy table: model, seed, length, value, by ascending length."""
    of_length = table[table["metric"].str.contains(r"_at_\d+$")]
    lengths = of_length.assign(length=of_length["metric"].str.rsplit("_", n=1).str[-1].astype(int))
    return lengths.sort_values("length", kind="stable")[["model", "seed", "length", "value"]]


def tested_lengths(table: pd.DataFrame) -> dict[str, list[int]]:
    """By task with tests at lengths of their own: these, ascending, the one trained on first."""
    lengths = {str(task): length_table(rows)["length"] for task, rows in table.groupby("task", sort=False)}
    return {task: found.unique().tolist() for task, found in lengths.items() if len(found)}


def epoch_table(results: Results) -> pd.DataFrame:
    """A row per epoch of every cell, finished or not: task, model, seed, state, epoch and the curves."""
    rows = [
        {"task": record.cell.task, "model": record.cell.model, "seed": record.cell.seed}
        | {"state": record.state, "epoch": row["epoch"]}
        | {column: number(row.get(column)) for column in EPOCH_COLUMNS}
        for record in results.cells
        for row in record.metrics
    ]
    columns = ["task", "model", "seed", "state", "epoch", *EPOCH_COLUMNS]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(EPOCH_COLUMNS, float))


def learned_table(results: Results) -> pd.DataFrame:
    """Horizons 1 / (1 - gamma), G, and learned powers and softening of the finished cells: task, model, seed,
    epoch, scalar, layer, timescale, head, value. Layers, timescales and heads count from 0."""
    rows = [
        (record.cell.task, record.cell.model, record.cell.seed, row["epoch"], *entry)
        for record in done_cells(results)
        for row in record.metrics
        for entry in _learned(row.get("learned"))
    ]
    columns = ["task", "model", "seed", "epoch", "scalar", "layer", "timescale", "head", "value"]
    return pd.DataFrame(rows, columns=columns)


def _learned(learned: Any) -> Iterator[tuple[str, int, int, int, float]]:
    for layer, scalars in as_object(learned).items():
        place = re.fullmatch(r"layer(\d{1,4})", layer)
        for name, scalar in LEARNED.items() if place else ():
            by_timescale = as_object(scalars).get(name)
            for timescale, heads in enumerate(by_timescale if isinstance(by_timescale, list) else ()):
                for head, entry in enumerate(heads if isinstance(heads, list) else ()):
                    value = number(entry)
                    if value is not None and (name != "gamma" or 0 < value < 1):
                        shown = 1 / (1 - value) if name == "gamma" else value
                        yield scalar, int(layer.removeprefix("layer")), timescale, head, shown


def distance_table(patterns: dict[Cell, AttentionPatterns]) -> pd.DataFrame:
    """Share of attention weight by distance, the mean over heads: task, model, seed, layer, timescale, low,
    high, share; a bin is low <= |i - j| < high."""
    rows = []
    for cell, one in patterns.items():
        shares = one.distance_share.mean(2).astype(float)  # (layers, T, B)
        for (layer, timescale, place), share in np.ndenumerate(shares):
            ends = one.distance_edges[place : place + 2]
            rows.append((cell.task, cell.model, cell.seed, layer, timescale, *ends, share))
    columns = ["task", "model", "seed", "layer", "timescale", "low", "high", "share"]
    return pd.DataFrame(rows, columns=columns)


def summarize(table: pd.DataFrame) -> dict[tuple[str, str, str], Estimate]:
    """The mean over seeds with its interval, by task, model and metric."""
    return {
        (str(task), str(model), str(metric)): estimate(group.sort_values("seed")["value"].tolist())
        for (task, model, metric), group in table.groupby(["task", "model", "metric"], sort=False)
    }


def by_seed(table: pd.DataFrame, task: str, model: str, metric: str) -> dict[int, float]:
    mine = table[(table["task"] == task) & (table["model"] == model) & (table["metric"] == metric)]
    return dict(zip(mine["seed"].tolist(), mine["value"].tolist(), strict=True))


def mean_ratio(table: pd.DataFrame, task: str, model: str, metric: str, baseline: str = BASELINE) -> float:
    """The metric as a multiple of the baseline's: the mean of the ratios by seed, NaN without a pair."""
    values, base = (by_seed(table, task, one, metric) for one in (model, baseline))
    ratios = [values[seed] / base[seed] for seed in values if base.get(seed, 0) > 0]
    return fmean(ratios) if ratios else math.nan
