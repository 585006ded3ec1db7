"""The tables of a comparison as text: one task's accuracy, cost and attention, differences, lost cells.

    for table in tables(analysis):
        print(markdown_table(table))

Every table of a smoke run says so in its title, and one with times also where cells shared a device. See
comparison_tables.py for the numbers.
"""

import math
from collections.abc import Sequence

from reporting.analysis import Analysis
from reporting.comparison_tables import CONVERGENCE, NEAR
from reporting.lra_literature import comparable
from reporting.metrics import Metric, metric_named
from reporting.run_results import TaskFacts
from reporting.seed_statistics import Estimate
from reporting.text_tables import NONE, TextTable, short, short_p
from reporting.verdicts import Difference, Speed

INTERVAL = "Mean over n seeds [95 % t interval]; n = 1: one run, no interval"
# (metric, heading, scale)
Column = tuple[str, str, float]
COST: tuple[Column, ...] = (
    ("seconds_per_epoch", "s per training epoch", 1.0),
    ("tokens_per_second", "tokens per s", 1.0),
    ("peak_memory_bytes", "peak memory (MiB)", 2.0**-20),
    ("parameters", "parameters", 1.0),
    ("attention_parameters", "of them in attention", 1.0),
    ("forward_flops", "forward MFLOPs / example", 1e-6),
)
ATTENTION: tuple[Column, ...] = (
    ("attention_entropy", "entropy of a row (1 = even)", 1.0),
    ("attention_share_near", f"weight within {NEAR} tokens (%)", 100.0),
)
TARGET: tuple[Column, ...] = (
    ("seconds_to_target", "training s to it", 1.0),
    ("tokens_to_target", "million tokens to it", 1e-6),
    ("seconds_to_best", "training s to the best epoch", 1.0),
    ("tokens_to_best", "million tokens to the best epoch", 1e-6),
)


def shown_mean(mean: Estimate, scale: float = 1.0, *, of: int = 0) -> str:
    """ "61.2 [58.1, 64.3]", without the interval where there is none; with its n where that is less than
    `of`, the number of finished seeds."""
    text = short(scale * mean.mean)
    if mean.n > 1 and mean.low != mean.high:
        text += f" [{short(scale * mean.low)}, {short(scale * mean.high)}]"
    return f"{text} (n = {mean.n})" if 0 < mean.n < of else text


def _quality(metric: Metric) -> list[Column]:
    found: list[Column] = [
        (metric.best, f"test {metric.label}", metric.scale),
        (metric.last, f"after the last epoch{' (%)' if metric.unit == '%' else ''}", metric.scale),
        ("best_epoch", "best epoch", 1.0),
    ]
    if not metric.more_is_better:
        return [*found, (CONVERGENCE, "epochs to 90 % of the way from chance", 1.0)]
    found.append(("convergence_epoch", "epochs to 90 % of best", 1.0))
    return [*found, (CONVERGENCE, "the same above chance", 1.0)]


def tables(analysis: Analysis) -> list[TextTable]:
    """All of them: of each task, of the differences, of what was run."""
    found = [table for facts in analysis.facts.values() for table in task_tables(analysis, facts)]
    return [*found, *difference_tables(analysis), *run_tables(analysis)]


def task_tables(analysis: Analysis, facts: TaskFacts) -> list[TextTable]:
    metric = facts.metric
    found = [
        _task_table(analysis, facts, f"{metric.title} and convergence", _quality(metric)),
        _task_table(analysis, facts, "cost", COST),
    ]
    if (analysis.table["metric"] == ATTENTION[0][0]).any():
        found.append(_task_table(analysis, facts, "attention", ATTENTION))
    if facts.name in analysis.targets:
        found.append(_target_table(analysis, facts))
    if lengths := analysis.lengths.get(facts.name):
        columns = [(metric.at_length(length), f"{length:,} tokens", metric.scale) for length in lengths]
        kind = f"test {metric.label} by length, trained at {lengths[0]:,}"
        found.append(_task_table(analysis, facts, kind, columns))
    if published := comparable(analysis.results, facts.name):
        rows = [[one.name, one.source, f"{100 * one.accuracy:.2f}"] for one in published]
        title = _title(analysis, facts, "published test accuracy")
        found.append(TextTable(title, ["model", "source", "test accuracy (%)"], rows, names=2))
    return found


def run_tables(analysis: Analysis) -> list[TextTable]:
    """The learning rates that were tried, and the cells that are not done."""
    found = [_tuning_table(analysis)] if analysis.tunings else []
    if rows := [[str(one.cell), one.state, one.reason or NONE] for one in analysis.unfinished()]:
        found.append(TextTable("Cells that are not done", ["cell", "state", "reason"], rows, names=3))
    return found


def _rows(analysis: Analysis, task: str, columns: Sequence[Column]) -> list[list[str]]:
    """A row per model: its name, its number of finished seeds, its means."""
    rows = []
    for model, name in analysis.names.items():
        n = analysis.quality(task, model).n
        means = (shown_mean(analysis.mean(task, model, metric), scale, of=n) for metric, _, scale in columns)
        rows.append([name, str(n), *means])
    return rows


