"""Whether a model differs from the baseline: in quality, in the share of seeds that learn, in speed.

    compare(table, "conventional", {"recall": 0.03})      # a Difference for each task and model
    compare(table, "conventional", at={"recall": 96})     # the same at a length beyond the one trained on
    compare_speed(progress, targets, metrics)             # a Speed for each task and model

The comparisons of one task, each model with the baseline, are a family named beforehand: Holm's correction is
over it. What decides is the paired t test on the differences by seed; the exact sign-flip test, which assumes
nothing of them, stands beside it. Where the seeds of a model or of the baseline either learn or do not, a
mean says little, and the shares decide (Fisher's exact test).
"""

import math
from collections.abc import Mapping
from statistics import median_low
from typing import NamedTuple

import numpy as np
import pandas as pd

from reporting.comparison_tables import by_seed, metric_in
from reporting.metrics import Metric
from reporting.run_results import BASELINE
from reporting.seed_statistics import (
    Estimate,
    deviation,
    estimate,
    fisher_p,
    holm,
    paired_differences,
    paired_t_p,
    pairs_needed,
    sign_flip_p,
    sign_test_p,
    standardised,
)
from reporting.text_tables import short

SIGNIFICANCE = 0.05
LEAST_SEEDS = 3  # pairs, without which there is no verdict
LEARNED_SHARE = 0.5  # of the way from chance to the best cell of the task: a seed beyond it has learned
LEARNED_GAP = 0.25  # of that way, between the worst seed that has and the best that has not


class Shares(NamedTuple):
    """How many seeds learned, of how many: the model's and the baseline's."""

    learned: int
    n: int
    base_learned: int
    base_n: int

    def __str__(self) -> str:
        return f"{self.learned} of {self.n} against {self.base_learned} of {self.base_n}"

    @property
    def gain(self) -> float:
        return self.learned / self.n - self.base_learned / self.base_n


class Difference(NamedTuple):
    """A model's test metric minus the baseline's on one task, paired by seed; see `compare`."""

    task: str
    model: str
    metric: Metric
    mean: Estimate
    dz: float
    spread: float
    p_t: float
    p_sign_flip: float
    shares: Shares | None
    p_shares: float
    length: int | None  # of the test, where it is not the one trained on
    p_holm: float = math.nan

    @property
    def p(self) -> float:
        """What decides: of the shares where there are any, else of the paired t test."""
        return self.p_t if self.shares is None else self.p_shares

    @property
    def gain(self) -> Estimate:
        """The mean in the metric's unit, positive where the model is ahead of the baseline."""
        n, *ends = self.mean
        mean, low, high = (self.metric.scale * self.metric.gain(end) for end in ends)
        return Estimate(n, mean, low, high) if self.metric.more_is_better else Estimate(n, mean, high, low)

    @property
    def decided(self) -> bool:
        return self.verdict in ("better", "worse")

    @property
    def pairs_needed(self) -> int:
        """About how many would show the smallest relevant difference."""
        return pairs_needed(self.spread, self.metric.relevant)

    @property
    def verdict(self) -> str:
        """ "no pair", "too few seeds" (less than 3 pairs), "no relevant difference" (the interval holds none,
        however sure it is), "better" or "worse" (p_holm <= 0.05, by the mean, or by the share of seeds that
        learn where this is what was tested), "open" (it holds relevant ones)."""
        if self.mean.n < LEAST_SEEDS:
            return "too few seeds" if self.mean.n else "no pair"
        within = max(abs(self.mean.low), abs(self.mean.high)) <= self.metric.relevant
        if within and self.shares is None:
            return "no relevant difference"
        if self.p_holm <= SIGNIFICANCE:
            gain = self.metric.gain(self.mean.mean) if self.shares is None else self.shares.gain
            return "better" if gain > 0 else "worse"
        return "open"


def compare(
    table: pd.DataFrame,
    baseline: str = BASELINE,
    levels: Mapping[str, float | None] | None = None,
    at: Mapping[str, int] | None = None,
) -> list[Difference]:
    """Each model minus the baseline, one entry per task and model. levels: the metric of guessing, by task;
    without it no seed is said to have learned or not. at: by task, the length of the test; only tasks that
    have one."""
    found = []
    for task in table["task"].unique() if at is None else at:
        of_task = table[table["task"] == task]
        metric = metric_in(of_task)
        length = None if at is None else at[task]
        column = metric.best if length is None else metric.at_length(length)
        values = {model: by_seed(of_task, task, model, column) for model in of_task["model"].unique()}
        base = values.get(baseline, {})
        learned = _learned(values, metric, (levels or {}).get(task))
        family = []
        for model, mine in values.items():
            if model == baseline:
                continue
            differences, shares = paired_differences(mine, base), _shares(learned, model, baseline)
            sizes = estimate(differences), standardised(differences), deviation(differences)
            p_values = paired_t_p(differences), sign_flip_p(differences)
            p_shares = math.nan if shares is None else fisher_p(*shares)
            family.append(Difference(task, model, metric, *sizes, *p_values, shares, p_shares, length))
        # A comparison without a verdict is none of the family.
        adjusted = holm([row.p if row.mean.n >= LEAST_SEEDS else math.nan for row in family])
        found += [row._replace(p_holm=p) for row, p in zip(family, adjusted, strict=True)]
    return found


