"""Figures of what accuracy costs: against training time, against tokens seen, and the best trade-offs.

Plot functions take data and `ax` and return `ax`; see figure_style.py. `progress` is the table of
accuracy_against_cost.py for one task.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from reporting.accuracy_against_cost import pareto_front
from reporting.figure_style import ModelStyle, model_legend, new_figure, no_data
from reporting.seed_statistics import estimate


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
