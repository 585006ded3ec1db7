"""Figures of training: learning curves by optimizer steps, and learned scalars by epoch.

Plot functions take data and `ax` and return `ax`; the *_figure functions lay panels out; see figure_style.py.
`epochs` and `learned` are tables of comparison_tables.py, for one task.
"""

from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reporting.comparison_tables import LEARNED_WORDS
from reporting.figure_style import LINE_STYLES, ModelStyle, model_legend, new_figure
from reporting.metrics import PERCENT, Metric

LOSSES = (("train_loss", "training loss (nats)", 1.0), ("val_loss", "validation loss (nats)", 1.0))


def plot_curves(
    epochs: pd.DataFrame, styles: dict[str, ModelStyle], ax: Axes, column: str, scale: float = 1.0
) -> Axes:
    """`column` by optimizer steps, or by epoch where they are not on record. Thick: the mean over the
    finished seeds, as long as all of them ran; band: from the smallest to the largest; thin: each seed. A
    cell that did not finish is dotted and ends in a cross.

    `epochs`: model, seed, state, epoch, steps and the column."""
    x = "steps" if epochs["steps"].notna().all() else "epoch"
    for model, style in styles.items():
        mine = epochs[(epochs["model"] == model) & epochs[column].notna()]
        for (_, state), cell in mine.groupby(["seed", "state"]):
            line: dict[str, Any] = {"lw": 0.7, "alpha": 0.5} if state == "done" else {"lw": 1.0, "ls": ":"}
            ax.plot(cell[x], scale * cell[column], color=style.color, **line)
            if state != "done":
                ax.plot(cell[x].iloc[-1:], scale * cell[column].iloc[-1:], "x", color=style.color, ms=7)
        done = mine[mine["state"] == "done"]
        by_all = done.groupby("epoch")["seed"].transform("size") == done["seed"].nunique()
        shared = done[by_all].assign(shown=scale * done[column])
        seeds = shared.groupby(x)["shown"].agg(["mean", "min", "max"])
        look: dict[str, Any] = {"color": style.color, "marker": style.marker, "mec": style.color}
        look |= {"markevery": max(1, len(seeds) // 10), "estimator": None, "legend": False, "ax": ax}
        sns.lineplot(seeds, x=x, y="mean", label=style.name, **look)
        ax.fill_between(seeds.index, seeds["min"], seeds["max"], color=style.color, alpha=0.12, lw=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_xlabel("optimizer steps" if x == "steps" else "epoch")
    ax.grid(axis="y")
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_visible(True)  # seaborn hides those of inner panels
    return ax


def curves_figure(
    epochs: pd.DataFrame,
    styles: dict[str, ModelStyle],
    title: str,
    *,
    metric: Metric = PERCENT,
    level: float | None = None,
    target: float | None = None,
) -> Figure:
    """The metric in training and validation, and below it the loss where the metric is not made of it.

    level: the metric of guessing; target: the validation metric that models are timed to."""
    words = (("train", "training"), ("val", "validation"))
    scale = metric.factor * metric.scale
    panels = [(f"{split}_{metric.source}", f"{word} {metric.label}", scale) for split, word in words]
    panels += LOSSES if metric.source != "loss" else ()
    rows = len(panels) // 2
    figure, axes = new_figure(rows, 2, width=8.4, height=1.2 + 2.5 * rows, sharey="row", sharex=True)
    for ax, (column, label, scale) in zip(axes.flat, panels, strict=True):
        plot_curves(epochs, styles, ax, column, scale).set_ylabel(label)
        ax.tick_params(labelleft=True, labelbottom=True)
    extra: list[Line2D] = []
    look: dict[str, Any] = {"color": "#555555", "lw": 1.2}
    if level is not None and metric.more_is_better:  # 8 bits are far above any curve
        for ax in axes[0]:
            line = ax.axhline(metric.scale * level, ls=":", label="chance", **look)
        extra.append(line)
    if target is not None:
        extra.append(
            axes[0, 1].axhline(
                metric.scale * target, ls="-.", label=f"target: {metric.shown(target)}", **look
            )
        )
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
