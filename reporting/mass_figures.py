"""The figure of masses: which tokens are heavy and which light.

Plot functions take data and `ax` and return `ax`; see figure_style.py. A mass is relative to the mean of its
example (attention_numbers.relative_masses): 1 is an average token.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reporting.figure_style import ModelStyle, drawable, new_figure

SHOWN_MASSES = 8  # heaviest, and as many lightest


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
