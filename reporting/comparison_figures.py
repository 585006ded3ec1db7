"""Figures that compare models: accuracy as points, costs as bars, improvement over the baseline, radar.

Plot functions take data and `ax` and return `ax`; the *_figure functions lay panels out. `values` is a part
of the tidy table (comparison_tables.py) with the columns model, seed, value, for one task and one metric.
Every mean is drawn with its 95 % t interval where two seeds or more allow one, and with a mark per seed.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reporting.figure_style import ModelStyle, model_legend, new_figure, no_data
from reporting.lra_literature import Published
from reporting.metrics import PERCENT, Metric
from reporting.run_results import TaskFacts
from reporting.seed_statistics import Estimate, estimate

BAR_ROOM = 0.42  # inches per bar
Level = tuple[str, float, Any]  # a reference line: label, the metric's value, line style


class Panel(NamedTuple):
    """A panel of bars: the metric, its axis label, and how it is shown. unmeasured: said of a model without
    a value; whole: ticks at whole numbers only."""

    metric: str
    label: str
    scale: float = 1.0
    form: Callable[[float], str] = "{:.1f}".format
    unmeasured: str = "not measured"
    whole: bool = False


def _rows(
    values: pd.DataFrame, styles: dict[str, ModelStyle], ax: Axes, scale: float, absent: Mapping[str, str]
) -> Iterator[tuple[int, ModelStyle, list[float], Estimate]]:
    """A row for each model: (row, style, values by ascending seed, their mean), to be drawn.

    A model without a value is not given: its row holds its words in `absent`."""
    for row, (model, style) in enumerate(styles.items()):
        mine = values[values["model"] == model].sort_values("seed")
        numbers = [scale * float(value) for value in mine["value"]]
        if numbers:
            yield row, style, numbers, estimate(numbers)
        else:
            words = absent.get(model, "not measured")
            ax.text(0.01, row, words, transform=ax.get_yaxis_transform(), va="center", color="#666666")
    ax.set_yticks(range(len(styles)), [style.label for style in styles.values()])
    ax.set_ylim(len(styles) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")


def _draw_seeds(
    ax: Axes, numbers: Sequence[float], row: float, style: ModelStyle, reach: float = 0.2
) -> None:
    """A mark per seed, the first seed uppermost, up to `reach` above and below the row."""
    spread = np.linspace(-reach, reach, len(numbers)) if len(numbers) > 1 else np.zeros(1)
    look: dict[str, Any] = {"color": style.color, "marker": style.marker, "s": 22}
    look |= {"edgecolor": "white", "linewidth": 0.5}
    sns.scatterplot(x=numbers, y=row + spread, clip_on=False, legend=False, ax=ax, **look)


def _draw_interval(ax: Axes, mean: Estimate, row: int) -> None:
    if mean.n > 1:
        half = mean.mean - mean.low
        ax.errorbar(mean.mean, row, xerr=half, fmt="|", color="black", ms=9, capsize=3, lw=1.2, zorder=4)


def _label(ax: Axes, text: str, x: float, row: int) -> None:
    """A number right of x, legible also where a line passes behind it."""
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
    place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "zorder": 5, "bbox": ground}
    ax.annotate(text, (x, row), (6, 0), size=8, **place)


def _row_height(models: int, rows: int = 1) -> float:
    return 1.3 + rows * (0.75 + BAR_ROOM * models)


def _thousands(value: float, _: object) -> str:
    return f"{value:,.10g}"


def _two_to_a_row(panels: int, models: int) -> tuple[Figure, np.ndarray]:
    rows, columns = (panels + 1) // 2, min(panels, 2)
    width = 9.6 if columns == 2 else 6.0
    return new_figure(rows, columns, width=width, height=_row_height(models, rows) - 0.45, sharey=True)


def reference_levels(facts: TaskFacts, published: Sequence[Published] = ()) -> list[Level]:
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
    drawn = [one for one in published if one.drawn]
    for one, line in zip(drawn, lines, strict=False):
        found.append((f"{one.name}: {100 * one.accuracy:.1f} % ({one.source})", one.accuracy, line))
    return found


def plot_quality(
    values: pd.DataFrame,
    styles: dict[str, ModelStyle],
    ax: Axes,
    levels: Sequence[Level] = (),
    absent: Mapping[str, str] | None = None,
    metric: Metric = PERCENT,
) -> Axes:
    """The test metric: each model's mean with its interval, a mark per seed, the levels as lines.

    The axis does not start at 0: points have no length to compare. absent: see `_rows`."""
    for label, level, line in levels:
        ax.axvline(metric.scale * level, color="#555555", ls=line, lw=1.2, label=label, zorder=1)
    for row, style, numbers, mean in _rows(values, styles, ax, metric.scale, absent or {}):
        _draw_seeds(ax, numbers, row + 0.28, style, reach=0.08)  # below the mean, which is not to hide them
        ax.plot(mean.mean, row, style.marker, color=style.color, ms=8, mec="white", zorder=3)
        _draw_interval(ax, mean, row)
        end = max(*numbers, mean.high) if mean.n > 1 else numbers[0]
        _label(ax, metric.shown(mean.mean / metric.scale) + ("" if mean.n > 1 else " (n = 1)"), end, row)
    ax.margins(x=0.14)
    ax.xaxis.set_major_locator(MaxNLocator(7))
    ax.xaxis.set_major_formatter(FuncFormatter(_thousands))
    ax.set_xlabel(f"test {metric.label}")
    return ax


def quality_figure(
    values: pd.DataFrame,
    styles: dict[str, ModelStyle],
    title: str,
    levels: Sequence[Level] = (),
    absent: Mapping[str, str] | None = None,
    metric: Metric = PERCENT,
) -> Figure:
    figure, axes = new_figure(1, 1, width=7, height=_row_height(len(styles)) + 0.12 * len(levels))
    ax = plot_quality(values, styles, axes[0, 0], levels, absent, metric)
    model_legend(figure, [], [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")])
    figure.suptitle(title)
    return figure


def plot_bars(
    values: pd.DataFrame,
    styles: dict[str, ModelStyle],
    ax: Axes,
    panel: Panel,
    absent: Mapping[str, str] | None = None,
) -> Axes:
    """A horizontal bar from 0 to each model's mean. absent: what is said of a model without any result."""
    reach, room = 0.0, 1.2
    words = dict.fromkeys(styles, panel.unmeasured) | dict(absent or {})
    for row, style, numbers, mean in _rows(values, styles, ax, panel.scale, words):
        look: dict[str, Any] = {"color": style.color, "saturation": 1, "width": 0.66, "alpha": 0.3}
        place: dict[str, Any] = {"orient": "y", "native_scale": True, "zorder": 1}
        sns.barplot(x=[mean.mean], y=[row], errorbar=None, ax=ax, **look, **place)
        _draw_seeds(ax, numbers, row, style)
        _draw_interval(ax, mean, row)
        end = max(*numbers, min(mean.high, 3 * max(numbers))) if mean.n > 1 else numbers[0]
        _label(ax, panel.form(mean.mean) + ("" if mean.n > 1 else "  (n = 1)"), end, row)
        room = max(room, 1.2 if mean.n > 1 else 1.35)
        reach = max(reach, end)
    ax.set_xlim(0, reach * room or 1)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=panel.whole, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(_thousands))
    ax.set_xlabel(panel.label)
    return ax


