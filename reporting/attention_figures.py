"""Figures of what attention looks at and what it has learned: maps with their tokens, weight by distance,
masses, horizons and G.

Plot functions take data and `ax` and return `ax`; the *_figure functions lay panels out; see figure_style.py.
Row i of a map holds the weights of query i over the keys j. A mass is relative to the mean of its example
(attention_numbers.relative_masses): 1 is an average token.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from reporting.figure_style import LINE_STYLES, ModelStyle, drawable, model_legend, new_figure, no_data
from results_folder import AttentionPatterns

SHOWN_TOKENS = 32  # more labels than this cannot be read
SHOWN_GRID_TOKENS, SHOWN_ROWS, SHOWN_HEADS = 20, 8, 4  # in a grid of maps
GRID_CELL, GRID_FOOT = 0.12, 1.75  # inches: per token, and below the maps
AT_ZERO = 0.5  # where a logarithmic axis shows the distance 0
SHOWN_MASSES = 8  # heaviest, and as many lightest
LINE_LETTERS = 78  # of a shaded example
LEAST_SHOWN = 0.01  # a mass of 0 has no place on a logarithmic scale
SHADES = "PuOr_r"  # light in the middle, told apart by colour-blind readers


# Maps and learned scalars


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
    shown = [drawable(symbol, 8) for symbol in symbols]
    sns.heatmap(
        weights.astype(np.float32),
        cmap="viridis",
        norm=PowerNorm(0.5, 0, largest),
        square=True,
        cbar=False,
        xticklabels=shown if labels in ("both", "keys") else False,
        yticklabels=shown if labels in ("both", "queries") else False,
        rasterized=True,  # a PDF need not hold a thousand rectangles
        ax=ax,
    )
    ax.tick_params(length=0, labelsize=6.5 if len(shown) > 20 else 7.5, pad=1)
    ax.tick_params(axis="x", labelrotation=90)
    ax.tick_params(axis="y", labelrotation=0)
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
    bar = figure.colorbar(axes[0, 0].collections[0], ax=axes, shrink=0.6, aspect=30, pad=0.01)
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


# Weight by distance. Densities are shares of a query's weight per token of distance, so that bins of unequal
# width can be compared; on logarithmic axes a power law is straight, an exponential decay bends down.


def densities(shares: pd.DataFrame) -> pd.DataFrame:
    """The mean over seeds: a row per bin, a column per timescale, in shares per token; the index is the
    bin's geometric middle. Bins without weight, beyond the longest example, are left out."""
    by_bin = shares.groupby(["low", "high", "timescale"])["share"].mean().unstack("timescale")
    low, high = (by_bin.index.get_level_values(level).to_numpy(float) for level in ("low", "high"))
    middle = np.where(low > 0, np.sqrt(low * np.maximum(high - 1, low)), AT_ZERO)
    table = by_bin.div(high - low, axis=0).set_axis(pd.Index(middle, name="distance"))
    return table[(table > 0).any(axis=1)]


def last_horizons(learned: pd.DataFrame) -> pd.DataFrame:
    """Horizons at the end of training, mean over heads and seeds: a row per (model, layer), a column per
    timescale."""
    horizons = learned[learned["scalar"] == "horizon"]
    last = horizons.groupby(["model", "seed"])["epoch"].transform("max")
    return (
        horizons[horizons["epoch"] == last]
        .groupby(["model", "layer", "timescale"])["value"]
        .mean()
        .unstack("timescale")
    )


def plot_models(shares: pd.DataFrame, styles: dict[str, ModelStyle], ax: Axes) -> Axes:
    """One line per model in one layer, the mean over its timescales."""
    for model, style in styles.items():
        mine = shares[shares["model"] == model]
        density = densities(mine).mean(axis=1) if len(mine) else pd.Series()
        if len(density):
            ax.plot(density.index, density, color=style.color, marker=style.marker, ms=4)
    return _distance_axes(ax)


def plot_timescales(
    shares: pd.DataFrame, horizons: Mapping[Hashable, float], style: ModelStyle, ax: Axes
) -> Axes:
    """One model's timescales in one layer. Grey: gamma^d of the same timescale, drawn through the measured
    value at distance 1; `horizons`: by timescale, from which gamma = 1 - 1 / horizon."""
    table = densities(shares)
    if table.empty:
        return no_data(ax, "no weights")
    for number, timescale in enumerate(table):
        line, density = LINE_STYLES[number % len(LINE_STYLES)], table[timescale]
        ax.plot(density.index, density, ls=line, color=style.color, marker=style.marker, ms=3.5)
        if timescale in horizons and 1.0 in density.index:
            distance = np.geomspace(1, density.index.max(), 60)
            decayed = density[1.0] * (1 - 1 / horizons[timescale]) ** (distance - 1)
            ax.plot(distance, decayed, ls=line, color="#888888", lw=1.1, zorder=1)
    low = table[table > 0].min().min()
    ax.set_ylim(bottom=low / 2)  # a discount of nothing but its tail needs no room
    return _distance_axes(ax)


def _distance_axes(ax: Axes) -> Axes:
    ax.set_xscale("log")
    ax.set_yscale("log")
    few = ax.dataLim.y1 < 30 * ax.dataLim.y0
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == AT_ZERO else f"{value:g}"))
    ax.set_xticks([tick for tick in (AT_ZERO, 1, 10, 100, 1000) if tick <= 1.3 * ax.dataLim.x1])
    ax.set_xticks([], minor=True)
    ax.grid(axis="both")
    ax.set_xlabel("distance |i - j| (tokens)")
    return ax


