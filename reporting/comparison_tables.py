"""The tables behind the comparison: pure functions from a results folder, as read, to pandas tables.

    results = usable(read_results(folder))      # run_results.py
    table = metric_table(results, patterns)     # task, model, seed, metric, value: everything measured
    summary = summarize(table)                  # task, model, metric, n, mean, low, high
    compare(table)                              # differences in accuracy, paired by seed, with p values

The seed is the unit; `low` and `high` are the ends of the 95 % t interval, NaN for n = 1.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd

from reporting.attention_numbers import attention_entropy, share_within
from reporting.run_results import ACCURACY, BASELINE, done_cells, number, task_facts
from reporting.seed_statistics import (
    Estimate,
    estimate,
    holm,
    paired_differences,
    sign_flip_p,
    smallest_sign_flip_p,
)
from results_folder import AttentionPatterns, Cell, Results

CONVERGENCE = "convergence_epoch_above_chance"
NEAR = 16  # tokens: what counts as near in `attention_share_near`
RESULT_METRICS = (
    ACCURACY,
    "test_accuracy_last",
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
EPOCH_COLUMNS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
# Metric, and whether more of it is better.
IMPROVEMENTS = {ACCURACY: True, CONVERGENCE: False, "seconds_per_epoch": False, "peak_memory_bytes": False}
RADAR_AXES = {
    "accuracy /\nhighest": (ACCURACY, True),
    "fewest epochs to\nconverge / epochs": (CONVERGENCE, False),
    "shortest time\nper epoch / time": ("seconds_per_epoch", False),
    "smallest peak\nmemory / memory": ("peak_memory_bytes", False),
}
SIGNIFICANCE = 0.05


def convergence_epoch(accuracies: Sequence[float], chance: float = 0.0) -> int | None:
    """The first epoch, counted from 1, with (accuracy - chance) / (best - chance) >= 0.9.

    With chance = 0 this is 90 % of the best, a rule that guessing meets on two classes. None where no epoch
    is above chance. The tolerance of 1e-9 is for rounding: accuracies are shares of far fewer examples.
    """
    best = max(accuracies, default=0.0)
    if not best > chance:
        return None
    reached = chance + 0.9 * (best - chance) - 1e-9
    return next(epoch for epoch, accuracy in enumerate(accuracies, 1) if accuracy >= reached)


def metric_table(results: Results, patterns: dict[Cell, AttentionPatterns]) -> pd.DataFrame:
    """Everything measured: task, model, seed, metric, value. `done` (1 or 0) is there for every cell."""
    rows = []
    for record in results.cells:
        values: dict[str, float | None] = {"done": float(record.state == "done")}
        if record.state == "done":
            result = record.result or {}
            values |= {metric: number(result.get(metric)) for metric in RESULT_METRICS}
            accuracies = [number(row.get("val_accuracy")) or 0.0 for row in record.metrics]
            chance = task_facts(results, record.cell.task).chance
            values["convergence_epoch"] = number(convergence_epoch(accuracies))
            values[CONVERGENCE] = None if chance is None else number(convergence_epoch(accuracies, chance))
        if record.cell in patterns:
            one = patterns[record.cell]
            values["attention_entropy"] = number(float(attention_entropy(one).mean()))
            values["attention_share_near"] = float(share_within(one, NEAR).mean())
        cell = (record.cell.task, record.cell.model, record.cell.seed)
        rows += [(*cell, metric, value) for metric, value in values.items() if value is not None]
    return pd.DataFrame(rows, columns=["task", "model", "seed", "metric", "value"])


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
    """Horizons 1 / (1 - gamma) and G of the finished cells: task, model, seed, epoch, scalar, layer,
    timescale, head, value. Layers, timescales and heads count from 0."""
    rows = [
        (record.cell.task, record.cell.model, record.cell.seed, row["epoch"], *entry)
        for record in done_cells(results)
        for row in record.metrics
        for entry in _learned(row.get("learned"))
    ]
    columns = ["task", "model", "seed", "epoch", "scalar", "layer", "timescale", "head", "value"]
    return pd.DataFrame(rows, columns=columns)


def _learned(learned: Any) -> Iterator[tuple[str, int, int, int, float]]:
    for layer, scalars in learned.items() if isinstance(learned, dict) else ():
        place = re.fullmatch(r"layer(\d{1,4})", layer)
        if place is None or not isinstance(scalars, dict):
            continue
        for name, scalar in (("gamma", "horizon"), ("gravity", "G")):
            by_timescale = scalars.get(name)
            for timescale, heads in enumerate(by_timescale if isinstance(by_timescale, list) else ()):
                for head, entry in enumerate(heads if isinstance(heads, list) else ()):
                    value = number(entry)
                    if value is not None and (name == "gravity" or 0 < value < 1):
                        shown = 1 / (1 - value) if name == "gamma" else value
                        yield scalar, int(place[1]), timescale, head, shown


def distance_table(patterns: dict[Cell, AttentionPatterns]) -> pd.DataFrame:
    """Share of attention weight by distance, the mean over heads: task, model, seed, layer, timescale, low,
    high, share; a bin is low <= |i - j| < high."""
    rows = []
    for cell, one in patterns.items():
        edges = one.distance_edges.tolist()
        shares = one.distance_share.mean(2)  # (layers, T, B)
        for layer, by_timescale in enumerate(shares.tolist()):
            for timescale, by_bin in enumerate(by_timescale):
                for low, high, share in zip(edges[:-1], edges[1:], by_bin, strict=True):
                    rows.append((cell.task, cell.model, cell.seed, layer, timescale, low, high, share))
    columns = ["task", "model", "seed", "layer", "timescale", "low", "high", "share"]
    return pd.DataFrame(rows, columns=columns)


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """n, mean and 95 % t interval over seeds: task, model, metric, n, mean, low, high."""
    rows = [
        (task, model, metric, *estimate(group.sort_values("seed")["value"].tolist()))
        for (task, model, metric), group in table.groupby(["task", "model", "metric"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["task", "model", "metric", "n", "mean", "low", "high"])


def by_seed(table: pd.DataFrame, task: str, model: str, metric: str) -> dict[int, float]:
    mine = table[(table["task"] == task) & (table["model"] == model) & (table["metric"] == metric)]
    return dict(zip(mine["seed"].tolist(), mine["value"].tolist(), strict=True))


class Difference(NamedTuple):
    """A model's accuracy minus the baseline's on one task, paired by seed; see `compare`."""

    task: str
    model: str
    mean: Estimate
    p: float
    smallest_p: float
    p_holm: float
    smallest_p_holm: float

    @property
    def verdict(self) -> str:
        """ "higher" or "lower" (p_holm <= 0.05), "not shown" (it could have been, and was not), "too few
        seeds" (no data could have shown it), "no pair" (n = 0)."""
        if self.mean.n == 0:
            return "no pair"
        if self.smallest_p_holm > SIGNIFICANCE:
            return "too few seeds"
        if self.p_holm > SIGNIFICANCE:
            return "not shown"
        return "higher" if self.mean.mean > 0 else "lower"