def bars_figure(
    table: pd.DataFrame,
    styles: dict[str, ModelStyle],
    panels: Sequence[Panel],
    title: str,
    absent: Mapping[str, str] | None = None,
) -> Figure:
    """The panels, two to a row. `table`: model, seed, metric, value of one task."""
    figure, axes = _two_to_a_row(len(panels), len(styles))
    for ax, panel in zip(axes.flat, panels, strict=True):
        plot_bars(table[table["metric"] == panel.metric], styles, ax, panel, absent)
    figure.suptitle(title)
    return figure


def plot_improvement(values: pd.DataFrame, styles: dict[str, ModelStyle], ax: Axes) -> Axes:
    """Percent by which each model improves on the baseline, one mark per seed; right of 0 is better."""
    ax.axvline(0, color="#555555", lw=1)
    for row, style, numbers, mean in _rows(values, styles, ax, 1.0, dict.fromkeys(styles, "no pair")):
        _draw_seeds(ax, numbers, row, style)
        _draw_interval(ax, mean, row)
        label = f"{mean.mean:+.1f} %" + ("" if mean.n > 1 else " (n = 1)")
        ax.annotate(label, (mean.mean, row), (0, 13), textcoords="offset points", ha="center", size=8)
    ax.margins(x=0.25)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return ax