def distance_figure(
    shares: pd.DataFrame, learned: pd.DataFrame, styles: dict[str, ModelStyle], title: str
) -> Figure:
    """A row per layer: all models, then a panel per model with several timescales or a learned decay.

    `shares`: model, layer, timescale, low, high, share; `learned`: see comparison_tables.learned_table."""
    layers = sorted(shares["layer"].unique())
    horizons = last_horizons(learned)
    several = {*shares.loc[shares["timescale"] > 0, "model"], *horizons.index.get_level_values("model")}
    apart = [model for model in styles if model in several & set(shares["model"])]
    columns = 1 + len(apart)
    figure, axes = new_figure(
        len(layers), columns, width=max(6, 0.8 + 3.1 * columns), height=1.0 + 2.5 * len(layers), sharex=True
    )
    for layer, row in zip(layers, axes, strict=True):
        mine = shares[shares["layer"] == layer]
        label = f"layer {layer + 1}\nshare of weight per token (%)"
        plot_models(mine, styles, row[0]).set_ylabel(label)
        for ax, model in zip(row[1:], apart, strict=True):
            key = (model, layer)
            decay = horizons.loc[key].to_dict() if key in horizons.index else {}
            plot_timescales(mine[mine["model"] == model], decay, styles[model], ax)
    for ax in axes[:-1].flat:
        ax.set_xlabel("")
    for ax, name in zip(axes[0], ["All models", *(styles[model].label for model in apart)], strict=True):
        ax.set_title(name)
    most = int(shares["timescale"].max()) + 1
    lines = [
        Line2D(
            [],
            [],
            color="#444444",
            ls=LINE_STYLES[number % len(LINE_STYLES)],
            label=f"timescale {number + 1}",
        )
        for number in range(most)
    ]
    if len(horizons):
        lines.append(Line2D([], [], color="#888888", lw=1.1, label="its learned gamma^d alone"))
    present = [styles[model] for model in styles if model in set(shares["model"])]
    model_legend(figure, present, lines if most > 1 or len(horizons) else [])
    figure.suptitle(title)
    return figure


# Masses


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
    ax.set_title(style.label)
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


def token_places(symbols: Sequence[str]) -> list[tuple[int, int, int]]:
    """(line, first letter, letters) of each token in lines of LINE_LETTERS; words are set apart."""
    gap = int(any(len(symbol) > 1 for symbol in symbols))
    places, line, at = [], 0, 0
    for symbol in symbols:
        size = min(max(1, len(symbol)), LINE_LETTERS)
        if at + size > LINE_LETTERS:
            line, at = line + 1, 0
        places.append((line, at, size))
        at += size + gap
    return places


def plot_shaded_tokens(
    symbols: Sequence[str], masses: np.ndarray, ax: Axes, largest: float, style: ModelStyle
) -> Axes:
    """The tokens in reading order on a ground that shows their mass (M,), from 1 / largest to largest."""
    shown = [drawable(symbol, LINE_LETTERS) for symbol in symbols]
    colors, norm = matplotlib.colormaps[SHADES], LogNorm(1 / largest, largest)
    places = token_places(shown)
    for symbol, mass, (line, at, size) in zip(shown, masses.tolist(), places, strict=True):
        ground = colors(float(norm(mass)))
        ax.add_patch(Rectangle((at, line), size, 0.86, facecolor=ground, edgecolor="none"))
        red, green, blue, _ = ground
        ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
        place = (at + size / 2, line + 0.44)
        ax.text(*place, symbol, family="DejaVu Sans Mono", size=7, ha="center", va="center", color=ink)
    ax.set_xlim(0, LINE_LETTERS)
    ax.set_ylim(places[-1][0] + 1, 0)
    ax.set_axis_off()
    ax.set_title(style.name, loc="left")
    return ax


def shaded_figure(
    examples: Mapping[str, tuple[Sequence[str], np.ndarray]], styles: dict[str, ModelStyle], title: str
) -> Figure:
    """The same example for each model that has masses. examples: (symbols, masses (M,)) by model."""
    lines = [token_places(symbols)[-1][0] + 1 for symbols, _ in examples.values()]
    figure, axes = new_figure(
        len(examples),
        1,
        width=7.6,
        height=1.2 + sum(0.45 + 0.2 * count for count in lines),
        height_ratios=[count + 1 for count in lines],
    )
    examples = {
        model: (symbols, np.maximum(masses, LEAST_SHOWN)) for model, (symbols, masses) in examples.items()
    }
    spread = max(float(np.exp(np.abs(np.log(masses)).max())) for _, masses in examples.values())
    largest = max(1.05, spread)
    for ax, (model, (symbols, masses)) in zip(axes[:, 0], examples.items(), strict=True):
        plot_shaded_tokens(symbols, masses, ax, largest, styles[model])
    bar = matplotlib.cm.ScalarMappable(LogNorm(1 / largest, largest), SHADES)
    ticks = [1 / largest, 1, largest]
    colorbar = figure.colorbar(bar, ax=axes, location="bottom", shrink=0.5, aspect=30, pad=0.02)
    colorbar.set_ticks(ticks, labels=[f"{tick:.2f}" for tick in ticks])
    colorbar.minorticks_off()
    colorbar.set_label("mass / mean mass of the example")
    figure.suptitle(title)
    return figure