def _learned(
    values: Mapping[str, Mapping[int, float]], metric: Metric, level: float | None
) -> dict[str, tuple[int, int, bool]]:
    """By model: how many of its seeds learned, how many there are, whether a gap parts the two kinds."""
    gains = {
        model: np.array([metric.gain(value - level) for value in mine.values()])
        for model, mine in values.items()
        if mine and level is not None
    }
    reach = max((float(mine.max()) for mine in gains.values()), default=0.0)
    found = {}
    for model, mine in gains.items():
        above, below = mine[mine >= LEARNED_SHARE * reach], mine[mine < LEARNED_SHARE * reach]
        parted = bool(
            reach > 0 and len(above) and len(below) and above.min() - below.max() >= LEARNED_GAP * reach
        )
        found[model] = len(above), len(mine), parted
    return found


def _shares(learned: Mapping[str, tuple[int, int, bool]], model: str, baseline: str) -> Shares | None:
    """None where neither's seeds are of two kinds."""
    mine, base = learned.get(model), learned.get(baseline)
    if mine is None or base is None or not (mine[2] or base[2]):
        return None
    return Shares(*mine[:2], *base[:2])


class Speed(NamedTuple):
    """Steps, or epochs, that a model took to the task's target. median: infinite where less than half of the
    seeds reached it. wins: pairs in which the model was there first. p: sign test over wins and losses."""

    task: str
    model: str
    unit: str
    reached: int
    n: int
    median: float
    budget: float
    wins: int
    losses: int
    ties: int
    p: float
    p_holm: float = math.nan

    @property
    def shown_median(self) -> str:
        return f"more than {short(self.budget)}" if math.isinf(self.median) else short(self.median)


def compare_speed(
    progress: pd.DataFrame,
    targets: Mapping[str, float],
    metrics: Mapping[str, Metric],
    baseline: str = BASELINE,
) -> list[Speed]:
    """How soon each model's seeds reached the target, censored where training ended before: of a pair one is
    faster if it reached the target before the other did or had been trained for; what cannot be told is a
    tie. Holm's correction is over the models of a task. The baseline's own entry has no pairs, and p NaN."""
    found = []
    done = progress[progress["state"] == "done"]
    for task, target in targets.items():
        of_task = done[done["task"] == task]
        unit = "steps" if of_task["steps"].notna().all() else "epochs"
        column = "steps" if unit == "steps" else "epoch"
        times = {
            str(model): {
                int(str(seed)): _time_to(rows, column, target, metrics[task])
                for seed, rows in mine.groupby("seed")
            }
            for model, mine in of_task.groupby("model", sort=False)
        }
        family = [
            _speed(task, model, unit, mine, {} if model == baseline else times.get(baseline, {}))
            for model, mine in times.items()
        ]
        adjusted = holm([row.p for row in family])
        found += [row._replace(p_holm=p) for row, p in zip(family, adjusted, strict=True)]
    return found


class Time(NamedTuple):
    """When the target was reached; or, missed, how long it was not. Of equal times one that was reached is
    the smaller."""

    at: float
    missed: bool


def _time_to(epochs: pd.DataFrame, column: str, target: float, metric: Metric) -> Time:
    # The tolerance is for rounding: accuracies are shares of far fewer examples.
    there = epochs[[metric.gain(value - target) >= -1e-9 for value in epochs["quality"]]]
    return Time(float((there if len(there) else epochs[-1:])[column].iloc[0]), there.empty)


def _speed(task: str, model: str, unit: str, mine: dict[int, Time], base: dict[int, Time]) -> Speed:
    pairs = [(mine[seed], base[seed]) for seed in mine.keys() & base.keys()]
    wins = sum(one < other and not one.missed for one, other in pairs)
    losses = sum(other < one and not other.missed for one, other in pairs)
    p = sign_test_p(wins, losses) if pairs else math.nan
    reached, budget = sum(not time.missed for time in mine.values()), max(time.at for time in mine.values())
    # The lower of two in the middle: there is no mean with infinity.
    median = median_low(math.inf if time.missed else time.at for time in mine.values())
    counts = wins, losses, len(pairs) - wins - losses
    return Speed(task, model, unit, reached, len(mine), median, budget, *counts, p)
