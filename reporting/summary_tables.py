"""What an analysis holds, and its tables: one task's accuracy, cost and attention, differences, lost cells.

    for table in tables(analysis):
        print(markdown_table(table))

Every table of a smoke run says so in its title, and one with times also where cells shared a device. See
comparison_tables.py for the numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from reporting.comparison_tables import (
    CONVERGENCE,
    NEAR,
    Difference,
)
from reporting.lra_literature import comparable
from reporting.run_results import ACCURACY, JoinedResults, TaskFacts, done_cells, most_on_a_device
from reporting.seed_statistics import Estimate
from reporting.text_tables import NONE, TextTable, short, short_p
from results_folder import Cell, CellRecord, Results

MIB = 2.0**20
SMOKE = "smoke test: its numbers mean nothing"
INTERVAL = "Mean over n seeds [95 % t interval]; n = 1: one run, no interval"
# (metric, heading, scale)
Column = tuple[str, str, float]
TABLES: tuple[tuple[str, tuple[Column, ...]], ...] = (
    (
        "accuracy and convergence",
        (
            (ACCURACY, "test accuracy (%)", 100.0),
            ("test_accuracy_last", "after the last epoch (%)", 100.0),
            ("best_epoch", "best epoch", 1.0),
            ("convergence_epoch", "epochs to 90 % of best", 1.0),
            (CONVERGENCE, "the same above chance", 1.0),
        ),
    ),
    (
        "cost",
        (
            ("seconds_per_epoch", "s per training epoch", 1.0),
            ("tokens_per_second", "tokens per s", 1.0),
            ("peak_memory_bytes", "peak memory (MiB)", 1 / MIB),
            ("parameters", "parameters", 1.0),
            ("attention_parameters", "of them in attention", 1.0),
            ("forward_flops", "forward MFLOPs / example", 1e-6),
        ),
    ),
    (
        "attention",
        (
            ("attention_entropy", "entropy of a row (1 = even)", 1.0),
            ("attention_share_near", f"weight within {NEAR} tokens (%)", 100.0),
        ),
    ),
)
TARGET_COLUMNS: tuple[Column, ...] = (
    ("epochs_to_target", "epochs to it", 1.0),
    ("seconds_to_target", "training s to it", 1.0),
    ("tokens_to_target", "million tokens to it", 1e-6),
    ("seconds_to_best", "training s to the best epoch", 1.0),
    ("tokens_to_best", "million tokens to the best epoch", 1e-6),
)


@dataclass(frozen=True)
class Analysis:
    """All that the report is made from. names: display names by model, in order; baseline: the model that
    the others are compared with; no_*: why a cell has none.

    See comparison_tables.py and accuracy_against_cost.py for the parts."""

    joined: JoinedResults
    facts: dict[str, TaskFacts]
    table: pd.DataFrame
    summary: pd.DataFrame
    differences: list[Difference]
    learned: pd.DataFrame
    names: dict[str, str]
    baseline: str
    no_patterns: dict[Cell, str]
    targets: dict[str, float]

    @property
    def results(self) -> Results:
        return self.joined.results

    @property
    def baseline_name(self) -> str:
        return self.names[self.baseline]

    def unfinished(self) -> list[CellRecord]:
        return [record for record in self.results.cells if record.state != "done"]

    def mean(self, task: str, model: str, metric: str) -> Estimate:
        """Over the seeds; n = 0 and NaN where there are none."""
        rows = self.summary
        rows = rows[(rows["task"] == task) & (rows["model"] == model) & (rows["metric"] == metric)]
        if rows.empty:
            return Estimate(0, math.nan, math.nan, math.nan)
        n, mean, low, high = (float(rows[column].iloc[0]) for column in Estimate._fields)
        return Estimate(int(n), mean, low, high)

    def notice(self, task: str, *, timed: bool = False) -> str:
        """What must be said wherever numbers of the task are shown; mostly nothing.

        timed: whether times or memory are among them."""
        notices = [SMOKE] if self.results.config.get("preset") == "smoke" else []
        if timed and (sharing := self.sharing(task)):
            notices.append(sharing)
        return "; ".join(notices)

    def sharing(self, task: str) -> str:
        """What must be said of the task's times and memory; "" where each cell had its device, or a core of
        its own as all others had."""
        done = [record for record in done_cells(self.results) if record.cell.task == task]
        most = max(map(most_on_a_device, done), default=1)
        return f"times and memory: {most} cells on a device" if most > 1 and not self.one_core_a_cell else ""

    @property
    def one_core_a_cell(self) -> bool:
        """Whether the cells ran side by side on a CPU, as many as it has cores at most, a thread each."""
        sharing = {most_on_a_device(record) for record in done_cells(self.results)}
        environments = [source.environment for source in self.joined.sources]
        alone = all(one.get("threads") == 1 and one.get("device") == "cpu" for one in environments)
        cores = [one.get("cores") for one in environments]
        return alone and len(sharing) == 1 and all(isinstance(n, int) and max(sharing) <= n for n in cores)


def shown_mean(mean: Estimate, scale: float = 1.0, *, of: int = 0) -> str:
    """ "61.2 [58.1, 64.3]", without the interval where there is none; with its n where that is less than
    `of`, the number of finished seeds."""
    text = short(scale * mean.mean)
    if mean.n > 1 and mean.low != mean.high:
        text += f" [{short(scale * mean.low)}, {short(scale * mean.high)}]"
    return f"{text} (n = {mean.n})" if 0 < mean.n < of else text


def tables(analysis: Analysis) -> list[TextTable]:
    found = []
    for facts in analysis.facts.values():
        for kind, columns in TABLES:
            if kind != "attention" or (analysis.table["metric"] == columns[0][0]).any():
                found.append(_task_table(analysis, facts, kind, columns))
        if facts.name in analysis.targets:
            found.append(_target_table(analysis, facts))
        if comparable(analysis.results, facts.name):
            found.append(_published_table(analysis, facts))
    if analysis.differences:
        found.append(_difference_table(analysis))
    if analysis.unfinished():
        rows = [[str(record.cell), record.state, record.reason or NONE] for record in analysis.unfinished()]
        found.append(TextTable("Cells that are not done", ["cell", "state", "reason"], rows, names=3))
    return found


def _task_table(
    analysis: Analysis, facts: TaskFacts, kind: str, columns: Sequence[tuple[str, str, float]]
) -> TextTable:
    rows = []
    for model, name in analysis.names.items():
        n = analysis.mean(facts.name, model, ACCURACY).n
        means = [(analysis.mean(facts.name, model, metric), scale) for metric, _, scale in columns]
        cells = [shown_mean(mean, scale, of=n) for mean, scale in means]
        rows.append([name, str(n), *cells])
    header = ["model", "n", *(heading for _, heading, _ in columns)]
    return TextTable(_title(analysis, facts, kind, timed=kind == "cost"), header, rows, note=INTERVAL)


def _title(analysis: Analysis, facts: TaskFacts, kind: str, *, timed: bool = False) -> str:
    notice = analysis.notice(facts.name, timed=timed)
    return f"{facts.name} ({facts.title}): {kind}" + (f" ({notice})" if notice else "")


def _target_table(analysis: Analysis, facts: TaskFacts) -> TextTable:
    target = f"{100 * analysis.targets[facts.name]:.1f} %"
    rows = []
    for model, name in analysis.names.items():
        n = analysis.mean(facts.name, model, ACCURACY).n
        reached = analysis.mean(facts.name, model, "epochs_to_target").n
        means = [(analysis.mean(facts.name, model, metric), scale) for metric, _, scale in TARGET_COLUMNS]
        cells = [shown_mean(mean, scale, of=n) for mean, scale in means]
        rows.append([name, str(n), f"{reached} of {n}" if n else NONE, *cells])
    header = ["model", "n", "seeds at the target", *(heading for _, heading, _ in TARGET_COLUMNS)]
    note = (
        f"{INTERVAL}. Target: a validation accuracy of {target}. To the target: mean over the seeds that "
        "reached it. Time is training time alone"
    )
    title = _title(analysis, facts, f"time to an accuracy of {target}", timed=True)
    return TextTable(title, header, rows, note)


def _published_table(analysis: Analysis, facts: TaskFacts) -> TextTable:
    lines = comparable(analysis.results, facts.name)
    rows = [[line.name, line.source, f"{100 * line.accuracy:.2f}"] for line in lines]
    header = ["model", "source", "test accuracy (%)"]
    return TextTable(_title(analysis, facts, "published test accuracy"), header, rows, names=2)


def _difference_table(analysis: Analysis) -> TextTable:
    rows = []
    for row in analysis.differences:
        notice = analysis.notice(row.task)
        p_values = (short_p(p) for p in (row.p, row.smallest_p, row.p_holm))
        task = row.task + (f" ({notice})" if notice else "")
        rows.append(
            [
                analysis.names[row.model],
                task,
                str(row.mean.n),
                shown_mean(row.mean, 100),
                *p_values,
                row.verdict,
            ]
        )
    header = ["model", "task", "n", "difference (points)", "p", "smallest p at this n", "p (Holm)", "verdict"]
    tested = sum(row.mean.n > 0 for row in analysis.differences)
    note = (
        f"Test accuracy minus that of {analysis.baseline_name}, paired by seed: mean [95 % t interval]; p: "
        f"exact, two-sided sign-flip test; Holm's correction over the {tested} comparisons"
    )
    return TextTable(f"Differences to {analysis.baseline_name}", header, rows, note, names=2)
