"""Figures that compare models: accuracy as points, costs as bars, learning curves, improvement, radar, and
what accuracy costs in training time and tokens.

Plot functions take data and `ax` and return `ax`; the *_figure functions lay panels out. `values` is a part
of the tidy table (comparison_tables.py) with the columns model, seed, value, for one task and one metric.
Every mean is drawn with its 95 % t interval where two seeds or more allow one, and with a mark per seed.
`progress` is the table of accuracy_against_cost.py for one task.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from reporting.accuracy_against_cost import pareto_front
from reporting.figure_style import ModelStyle, model_legend, new_figure, no_data
from reporting.lra_literature import Published
from reporting.seed_statistics import Estimate, estimate

BAR_ROOM = 0.42  # inches per bar
CURVES = (
    ("train_accuracy", "training accuracy (%)", 100.0),
    ("val_accuracy", "validation accuracy (%)", 100.0),
    ("train_loss", "training loss (nats)", 1.0),
    ("val_loss", "validation loss (nats)", 1.0),
)


def seed_values(values: pd.DataFrame, model: str, scale: float = 1.0) -> list[float]:
    """A model's values, by ascending seed."""
    mine = values[values["model"] == model].sort_values("seed")
    return [float(value) * scale for value in mine["value"]]


def plot_bars(
    values: pd.DataFrame,
    styles: dict[str, ModelStyle],
    ax: Axes,
    *,
    scale: float = 1.0,
    form: Callable[[float], str] = "{:.1f}".format,
    absent: Mapping[str, str] | None = None,
    unmeasured: str = "not measured",
    whole: bool = False,
) -> Axes:
    """A horizontal bar from 0 to each model's mean. A model without a value has its words in `absent`, which
    are for those without any result, or else `unmeasured`. whole: ticks at whole numbers only."""
    reach, room = 0.0, 1.2
    for row, (model, style) in enumerate(styles.items()):
        numbers = seed_values(values, model, scale)
        mean = estimate(numbers)
        if not numbers:
            words = (absent or {}).get(model, unmeasured)
            ax.text(0.01, row, words, transform=ax.get_yaxis_transform(), va="center", color="#666666")
            continue
        bar: dict[str, Any] = {
            "color": style.color,
            "saturation": 1,
            "width": 0.66,
            "alpha": 0.3,
            "zorder": 1,
        }
        sns.barplot(x=[mean.mean], y=[row], orient="y", native_scale=True, errorbar=None, ax=ax, **bar)
        _draw_seeds(ax, numbers, row, style)
        _draw_interval(ax, mean, row)
        end = max(*numbers, min(mean.high, 3 * max(numbers))) if mean.n > 1 else numbers[0]
        label = form(mean.mean) + ("" if mean.n > 1 else "  (n = 1)")
        room = max(room, 1.2 if mean.n > 1 else 1.35)
        _label(ax, label, end, row)
        reach = max(reach, end)
    ax.set_xlim(0, reach * room or 1)
    _name_rows(ax, styles)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.grid(axis="x")
    return ax


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


def _name_rows(ax: Axes, styles: dict[str, ModelStyle]) -> None:
    ax.set_yticks(range(len(styles)), [style.label for style in styles.values()])
    ax.set_ylim(len(styles) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)


def _bar_height(models: int, rows: int = 1) -> float:
    return 1.3 + rows * (0.75 + BAR_ROOM * models)


def reference_levels(
    chance: float | None, majority: float | None, published: Sequence[Published] = ()
) -> list[tuple[str, float, Any]]:
    """The lines that accuracies are held against: (label, accuracy from 0 to 1, line style)."""
    levels = [("chance", chance, ":"), ("largest class", majority, "--")]
    if chance is not None and majority is not None and abs(chance - majority) < 5e-4:
        levels = [("chance = largest class", chance, "--")]
    found: list[tuple[str, float, Any]] = [
        (f"{name}: {100 * level:.1f} %", level, line) for name, level, line in levels if level is not None
    ]
    lines = itertools.cycle(((0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2, 1, 2))))
    drawn = [one for one in published if one.drawn]
    for one, line in zip(drawn, lines, strict=False):
        found.append((f"{one.name}: {100 * one.accuracy:.1f} % ({one.source})", one.accuracy, line))
    return found