def compare(table: pd.DataFrame, baseline: str = BASELINE, metric: str = ACCURACY) -> list[Difference]:
    """Each model minus the baseline, one entry per task and model.

    p is exact (sign flips). Holm's correction is over all entries that have a pair. smallest_*: what the p
    values would be if all seeds of all entries pointed one way.
    """
    pairs: list[tuple[str, str, list[float]]] = []
    for task in table["task"].unique():
        of_task = table[table["task"] == task]
        base = by_seed(of_task, task, baseline, metric)
        for model in of_task["model"].unique():
            if model != baseline:
                values = by_seed(of_task, task, model, metric)
                pairs.append((task, model, list(paired_differences(values, base).values())))
    tested = [differences for *_, differences in pairs if differences]
    p_values = [sign_flip_p(differences) for differences in tested]
    smallest = [smallest_sign_flip_p(len(differences)) for differences in tested]
    tests = zip(p_values, smallest, holm(p_values), holm(smallest), strict=True)
    return [
        Difference(task, model, estimate(values), *(next(tests) if values else (math.nan,) * 4))
        for task, model, values in pairs
    ]


def improvements(table: pd.DataFrame, baseline: str = BASELINE) -> pd.DataFrame:
    """Percent by which a model improves on the baseline with the same seed: task, model, metric, seed, value.

    For accuracy 100 (x - b) / b; for epochs, time and memory 100 (b - x) / b: less is better."""
    rows = []
    for task in table["task"].unique():
        of_task = table[table["task"] == task]
        for metric, more_is_better in IMPROVEMENTS.items():
            base = by_seed(of_task, task, baseline, metric)
            for model in of_task["model"].unique():
                values = by_seed(of_task, task, model, metric)
                for seed, difference in paired_differences(values, base).items():
                    if model != baseline and base[seed] > 0:
                        gain = difference if more_is_better else -difference
                        rows.append((task, model, metric, seed, 100 * gain / base[seed]))
    return pd.DataFrame(rows, columns=["task", "model", "metric", "seed", "value"])


def radar_scores(summary: pd.DataFrame, task: str) -> pd.DataFrame:
    """Scores in 0..1, a row per model, a column per axis: 1 is the best model of the task on that axis.

    Accuracy: mean / largest mean. Epochs to converge, time per epoch, peak memory: smallest mean / mean."""
    of_task = summary[summary["task"] == task]
    means = of_task.pivot(index="model", columns="metric", values="mean").reindex(of_task["model"].unique())
    scores = pd.DataFrame(index=means.index)
    for axis, (metric, more_is_better) in RADAR_AXES.items():
        column = means[metric] if metric in means else pd.Series(math.nan, index=means.index)
        column = column.where(column > 0)
        scores[axis] = column / column.max() if more_is_better else column.min() / column
    return scores[scores.notna().any(axis=1)]
