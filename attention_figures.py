"""Figures of what attention looks at: maps with their tokens, weight by distance, masses, learned scalars.

Plot functions take data and `ax` and return `ax`; the figure_* functions lay panels out. See figure_style.py.
Symbols: T timescales, H heads, M tokens; row i of a map holds the weights of query i over the keys j.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from evaluate_performance import AttentionPatterns
from figure_style import ModelStyle, drawable, model_legend, new_figure

SHOWN_TOKENS = 32  # more labels than this cannot be read
SHOWN_MASSES = 8  # heaviest, and as many lightest
LINE_STYLES = ("-", "--", ":", "-.")


def shown_example(patterns: AttentionPatterns) -> tuple[int, int]:
    """(example, tokens): the longest example that can be shown whole, else the shortest, cut."""
    lengths = patterns.lengths.tolist()
    whole = [length for length in lengths if length <= SHOWN_TOKENS]
    length = max(whole) if whole else min(lengths)
    return lengths.index(length), min(length, SHOWN_TOKENS)


def plot_attention_map(
    weights: np.ndarray, symbols: np.ndarray, ax: Axes, largest: float, *, labels: str = "both"
) -> Axes:
    """A map (M, M) with its tokens (M,): row = query, column = key.

    labels: which are written, "both", "queries", "keys" or "none". The colour is the square root of the
    weight, up to `largest`, so that small weights are seen too."""
    image = weights.astype(np.float32)
    ax.imshow(image, cmap="viridis", norm=PowerNorm(0.5, 0, largest), interpolation="nearest", aspect="equal")
    shown = [drawable(symbol, 8) for symbol in symbols]
    size = 6.5 if len(shown) > 20 else 7.5
    for axis, wanted in ((ax.yaxis, ("both", "queries")), (ax.xaxis, ("both", "keys"))):
        axis.set_ticks(range(len(shown)), shown if labels in wanted else [])
        axis.set_tick_params(length=0, labelsize=size, pad=1)
    ax.tick_params(axis="x", labelrotation=90)
    ax.spines[:].set_visible(False)
    return ax


def figure_of_maps(
    panels: Sequence[Sequence[tuple[str, np.ndarray]]], symbols: np.ndarray, title: str
) -> Figure:
    """A grid of titled maps (M, M) that share one colour scale."""
    rows, columns = len(panels), max(len(row) for row in panels)
    figure, axes = new_figure(rows, columns, width=1.4 + 3.4 * columns, height=1.0 + 3.5 * rows)
    largest = max(float(weights.max()) for row in panels for _, weights in row) or 1.0
    for row, line in enumerate(panels):
        for column, (name, weights) in enumerate(line):
            keys, queries = row == rows - 1, column == 0
            labels = {(True, True): "both", (True, False): "keys", (False, True): "queries"}
            ax = axes[row, column]
            plot_attention_map(
                weights, symbols, ax, largest, labels=labels.get((keys, queries), "none")
            ).set_title(name)
            if queries:
                ax.set_ylabel("query")
            if keys:
                ax.set_xlabel("key")
        for ax in axes[row, len(line) :]:
            ax.set_axis_off()
    bar = figure.colorbar(axes[0, 0].images[0], ax=axes, shrink=0.6, aspect=30, pad=0.01)
    bar.set_label("attention weight (square-root colour scale)")
    figure.suptitle(title)
    return figure


def attention_figure(patterns: AttentionPatterns, title: str) -> Figure:
    """The mean over heads of one example: a row per layer, a column per timescale, or layers in one row."""
    example, length = shown_example(patterns)
    maps = patterns.maps[:, example, :, :, :length, :length].astype(np.float32).mean(2)
    panels = [
        [(_panel_name(layer, timescale, len(row)), weights) for timescale, weights in enumerate(row)]
        for layer, row in enumerate(maps)
    ]
    if maps.shape[1] == 1:
        panels = [[panel for row in panels for panel in row]]
    return figure_of_maps(panels, patterns.symbols[example, :length], title)


def head_figure(patterns: AttentionPatterns, layer: int, timescale: int, title: str) -> Figure:
    """One example in one layer and timescale: a panel per head, four to a row at most."""
    example, length = shown_example(patterns)
    maps = patterns.maps[layer, example, timescale, :, :length, :length]
    panels = [(f"head {head + 1}", weights) for head, weights in enumerate(maps)]
    width = 2 if len(panels) <= 4 else 4
    rows = [panels[start : start + width] for start in range(0, len(panels), width)]
    return figure_of_maps(rows, patterns.symbols[example, :length], title)


def _panel_name(layer: int, timescale: int, timescales: int) -> str:
    return f"layer {layer + 1}" + (f", timescale {timescale + 1}" if timescales > 1 else "")


def plot_distance_share(shares: pd.DataFrame, styles: dict[str, ModelStyle], ax: Axes) -> Axes:
    """Share of weight by distance in one layer. `shares`: model, timescale, low, high, share (0 to 1).

    Thick: the mean over timescales; thin: each timescale, where there are several."""
    for model, of_model in shares.groupby("model", sort=False):
        style = styles[str(model)]
        by_timescale = of_model.groupby(["timescale", "low", "high"])["share"].mean().unstack("timescale")
        low, high = (by_timescale.index.get_level_values(level).to_numpy() for level in ("low", "high"))
        middle = np.where(low > 0, np.sqrt(low * np.maximum(high - 1, low)), 0.5)
        if by_timescale.shape[1] > 1:
            for number, timescale in enumerate(by_timescale):
                line = LINE_STYLES[number % len(LINE_STYLES)]
                ax.plot(middle, 100 * by_timescale[timescale], line, color=style.color, lw=0.8, alpha=0.6)
        ax.plot(middle, 100 * by_timescale.mean(axis=1), color=style.color, marker=style.marker, label=model)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == 0.5 else f"{value:g}"))
    ticks = [0.5, 1, 10, 100, 1000]
    ax.set_xticks([tick for tick in ticks if tick <= shares["high"].max()])
    ax.set_xticks([], minor=True)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("distance |i - j| in tokens (log scale; 0 = the token itself)")
    ax.grid(axis="y")
    return ax


def distance_figure(shares: pd.DataFrame, styles: dict[str, ModelStyle], title: str) -> Figure:
    """A panel per layer. `shares`: model, layer, timescale, low, high, share."""
    layers = sorted(shares["layer"].unique())
    figure, axes = new_figure(1, len(layers), width=1.2 + 4.2 * len(layers), height=3.6, sharey=True)
    for ax, layer in zip(axes[0], layers, strict=True):
        plot_distance_share(shares[shares["layer"] == layer], styles, ax).set_title(f"layer {layer + 1}")
    axes[0, 0].set_ylabel("share of attention weight (%)")
    most = int(shares["timescale"].max()) + 1
    thin = [
        Line2D([], [], color="#666666", lw=0.8, ls=LINE_STYLES[number % 4], label=f"timescale {number + 1}")
        for number in range(most)
    ]
    present = [styles[model] for model in styles if model in set(shares["model"])]
    model_legend(figure, present, thin if most > 1 else [])
    figure.suptitle(title)
    return figure


def plot_token_masses(masses: Sequence[tuple[str, float, int]], style: ModelStyle, ax: Axes) -> Axes:
    """Heaviest and lightest tokens. `masses`: (symbol, relative mass, occurrences) by falling mass."""
    if len(masses) > 2 * SHOWN_MASSES:
        masses = [*masses[:SHOWN_MASSES], *masses[-SHOWN_MASSES:]]
        ax.axhline(SHOWN_MASSES - 0.5, color="#999999", lw=0.8, ls="--")
    position = range(len(masses))
    ax.axvline(1, color="#999999", lw=0.8)
    ax.plot([mass for _, mass, _ in masses], position, style.marker, color=style.color)
    labels = [f"{drawable(symbol, 14)}  ({count})" for symbol, _, count in masses]
    ax.set_yticks(position, labels)
    ax.set_ylim(len(masses) - 0.5, -0.5)
    ax.set_xlabel("mass / mean mass of its example")
    ax.set_title(style.name)
    ax.grid(axis="x")
    return ax


def mass_figure(
    masses: dict[str, list[tuple[str, float, int]]], styles: dict[str, ModelStyle], title: str
) -> Figure:
    """A panel per model that has masses."""
    rows = max(min(len(tokens), 2 * SHOWN_MASSES) for tokens in masses.values())
    figure, axes = new_figure(1, len(masses), width=0.6 + 4.0 * len(masses), height=1.4 + 0.22 * rows)
    for ax, (model, tokens) in zip(axes[0], masses.items(), strict=True):
        plot_token_masses(tokens, styles[model], ax)
    axes[0, 0].set_ylabel("token (occurrences)")
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
        ax.plot(epochs, lines["mean"], LINE_STYLES[layer % len(LINE_STYLES)], color=style.color)
        if horizon or learned["timescale"].nunique() == 1:
            ax.fill_between(epochs, lines["min"], lines["max"], color=style.color, alpha=0.1, lw=0)
        if horizon and layer == learned["layer"].min():
            ax.plot(epochs[-1], lines["mean"].iloc[-1], style.marker, color=style.color)
            start, end = lines["mean"].iloc[0], lines["mean"].iloc[-1]
            name = f"t = {timescale + 1}:\n{start:,.4g} → {end:,.4g}"
            ax.annotate(name, (epochs[-1], end), (7, 0), textcoords="offset points", va="center", size=8)
    if horizon:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.set_yticks([], minor=True)
        ax.margins(y=0.12)
    ax.set_xlabel("epoch")
    ax.set_title(style.name)
    first, last = int(learned["epoch"].min()), int(learned["epoch"].max())
    ticks = MaxNLocator(8, integer=True).tick_values(first, last)
    ax.set_xticks([tick for tick in ticks if first <= tick <= last])
    ax.set_xlim(first - 0.05 * max(1, last - first), last + (0.3 if horizon else 0.05) * max(1, last - first))
    ax.grid(axis="y")
    return ax


def learned_figure(learned: pd.DataFrame, styles: dict[str, ModelStyle], title: str) -> Figure:
    """A panel per model and learned scalar. `learned`: model, scalar ("horizon" or "G"), layer, timescale,
    epoch, value."""
    panels = list(learned.groupby(["scalar", "model"], sort=False))
    names = {"horizon": "horizon 1 / (1 - gamma), tokens", "G": "strength of gravity G"}
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    width = 0.6 + 3.6 * columns
    figure, axes = new_figure(rows, columns, width=max(6, width), height=0.7 + 2.6 * rows)
    for ax, ((scalar, model), lines) in zip(axes.flat, panels, strict=False):
        plot_learned(lines, styles[str(model)], ax).set_ylabel(names[str(scalar)])
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    layers = [
        Line2D([], [], color="#444444", ls=LINE_STYLES[layer % 4], label=f"layer {layer + 1}")
        for layer in sorted(learned["layer"].unique().tolist())
    ]
    model_legend(figure, [], layers)
    figure.suptitle(title)
    return figure