def plot_accuracy(
    values: pd.DataFrame,
    styles: dict[str, ModelStyle],
    ax: Axes,
    levels: Sequence[tuple[str, float, Any]] = (),
    *,
    absent: Mapping[str, str] | None = None,
) -> Axes:
    """Test accuracy in percent: each model's mean with its interval, a mark per seed, the levels as lines.

    The axis does not start at 0: points have no length to compare. levels: see `reference_levels`."""
    for label, level, line in levels:
        ax.axvline(100 * level, color="#555555", ls=line, lw=1.2, label=label, zorder=1)
    for row, (model, style) in enumerate(styles.items()):
        numbers = seed_values(values, model, 100)
        if not numbers:
            words = (absent or {}).get(model, "not measured")
            ax.text(0.01, row, words, transform=ax.get_yaxis_transform(), va="center", color="#666666")
            continue
        mean = estimate(numbers)
        _draw_seeds(ax, numbers, row + 0.28, style, reach=0.08)  # below the mean, which is not to hide them
        ax.plot(mean.mean, row, style.marker, color=style.color, ms=8, mec="white", zorder=3)
        _draw_interval(ax, mean, row)
        end = max(*numbers, mean.high) if mean.n > 1 else numbers[0]
        _label(ax, f"{mean.mean:.1f} %" + ("" if mean.n > 1 else " (n = 1)"), end, row)
    _name_rows(ax, styles)
    ax.margins(x=0.14)
    ax.xaxis.set_major_locator(MaxNLocator(7))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.grid(axis="x")
    ax.set_xlabel("test accuracy (%)")
    return ax


def _label(ax: Axes, text: str, x: float, row: int) -> None:
    """A number right of x, legible also where a line passes behind it."""
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
    place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "zorder": 5, "bbox": ground}
    ax.annotate(text, (x, row), (6, 0), size=8, **place)


