"""Which figures a comparison has, those of all tasks first, and how each is to be read.

    for task, drawn, figure in all_figures(analysis):       # task: "" where it is of all tasks
        save_figure(figure, folder, drawn.stem)

File names hold the task's own name. Every title holds the notice of smoke runs, and one with times also that
of cells that shared a device.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from reporting.analysis import Analysis
from reporting.attention_explorer import of_one_seed
from reporting.attention_figures import (
    attention_figure,
    distance_figure,
    mass_figure,
    rows_of_maps,
    shown_example,
)
from reporting.attention_numbers import token_masses
from reporting.comparison_figures import (
    forest_figure,
    gain_at_cost_figure,
    length_figure,
    quality_figure,
    reference_levels,
)
from reporting.comparison_tables import distance_table, length_table
from reporting.figure_style import ModelStyle, drawable
from reporting.lra_literature import PUBLISHED, comparable
from reporting.training_figures import curves_figure, learned_figure
from results_folder import AttentionPatterns, Cell, file_name

LONGEST_STEM = 60
MAP_TOKENS, FEWEST_TOKENS, MAP_HEADS = 20, 8, 4
TOKENS_DOWN = 160  # below each other in a grid of maps, unless its rows are very many


class DrawnFigure(NamedTuple):
    """A figure in figures/, by the stem of its two files, and how to read it. folded: whether report.html
    leads to it, and does not hold it."""

    stem: str
    title: str
    caption: str
    folded: bool = False


Drawn = Iterator[tuple[DrawnFigure, Figure]]


def file_stems(names: Sequence[str]) -> dict[str, str]:
    """Names of tasks or models as parts of file names; a number is added where two would be the same."""
    stems: dict[str, str] = {}
    for number, name in enumerate(names):
        stem = file_name(name)[:LONGEST_STEM]
        stems[name] = f"{stem}_{number}" if stem in stems.values() else stem
    return stems


def all_figures(
    analysis: Analysis, only: Sequence[str] | None = None
) -> Iterator[tuple[str, DrawnFigure, Figure]]:
    """One figure after the other, so that only one is in memory. only: of these tasks, "" being all."""
    for task, stem in {"": "", **file_stems([*analysis.facts])}.items():
        if only is None or task in only:
            drawn = task_figures(TaskView(analysis, task, stem)) if task else overview_figures(analysis)
            yield from ((task, *one) for one in drawn)


def overview_figures(analysis: Analysis) -> Drawn:
    """The figures over all tasks: what a model gains against what it costs, and every difference."""
    found = [row for row in analysis.differences if row.mean.n]
    if not found:
        return
    name, styles = analysis.baseline_name, analysis.styles
    read = "Filled: better or worse; hollow: neither. Bar: 95 % t interval of the paired differences, n of 2 "
    read += "and more. Each metric keeps its own unit, so each has a panel."
    costs = [analysis.multiple(row.task, row.model, "seconds_per_epoch") for row in found]
    if priced := [(row, cost) for row, cost in zip(found, costs, strict=True) if cost > 0]:
        notices = {analysis.notice(row.task, timed=True) for row, _ in priced} - {""}
        title = "\n".join([f"Gain over {drawable(name)} against cost", *sorted(notices)])
        caption = (
            f"A point for each model and task. Up: ahead of {name}, below 0: behind it; right: more time per "
            f"training epoch, as a multiple of {name}'s with the same seed. {read}"
        )
        drawn = DrawnFigure("gain_at_cost", f"Gain over {name} against cost", caption)
        yield drawn, gain_at_cost_figure(priced, styles, name, title)
    notices = {analysis.notice(row.task) for row in found} - {""}
    title = "\n".join([f"Differences to {drawable(name)}", *sorted(notices)])
    margins = " or ".join(dict.fromkeys(row.metric.margin for row in found))
    caption = (
        f"Test metric minus that of {name}, paired by seed, turned so that right is a gain. {read} Grey: "
        f"differences too small to matter ({margins})."
    )
    drawn = DrawnFigure("differences", f"Differences to {name} on all tasks", caption)
    yield drawn, forest_figure(found, styles, title)


@dataclass(frozen=True)
class TaskView:
    """One task's part of an analysis. stem: the task in file names."""

    analysis: Analysis
    task: str
    stem: str

    def of_task(self, table: pd.DataFrame) -> pd.DataFrame:
        return table[table["task"] == self.task]

    @property
    def styles(self) -> dict[str, ModelStyle]:
        return self.analysis.styles

    @cached_property
    def table(self) -> pd.DataFrame:
        """The tidy table."""
        return self.of_task(self.analysis.table)

    @cached_property
    def patterns(self) -> dict[Cell, AttentionPatterns]:
        return {cell: one for cell, one in self.analysis.patterns.items() if cell.task == self.task}

    def figure(
        self, kind: str, what: str, draw: Callable[[str], Figure], caption: str, *, folded: bool = False
    ) -> Drawn:
        """The figure, drawn under its title."""
        notice = self.analysis.notice(self.task)
        title = f"{what}: {drawable(self.analysis.facts[self.task].title, 60)}"
        drawn = DrawnFigure(f"{kind}_{self.stem}", f"{what}, {self.task}", caption, folded)
        yield drawn, draw(f"{title}\n{drawable(notice, 90)}" if notice else title)


