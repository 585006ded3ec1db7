"""The findings of a comparison: sentences made from its numbers.

    for task in findings(analysis):
        print(task.title, task.sentences)

How strongly a sentence is worded follows from the numbers: with one seed there is no interval and no
verdict, with too few seeds the smallest p value they can give is named, and only a difference that passes
Holm's correction is called better or worse.
"""

import math
from typing import NamedTuple

from reporting.analysis import Analysis
from reporting.comparison_tables import SIGNIFICANCE, TIMED_METRICS, Difference, by_seed
from reporting.lra_literature import comparable
from reporting.run_results import ACCURACY, BASELINE, TaskFacts
from reporting.seed_statistics import Estimate
from reporting.text_tables import short, short_p


class TaskFindings(NamedTuple):
    """A task's heading and what its numbers say, a sentence or a few each."""

    title: str
    sentences: list[str]


def findings(analysis: Analysis) -> list[TaskFindings]:
    found = []
    for task, facts in analysis.facts.items():
        notice = analysis.notice(task)
        sentences = [
            *_accuracy_findings(analysis, facts),
            *_published_findings(analysis, task),
            *_difference_findings(analysis, task),
            *_cost_findings(analysis, task),
            *_target_findings(analysis, task),
            *_learned_findings(analysis, task),
        ]
        if not any(analysis.mean(task, model, ACCURACY).n for model in analysis.names):
            sentences = ["No cell of this task is done: nothing can be said."]
        found.append(TaskFindings(f"{task} ({facts.title})" + (f": {notice}" if notice else ""), sentences))
    return found


def _accuracy_findings(analysis: Analysis, facts: TaskFacts) -> list[str]:
    means = {model: analysis.mean(facts.name, model, ACCURACY) for model in analysis.names}
    means = {model: mean for model, mean in means.items() if mean.n}
    shown = "; ".join(
        f"{analysis.names[model]} {_percent(mean)}"
        for model, mean in sorted(means.items(), key=lambda item: -item[1].mean)
    )
    sentences = [f"Test accuracy, from the highest: {shown}."]
    if facts.test_size and facts.majority is not None:
        error = math.sqrt(facts.majority * (1 - facts.majority) / facts.test_size)
        near = [analysis.names[model] for model in means if means[model].mean <= facts.majority + 2 * error]
        if near:
            sentences.append(
                f"Not told apart from always naming the largest class ({100 * facts.majority:.1f} %; two "
                f"standard errors of the test set are {200 * error:.1f} points): {', '.join(near)}."
            )
    if any(mean.n == 1 for mean in means.values()) and facts.test_size:
        typical = sum(mean.mean for mean in means.values()) / len(means)
        error = math.sqrt(typical * (1 - typical) / facts.test_size)
        sentences.append(
            f"The {facts.test_size:,} test examples alone leave each accuracy a standard error of about "
            f"{100 * error:.1f} points."
        )
    return sentences


def _percent(mean: Estimate) -> str:
    if mean.n < 2:
        return f"{100 * mean.mean:.1f} % (n = {mean.n}, no interval)"
    return (
        f"{100 * mean.mean:.1f} % (n = {mean.n}, 95 % interval {100 * mean.low:.1f} to {100 * mean.high:.1f})"
    )


def _difference_findings(analysis: Analysis, task: str) -> list[str]:
    sentences = []
    for row in analysis.differences:
        if row.task != task:
            continue
        name = f"{analysis.names[row.model]} against {analysis.baseline_name}"
        points = f"{100 * row.mean.mean:+.1f} points of test accuracy"
        if row.mean.n == 0:
            sentences.append(f"{name}: no seed finished with both, so there is no comparison.")
        elif row.mean.n == 1:
            sentences.append(
                f"{name}: {points} (n = 1: no interval; one seed cannot tell the mechanism from the luck of "
                "the draw)."
            )
        else:
            sentences.append(f"{name}: {points} on average {_evidence(row)}")
    return sentences


def _evidence(row: Difference) -> str:
    n, _, low, high = row.mean
    numbers = (
        f"(n = {n}, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, p = {short_p(row.p)}, "
        f"after Holm's correction {short_p(row.p_holm)})"
    )
    if row.verdict == "too few seeds":
        return (
            f"{numbers}. The smallest p value that {n} seeds can give is {short_p(row.smallest_p)}, "
            f"{short_p(row.smallest_p_holm)} after the correction: too few seeds to tell."
        )
    if row.verdict == "not shown":
        return f"{numbers}: a difference is not shown at the {SIGNIFICANCE} level."
    word = {"higher": "better", "lower": "worse"}[row.verdict]
    return f"{numbers}: {word} at the {SIGNIFICANCE} level, for these settings and this data."