def _task_table(analysis: Analysis, facts: TaskFacts, kind: str, columns: Sequence[Column]) -> TextTable:
    header = ["model", "n", *(heading for _, heading, _ in columns)]
    title = _title(analysis, facts, kind, timed=kind == "cost")
    return TextTable(title, header, _rows(analysis, facts.name, columns), note=INTERVAL)


def _title(analysis: Analysis, facts: TaskFacts, kind: str, *, timed: bool = False) -> str:
    notice = analysis.notice(facts.name, timed=timed)
    return f"{facts.name} ({facts.title}): {kind}" + (f" ({notice})" if notice else "")


def _target_table(analysis: Analysis, facts: TaskFacts) -> TextTable:
    metric = facts.metric
    target = metric.shown(analysis.targets[facts.name])
    speeds = {speed.model: speed for speed in analysis.speeds if speed.task == facts.name}
    unit = next((speed.unit for speed in speeds.values()), "steps")
    rows = _rows(analysis, facts.name, TARGET)
    for row, model in zip(rows, analysis.names, strict=True):
        row[2:2] = _speed_cells(speeds.get(model))
    header = ["model", "n", "seeds at the target", f"median {unit} to it", "sooner, later, tied", "p"]
    header += ["p (Holm)", *(heading for _, heading, _ in TARGET)]
    note = (
        f"{INTERVAL}. Target: a validation {metric.title} of {target}. Median over all seeds, those "
        "that did not reach it counted as slower than any that did. Sooner, later, tied: pairs with "
        f"{analysis.baseline_name}, where training that ended before the target can lose or tie alone; p: "
        "exact, two-sided sign test; Holm's correction over the models of the task. Seconds and tokens to "
        "it: mean over the seeds that reached it, of training alone"
    )
    what = "an accuracy" if metric.more_is_better else metric.title
    return TextTable(_title(analysis, facts, f"time to {what} of {target}", timed=True), header, rows, note)


def _speed_cells(speed: Speed | None) -> list[str]:
    if speed is None:
        return [NONE] * 5
    pairs = NONE if math.isnan(speed.p) else f"{speed.wins}, {speed.losses}, {speed.ties}"
    p_values = short_p(speed.p), short_p(speed.p_holm)
    return [f"{speed.reached} of {speed.n}", speed.shown_median, pairs, *p_values]


def _tuning_table(analysis: Analysis) -> TextTable:
    """What each learning rate came to on validation."""
    rates = sorted({one.learning_rate for tuning in analysis.tunings.values() for one in tuning.trials})
    rows = []
    for (task, model), tuning in analysis.tunings.items():
        metric = metric_named(tuning.metric)
        tried = {
            one.learning_rate: one.state if one.value is None else metric.shown(one.value)
            for one in tuning.trials
        }
        chosen = f"{tuning.chosen:g}" + (" (an end of the grid)" if tuning.at_an_end else "")
        rows.append([analysis.names[model], task, *(tried.get(rate, NONE) for rate in rates), chosen])
    used = sorted({seed for tuning in analysis.tunings.values() for seed in tuning.seeds})
    note = (
        f"Best validation value, mean of seeds {', '.join(map(str, used))}, which no result uses; results "
        "are trained with the chosen rate"
    )
    header = ["model", "task", *(f"{rate:g}" for rate in rates), "chosen"]
    return TextTable("Learning rates", header, rows, note, names=2)


def difference_tables(analysis: Analysis) -> list[TextTable]:
    """At the length trained on, and at the longest that was tested."""
    both = ((analysis.differences, ""), (analysis.beyond, ", at the longest length"))
    return [_difference_table(analysis, found, title) for found, title in both if found]


def _difference_table(analysis: Analysis, differences: Sequence[Difference], title: str) -> TextTable:
    rows = []
    for row in differences:
        notice = analysis.notice(row.task)
        task = row.task + (f" at {row.length:,}" if row.length else "") + (f" ({notice})" if notice else "")
        difference = f"{shown_mean(row.mean, row.metric.scale)} {row.metric.step}" if row.mean.n else NONE
        shares = NONE if row.shares is None else str(row.shares)
        p_values = map(short_p, (row.p_t, row.p_sign_flip, row.p_shares, row.p_holm))
        numbers = (str(row.mean.n), difference, short(row.dz), shares, *p_values)
        rows.append([analysis.names[row.model], task, *numbers, row.verdict])
    header = ["model", "task", "n", "difference", "d_z", "seeds that learned"]
    header += ["p (t)", "p (sign flip)", "p (shares)", "p (Holm)", "verdict"]
    note = (
        f"Test metric minus that of {analysis.baseline_name}, paired by seed: mean [95 % t interval]; d_z: "
        "mean over standard deviation of the differences. What decides is the paired t test, or Fisher's "
        "exact test of the shares where seeds either learn or do not, with Holm's correction over the "
        "models of a task"
    )
    return TextTable(f"Differences to {analysis.baseline_name}{title}", header, rows, note, names=2)
