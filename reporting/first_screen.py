"""The first screen of a report: a sentence of verdict for each model, and a matrix of models and tasks.

    screen = first_screen(analysis)
    screen.verdicts, screen.matrix

Both say the same numbers, and no more than these allow: "better" and "worse" are verdicts (verdicts.py), a
difference without one is given as "open" or as of too few seeds, what did not finish is named, and a smoke
run says nothing of any model.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from reporting.analysis import SMOKE, Analysis
from reporting.report_findings import guessing
from reporting.text_tables import TextTable, short
from reporting.verdicts import LEAST_SEEDS, SIGNIFICANCE, Difference

WORDS = {
    "better": f"the corrected p is at most {SIGNIFICANCE}, and the model is ahead by what may matter",
    "worse": f"the corrected p is at most {SIGNIFICANCE}, and the model is behind by what may matter",
    "no relevant difference": "the interval holds none that matters",
    "open": "the interval holds differences that matter, so that more seeds would tell",
    "too few seeds": f"less than {LEAST_SEEDS} pairs allow no verdict",
    "no pair": "no seed finished with both models",
}


class Entry(NamedTuple):
    """What the matrix says of a model on a task. verdict: the words; kind: its colour, a key of WORDS."""

    verdict: str
    numbers: str
    kind: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.numbers}" if self.numbers else self.verdict


class Matrix(NamedTuple):
    """A heading for each task, a row of entries for each model, (name, entries), and what the words mean."""

    tasks: list[str]
    rows: list[tuple[str, list[Entry]]]
    legend: str

    def table(self) -> TextTable:
        rows = [[name, *map(str, entries)] for name, entries in self.rows]
        return TextTable("Verdicts", ["model", *self.tasks], rows, self.legend, names=1 + len(self.tasks))


class Verdict(NamedTuple):
    """A sentence or a few of a model: its name, how they go on, and more, of longer tests and learning."""

    name: str
    text: str
    more: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.text}"


class FirstScreen(NamedTuple):
    """matrix: None where there is nothing to compare."""

    verdicts: list[Verdict]
    matrix: Matrix | None


def first_screen(analysis: Analysis) -> FirstScreen:
    if SMOKE in {analysis.notice(task) for task in analysis.facts}:
        return FirstScreen([Verdict("A smoke test", "says nothing of any model.")], None)
    others = [model for model in analysis.names if model != analysis.baseline]
    if not any(analysis.quality(task, model).n for task in analysis.facts for model in analysis.names):
        return FirstScreen([Verdict("No cell is done,", "so nothing can be said of any model.")], None)
    differences = {(row.task, row.model): row for row in analysis.differences}
    rows = [(f"{analysis.baseline_name} (baseline)", [_base(analysis, task) for task in analysis.facts])]
    for model in others:
        entries = [_entry(analysis, task, model, differences.get((task, model))) for task in analysis.facts]
        rows.append((analysis.names[model], entries))
    kinds = {entry.kind for _, entries in rows for entry in entries}
    legend = "; ".join(f"{word}: {meaning}" for word, meaning in WORDS.items() if word in kinds)
    verdicts = [_of_baseline(analysis), *(_of_model(analysis, model, differences) for model in others)]
    return FirstScreen(verdicts, Matrix([_heading(analysis, task) for task in analysis.facts], rows, legend))


def _heading(analysis: Analysis, task: str) -> str:
    metric = analysis.metric(task)
    found = [model for model in analysis.names if analysis.quality(task, model).n]
    title = metric.title
    words = f"{metric.step} of {title}" if metric.more_is_better else f"{title}, fewer are a gain"
    none = "; no model is told apart from guessing" if found and guessing(analysis, task) == found else ""
    return f"{task} ({words}{none})"


def _base(analysis: Analysis, task: str) -> Entry:
    mean, metric = analysis.quality(task, analysis.baseline), analysis.metric(task)
    if not mean.n:
        return Entry(
            f"no result ({analysis.lost(task, analysis.baseline) or 'not planned'})", "", "no result"
        )
    parts = [f"n = {mean.n}", analysis.lost(task, analysis.baseline)]
    return Entry(metric.shown(mean.mean), "; ".join(filter(None, parts)), "baseline")


def _entry(analysis: Analysis, task: str, model: str, row: Difference | None) -> Entry:
    if row is None or not analysis.quality(task, model).n:
        return Entry(f"no result ({analysis.lost(task, model) or 'not planned'})", "", "no result")
    if not row.mean.n:
        return Entry(row.verdict, "", row.verdict)
    return Entry(row.verdict, _numbers(analysis, row), row.verdict)


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


def _of_baseline(analysis: Analysis) -> Verdict:
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
    return Verdict(analysis.baseline_name, text)


def _of_model(analysis: Analysis, model: str, differences: dict[tuple[str, str], Difference]) -> Verdict:
    """Where the model is better, worse, neither or unknown, and what it costs; how soon it learns."""
    base = analysis.baseline_name
    rows = [row for (_, of), row in differences.items() if of == model and row.mean.n]
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
    more = [*_beyond(analysis, model), *_soon(analysis, model)]
    return Verdict(analysis.names[model], " ".join([*sentences, *_cost(analysis, model)]), "; ".join(more))


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
        for word, ahead in (("sooner", True), ("later", False))
        if (tasks := [one.task for one in told if (one.wins > one.losses) is ahead])
    ]
    return [f"reaches the target {' and '.join(parts)}"] if parts else []


def _beyond(analysis: Analysis, model: str) -> list[str]:
    """What is decided beyond the length trained on."""
    parts = []
    for verdict in ("better", "worse"):
        named = [
            f"{row.task} at {row.length:,} tokens, {row.length / analysis.shortest_test(row.task):.3g} times "
            f"as many ({row.metric.difference(row.mean.mean)} {row.metric.step})"
            for row in analysis.beyond
            if row.model == model and row.verdict == verdict and row.length
        ]
        if named:
            parts.append(f"{verdict} on {_listed(named)}")
    return [", ".join(parts)] if parts else []


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
