"""The first screen of a report: a sentence of verdict for each model, and a matrix of models and tasks.

    screen = first_screen(analysis)
    screen.verdicts, screen.matrices, screen.scope

All say the same numbers, and no more than these allow: "better" and "worse" are verdicts (verdicts.py), a
difference without one is given as "open" or as of too few seeds, what did not finish is named, and a smoke
run says nothing of any model.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from reporting.analysis import SMOKE, Analysis
from reporting.report_findings import guessing
from reporting.text_tables import TextTable, short
from reporting.verdicts import LEAST_SEEDS, SIGNIFICANCE, Difference

WORDS = {
    "better": f"the corrected p is at most {SIGNIFICANCE}: gains that may matter, or more seeds that learn",
    "worse": f"the corrected p is at most {SIGNIFICANCE}: losses that may matter, or fewer seeds that learn",
    "no relevant difference": "the interval holds none that matters",
    "open": "the interval holds differences that matter, so that more seeds would tell",
    "too few seeds": f"less than {LEAST_SEEDS} pairs allow no verdict",
    "no pair": "no seed finished with both models",
}


class Entry(NamedTuple):
    """What the matrix says of a model on a task. verdict: the words; kind: its colour, a key of
    WORDS, "baseline" or "no result"."""

    verdict: str
    numbers: str
    kind: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.numbers}" if self.numbers else self.verdict


class FirstScreen(NamedTuple):
    """verdicts: of each model its name, and how a sentence or a few of it go on. matrices: a row for each
    model, its name and an Entry for each task, at the length trained on, and at the longest that was tested;
    none where there is nothing to compare. scope: sentences on what the verdicts hold for."""

    verdicts: list[tuple[str, str]]
    matrices: Sequence[TextTable] = ()
    scope: Sequence[str] = ()


def first_screen(analysis: Analysis) -> FirstScreen:
    if SMOKE in {analysis.notice(task) for task in analysis.facts}:
        return FirstScreen([("A smoke test", "says nothing of any model.")])
    if not any(analysis.quality(task, model).n for task in analysis.facts for model in analysis.names):
        return FirstScreen([("No cell is done,", "so nothing can be said of any model.")])
    verdicts = [(analysis.baseline_name, _of_baseline(analysis))]
    verdicts += [(name, _of_model(analysis, model)) for model, name in analysis.others.items()]
    matrices = [_verdicts(analysis), *_beyond(analysis)]
    return FirstScreen(verdicts, matrices, [*_size(analysis), *_grid_ends(analysis)])


def _verdicts(analysis: Analysis) -> TextTable:
    header = ["model", *(_heading(analysis, task) for task in analysis.facts)]
    base = [f"{analysis.baseline_name} (baseline)", *(_base(analysis, task) for task in analysis.facts)]
    rows = [base, *_rows(analysis, analysis.facts, analysis.differences)]
    kinds = {entry.kind for row in rows for entry in row if isinstance(entry, Entry)}
    legend = "; ".join(f"{word}: {meaning}" for word, meaning in WORDS.items() if word in kinds)
    return TextTable("Verdicts", header, rows, legend, names=len(header))


def _rows(analysis: Analysis, tasks: Iterable[str], differences: Sequence[Difference]) -> Iterator[list[Any]]:
    """Of the models but the baseline."""
    found = {(row.task, row.model): row for row in differences}
    for model, name in analysis.others.items():
        yield [name, *(_entry(analysis, task, model, found.get((task, model))) for task in tasks)]


def _heading(analysis: Analysis, task: str) -> str:
    metric = analysis.metric(task)
    found = [model for model in analysis.names if analysis.quality(task, model).n]
    title = metric.title
    words = f"{metric.step} of {title}" if metric.more_is_better else f"{title}, fewer are a gain"
    none = "; no model is told apart from guessing" if found and guessing(analysis, task) == found else ""
    return f"{task} ({words}{none})"


def _base(analysis: Analysis, task: str) -> Entry:
    mean, lost = analysis.quality(task, analysis.baseline), analysis.lost(task, analysis.baseline)
    if not mean.n:
        return Entry(f"no result ({lost or 'not planned'})", "", "no result")
    numbers = f"n = {mean.n}; {lost}" if lost else f"n = {mean.n}"
    return Entry(analysis.metric(task).shown(mean.mean), numbers, "baseline")


def _entry(analysis: Analysis, task: str, model: str, row: Difference | None) -> Entry:
    if row is None or not analysis.quality(task, model).n:
        return Entry(f"no result ({analysis.lost(task, model) or 'not planned'})", "", "no result")
    return Entry(row.verdict, _numbers(analysis, row) if row.mean.n else "", row.verdict)


def _numbers(analysis: Analysis, row: Difference) -> str:
    """ "+43.1 [+38.0, +48.2], n = 7; seeds that learn: 7 of 7 against 3 of 8; 1 diverged"; without n where
    it is the baseline's, which has it in its row."""
    metric, (n, mean, low, high) = row.metric, row.mean
    text = metric.difference(mean)
    if n > 1:
        text += f" [{metric.difference(low)}, {metric.difference(high)}]"
    if n != analysis.quality(row.task, analysis.baseline).n:
        text += f", n = {n}"
    learned = "" if row.shares is None else f"seeds that learn: {row.shares}"
    return "; ".join(filter(None, [text, learned, analysis.lost(row.task, row.model)]))