def task_figures(view: TaskView) -> Drawn:
    yield from _accuracy(view)
    epochs = view.of_task(view.analysis.epochs)
    if not epochs.empty:
        facts, target = view.analysis.facts[view.task], view.analysis.targets.get(view.task)
        shown: dict[str, Any] = {"metric": facts.metric, "level": facts.level, "target": target}
        yield from view.figure(
            "learning_curves",
            "Learning curves",
            lambda title: curves_figure(epochs, view.styles, title, **shown),
            "Thick: mean over the finished seeds, as far as all of them ran; band: from the smallest to the "
            "largest seed; thin: each seed. Dotted, ending in a cross: a cell that did not finish. The "
            "target is one for all models: who crosses it further left learns in fewer steps. Training "
            "values are taken while the weights change and dropout is on, so they may lie behind validation.",
        )
    yield from _lengths(view)
    yield from _attention(view)
    learned = view.of_task(view.analysis.learned)
    if len(learned):
        yield from view.figure(
            "learned",
            "Learned horizons and laws of gravity",
            lambda title: learned_figure(learned, view.styles, title),
            "Horizon 1 / (1 - gamma): the distance in tokens over which the weight (with discount=logits: "
            "the logit) falls to about a third; t: timescale. G: strength of gravity, 1 at the start; p, "
            "softening: of its distance. Line: one per layer and timescale, mean over heads and seeds; band: "
            "smallest to largest. A flat line has learned nothing.",
            folded=True,
        )


def _accuracy(view: TaskView) -> Drawn:
    facts = view.analysis.facts[view.task]
    metric = facts.metric
    values = view.table[view.table["metric"] == metric.best]
    if values.empty:
        return
    lost = {model: view.analysis.lost(view.task, model) or "not planned" for model in view.styles}
    absent = {model: f"no result ({why})" for model, why in lost.items()}
    published = comparable(view.analysis.results, view.task)
    levels = reference_levels(facts, published)
    said = ", and published test accuracies of the Long Range Arena" if published else ""
    if not published and view.task in PUBLISHED:
        said = (
            "; published accuracies of the Long Range Arena are not drawn, since they hold for its full data "
            "and this run had other data settings"
        )
    lines = f"Lines: guessing, and always naming the largest class{said}"
    if not metric.more_is_better:
        guess = "" if facts.level is None else f"; guessing costs {metric.shown(facts.level)}"
        lines = f"Further left is better{guess}"
    yield from view.figure(
        "accuracy",
        f"Test {metric.title}",
        lambda title: quality_figure(values, view.styles, title, levels, absent, metric),
        "Large: mean over seeds, black: its 95 % t interval, where n is at least 2; small, below: each seed. "
        f"{lines}. The axis does not start at 0.",
    )


def _lengths(view: TaskView) -> Drawn:
    lengths, metric = length_table(view.table), view.analysis.metric(view.task)
    if len(lengths):
        yield from view.figure(
            "lengths",
            f"Test {metric.title} at longer lengths",
            lambda title: length_figure(lengths, view.styles, title, metric),
            "Of the best validation epoch's weights on examples of each length. Dotted: the length trained "
            "on; thick: mean over seeds, with its 95 % t interval where n is at least 2; thin: each seed.",
        )


def _attention(view: TaskView) -> Drawn:
    if not view.patterns:
        return
    yield from _attention_maps(view)
    shares, learned = distance_table(view.patterns), view.of_task(view.analysis.learned)
    last = shares[shares["layer"] == shares["layer"].max()]
    yield from view.figure(
        "attention_distance",
        "Attention weight by distance in the last layer",
        lambda title: distance_figure(last, learned, view.styles, title),
        "Share of a query's weight per token of distance, in bins that double in width, on logarithmic axes; "
        "mean over queries of long validation examples, heads and seeds. Even weights are level, and fall at "
        "the right, where few pairs are so far apart. Left: mean over timescales. Others: each timescale of "
        "one model; grey: what its learned gamma^d alone would do to weights (mean over heads), through the "
        "measured value at distance 1.",
        folded=True,
    )
    masses = {
        model: tokens
        for model in view.styles
        if (tokens := token_masses([one for cell, one in view.patterns.items() if cell.model == model]))
    }
    if masses:
        yield from view.figure(
            "masses",
            "Heaviest and lightest tokens (as keys)",
            lambda title: mass_figure(masses, view.styles, title),
            "Mass of a token as a key over the mean mass of its example, mean over layers, timescales, "
            "heads, examples and seeds; in brackets how often it occurs there. 1: an average token. A token "
            "that occurs once or twice says little.",
            folded=True,
        )


def _attention_maps(view: TaskView) -> Drawn:
    seed, patterns = of_one_seed(view.patterns, view.styles)
    first = next(iter(patterns.values()))
    number = sum(one.maps.shape[2] for one in patterns.values())  # of rows
    example, shown = shown_example(first, min(MAP_TOKENS, max(FEWEST_TOKENS, TOKENS_DOWN // number)))
    rows: dict[str, np.ndarray] = {}
    for model, one in patterns.items():
        rows |= rows_of_maps(one, view.styles[model].name, -1, example, shown, MAP_HEADS)
    length = int(first.lengths[example])
    cut = f"the first {shown} of {length} tokens of" if shown < length else "all tokens of"
    return view.figure(
        "attention",
        "Attention of the last layer",
        lambda title: attention_figure(rows, first.symbols[example, :shown], title),
        f"Weights before dropout, for {cut} a validation example (seed {seed}), by up to {MAP_HEADS} heads. "
        "In each map, row: the query; column: the key it attends to. Bright: more weight, on a square-root "
        "scale that the maps share. A bright diagonal looks at near tokens, a bright column at one token "
        "from everywhere. The explorer has the other layers, heads and examples.",
        folded=True,
    )
