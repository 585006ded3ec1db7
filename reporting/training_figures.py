"""Figures of training: curves by epoch, learned scalars, and accuracy against training time and tokens.

Plot functions take data and `ax` and return `ax`; the *_figure functions lay panels out; see figure_style.py.
`epochs` and `learned` are tables of comparison_tables.py, `progress` is that of accuracy_against_cost.py, all
for one task.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from reporting.accuracy_against_cost import pareto_front
from reporting.comparison_tables import LEARNED_WORDS
from reporting.figure_style import LINE_STYLES, ModelStyle, model_legend, new_figure, no_data
from reporting.metrics import PERCENT, Metric
from reporting.seed_statistics import estimate


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
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    ax.set_xlabel("epoch")
    ax.grid(axis="y")
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_visible(True)  # seaborn hides those of inner panels
    return ax


def curves_figure(
    epochs: pd.DataFrame,
    styles: dict[str, ModelStyle],
    title: str,
    *,
    chance: float | None = None,
    metric: Metric = PERCENT,
) -> Figure:
    """Accuracy and loss in training and validation, the loss as bits per byte where those are the metric.
    Both panels of a row share their scale."""
    figure, axes = new_figure(2, 2, width=8.4, height=6.2, sharey="row", sharex=True)
    loss, factor = (metric.title, metric.factor) if metric.source == "loss" else ("loss (nats)", 1.0)
    for row, (column, label, scale) in zip(
        axes, (("accuracy", "accuracy (%)", 100.0), ("loss", loss, factor)), strict=True
    ):
        for ax, (part, word) in zip(row, (("train", "training"), ("val", "validation")), strict=True):
            plot_curves(epochs, styles, ax, f"{part}_{column}", scale).set_ylabel(f"{word} {label}")
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


def plot_learned(learned: pd.DataFrame, style: ModelStyle, ax: Axes) -> Axes:
    """A learned scalar by epoch: a line per layer and timescale, the mean over heads and seeds.

    `learned`: scalar, layer, timescale, epoch, value. The band, left out where several would lie on each
    other, goes from the smallest to the largest."""
    horizon = bool((learned["scalar"] == "horizon").all())
    values = learned.groupby(["layer", "timescale", "epoch"])["value"].agg(["mean", "min", "max"])
    for layer, timescale in learned[["layer", "timescale"]].drop_duplicates().to_numpy().tolist():
        lines = values.loc[layer, timescale]
        epochs = lines.index.to_numpy()
        ax.plot(epochs, lines["mean"], ls=LINE_STYLES[layer % len(LINE_STYLES)], color=style.color)
        if horizon or learned["timescale"].nunique() == 1:
            ax.fill_between(epochs, lines["min"], lines["max"], color=style.color, alpha=0.1, lw=0)
        if horizon and layer == learned["layer"].min():
            ax.plot(epochs[-1], lines["mean"].iloc[-1], style.marker, color=style.color)
            start, end = lines["mean"].iloc[0], lines["mean"].iloc[-1]
            name = f"t = {timescale + 1}:\n{start:,.4g} to {end:,.4g}"
            ax.annotate(name, (epochs[-1], end), (7, 0), textcoords="offset points", va="center", size=8)
    if horizon:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.set_yticks([], minor=True)
        ax.margins(y=0.12)
    ax.set_xlabel("epoch")
    ax.set_title(style.label)
    first, last = int(learned["epoch"].min()), int(learned["epoch"].max())
    ticks = MaxNLocator(8, integer=True, min_n_ticks=1).tick_values(first, last)
    ax.set_xticks([tick for tick in ticks if first <= tick <= last])
    ax.set_xlim(first - 0.05 * max(1, last - first), last + (0.3 if horizon else 0.05) * max(1, last - first))
    ax.grid(axis="y")
    return ax


def learned_figure(learned: pd.DataFrame, styles: dict[str, ModelStyle], title: str) -> Figure:
    """A panel per model and learned scalar. `learned`: model, scalar, layer, timescale, epoch, value."""
    panels = list(learned.groupby(["scalar", "model"], sort=False))
    names = LEARNED_WORDS | {"horizon": "horizon 1 / (1 - gamma), tokens"}
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    width = 0.6 + 3.6 * columns
    figure, axes = new_figure(rows, columns, width=max(6, width), height=0.7 + 2.6 * rows)
    for ax, ((scalar, model), lines) in zip(axes.flat, panels, strict=False):
        plot_learned(lines, styles[str(model)], ax).set_ylabel(names[str(scalar)])
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    layers = [
        Line2D([], [], color="#444444", ls=LINE_STYLES[layer % len(LINE_STYLES)], label=f"layer {layer + 1}")
        for layer in sorted(learned["layer"].unique().tolist())
    ]
    model_legend(figure, [], layers)
    figure.suptitle(title)
    return figure


def plot_progress(
    progress: pd.DataFrame,
    styles: dict[str, ModelStyle],
    ax: Axes,
    column: str,
    *,
    target: float | None = None,
    metric: Metric = PERCENT,
) -> Axes:
    """The validation metric by `column` ("seconds" or "tokens"), which is added up over the epochs.

    Thick: mean over the finished seeds, epoch by epoch, as long as all of them ran; thin: each seed."""
    done = progress[(progress["state"] == "done") & (progress[column] > 0) & progress["quality"].notna()]
    if done.empty:
        return no_data(ax, f"no {column} on record")
    for model, style in styles.items():
        mine = done[done["model"] == model]
        for _, cell in mine.groupby("seed"):
            ax.plot(cell[column], metric.scale * cell["quality"], color=style.color, lw=0.7, alpha=0.45)
        by_epoch = mine.groupby("epoch").agg(x=(column, "mean"), y=("quality", "mean"), n=("quality", "size"))
        shared = by_epoch[by_epoch["n"] == mine["seed"].nunique()]
        every = max(1, len(shared) // 10)
        ax.plot(
            shared["x"], metric.scale * shared["y"], color=style.color, marker=style.marker, markevery=every
        )
    if target is not None:
        ax.axhline(metric.scale * target, color="#555555", ls="-.", lw=1.0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    if column == "seconds":
        _time_axis(ax)
    ax.xaxis.set_major_formatter(FuncFormatter(_short_number))
    ax.grid(axis="both")
    ax.set_ylabel(f"validation {metric.label}")
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


def plot_trade_off(
    points: pd.DataFrame, styles: dict[str, ModelStyle], ax: Axes, metric: Metric = PERCENT
) -> Axes:
    """The test metric by the training time it took. `points`: model, seed, seconds, quality.

    Large: means, with the 95 % t interval of the metric; small: seeds. Dashed: the front of models
    that no other beats in both."""
    means = []
    if points.empty:
        return no_data(ax, "no training time on record")
    for model, style in styles.items():
        mine = points[points["model"] == model].sort_values("seed")
        if mine.empty:
            continue
        seconds = estimate(mine["seconds"].tolist())
        quality = estimate((metric.scale * mine["quality"]).tolist())
        ax.plot(
            mine["seconds"],
            metric.scale * mine["quality"],
            style.marker,
            color=style.color,
            ms=3.5,
            alpha=0.55,
        )
        if quality.n > 1:
            half = quality.mean - quality.low
            ax.errorbar(seconds.mean, quality.mean, yerr=half, color=style.color, lw=1, capsize=3)
        ax.plot(seconds.mean, quality.mean, style.marker, color=style.color, ms=9, mec="white", zorder=4)
        means.append((seconds.mean, quality.mean))
    front = [means[index] for index in pareto_front([(cost, metric.gain(value)) for cost, value in means])]
    ax.plot(*zip(*front, strict=True), color="#777777", ls="--", lw=1.0, drawstyle="steps-post", zorder=1)
    _time_axis(ax)
    ax.xaxis.set_major_formatter(FuncFormatter(_short_number))
    ax.grid(axis="both")
    ax.set_xlabel("training time to the best epoch (s)")
    ax.set_ylabel(f"test {metric.label}")
    return ax


def progress_figure(
    progress: pd.DataFrame,
    points: pd.DataFrame,
    styles: dict[str, ModelStyle],
    title: str,
    *,
    target: float | None = None,
    metric: Metric = PERCENT,
) -> Figure:
    figure, axes = new_figure(1, 3, width=10.5, height=3.8)
    by_time, by_tokens, trade_off = axes[0]
    shown: dict[str, Any] = {"target": target, "metric": metric}
    plot_progress(progress, styles, by_time, "seconds", **shown).set_xlabel("training time (s)")
    plot_progress(progress, styles, by_tokens, "tokens", **shown).set_xlabel("training tokens seen")
    plot_trade_off(points, styles, trade_off, metric)
    extra: Sequence[Line2D] = [Line2D([], [], color="#777777", ls="--", lw=1.0, label="best trade-offs")]
    if target is not None:
        line = Line2D([], [], color="#555555", ls="-.", lw=1.0, label=f"target: {metric.shown(target)}")
        extra = [line, *extra]
    present = [style for model, style in styles.items() if model in set(progress["model"])]
    model_legend(figure, present, extra)
    figure.suptitle(title)
    return figure