def _of_baseline(analysis: Analysis) -> str:
    """What the baseline reaches, and where it has nothing to compare with."""
    reached, without = [], []
    for task, facts in analysis.facts.items():
        mean = analysis.quality(task, analysis.baseline)
        if mean.n:
            reached.append(f"{facts.metric.shown(mean.mean)} on {task}")
        else:
            without.append(task)
    text = f"is what the others are compared with{': ' if reached else ''}{_listed(reached)}."
    if without:
        text += f" It has no result on {_listed(without)}: nothing is compared there."
    return text


def _of_model(analysis: Analysis, model: str) -> str:
    """Where the model is better, worse, neither or unknown, how soon it learns and what it costs."""
    base = analysis.baseline_name
    rows = [row for row in analysis.differences if row.model == model and row.mean.n]
    starts = {
        "better": ("is better", f" than {base}"),
        "worse": ("is worse", f" than {base}"),
        "no relevant difference": ("has no relevant difference", f" to {base}"),
        "open": ("is not told apart", f" from {base}"),
        "too few seeds": (f"has no verdict, for too few seeds ({LEAST_SEEDS} pairs are the least),", ""),
    }
    parts: list[str] = []
    for verdict, (start, whom) in starts.items():
        if named := [f"{row.task}{_brief(analysis, row)}" for row in rows if row.verdict == verdict]:
            parts.append(f"{start}{'' if parts else whom} on {_listed(named)}")
    if nothing := [task for task in analysis.facts if task not in {row.task for row in rows}]:
        parts.append(f"has nothing to compare on {_listed(nothing)}")
    sentences = [f"{'; '.join(parts)}."]
    if any("diverged" in analysis.lost(row.task, model) for row in rows):
        sentences.append("Seeds that diverged are in no mean, which flatters it.")
    return " ".join([*sentences, *_soon(analysis, model), *_cost(analysis, model)])


def _brief(analysis: Analysis, row: Difference) -> str:
    """The number of a verdict, or of what had too few seeds for one, and what did not finish."""
    parts = []
    if row.decided and row.shares is not None:
        parts.append(f"seeds that learn: {row.shares}")
    elif row.decided or row.mean.n < LEAST_SEEDS:
        parts.append(f"{row.metric.difference(row.mean.mean)} {row.metric.step}")
    if row.mean.n < LEAST_SEEDS:
        parts.append(f"n = {row.mean.n}")
    if lost := analysis.lost(row.task, row.model):
        parts.append(lost)
    return f" ({', '.join(parts)})" if parts else ""


def _soon(analysis: Analysis, model: str) -> list[str]:
    told = [one for one in analysis.speeds if one.model == model and one.p_holm <= SIGNIFICANCE]
    parts = [
        f"{word} on {_listed(tasks)}"
        for word, ahead in (("in fewer steps", True), ("in more steps", False))
        if (tasks := [one.task for one in told if (one.wins > one.losses) is ahead])
    ]
    return [f"It reaches the target {' and '.join(parts)}."] if parts else []


def _beyond(analysis: Analysis) -> list[TextTable]:
    """The differences at the longest length that each task was tested at."""
    tasks = list(dict.fromkeys(row.task for row in analysis.beyond))
    header: list[str] = ["model"]
    base: list[Any] = [f"{analysis.baseline_name} (baseline)"]
    for task in tasks:
        metric, (trained, *_, longest) = analysis.metric(task), analysis.lengths[task]
        header.append(f"{task} at {longest:,} tokens ({longest / trained:.3g} times the trained length)")
        mean = analysis.mean(task, analysis.baseline, metric.at_length(longest))
        base.append(Entry(metric.shown(mean.mean) if mean.n else "no result", "", "baseline"))
    rows = [base, *_rows(analysis, tasks, analysis.beyond)]
    title = "Tested beyond the trained length"
    return [TextTable(title, header, rows, names=len(header))] if tasks else []


def _size(analysis: Analysis) -> list[str]:
    """How large the models were, and how long they were trained."""
    table = analysis.table
    parameters = table.loc[table["metric"] == "parameters", "value"]
    steps = analysis.epochs.groupby("task")["steps"].max().dropna()
    if parameters.empty or steps.empty:
        return []
    sizes, trained = (
        " to ".join(dict.fromkeys(f"{end:,.0f}" for end in (found.min(), found.max())))
        for found in (parameters, steps)
    )
    return [f"Models of {sizes} parameters, trained for {trained} steps: what holds there may not elsewhere."]


def _grid_ends(analysis: Analysis) -> list[str]:
    """On which tasks learning rates that were not tried may be better."""
    found = []
    for task in analysis.facts:
        tuned = [tuning for (of, _), tuning in analysis.tunings.items() if of == task]
        ends = sum(tuning.at_an_end for tuning in tuned)
        found += [f"{ends} of {len(tuned)} models on {task}"] if ends else []
    tail = "at an end of those tried: beyond it may be better ones"
    return [f"The best learning rate of {_listed(found)} is {tail}."] if found else []


def _cost(analysis: Analysis, model: str) -> list[str]:
    """Time and parameters as multiples of the baseline's, the range over the tasks."""
    parts = []
    costs = (("seconds_per_epoch", "time per epoch", "much"), ("parameters", "parameters", "many"))
    for metric, what, amount in costs:
        every = (analysis.multiple(task, model, metric) for task in analysis.facts)
        found = sorted(one for one in every if not math.isnan(one))
        ends = list(dict.fromkeys(map(short, found[:1] + found[-1:])))
        if ends:
            equal = {*ends} <= {"1", "1.00"}
            parts.append(f"as {amount} {what}" if equal else f"{' to '.join(ends)} times the {what}")
    timed = {analysis.sharing(task) for task in analysis.facts} - {""}
    caution = f" ({'; '.join(sorted(timed))})" if timed else ""
    return [f"It takes {' and '.join(parts)}{caution}."] if parts else []


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