def accuracy_figure(
    values: pd.DataFrame,
    styles: dict[str, ModelStyle],
    title: str,
    levels: Sequence[tuple[str, float, Any]] = (),
    *,
    absent: Mapping[str, str] | None = None,
) -> Figure:
    figure, axes = new_figure(1, 1, width=7, height=_bar_height(len(styles)) + 0.12 * len(levels))
    ax = plot_accuracy(values, styles, axes[0, 0], levels, absent=absent)
    model_legend(figure, [], [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")])
    figure.suptitle(title)
    return figure


def plot_curves(
    epochs: pd.DataFrame, styles: dict[str, ModelStyle], ax: Axes, column: str, scale: float = 1.0
) -> Axes:
    """`column` by epoch. Thick: the mean over the finished seeds, as long as all of them ran; band: from the
    smallest to the largest; thin: each seed. A cell that did not finish is dotted and ends in a cross.

    `epochs`: model, seed, state, epoch and the column."""
    for model, style in styles.items():
        mine = epochs[(epochs["model"] == model) & epochs[column].notna()]
        for (_, state), cell in mine.groupby(["seed", "state"]):
            line: dict[str, Any] = {"lw": 0.7, "alpha": 0.5} if state == "done" else {"lw": 1.0, "ls": ":"}
            ax.plot(cell["epoch"], scale * cell[column], color=style.color, **line)
            if state != "done":
                ax.plot(cell["epoch"].iloc[-1:], scale * cell[column].iloc[-1:], "x", color=style.color, ms=7)
        done = mine[mine["state"] == "done"]
        by_all = done.groupby("epoch")["seed"].transform("size") == done["seed"].nunique()
        shared = done[by_all].assign(shown=scale * done[column])
        every = max(1, shared["epoch"].nunique() // 10)
        look: dict[str, Any] = {"color": style.color, "marker": style.marker, "markevery": every}
        look |= {"mec": style.color, "errorbar": ("pi", 100), "err_kws": {"alpha": 0.12, "lw": 0}}
        sns.lineplot(shared, x="epoch", y="shown", label=style.name, legend=False, ax=ax, **look)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.set_xlabel("epoch")
    ax.grid(axis="y")
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_visible(True)  # seaborn hides those of inner panels
    return ax


def curves_figure(
    epochs: pd.DataFrame, styles: dict[str, ModelStyle], title: str, *, chance: float | None = None
) -> Figure:
    """Accuracy and loss in training and validation. Both panels of a row share their scale."""
    figure, axes = new_figure(2, 2, width=8.4, height=6.2, sharey="row", sharex=True)
    for ax, (column, label, scale) in zip(axes.flat, CURVES, strict=True):
        plot_curves(epochs, styles, ax, column, scale).set_ylabel(label)
        ax.tick_params(labelleft=True, labelbottom=True)
    extra = []
    if chance is not None:
        for ax in axes[0]:
            extra = [ax.axhline(100 * chance, color="#555555", ls=":", lw=1.2, label="chance")]
    present = [style for model, style in styles.items() if model in set(epochs["model"])]
    if (epochs["state"] != "done").any():
        extra.append(Line2D([], [], color="#444444", ls=":", marker="x", label="did not finish"))
    model_legend(figure, present, extra)
    figure.suptitle(title)
    return figure


@dataclass(frozen=True)
class Panel:
    """A panel of bars: the metric, its axis label, and how `plot_bars` is to show it."""

    metric: str
    label: str
    scale: float = 1.0
    form: Callable[[float], str] = "{:.1f}".format
    unmeasured: str = "not measured"
    whole: bool = False


def bars_figure(
    table: pd.DataFrame,
    styles: dict[str, ModelStyle],
    panels: Sequence[Panel],
    title: str,
    *,
    absent: Mapping[str, str] | None = None,
) -> Figure:
    """The panels, two to a row. `table`: model, seed, metric, value of one task."""
    rows = (len(panels) + 1) // 2
    figure, axes = new_figure(rows, 2, width=9.6, height=_bar_height(len(styles), rows) - 0.5, sharey=True)
    for ax, panel in zip(axes.flat, panels, strict=True):
        values = table[table["metric"] == panel.metric]
        plot_bars(
            values,
            styles,
            ax,
            scale=panel.scale,
            form=panel.form,
            absent=absent,
            unmeasured=panel.unmeasured,
            whole=panel.whole,
        ).set_xlabel(panel.label)
    figure.suptitle(title)
    return figure


def plot_improvement(values: pd.DataFrame, styles: dict[str, ModelStyle], ax: Axes) -> Axes:
    """Percent by which each model improves on the baseline, one mark per seed; right of 0 is better."""
    ax.axvline(0, color="#555555", lw=1)
    for row, (model, style) in enumerate(styles.items()):
        numbers = seed_values(values, model)
        mean = estimate(numbers)
        if not numbers:
            ax.text(0.02, row, "no pair", transform=ax.get_yaxis_transform(), va="center", color="#666666")
            continue
        _draw_seeds(ax, numbers, row, style)
        _draw_interval(ax, mean, row)
        label = f"{mean.mean:+.1f} %" + ("" if mean.n > 1 else " (n = 1)")
        ax.annotate(label, (mean.mean, row), (0, 13), textcoords="offset points", ha="center", size=8)
    _name_rows(ax, styles)
    ax.margins(x=0.25)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x")
    return ax


def improvement_figure(
    improvements: pd.DataFrame,
    styles: dict[str, ModelStyle],
    panels: Sequence[tuple[str, str]],
    title: str,
) -> Figure:
    """A panel per (metric, label). `improvements`: model, metric, seed, value in percent."""
    rows = (len(panels) + 1) // 2
    figure, axes = new_figure(rows, 2, width=9.6, height=_bar_height(len(styles), rows) - 0.4, sharey=True)
    for ax, (metric, label) in zip(axes.flat, panels, strict=True):
        plot_improvement(improvements[improvements["metric"] == metric], styles, ax).set_xlabel(label)
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


# What accuracy costs


def plot_progress(
    progress: pd.DataFrame,
    styles: dict[str, ModelStyle],
    ax: Axes,
    column: str,
    *,
    target: float | None = None,
) -> Axes:
    """Validation accuracy in percent by `column` ("seconds" or "tokens"), which is added up over the epochs.

    Thick: mean over the finished seeds, epoch by epoch, as long as all of them ran; thin: each seed."""
    done = progress[(progress["state"] == "done") & (progress[column] > 0) & progress["val_accuracy"].notna()]
    if done.empty:
        return no_data(ax, f"no {column} on record")
    for model, style in styles.items():
        mine = done[done["model"] == model]
        for _, cell in mine.groupby("seed"):
            ax.plot(cell[column], 100 * cell["val_accuracy"], color=style.color, lw=0.7, alpha=0.45)
        by_epoch = mine.groupby("epoch").agg(
            x=(column, "mean"), y=("val_accuracy", "mean"), n=("val_accuracy", "size")
        )
        shared = by_epoch[by_epoch["n"] == mine["seed"].nunique()]
        every = max(1, len(shared) // 10)
        ax.plot(shared["x"], 100 * shared["y"], color=style.color, marker=style.marker, markevery=every)
    if target is not None:
        ax.axhline(100 * target, color="#555555", ls="-.", lw=1.0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    if column == "seconds":
        _time_axis(ax)
    ax.xaxis.set_major_formatter(FuncFormatter(_short_number))
    ax.grid(axis="both")
    ax.set_ylabel("validation accuracy (%)")
    return ax


def _time_axis(ax: Axes) -> None:
    """Logarithmic where the fastest and the slowest lie far apart."""
    low, high = ax.dataLim.intervalx
    if low <= 0 or high / low < 5:
        return
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    ax.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _short_number(value: float, _: object = None) -> str:
    """1,500,000 as "1.5M"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.10g}{unit}"
    return f"{value:.10g}"


def plot_trade_off(points: pd.DataFrame, styles: dict[str, ModelStyle], ax: Axes) -> Axes:
    """Test accuracy in percent by the training time it took. `points`: model, seed, seconds, accuracy.

    Large: means, with the 95 % t interval of accuracy; small: seeds. Dashed: the front of models
    that no other beats in both."""
    means = []
    if points.empty:
        return no_data(ax, "no training time on record")
    for model, style in styles.items():
        mine = points[points["model"] == model].sort_values("seed")
        if mine.empty:
            continue
        seconds, accuracy = estimate(mine["seconds"].tolist()), estimate((100 * mine["accuracy"]).tolist())
        ax.plot(mine["seconds"], 100 * mine["accuracy"], style.marker, color=style.color, ms=3.5, alpha=0.55)
        if accuracy.n > 1:
            half = accuracy.mean - accuracy.low
            ax.errorbar(seconds.mean, accuracy.mean, yerr=half, color=style.color, lw=1, capsize=3)
        ax.plot(seconds.mean, accuracy.mean, style.marker, color=style.color, ms=9, mec="white", zorder=4)
        means.append((seconds.mean, accuracy.mean))
    front = [means[index] for index in pareto_front(means)]
    ax.plot(*zip(*front, strict=True), color="#777777", ls="--", lw=1.0, drawstyle="steps-post", zorder=1)
    _time_axis(ax)
    ax.xaxis.set_major_formatter(FuncFormatter(_short_number))
    ax.grid(axis="both")
    ax.set_xlabel("training time to the best epoch (s)")
    ax.set_ylabel("test accuracy (%)")
    return ax


def progress_figure(
    progress: pd.DataFrame,
    points: pd.DataFrame,
    styles: dict[str, ModelStyle],
    title: str,
    *,
    target: float | None = None,
) -> Figure:
    figure, axes = new_figure(1, 3, width=10.5, height=3.8)
    by_time, by_tokens, trade_off = axes[0]
    plot_progress(progress, styles, by_time, "seconds", target=target).set_xlabel("training time (s)")
    plot_progress(progress, styles, by_tokens, "tokens", target=target).set_xlabel("training tokens seen")
    plot_trade_off(points, styles, trade_off)
    extra: Sequence[Line2D] = [Line2D([], [], color="#777777", ls="--", lw=1.0, label="best trade-offs")]
    if target is not None:
        line = Line2D([], [], color="#555555", ls="-.", lw=1.0, label=f"target: {100 * target:.1f} %")
        extra = [line, *extra]
    present = [style for model, style in styles.items() if model in set(progress["model"])]
    model_legend(figure, present, extra)
    figure.suptitle(title)
    return figure
