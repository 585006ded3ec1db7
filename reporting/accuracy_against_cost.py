"""Accuracy against what it took: training time and tokens seen, and what a target accuracy costs.

    progress = progress_table(results)          # an epoch a row, time and tokens added up
    targets = target_accuracies(progress, {"listops": 0.1})
    rows = progress_metrics(progress, targets)  # task, model, seed, metric, value: to the tidy table

Time is that of the training steps alone, as in `seconds_per_epoch`: evaluation and the first step of a run,
which warms up, are left out. Tokens are true ones, padding not counted, an example once per epoch.
"""

import math
from collections.abc import Sequence
from typing import cast

import pandas as pd

from reporting.run_results import ACCURACY, BASELINE, number
from results_folder import Results

TARGET_SHARE = 0.9  # of the way from chance to the baseline's best
COLUMNS = ("task", "model", "seed", "state", "epoch", "seconds", "tokens", "val_accuracy")


def progress_table(results: Results) -> pd.DataFrame:
    """A row per epoch of every cell: task, model, seed, state, epoch, val_accuracy, and the training seconds
    and tokens up to its end; NaN from the first epoch on that has none on record."""
    rows = []
    for record in results.cells:
        seconds = tokens = 0.0
        for row in record.metrics:
            spent, seen, accuracy = (
                math.nan if (value := number(row.get(name))) is None else value
                for name in ("train_seconds", "train_tokens", "val_accuracy")
            )
            seconds, tokens = seconds + spent, tokens + seen
            cell = (record.cell.task, record.cell.model, record.cell.seed, record.state)
            rows.append((*cell, row["epoch"], seconds, tokens, accuracy))
    types = dict.fromkeys(("seconds", "tokens", "val_accuracy"), float)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(types)


def target_accuracies(
    progress: pd.DataFrame, chance: dict[str, float | None], baseline: str = BASELINE
) -> dict[str, float]:
    """A validation accuracy per task that all models are timed to: nine tenths of the way from chance to the
    baseline's best, the mean over its finished seeds. No entry where the baseline did not beat chance."""
    done = progress[(progress["state"] == "done") & (progress["model"] == baseline)]
    targets = {}
    for task, level in chance.items():
        best = float(done[done["task"] == task].groupby("seed")["val_accuracy"].max().mean())
        if level is not None and best > level:
            targets[task] = level + TARGET_SHARE * (best - level)
    return targets


def progress_metrics(progress: pd.DataFrame, targets: dict[str, float]) -> pd.DataFrame:
    """Of each finished cell: task, model, seed, metric, value.

    seconds_to_best, tokens_to_best: up to the end of the best validation epoch. target_reached: 1 or 0;
    epochs_, seconds_ and tokens_to_target: to the first epoch at the task's target, where one is."""
    rows: list[tuple[str, str, int, str, float]] = []
    done = progress[(progress["state"] == "done") & progress["val_accuracy"].notna()]
    for key, epochs in done.groupby(["task", "model", "seed"], sort=False):
        task, model, seed = cast(tuple[str, str, int], key)
        best = epochs.sort_values("val_accuracy", ascending=False, kind="stable").iloc[0]
        values = {"seconds_to_best": best["seconds"], "tokens_to_best": best["tokens"]}
        if task in targets:
            # The tolerance is for rounding: accuracies are shares of far fewer examples.
            reached = epochs[epochs["val_accuracy"] >= targets[task] - 1e-9]
            values["target_reached"] = float(len(reached) > 0)
            if len(reached):
                first = reached.iloc[0]
                values |= {"epochs_to_target": float(first["epoch"])}
                values |= {f"{name}_to_target": first[name] for name in ("seconds", "tokens")}
        rows += [
            (task, model, seed, metric, float(value))
            for metric, value in values.items()
            if math.isfinite(value)
        ]
    return pd.DataFrame(rows, columns=["task", "model", "seed", "metric", "value"])


def trade_offs(table: pd.DataFrame) -> pd.DataFrame:
    """Of each finished cell of a task: model, seed, seconds to the best epoch, test accuracy of its weights.

    `table`: the tidy table of one task; cells that lack one of the two are left out."""
    wanted = table[table["metric"].isin(["seconds_to_best", ACCURACY])]
    wide = wanted.pivot(index=["model", "seed"], columns="metric", values="value")
    wide = wide.reindex(columns=["seconds_to_best", ACCURACY]).dropna().reset_index()
    return wide.set_axis(["model", "seed", "seconds", "accuracy"], axis=1)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The positions of the (cost, gain) that no other point beats: none costs less or as much and gains more,
    or costs less and gains as much. By rising cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda one: (points[one][0], -points[one][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front