def _published_findings(analysis: Analysis, task: str) -> list[str]:
    """Whether softmax attention is where published softmax attention is: the check of the whole pipeline."""
    transformers = [one for one in comparable(analysis.results, task) if one.name.startswith("Transformer")]
    mean = analysis.mean(task, BASELINE, ACCURACY)
    if not transformers or not mean.n:
        return []
    low, high = (100 * pick(one.accuracy for one in transformers) for pick in (min, max))
    return [
        f"Published Transformers of the Long Range Arena reach {low:.1f} to {high:.1f} % on this task; "
        f"{analysis.names[BASELINE]} here {_percent(mean)}."
    ]


def _cost_findings(analysis: Analysis, task: str) -> list[str]:
    """Time, memory and parameters as multiples of the baseline's, from the seeds that both have."""
    sentences = []
    for metric, what in (
        ("seconds_per_epoch", "Time per training epoch"),
        ("peak_memory_bytes", "Peak memory"),
        ("parameters", "Parameters"),
        ("forward_flops", "Matrix products of a forward pass"),
    ):
        base = by_seed(analysis.table, task, analysis.baseline, metric)
        ratios = []
        for model, name in analysis.names.items():
            values = by_seed(analysis.table, task, model, metric)
            shared = [seed for seed in values if base.get(seed, 0) > 0]
            if model != analysis.baseline and shared:
                ratio = sum(values[seed] / base[seed] for seed in shared) / len(shared)
                ratios.append(f"{name} {short(ratio)}")
        if ratios:
            measured = metric in ("seconds_per_epoch", "peak_memory_bytes")
            mean = " (mean of the seeds' ratios)" if len(base) > 1 and measured else ""
            if metric in TIMED_METRICS and (sharing := analysis.sharing(task)):
                mean += f" ({sharing})"
            caveat = " A difference in accuracy may also come from a difference in size."
            sentences.append(
                f"{what} as a multiple of {analysis.baseline_name}'s{mean}: {'; '.join(ratios)}."
                + (caveat if metric == "parameters" else "")
            )
    return sentences


def _target_findings(analysis: Analysis, task: str) -> list[str]:
    """What the target accuracy took each model, and who never reached it."""
    if task not in analysis.targets:
        return []
    parts = []
    for model, name in analysis.names.items():
        n = analysis.mean(task, model, ACCURACY).n
        seconds = analysis.mean(task, model, "seconds_to_target")
        epochs = analysis.mean(task, model, "epochs_to_target")
        if not n:
            continue
        if not epochs.n:
            parts.append(f"{name} never")
            continue
        spent = f"{short(seconds.mean)} s of training" if seconds.n else "an unrecorded time"
        some = f" ({epochs.n} of {n} seeds)" if epochs.n < n else ""
        word = "epoch" if epochs.mean == 1 else "epochs"
        parts.append(f"{name} {spent}, {short(epochs.mean)} {word}{some}")
    target = f"{100 * analysis.targets[task]:.1f} %"
    return [f"To a validation accuracy of {target}: {'; '.join(parts)}."]


def _learned_findings(analysis: Analysis, task: str) -> list[str]:
    """How far the learned scalars moved between the first epoch and the last."""
    learned = analysis.learned[analysis.learned["task"] == task]
    sentences = []
    for (scalar, model), lines in learned.groupby(["scalar", "model"], sort=False):
        first = lines.groupby(["seed"])["epoch"].transform("min")
        last = lines.groupby(["seed"])["epoch"].transform("max")
        start = lines[lines["epoch"] == first].groupby("timescale")["value"].mean()
        end = lines[lines["epoch"] == last].groupby("timescale")["value"].mean()
        moves = ", ".join(f"{short(start[one])} to {short(end[one])}" for one in start.index)
        what = "horizons in tokens" if scalar == "horizon" else "strength of gravity G"
        sentences.append(
            f"{analysis.names[str(model)]}: {what} from the end of the first epoch to that of the last, mean "
            f"over layers, heads and seeds{', by timescale' if len(start) > 1 else ''}: {moves}."
        )
    return sentences
