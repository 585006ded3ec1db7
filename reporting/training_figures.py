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
from matplotlib.ticker import MaxNLocator

from reporting.comparison_tables import LEARNED_WORDS
from reporting.figure_style import ModelStyle, legend_below, line_style, new_figure, numbered_lines
from reporting.metrics import Metric

LOSSES = (("train_loss", "training loss (nats)", 1.0), ("val_loss", "validation loss (nats)", 1.0))


def plot_curves(
    epochs: pd.DataFrame, styles: dict[str, ModelStyle], ax: Axes, column: str, scale: float = 1.0
) -> Axes:
    """`column` by optimizer steps, or by epoch where they are not on record. Thick: the mean over the
    finished seeds, as long as all of them ran; band: from the smallest to the largest; thin: each seed. A
    cell that did not finish is dotted and ends in a cross.

    `epochs`: model, seed, state, epoch, steps and the column."""
    x = "steps" if epochs["steps"].notna().all() else "epoch"
    shown = epochs[epochs[column].notna()].assign(shown=scale * epochs[column])
    for model, style in styles.items():
        mine = shown[shown["model"] == model]
        for (_, state), cell in mine.groupby(["seed", "state"]):
            line: dict[str, Any] = {"lw": 0.7, "alpha": 0.5} if state == "done" else {"lw": 1.0, "ls": ":"}
            ax.plot(cell[x], cell["shown"], color=style.color, **line)
            if state != "done":
                ax.plot(cell[x].iloc[-1], cell["shown"].iloc[-1], "x", color=style.color, ms=7)
        done = mine[mine["state"] == "done"]
        shared = done[done.groupby("epoch")["seed"].transform("size") == done["seed"].nunique()]
        look: dict[str, Any] = {"color": style.color, "marker": style.marker, "mec": style.color}
        look |= {"markevery": max(1, shared[x].nunique() // 10), "err_kws": {"alpha": 0.12, "lw": 0}}
        sns.lineplot(
            shared, x=x, y="shown", errorbar=("pi", 100), label=style.name, legend=False, ax=ax, **look
        )
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter("{x:,.0f}")
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
    metric: Metric,
    level: float | None,
    target: float | None = None,
) -> Figure:
    """The metric in training and validation, and below it the loss where the metric is not made of it.

    level: the metric of guessing; target: the validation metric that models are timed to."""
    words = (("train", "training"), ("val", "validation"))
    scale = metric.factor * metric.scale
    panels = [(f"{split}_{metric.source}", f"{word} {metric.label}", scale) for split, word in words]
    panels += LOSSES if metric.source != "loss" else ()
    rows = len(panels) // 2
    figure, axes = new_figure(rows, 2, 8.4, 1.2 + 2.5 * rows, title, sharey="row", sharex=True)
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
        named = f"target: {metric.shown(target)}"
        extra.append(axes[0, 1].axhline(metric.scale * target, ls="-.", label=named, **look))
    if (epochs["state"] != "done").any():
        extra.append(Line2D([], [], color="#444444", ls=":", marker="x", label="did not finish"))
    legend_below(figure, styles, set(epochs["model"]), extra)
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
        ax.plot(epochs, lines["mean"], ls=line_style(layer), color=style.color)
        if horizon or learned["timescale"].nunique() == 1:
            ax.fill_between(epochs, lines["min"], lines["max"], color=style.color, alpha=0.1, lw=0)
        if horizon and layer == learned["layer"].min():
            start, end = lines["mean"].iloc[0], lines["mean"].iloc[-1]
            ax.plot(epochs[-1], end, style.marker, color=style.color)
            name = f"t = {timescale + 1}:\n{start:,.4g} to {end:,.4g}"
            ax.annotate(name, (epochs[-1], end), (7, 0), textcoords="offset points", va="center", size=8)
    if horizon:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:,.0f}")
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
    figure, axes = new_figure(rows, columns, max(6, 0.6 + 3.6 * columns), 0.7 + 2.6 * rows, title)
    for ax, ((scalar, model), lines) in zip(axes.flat, panels, strict=False):
        plot_learned(lines, styles[str(model)], ax).set_ylabel(names[str(scalar)])
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    layers = sorted(learned["layer"].unique().tolist())
    legend_below(figure, {}, (), numbered_lines("layer", layers))
    return figure
