"""Figures of masses: which tokens are heavy and which light, and one example shaded token by token.

Plot functions take data and `ax` and return `ax`; see figure_style.py. A mass is relative to the mean of its
example (attention_numbers.relative_masses): 1 is an average token.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from reporting.figure_style import ModelStyle, drawable, new_figure

SHOWN_MASSES = 8  # heaviest, and as many lightest
LINE_LETTERS = 78  # of a shaded example
LEAST_SHOWN = 0.01  # a mass of 0 has no place on a logarithmic scale
SHADES = "PuOr_r"  # light in the middle, told apart by colour-blind readers


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
