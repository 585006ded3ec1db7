"""The tables of a comparison as text: one task's accuracy, cost and attention, differences, lost cells.

    for table in tables(analysis):
        print(markdown_table(table))

Every table of a smoke run says so in its title, and one with times also where cells shared a device. See
comparison_tables.py for the numbers.
"""

from collections.abc import Sequence

from reporting.analysis import Analysis
from reporting.comparison_tables import CONVERGENCE, NEAR
from reporting.lra_literature import comparable
from reporting.run_results import ACCURACY, TaskFacts
from reporting.seed_statistics import Estimate
from reporting.text_tables import NONE, TextTable, short, short_p

MIB = 2.0**20
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


def _rows(analysis: Analysis, task: str, columns: Sequence[Column]) -> list[list[str]]:
    """A row per model: its name, its number of finished seeds, its means."""
    rows = []
    for model, name in analysis.names.items():
        n = analysis.mean(task, model, ACCURACY).n
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
    target = f"{100 * analysis.targets[facts.name]:.1f} %"
    rows = _rows(analysis, facts.name, TARGET_COLUMNS)
    for row, model in zip(rows, analysis.names, strict=True):
        reached = analysis.mean(facts.name, model, "epochs_to_target").n
        row.insert(2, f"{reached} of {row[1]}" if row[1] != "0" else NONE)
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
        task = row.task + (f" ({notice})" if notice else "")
        numbers = (
            str(row.mean.n),
            shown_mean(row.mean, 100),
            *map(short_p, (row.p, row.smallest_p, row.p_holm)),
        )
        rows.append([analysis.names[row.model], task, *numbers, row.verdict])
    header = ["model", "task", "n", "difference (points)", "p", "smallest p at this n", "p (Holm)", "verdict"]
    tested = sum(row.mean.n > 0 for row in analysis.differences)
    note = (
        f"Test accuracy minus that of {analysis.baseline_name}, paired by seed: mean [95 % t interval]; p: "
        f"exact, two-sided sign-flip test; Holm's correction over the {tested} comparisons"
    )
    return TextTable(f"Differences to {analysis.baseline_name}", header, rows, note, names=2)
