"""Accuracy against what it took: training time and tokens seen, and what a target accuracy costs.

    progress = progress_table(results)          # an epoch a row, time and tokens added up
    targets = target_qualities(progress, facts)
    rows = progress_metrics(progress, targets)  # task, model, seed, metric, value: to the tidy table

Time is that of the training steps alone, as in `seconds_per_epoch`: evaluation and the first step of a run,
which warms up, are left out. Tokens are true ones, padding not counted, an example once per epoch.
"""

import math
from collections.abc import Mapping
from typing import cast

import pandas as pd

from reporting.metrics import number
from reporting.run_results import TaskFacts, task_facts
from results_folder import Results

TARGET_SHARE = 0.9  # of the way from chance to what the best model reaches
COLUMNS = ("task", "model", "seed", "state", "epoch", "seconds", "tokens", "steps", "quality")


def progress_table(results: Results) -> pd.DataFrame:
    """A row per epoch of every cell: task, model, seed, state, epoch, quality (the task's metric on
    validation), and the training seconds, tokens and optimizer steps up to its end; NaN where there is none
    on record, of seconds and tokens from that epoch on."""
    metrics = {record.cell.task: task_facts(results, record.cell.task).metric for record in results.cells}
    rows = []
    for record in results.cells:
        cell = (record.cell.task, record.cell.model, record.cell.seed, record.state)
        seconds = tokens = 0.0
        for row in record.metrics:
            spent, seen, steps = (
                number(row.get(name)) for name in ("train_seconds", "train_tokens", "steps")
            )
            seconds += math.nan if spent is None else spent
            tokens += math.nan if seen is None else seen
            quality = metrics[record.cell.task].read(row, "val_{}")
            rows.append((*cell, row["epoch"], seconds, tokens, steps, quality))
    types = dict.fromkeys(("seconds", "tokens", "steps", "quality"), float)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(types)


def target_qualities(progress: pd.DataFrame, facts: Mapping[str, TaskFacts]) -> dict[str, float]:
    """A validation metric per task that all models are timed to: nine tenths of the way from chance to the
    reachable, which is the best epoch of the best model, the mean over its finished seeds. No entry where no
    model beat chance."""
    done = progress[progress["state"] == "done"]
    targets = {}
    for task, one in facts.items():
        gains = done[done["task"] == task].assign(gain=done["quality"] * one.metric.gain(1))
        best = float(gains.groupby(["model", "seed"])["gain"].max().groupby("model").mean().max())
        if one.level is not None and best > one.metric.gain(one.level):
            targets[task] = one.level + TARGET_SHARE * (one.metric.gain(best) - one.level)
    return targets


def progress_metrics(
    progress: pd.DataFrame, targets: Mapping[str, float], facts: Mapping[str, TaskFacts]
) -> pd.DataFrame:
    """Of each finished cell: task, model, seed, metric, value.

    seconds_to_best, tokens_to_best: up to the end of the best validation epoch. target_reached: 1 or 0;
    seconds_ and tokens_to_target: to the first epoch at the task's target, where one is."""
    rows: list[tuple[str, str, int, str, float]] = []
    done = progress[(progress["state"] == "done") & progress["quality"].notna()]
    for key, epochs in done.groupby(["task", "model", "seed"], sort=False):
        task, model, seed = cast(tuple[str, str, int], key)
        metric = facts[task].metric
        best = epochs.sort_values("quality", ascending=not metric.more_is_better, kind="stable").iloc[0]
        values = {"seconds_to_best": best["seconds"], "tokens_to_best": best["tokens"]}
        if task in targets:
            # The tolerance is for rounding: accuracies are shares of far fewer examples.
            reached = epochs[(epochs["quality"] - targets[task]) * metric.gain(1) >= -1e-9]
            values["target_reached"] = float(len(reached) > 0)
            if len(reached):
                values |= {f"{name}_to_target": reached.iloc[0][name] for name in ("seconds", "tokens")}
        rows += [
            (task, model, seed, name, float(value)) for name, value in values.items() if math.isfinite(value)
        ]
    return pd.DataFrame(rows, columns=["task", "model", "seed", "metric", "value"])
