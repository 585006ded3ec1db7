"""All numbers of a comparison, made once and handed to the tables, findings, figures and the report.

analysis = make_analysis(read_joined([folder]))
analysis.quality("listops", "gravitational")                # Estimate(n=3, mean=0.43, low=0.41, high=0.45)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from command_line import InputError, choose
from reporting.accuracy_against_cost import progress_metrics, progress_table, target_qualities
from reporting.comparison_tables import (
    epoch_table,
    learned_table,
    mean_ratio,
    metric_table,
    summarize,
    tested_lengths,
)
from reporting.figure_style import ModelStyle, model_styles
from reporting.learning_rates import Tuning, read_tuning
from reporting.metrics import Metric
from reporting.run_results import (
    JoinedResults,
    TaskFacts,
    default_baseline,
    done_cells,
    models_of,
    most_on_a_device,
    read_patterns,
    task_facts,
    tasks_of,
)
from reporting.seed_statistics import Estimate, estimate
from reporting.verdicts import Difference, Speed, compare, compare_speed
from results_folder import AttentionPatterns, Cell, CellRecord, Results

SMOKE = "smoke test: its numbers mean nothing"


@dataclass(frozen=True)
class Analysis:
    """All that a report is made from. styles: name, colour and marker by model, in order; baseline: the model
    that the others are compared with; lengths: by task that was tested at several, the one trained on first;
    beyond: differences at the longest of them; facts, targets: by task; no_patterns: why a cell has none;
    tunings: by task and model, the first folder's that has one; bad_tunings: why one cannot be read.

    See comparison_tables.py and accuracy_against_cost.py for the tables."""

    joined: JoinedResults
    facts: dict[str, TaskFacts]
    styles: dict[str, ModelStyle]
    baseline: str
    table: pd.DataFrame
    means: dict[tuple[str, str, str], Estimate]
    lengths: dict[str, list[int]]
    differences: list[Difference]
    beyond: list[Difference]
    speeds: list[Speed]
    epochs: pd.DataFrame
    learned: pd.DataFrame
    progress: pd.DataFrame
    targets: dict[str, float]
    patterns: dict[Cell, AttentionPatterns]
    no_patterns: dict[Cell, str]
    tunings: dict[tuple[str, str], Tuning]
    bad_tunings: list[str]

    @property
    def results(self) -> Results:
        return self.joined.results

    @property
    def names(self) -> dict[str, str]:
        return {model: style.name for model, style in self.styles.items()}

    @property
    def baseline_name(self) -> str:
        return self.names[self.baseline]

    @property
    def others(self) -> dict[str, str]:
        """The names of the models but the baseline."""
        return {model: name for model, name in self.names.items() if model != self.baseline}

    def unfinished(self) -> list[CellRecord]:
        return [record for record in self.results.cells if record.state != "done"]

    def lost(self, task: str, model: str) -> str:
        """The cells that are not done, in words; "" where there are none."""
        return in_words([r for r in self.unfinished() if (r.cell.task, r.cell.model) == (task, model)])

    def multiple(self, task: str, model: str, metric: str) -> float:
        """The metric as a multiple of the baseline's, paired by seed; NaN without a pair."""
        return mean_ratio(self.table, task, model, metric, self.baseline)

    def mean(self, task: str, model: str, metric: str) -> Estimate:
        """Over the seeds; n = 0 and NaN where there are none."""
        return self.means.get((task, model, metric), estimate([]))

    def quality(self, task: str, model: str) -> Estimate:
        """The mean of the task's own metric on the test split."""
        return self.mean(task, model, self.metric(task).best)

    def metric(self, task: str) -> Metric:
        return self.facts[task].metric

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
        most = max(self.on_a_device(task), default=1)
        return f"times and memory: {most} cells on a device" if most > 1 and not self.one_core_a_cell else ""

    def on_a_device(self, task: str | None = None) -> list[int]:
        """How many cells were on the device of each finished cell at a time, itself included."""
        done = done_cells(self.results)
        return [most_on_a_device(record) for record in done if task in (None, record.cell.task)]

    @property
    def one_core_a_cell(self) -> bool:
        """Whether the cells ran side by side on a CPU, as many as it has cores at most, a thread each."""
        sharing = set(self.on_a_device())
        environments = [source.environment for source in self.joined.sources]
        alone = all(one.get("threads") == 1 and one.get("device") == "cpu" for one in environments)
        cores = [one.get("cores") for one in environments]
        return alone and len(sharing) == 1 and all(isinstance(n, int) and max(sharing) <= n for n in cores)


def in_words(cells: Sequence[CellRecord]) -> str:
    """How many there are in each state: "2 failed, 1 missing"."""
    return ", ".join(f"{n} {state}" for state, n in Counter(record.state for record in cells).items())


def make_analysis(joined: JoinedResults, baseline: str | None = None) -> Analysis:
    """baseline: the model that differences are taken to; by default `default_baseline`. Raises InputError
    where it is no model of the results."""
    results = joined.results
    models = models_of(results)
    baseline = default_baseline(models) if baseline is None else choose(baseline, models, "baseline")
    facts = {task: task_facts(results, task) for task in tasks_of(results)}
    patterns, no_patterns = read_patterns(results)
    progress = progress_table(results)
    targets = target_qualities(progress, facts)
    tunings, bad_tunings = _tunings(joined)
    measured, more = metric_table(results, patterns), progress_metrics(progress, targets, facts)
    table = pd.concat([measured, more], ignore_index=True) if len(more) else measured
    lengths = tested_lengths(table)
    return Analysis(
        joined=joined,
        facts=facts,
        styles=model_styles(models),
        baseline=baseline,
        table=table,
        means=summarize(table),
        lengths=lengths,
        differences=compare(table, baseline, {task: one.level for task, one in facts.items()}),
        beyond=compare(table, baseline, at={task: of[-1] for task, of in lengths.items() if len(of) > 1}),
        speeds=compare_speed(progress, targets, {task: one.metric for task, one in facts.items()}, baseline),
        epochs=epoch_table(results),
        learned=learned_table(results),
        progress=progress,
        targets=targets,
        patterns=patterns,
        no_patterns=no_patterns,
        tunings=tunings,
        bad_tunings=bad_tunings,
    )


def _tunings(joined: JoinedResults) -> tuple[dict[tuple[str, str], Tuning], list[str]]:
    found: dict[tuple[str, str], Tuning] = {}
    unreadable = []
    for source in joined.sources:
        for task, model in dict.fromkeys((record.cell.task, record.cell.model) for record in source.cells):
            try:
                if tuning := read_tuning(source.root, task, model):
                    found.setdefault((task, model), tuning)
            except InputError as error:
                unreadable.append(str(error))
    return found, unreadable
