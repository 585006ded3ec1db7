"""Which figures a comparison has, one task at a time, and how each is to be read.

    for drawn, figure in task_figures(TaskView(analysis, task, stem)):
        save_figure(figure, folder, drawn.stem)

File names hold the task's own name. Every title holds the notice of smoke runs, and one with times also that
of cells that shared a device.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from reporting.accuracy_against_cost import trade_offs
from reporting.analysis import Analysis
from reporting.attention_figures import attention_figure, distance_figure, shown_maps
from reporting.attention_numbers import relative_masses, token_masses
from reporting.comparison_figures import (
    Panel,
    bars_figure,
    improvement_figure,
    length_figure,
    quality_figure,
    radar_figure,
    reference_levels,
)
from reporting.comparison_tables import (
    CONVERGENCE,
    distance_table,
    improvements,
    length_table,
    radar_scores,
)
from reporting.figure_style import ModelStyle, drawable
from reporting.lra_literature import PUBLISHED, comparable
from reporting.mass_figures import mass_figure, shaded_figure
from reporting.summary_tables import MIB
from reporting.text_tables import short
from reporting.training_figures import curves_figure, learned_figure, progress_figure
from results_folder import AttentionPatterns, Cell, file_name

LONGEST_STEM = 60
TIMED = ("accuracy_time", "cost", "improvement", "radar")  # figures with times or memory
BARS = "Bar: mean over seeds; marks: one per seed; black: 95 % t interval of the mean, where n is at least 2."

_PLAIN = Panel("convergence_epoch", "epochs to 90 % of the best validation accuracy", form=short, whole=True)
_ABOVE = Panel(CONVERGENCE, "the same, counted above chance", 1.0, short, "never above chance", whole=True)
CONVERGENCE_PANELS = (_PLAIN, _ABOVE)
WAY_PANELS = (_ABOVE._replace(label="epochs to 90 % of the way from chance to the best"),)  # less is better
COST_PANELS = (
    Panel("seconds_per_epoch", "seconds per training epoch", form=short),
    Panel("tokens_per_second", "training tokens per second", form=short),
    Panel("peak_memory_bytes", "peak memory (MiB)", 1 / MIB, form=short),
    Panel("parameters", "parameters", form=short),
)


class DrawnFigure(NamedTuple):
    """A figure in figures/, by the stem of its two files, and how to read it."""

    stem: str
    title: str
    caption: str


Drawn = Iterator[tuple[DrawnFigure, Figure]]


def file_stems(names: Sequence[str]) -> dict[str, str]:
    """Names of tasks or models as parts of file names; a number is added where two would be the same."""
    stems: dict[str, str] = {}
    for number, name in enumerate(names):
        stem = file_name(name)[:LONGEST_STEM]
        stems[name] = f"{stem}_{number}" if stem in stems.values() else stem
    return stems


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

    @cached_property
    def absent(self) -> dict[str, str]:
        """Why a model has no result, by model: "no result (failed, 2 missing)"."""
        words = {}
        for model in self.styles:
            states = Counter(
                record.state
                for record in self.analysis.results.cells
                if (record.cell.task, record.cell.model) == (self.task, model)
            )
            if not states["done"]:
                counts = (f"{count} {state}" if count > 1 else state for state, count in states.items())
                words[model] = f"no result ({', '.join(counts) or 'not planned'})"
        return words

    def figure(self, kind: str, what: str, draw: Callable[[str], Figure], caption: str) -> Drawn:
        """The figure, drawn under its title."""
        notice = self.analysis.notice(self.task, timed=kind in TIMED)
        title = f"{what}: {drawable(self.analysis.facts[self.task].title, 60)}"
        drawn = DrawnFigure(f"{kind}_{self.stem}", f"{what}, {self.task}", caption)
        yield drawn, draw(f"{title}\n{drawable(notice, 90)}" if notice else title)


def task_figures(view: TaskView) -> Drawn:
    """One figure after the other, so that only one is in memory."""
    some_done = len(view.absent) < len(view.styles)
    if some_done:
        yield from _accuracy(view)
    epochs = view.of_task(view.analysis.epochs)
    if not epochs.empty:
        facts = view.analysis.facts[view.task]
        yield from view.figure(
            "learning_curves",
            "Learning curves",
            lambda title: curves_figure(epochs, view.styles, title, chance=facts.chance, metric=facts.metric),
            "Thick: mean over the finished seeds, as far as all of them ran; band: from the smallest to the "
            "largest seed; thin: each seed. Dotted, ending in a cross: a cell that did not finish. Training "
            "accuracy is taken while the weights change and dropout is on, so it may lie below validation.",
        )
    if some_done:
        yield from _progress(view)
        yield from _comparisons(view)
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
        )


def _accuracy(view: TaskView) -> Drawn:
    facts = view.analysis.facts[view.task]
    metric = facts.metric
    published = comparable(view.analysis.results, view.task)
    values = view.table[view.table["metric"] == metric.best]
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
    return view.figure(
        "accuracy",
        f"Test {metric.title}",
        lambda title: quality_figure(values, view.styles, title, levels, view.absent, metric),
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


def _progress(view: TaskView) -> Drawn:
    target = view.analysis.targets.get(view.task)
    progress, points = view.of_task(view.analysis.progress), trade_offs(view.table)
    metric = view.analysis.metric(view.task)
    return view.figure(
        "accuracy_time",
        f"{metric.title.capitalize()} against time and tokens",
        lambda title: progress_figure(progress, points, view.styles, title, target=target, metric=metric),
        f"Left and middle: validation {metric.title} against the training time and the tokens spent so "
        "far, a point per epoch; thick: mean over the finished seeds, as far as all of them ran; thin: "
        f"each seed. Further left is cheaper. Right: test {metric.title} against the training time to the "
        f"best epoch; large: means, with the 95 % t interval of {metric.title} where n is at least 2; "
        f"small: seeds; {'up' if metric.more_is_better else 'down'} and left: more for less; no model on "
        "the dashed line is beaten in both. Times hold for this machine and leave out "
        "evaluation; their axes are logarithmic where they span much.",
    )


def _comparisons(view: TaskView) -> Drawn:
    quality = view.analysis.metric(view.task)
    panels = CONVERGENCE_PANELS if quality.more_is_better else WAY_PANELS
    what = (
        "Left: the first epoch at 90 % of the best validation accuracy, which guessing already meets on two "
        "classes. Right: 90 % of the way from chance to the best."
    )
    if not quality.more_is_better:
        what = f"The first epoch 90 % of the way from guessing to the best {quality.title}."
    yield from view.figure(
        "convergence",
        "Convergence",
        lambda title: bars_figure(view.table, view.styles, panels, title, view.absent),
        f"{BARS} Fewer is faster. {what}",
    )
    yield from view.figure(
        "cost",
        "Cost",
        lambda title: bars_figure(view.table, view.styles, COST_PANELS, title, view.absent),
        f"{BARS} Times hold for this machine only: compare models, not runs on different machines. Peak "
        "memory on a CPU counts the whole process, its libraries included.",
    )
    baseline = view.analysis.baseline
    gains = improvements(view.table, baseline)
    others = {model: style for model, style in view.styles.items() if model != baseline}
    if len(gains) and others:
        metrics = (
            (quality.best, f"test {quality.title}: {'gain' if quality.more_is_better else 'saving'} (%)"),
            (CONVERGENCE, "epochs to converge, above chance: saving (%)"),
            ("seconds_per_epoch", "time per epoch: saving (%)"),
            ("peak_memory_bytes", "peak memory: saving (%)"),
        )
        name = view.styles[baseline].name
        yield from view.figure(
            "improvement",
            f"Relative improvement over {name}",
            lambda title: improvement_figure(gains, others, metrics, title),
            f"In percent of {name}'s value with the same seed: right of 0 the model gains accuracy or saves "
            "bits, epochs, time or memory. Marks: one per seed; black: mean and 95 % t interval, where n "
            "is at least 2. An interval that holds 0 is no sign of a difference.",
        )
    scores = radar_scores(view.analysis.summary, view.task)
    yield from view.figure(
        "radar",
        "Quality and efficiency, 1 = best of these models",
        lambda title: radar_figure(scores, view.styles, title),
        "Each axis is scaled to the best model of this task, from means over seeds: accuracy / the highest "
        "accuracy, or the fewest bits / bits; the fewest epochs to converge (above chance) / epochs; the "
        "shortest time per epoch / time; the smallest peak memory / memory. 0.5 is half as good as the "
        "best. An open line: a model without that number. The area has no meaning, and the radar shows no "
        "uncertainty.",
    )


def _attention(view: TaskView) -> Drawn:
    if not view.patterns:
        return
    for model in view.styles:
        cell = next((cell for cell in view.patterns if cell.model == model), None)
        if cell is not None:
            yield from _attention_map(view, cell)
    shares, learned = distance_table(view.patterns), view.of_task(view.analysis.learned)
    yield from view.figure(
        "attention_distance",
        "Attention weight by distance",
        lambda title: distance_figure(shares, learned, view.styles, title),
        "Share of a query's weight per token of distance, in bins that double in width, on logarithmic axes; "
        "mean over queries of long validation examples, heads and seeds. Even weights are level, and fall at "
        "the right, where few pairs are so far apart. Left: mean over timescales. Others: each timescale of "
        "one model; grey: what its learned gamma^d alone would do to weights (mean over heads), through the "
        "measured value at distance 1.",
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
        )
        yield from _shaded(view)


def _attention_map(view: TaskView, cell: Cell) -> Drawn:
    one = view.patterns[cell]
    example, shown, layers, heads = shown_maps(one)
    length = int(one.lengths[example])
    parts = "all layers" if len(layers) == len(one.maps) else "the last layer"
    parts += " and heads" if heads == one.maps.shape[3] else f", {heads} of {one.maps.shape[3]} heads"
    cut = f"the first {shown} of {length} tokens of" if shown < length else "all tokens of"
    return view.figure(
        f"attention_{file_stems([*view.styles])[cell.model]}",
        f"Attention of {view.styles[cell.model].name}",
        lambda title: attention_figure(one, title),
        f"Weights before dropout, for {cut} one validation example (seed {cell.seed}); {parts}. In each map, "
        "row: the query; column: the key it attends to. Bright: more weight, on a square-root scale that the "
        "maps share; the scale differs between models. A bright diagonal looks at near tokens, a bright "
        "column at one token from everywhere.",
    )


def _shaded(view: TaskView) -> Drawn:
    """An example of each model's first cell that has masses: the same one for models of equal seed."""
    examples, seeds = {}, set()
    for model in view.styles:
        for cell, one in view.patterns.items():
            if cell.model == model and one.key_mass is not None and model not in examples:
                example = int(one.lengths.argmax())
                length = int(one.lengths[example])
                masses = relative_masses(one.key_mass[:, example, ..., :length])
                examples[model] = one.symbols[example, :length].tolist(), masses
                seeds.add(cell.seed)
    return view.figure(
        "mass_text",
        "One example, its tokens shaded by mass",
        lambda title: shaded_figure(examples, view.styles, title),
        "The longest of the short validation examples that are kept (seed "
        f"{', '.join(map(str, sorted(seeds)))}), at most its first 64 tokens. Orange: heavier as a key than "
        "the mean of the example, so that it pulls more weight; violet: lighter; mean over layers, "
        "timescales and heads. The scale is shared, and as wide as the masses are apart: look at its ends "
        "first.",
    )