def improvement_figure(
    improvements: pd.DataFrame,
    styles: dict[str, ModelStyle],
    panels: Sequence[tuple[str, str]],
    title: str,
) -> Figure:
    """A panel per (metric, label). `improvements`: model, metric, seed, value in percent."""
    figure, axes = _two_to_a_row(len(panels), len(styles))
    for ax, (metric, label) in zip(axes.flat, panels, strict=True):
        plot_improvement(improvements[improvements["metric"] == metric], styles, ax).set_xlabel(label)
    figure.suptitle(title)
    return figure


def plot_lengths(lengths: pd.DataFrame, styles: dict[str, ModelStyle], ax: Axes, metric: Metric) -> Axes:
    """The test metric by the length of the examples, on a logarithmic axis: thick: mean over seeds with its
    interval; thin: each seed. Dotted: the shortest length, which was trained on. `lengths`: model, seed,
    length, value."""
    trained = lengths["length"].min()
    ax.axvline(trained, color="#555555", ls=":", lw=1.2)
    for model, style in styles.items():
        mine = lengths[lengths["model"] == model]
        for _, seed in mine.groupby("seed"):
            ax.plot(seed["length"], metric.scale * seed["value"], color=style.color, lw=0.7, alpha=0.45)
        means = {at: estimate((metric.scale * part["value"]).tolist()) for at, part in mine.groupby("length")}
        half = [mean.mean - mean.low if mean.n > 1 else 0.0 for mean in means.values()]
        middle = [mean.mean for mean in means.values()]
        ax.errorbar(np.array([*means]), middle, yerr=half, color=style.color, marker=style.marker, capsize=3)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(lengths["length"].unique()))
    ax.xaxis.set_major_formatter(FuncFormatter(_thousands))
    ax.set_xlabel("tokens of a test example")
    ax.set_ylabel(f"test {metric.label}")
    ax.grid(axis="y")
    return ax


def length_figure(lengths: pd.DataFrame, styles: dict[str, ModelStyle], title: str, metric: Metric) -> Figure:
    figure, axes = new_figure(1, 1, width=7, height=4)
    plot_lengths(lengths, styles, axes[0, 0], metric)
    trained = Line2D([], [], color="#555555", ls=":", lw=1.2, label="length trained on")
    present = [style for model, style in styles.items() if model in set(lengths["model"])]
    model_legend(figure, present, [trained])
    figure.suptitle(title)
    return figure


def plot_radar(scores: pd.DataFrame, styles: dict[str, ModelStyle], ax: PolarAxes) -> PolarAxes:
    """Scores 0 to 1 of each model (rows) on each axis (columns); an axis without a score is left open."""
    angles = np.linspace(0, 2 * np.pi, scores.shape[1], endpoint=False)
    closed = np.append(angles, angles[0])
    for model, row in scores.iterrows():
        style = styles[str(model)]
        values = np.append(row.to_numpy(float), row.iloc[0])
        ax.plot(closed, values, color=style.color, marker=style.marker, label=style.name)
        if np.isfinite(values).all():
            ax.fill(closed, values, color=style.color, alpha=0.06, lw=0)
    ax.set_theta_offset(np.pi / 2)
    ax.set_theta_direction(-1)
    ax.set_xticks(angles, list(scores.columns))
    for label, angle in zip(ax.get_xticklabels(), angles, strict=True):
        side = float(np.sin(angle))
        label.set_horizontalalignment("left" if side > 0.1 else "right" if side < -0.1 else "center")
    ax.set_ylim(0, 1.05)
    ax.set_yticks([0.25, 0.5, 0.75, 1.0], ["0.25", "0.5", "0.75", "1"])
    ax.tick_params(axis="y", labelsize=7, labelcolor="#555555")
    ax.set_rlabel_position(45)
    return ax


def radar_figure(scores: pd.DataFrame, styles: dict[str, ModelStyle], title: str) -> Figure:
    figure, axes = new_figure(1, 1, width=8, height=5.6, subplot_kw={"projection": "polar"})
    present = [style for model, style in styles.items() if model in scores.index]
    if scores.notna().to_numpy().any():
        plot_radar(scores, styles, axes[0, 0])
    else:
        no_data(axes[0, 0], "no scores")
    model_legend(figure, present)
    figure.suptitle(title)
    return figure
