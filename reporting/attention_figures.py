"""Figures of what attention looks at: maps with their tokens, weight by distance, heavy and light tokens.

Plot functions take data and `ax` and return `ax`; the *_figure functions lay panels out; see figure_style.py.
Row i of a map holds the weights of query i over the keys j. Densities are shares of a query's weight per
token of distance, so that bins of unequal width can be compared; both axes are logarithmic, on which a power
law is straight and an exponential decay bends down at its horizon. A mass is relative to the mean of its
example (attention_numbers.relative_masses): 1 is an average token.
"""

import textwrap
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from reporting.figure_style import (
    ModelStyle,
    drawable,
    legend_below,
    line_style,
    new_figure,
    no_data,
    numbered_lines,
)
from results_folder import AttentionPatterns

CELL, FOOT = 0.12, 1.75  # inches: per token, and below the maps
AT_ZERO = 0.5  # where a logarithmic axis shows the distance 0
SHOWN_MASSES = 8  # heaviest, and as many lightest
Masses = Sequence[tuple[str, float, int]]  # symbol, relative mass, occurrences, by falling mass


def shown_example(patterns: AttentionPatterns, most_tokens: int) -> tuple[int, int]:
    """Which example a grid of maps shows, and how many of its tokens: the longest of at most `most_tokens`,
    else the first of the shortest."""
    lengths = patterns.lengths.tolist()
    length = max((length for length in lengths if length <= most_tokens), default=min(lengths))
    return lengths.index(length), min(length, most_tokens)


def rows_of_maps(
    patterns: AttentionPatterns, name: str, layer: int, example: int, tokens: int, most_heads: int
) -> dict[str, np.ndarray]:
    """By name, a timescale each, what a row of a grid shows of a layer: maps (heads, M, M)."""
    maps = patterns.maps[layer, example, :, :most_heads, :tokens, :tokens].astype(np.float32)
    if len(maps) == 1:
        return {name: maps[0]}
    return {f"{name}, timescale {number}": one for number, one in enumerate(maps, 1)}


