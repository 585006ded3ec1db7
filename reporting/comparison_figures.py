"""Figures that compare models: quality as points and by length, differences to the baseline over all tasks
and against what they cost.

Plot functions take data and `ax` and return `ax`; the *_figure functions lay panels out. `values` is a part
of the tidy table (comparison_tables.py) with the columns model, seed, value, for one task and one metric.
Every mean is drawn with its 95 % t interval where two seeds or more allow one, and with a mark per seed.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reporting.figure_style import ModelStyle, drawable, legend_below, new_figure
from reporting.lra_literature import DRAWN, Published
from reporting.metrics import Metric
from reporting.run_results import TaskFacts
from reporting.seed_statistics import estimate
from reporting.verdicts import Difference

Level = tuple[str, float, Any]  # a reference line: label, the metric's value, line style


def reference_levels(facts: TaskFacts, published: Sequence[Published]) -> list[Level]:
    """The lines that accuracies are held against; bits have none, since guessing lies far off."""
    metric, chance, majority = facts.metric, facts.level, facts.majority
    if not metric.more_is_better:
        return []
    levels = [("chance", chance, ":"), ("largest class", majority, "--")]
    if chance is not None and majority is not None and abs(chance - majority) < 5e-4:
        levels = [("chance = largest class", chance, "--")]
    found: list[Level] = [
        (f"{name}: {metric.shown(level)}", level, line) for name, level, line in levels if level is not None
    ]
    lines = itertools.cycle(((0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2, 1, 2))))
    drawn = [one for one in published if one.name in DRAWN]
    for one, line in zip(drawn, lines, strict=False):
        found.append((f"{one.name}: {100 * one.accuracy:.1f} % ({one.source})", one.accuracy, line))
    return found


def plot_quality(
    values: pd.DataFrame,
    styles: dict[str, ModelStyle],
    ax: Axes,
    levels: Sequence[Level],
    absent: Mapping[str, str],
    metric: Metric,
) -> Axes:
    """The test metric: each model's mean with its interval, a mark per seed, the levels as lines.

    The axis does not start at 0: points have no length to compare. absent: what is said of a model without
    a value."""
    for label, level, line in levels:
        ax.axvline(metric.scale * level, color="#555555", ls=line, lw=1.2, label=label, zorder=1)
    for row, (model, style) in enumerate(styles.items()):
        mine = values[values["model"] == model].sort_values("seed")
        if mine.empty:
            place = ax.get_yaxis_transform()
            ax.text(0.01, row, absent[model], transform=place, va="center", color="#666666")
            continue
        numbers = (metric.scale * mine["value"]).tolist()
        mean, end = estimate(numbers), max(numbers)
        look: dict[str, Any] = {"color": style.color, "marker": style.marker, "edgecolor": "white", "s": 22}
        below = row + 0.28 + np.linspace(-0.08, 0.08, len(numbers))  # the seeds are not to hide their mean
        sns.scatterplot(x=numbers, y=below, **look, linewidth=0.5, clip_on=False, legend=False, ax=ax)
        ax.plot(mean.mean, row, style.marker, color=style.color, ms=8, mec="white", zorder=3)
        if mean.n > 1:
            half, end = mean.high - mean.mean, max(end, mean.high)
            ax.errorbar(mean.mean, row, xerr=half, fmt="|", color="black", ms=9, capsize=3, lw=1.2, zorder=4)
        shown = metric.shown(mean.mean / metric.scale) + ("" if mean.n > 1 else " (n = 1)")
        ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "size": 8, "bbox": ground}
        ax.annotate(shown, (end, row), (6, 0), zorder=5, **beside)
    ax.set_yticks(range(len(styles)), [style.label for style in styles.values()])
    ax.set_ylim(len(styles) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    ax.margins(x=0.14)
    ax.xaxis.set_major_locator(MaxNLocator(7))
    ax.xaxis.set_major_formatter("{x:,.10g}")
    ax.set_xlabel(f"test {metric.label}")
    return ax


def quality_figure(
    values: pd.DataFrame,
    styles: dict[str, ModelStyle],
    title: str,
    levels: Sequence[Level],
    absent: Mapping[str, str],
    metric: Metric,
) -> Figure:
    figure, axes = new_figure(1, 1, 7, 2.05 + 0.42 * len(styles) + 0.12 * len(levels), title)
    ax = plot_quality(values, styles, axes[0, 0], levels, absent, metric)
    legend_below(figure, {}, (), ax.get_legend_handles_labels()[0])
    return figure


def t_interval(values: pd.Series) -> tuple[float, float]:
    """The ends of the 95 % t interval, for seaborn, which asks for none of a single value."""
    return estimate(values.tolist())[2:]


def plot_lengths(lengths: pd.DataFrame, styles: dict[str, ModelStyle], ax: Axes, metric: Metric) -> Axes:
    """The test metric by the length of the examples, on a logarithmic axis: thick: mean over seeds with its
    interval; thin: each seed. Dotted: the shortest length, which was trained on. `lengths`: model, seed,
    length, value."""
    ax.axvline(lengths["length"].min(), color="#555555", ls=":", lw=1.2, label="length trained on")
    shown = lengths.assign(shown=metric.scale * lengths["value"])
    for model, mine in shown.groupby("model", sort=False):
        style = styles[str(model)]
        look: dict[str, Any] = {"x": "length", "y": "shown", "color": style.color, "legend": False, "ax": ax}
        sns.lineplot(mine, units="seed", estimator=None, lw=0.7, alpha=0.45, **look)
        look |= {"errorbar": t_interval, "err_style": "bars", "err_kws": {"capsize": 3}}
        sns.lineplot(mine, marker=style.marker, mec=style.color, **look)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(lengths["length"].unique()))
    ax.xaxis.set_major_formatter("{x:,.10g}")
    ax.set_xlabel("tokens of a test example")
    ax.set_ylabel(f"test {metric.label}")
    ax.grid(axis="y")
    return ax


def length_figure(lengths: pd.DataFrame, styles: dict[str, ModelStyle], title: str, metric: Metric) -> Figure:
    figure, axes = new_figure(1, 1, 7, 4, title)
    ax = plot_lengths(lengths, styles, axes[0, 0], metric)
    legend_below(figure, styles, set(lengths["model"]), ax.get_legend_handles_labels()[0])
    return figure


def _gain_label(metric: Metric) -> str:
    return f"gain in {metric.step} of {metric.title}" if metric.more_is_better else f"{metric.title} saved"


def _draw_difference(row: Difference, x: float, y: float, style: ModelStyle, ax: Axes, along: str) -> None:
    """A marker, filled where there is a verdict, with the interval along "x" or "y"."""
    gain = row.gain
    if gain.n > 1:
        bar: dict[str, Any] = {f"{along}err": [[gain.mean - gain.low], [gain.high - gain.mean]]}
        ax.errorbar(x, y, **bar, color=style.color, lw=1.1, zorder=2)
    ground = style.color if row.decided else "white"
    ax.plot(x, y, style.marker, color=style.color, mfc=ground, ms=6, zorder=3)


def plot_forest(rows: Sequence[Difference], styles: dict[str, ModelStyle], ax: Axes) -> Axes:
    """Paired differences of one metric, a line each under the name of its task, with number and verdict."""
    metric = rows[0].metric
    ax.axvspan(-metric.scale * metric.relevant, metric.scale * metric.relevant, color="#e8e8e8", zorder=0)
    ax.axvline(0, color="#555555", lw=1)
    labels: list[tuple[str, str]] = []
    for task, mine in itertools.groupby(rows, key=lambda row: row.task):
        labels.append((drawable(task), "bold"))
        for row in mine:
            gain, y, style = row.gain, len(labels), styles[row.model]
            _draw_difference(row, gain.mean, y, style, ax, "x")
            numbers = metric.difference(metric.gain(row.mean.mean))
            if gain.n > 1:  # z: no -0.0
                numbers += f" [{gain.low:z.{metric.digits}f}, {gain.high:z.{metric.digits}f}]"
            words = f"{numbers}  {row.verdict}"
            ax.annotate(words, (1.02, y), xycoords=ax.get_yaxis_transform(), va="center", size=7.5)
            labels.append((drawable(style.name), "normal"))
    ax.set_yticks(range(len(labels)), [label for label, _ in labels])
    for tick, (_, weight) in zip(ax.get_yticklabels(), labels, strict=True):
        tick.set_fontweight(weight)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.grid(axis="x")
    ax.set_xlabel(_gain_label(metric))
    return ax


def forest_figure(rows: Sequence[Difference], styles: dict[str, ModelStyle], title: str) -> Figure:
    """A panel for each metric, since their units differ."""
    metrics = dict.fromkeys(row.metric for row in rows)
    panels = [[row for row in rows if row.metric == metric] for metric in metrics]
    lines = [len(mine) + len({row.task for row in mine}) + 2 for mine in panels]
    height = 0.6 + 0.17 * sum(lines) + 0.25 * len(lines)
    figure, axes = new_figure(len(panels), 1, 8, height, title, height_ratios=lines)
    for ax, mine in zip(axes[:, 0], panels, strict=True):
        plot_forest(mine, styles, ax)
    return figure


def plot_gain_at_cost(
    priced: Sequence[tuple[Difference, float]], styles: dict[str, ModelStyle], ax: Axes
) -> Axes:
    """Gain of one metric against cost, a multiple of the baseline's; a verdict has its task's name beside."""
    metric = priced[0][0].metric
    ax.axhline(0, color="#555555", lw=1)
    ax.axvline(1, color="#555555", lw=1, ls=":")
    for row, cost in priced:
        _draw_difference(row, cost, row.gain.mean, styles[row.model], ax, "y")
    ax.margins(x=0.15, y=0.12)
    taken: list[tuple[float, float]] = []  # by names, in shares of the axes
    for row, cost in sorted(priced, key=lambda one: -one[0].gain.mean):
        if row.decided:
            ax.get_ylim()  # settles the scale
            place = ax.transAxes.inverted().transform(ax.transData.transform((cost, row.gain.mean)))
            x, y = place.tolist()
            while any(abs(x - left) < 0.1 and abs(y - low) < 0.04 for left, low in taken):
                y -= 0.01
            taken.append((x, y))
            look: dict[str, Any] = {"size": 7, "va": "center", "color": styles[row.model].color}
            ax.text(x + 0.015, y, drawable(row.task, 14), transform=ax.transAxes, **look)
    ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter("{x:.3g}x")
    ax.grid(axis="both")
    ax.set_ylabel(_gain_label(metric))
    return ax


def gain_at_cost_figure(
    priced: Sequence[tuple[Difference, float]], styles: dict[str, ModelStyle], baseline: str, title: str
) -> Figure:
    """A panel for each metric, since their units differ; below 0 a model is behind the baseline."""
    metrics = dict.fromkeys(row.metric for row, _ in priced)
    figure, axes = new_figure(1, len(metrics), 3.4 + 3.8 * len(metrics), 4.2, title)
    for ax, metric in zip(axes[0], metrics, strict=True):
        mine = [(row, cost) for row, cost in priced if row.metric == metric]
        plot_gain_at_cost(mine, styles, ax).set_xlabel(f"time per epoch, multiple of {drawable(baseline)}'s")
    legend_below(figure, styles, {row.model for row, _ in priced})
    return figure
