"""Figures of what attention looks at and what it has learned: maps with their tokens, horizons and G.

Plot functions take data and `ax` and return `ax`; the figure_* functions lay panels out. See figure_style.py.
Symbols: T timescales, H heads, M tokens; row i of a map holds the weights of query i over the keys j.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from evaluate_performance import AttentionPatterns
from reporting.figure_style import LINE_STYLES, ModelStyle, drawable, model_legend, new_figure

SHOWN_TOKENS = 32  # more labels than this cannot be read
SHOWN_GRID_TOKENS, SHOWN_ROWS, SHOWN_HEADS = 20, 8, 4  # in a grid of maps
GRID_CELL, GRID_FOOT = 0.12, 1.75  # inches: per token, and below the maps


def shown_example(patterns: AttentionPatterns, most: int = SHOWN_TOKENS) -> tuple[int, int]:
    """(example, tokens): the longest example of at most `most` tokens, else the shortest, cut."""
    lengths = patterns.lengths.tolist()
    whole = [length for length in lengths if length <= most]
    length = max(whole) if whole else min(lengths)
    return lengths.index(length), min(length, most)


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


def shown_maps(patterns: AttentionPatterns) -> tuple[list[int], int, int]:
    """(layers, heads, tokens) that `attention_figure` shows: all layers, or the last where the rows would be
    too many; up to 4 heads; the tokens of the longest example that fits, else the first of the shortest."""
    layers, _, timescales, heads = patterns.maps.shape[:4]
    rows = range(layers) if layers * timescales <= SHOWN_ROWS else range(layers - 1, layers)
    return list(rows), min(heads, SHOWN_HEADS), shown_example(patterns, SHOWN_GRID_TOKENS)[1]


def attention_figure(patterns: AttentionPatterns, title: str) -> Figure:
    """One example: a row of maps per layer and timescale, a column per head; see `shown_maps`."""
    example, _ = shown_example(patterns, SHOWN_GRID_TOKENS)
    layers, heads, tokens = shown_maps(patterns)
    timescales = patterns.maps.shape[2]
    maps = patterns.maps[layers, example, :, :heads, :tokens, :tokens].astype(np.float32)
    maps = maps.reshape(-1, heads, tokens, tokens)
    names = [_panel_name(layer, timescale, timescales) for layer in layers for timescale in range(timescales)]
    across, down = (GRID_CELL * (count * (tokens + 1) - 1) for count in (heads, len(maps)))
    top = 0.45 + 0.18 * (title.count("\n") + 1)
    width, height = max(6.0, across + 1.5), top + down + GRID_FOOT
    # Laid out by hand: the sizes are known, and hundreds of labels make the layout engine slow.
    figure = Figure(figsize=(width, height))
    left = (width - across) / 2 + 0.25
    ax = figure.add_axes((left / width, GRID_FOOT / height, across / width, down / height))
    plot_map_grid(maps, patterns.symbols[example, :tokens], names, ax)
    long = min(3.5, across)
    place = (left + (across - long) / 2) / width, 0.55 / height, long / width, 0.12 / height
    bar = figure.colorbar(ax.images[0], cax=figure.add_axes(place), orientation="horizontal")
    # Evenly spaced on this scale.
    ticks = [ax.images[0].get_clim()[1] * share**2 for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.set_label("attention weight (square-root colour scale)")
    figure.suptitle(title, y=1 - 0.1 / height)
    return figure


def plot_map_grid(maps: np.ndarray, symbols: np.ndarray, names: Sequence[str], ax: Axes) -> Axes:
    """Maps (rows, heads, M, M) side by side in one image, with the tokens at the left and at the foot.

    names: of the rows. All share one colour scale, up to the largest weight."""
    rows, heads, tokens = maps.shape[:3]
    step = tokens + 1  # a line of white between maps
    image = np.full((rows * step - 1, heads * step - 1), np.nan, np.float32)
    for row, head in itertools.product(range(rows), range(heads)):
        top, left = row * step, head * step
        image[top : top + tokens, left : left + tokens] = maps[row, head]
    norm = PowerNorm(0.5, 0, float(maps.max()) or 1.0)
    ax.imshow(image, cmap="viridis", norm=norm, interpolation="nearest", aspect="equal")
    ax.set_axis_off()
    bottom, right, middle = rows * step - 1.2, heads * step - 0.5, (tokens - 1) / 2
    shown = [drawable(symbol, 8) for symbol in symbols]
    for place, symbol in enumerate(shown):
        for row in range(rows):
            ax.text(-0.8, row * step + place, symbol, ha="right", va="center", size=7)
        for head in range(heads):
            ax.text(head * step + place, bottom, symbol, ha="center", va="top", rotation=90, size=7)
    for head in range(heads):
        ax.text(head * step + middle, -1, f"head {head + 1}", ha="center", va="bottom", size=9)
    for row, name in enumerate(names):
        ax.text(right, row * step + middle, name, rotation=270, ha="left", va="center", size=9)
    away = 16 + 5.5 * max(map(len, shown))  # points, past the tokens
    far: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate("query", (0, 0.5), (-away, 0), rotation=90, ha="center", va="center", **far)
    ax.annotate("key", (0.5, 0), (0, -away), ha="center", va="center", **far)
    return ax


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
        Line2D([], [], color="#444444", ls=LINE_STYLES[layer % len(LINE_STYLES)], label=f"layer {layer + 1}")
        for layer in sorted(learned["layer"].unique().tolist())
    ]
    model_legend(figure, [], layers)
    figure.suptitle(title)
    return figure