def attention_figure(rows: Mapping[str, np.ndarray], symbols: np.ndarray, title: str) -> Figure:
    """One example: by name a row of maps (heads, M, M); a column per head, empty where a row has fewer."""
    heads, tokens = max(map(len, rows.values())), len(symbols)
    maps = np.full((len(rows), heads, tokens, tokens), np.nan, np.float32)
    for row, shown in zip(maps, rows.values(), strict=True):
        row[: len(shown)] = shown
    across, down = (CELL * (count * (tokens + 1) - 1) for count in (heads, len(maps)))
    top = 0.45 + 0.18 * (title.count("\n") + 1)
    width, height = max(6.0, across + 1.8), top + down + FOOT
    # Laid out by hand: the sizes are known, and hundreds of labels make the layout engine slow.
    figure = Figure(figsize=(width, height))
    left = (width - across) / 2 + 0.1
    ax = figure.add_axes((left / width, FOOT / height, across / width, down / height))
    letters = int(CELL * tokens / 0.075)  # that a map's side has room for
    plot_maps(maps, symbols, [textwrap.fill(name, letters) for name in rows], ax)
    long = min(3.5, across)
    place = (left + (across - long) / 2) / width, 0.55 / height, long / width, 0.12 / height
    colors = ax.collections[0]
    bar = figure.colorbar(colors, cax=figure.add_axes(place), orientation="horizontal")
    # Evenly spaced on this scale.
    ticks = [colors.get_clim()[1] * share**2 for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.set_label("attention weight (square-root colour scale)")
    figure.suptitle(title, y=1 - 0.1 / height)
    return figure


def plot_maps(maps: np.ndarray, symbols: np.ndarray, names: Sequence[str], ax: Axes) -> Axes:
    """Maps (rows, heads, M, M) side by side in one image, with the tokens at the left and at the foot.

    names: of the rows. All share one colour scale: the square root of the weight, up to the largest, so that
    small weights are seen too."""
    rows, heads, tokens = maps.shape[:3]
    gaps = (0, 1)  # a line of white after each map
    image = np.pad(maps, ((0, 0), (0, 0), gaps, gaps), constant_values=np.nan)
    image = image.transpose(0, 2, 1, 3).reshape(rows * (tokens + 1), heads * (tokens + 1))[:-1, :-1]
    shown = [*(drawable(symbol, 8) for symbol in symbols), ""]
    sns.heatmap(
        image,
        cmap="viridis",
        norm=PowerNorm(0.5, 0, float(np.nanmax(maps)) or 1.0),
        cbar=False,
        xticklabels=False,  # of hundreds it would look which lie on each other, for seconds
        yticklabels=False,
        rasterized=True,  # a PDF need not hold ten thousand rectangles
        ax=ax,
    )
    ax.set_xticks(np.arange(image.shape[1]) + 0.5, (shown * heads)[:-1])
    ax.set_yticks(np.arange(image.shape[0]) + 0.5, (shown * rows)[:-1])
    ax.tick_params(length=0, labelsize=7, pad=1)
    ax.tick_params(axis="x", labelrotation=90)
    ax.tick_params(axis="y", labelrotation=0)
    for head in range(heads):
        middle = head * (tokens + 1) + tokens / 2
        ax.text(middle, -0.5, f"head {head + 1}", ha="center", va="bottom", size=9)
    for row, name in enumerate(names):
        middle = row * (tokens + 1) + tokens / 2
        ax.text(image.shape[1] + 0.5, middle, name, rotation=270, ha="left", va="center", size=9)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    return ax


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
        line, density = line_style(number), table[timescale]
        ax.plot(density.index, density, ls=line, color=style.color, marker=style.marker, ms=3.5)
        if timescale in horizons and 1.0 in density.index:
            distance = np.geomspace(1, density.index.max(), 60)
            decayed = density[1.0] * (1 - 1 / horizons[timescale]) ** (distance - 1)
            ax.plot(distance, decayed, ls=line, color="#888888", lw=1.1, zorder=1)
    # Whole markers; what of a discount is below them needs no room.
    ax.set_ylim(table[table > 0].min().min() / 2, 1.5 * table.max().max())
    return _distance_axes(ax)


def _distance_axes(ax: Axes) -> Axes:
    ax.set_xscale("log")
    ax.set_yscale("log")
    few = ax.dataLim.y1 < 30 * ax.dataLim.y0
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g}"))
    ax.set_yticks([], minor=True)
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
    rows, columns = len(layers), 1 + len(apart)
    figure, axes = new_figure(rows, columns, max(6, 0.8 + 3.1 * columns), 1 + 2.5 * rows, title, sharex=True)
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
    lines = numbered_lines("timescale", range(most)) if most > 1 or len(horizons) else []
    if len(horizons):
        lines.append(Line2D([], [], color="#888888", lw=1.1, label="its learned gamma^d alone"))
    legend_below(figure, styles, set(shares["model"]), lines)
    return figure


def plot_token_masses(masses: Masses, style: ModelStyle, ax: Axes) -> Axes:
    """Heaviest and lightest tokens."""
    if len(masses) > 2 * SHOWN_MASSES:
        masses = [*masses[:SHOWN_MASSES], *masses[-SHOWN_MASSES:]]
        ax.axhline(SHOWN_MASSES - 0.5, color="#999999", lw=0.8, ls="--")
    position = range(len(masses))
    ax.axvline(1, color="#999999", lw=0.8)
    ax.plot([mass for _, mass, _ in masses], position, style.marker, color=style.color)
    ax.set_yticks(position, [f"{drawable(symbol, 14)}  ({count})" for symbol, _, count in masses])
    ax.set_ylim(len(masses) - 0.5, -0.5)
    ax.set_xlabel("mass / mean mass of its example")
    ax.set_title(style.label)
    ax.grid(axis="x")
    return ax


def mass_figure(masses: Mapping[str, Masses], styles: dict[str, ModelStyle], title: str) -> Figure:
    """A panel per model that has masses."""
    rows = max(min(len(tokens), 2 * SHOWN_MASSES) for tokens in masses.values())
    figure, axes = new_figure(1, len(masses), 0.6 + 4.0 * len(masses), 1.4 + 0.22 * rows, title)
    for ax, (model, tokens) in zip(axes[0], masses.items(), strict=True):
        plot_token_masses(tokens, styles[model], ax)
    axes[0, 0].set_ylabel("token (occurrences)")
    return figure
