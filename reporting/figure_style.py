"""How every figure looks: one name, colour and marker per model, one style, files that repeat byte for byte.

    styles = model_styles(["conventional", "gravitational"])
    with figure_style():
        figure, axes = new_figure(1, 2, width=8, height=3, title="ListOps")
        ...
        save_figure(figure, folder, "accuracy_listops")      # .png

Colours are those of Okabe and Ito 2008, which colour-blind readers can tell apart. Figures are made without
pyplot, so nothing of the caller's is drawn on, and the caller's rcParams come back.
"""

import contextlib
import functools
import itertools
import textwrap
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from PIL import Image

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.dpi": 150,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a model's name may hold a dollar sign
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": False,  # a letter outside Latin-1 costs each PDF a second copy of the font
}
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, BLACK = "#0072B2", "#D55E00", "#CC79A7", "#000000"
LONGEST_NAME = 40
COLORS = 192  # of a PNG file
_LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))


@dataclass(frozen=True)
class ModelStyle:
    """How one model is shown in every figure and table."""

    name: str
    color: str
    marker: str

    @property
    def label(self) -> str:
        """The name in lines of at most LONGEST_NAME letters: for the axes and panels of figures."""
        return textwrap.fill(self.name, LONGEST_NAME, break_on_hyphens=False)


MODEL_STYLES = {
    "conventional": ModelStyle("Conventional", BLACK, "o"),
    "gravitational": ModelStyle("Gravitational", VERMILLION, "s"),
    "multi_timescale": ModelStyle("Multi-timescale", BLUE, "^"),
    "gravitational_multi_timescale": ModelStyle("Gravitational multi-timescale", GREEN, "D"),
    "discounted": ModelStyle("Discounted, one timescale", PURPLE, "v"),
    "per_head_decay": ModelStyle("Per-head decay", ORANGE, "P"),
    "adaptive": ModelStyle("Adaptive timescales", SKY, "X"),
}
# Five are of Paul Tol's muted scheme; yellow, pale on white, comes last.
_FURTHER_COLORS = ("#999999", "#882255", "#999933", "#332288", "#44AA99", "#AA4499", YELLOW)
_FURTHER_MARKERS = ("<", ">", "p", "h", "*", "d")


def model_styles(models: Sequence[str]) -> dict[str, ModelStyle]:
    """The styles of the models, in their order; one unknown to MODEL_STYLES gets a free colour and marker.

    `package.module:Class` is shown as Class, and settings follow the model's name, unless two models would
    then share the name."""
    unused = [style.color for model, style in MODEL_STYLES.items() if model not in models]
    colors, markers = itertools.cycle([*_FURTHER_COLORS, *unused]), itertools.cycle(_FURTHER_MARKERS)
    short = [_short_name(model) for model in models]
    styles: dict[str, ModelStyle] = {}
    for model, name in zip(models, short, strict=True):
        if model in MODEL_STYLES:
            styles[model] = MODEL_STYLES[model]
        else:
            shown = name if short.count(name) == 1 else drawable(model, 2 * LONGEST_NAME)
            styles[model] = ModelStyle(shown, next(colors), next(markers))
    return styles


def _short_name(model: str) -> str:
    base, *own = model.split(",")
    name = MODEL_STYLES[base].name if base in MODEL_STYLES else base.rpartition(":")[2]
    return drawable(", ".join([drawable(name), *own]), 2 * LONGEST_NAME)


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def drawable(text: str, longest: int = LONGEST_NAME) -> str:
    """The text on one line, cut to `longest` characters, with a box for what the font has no glyph for."""
    shown = "".join(letter if ord(letter) in _glyphs() and letter.isprintable() else "□" for letter in text)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


@contextlib.contextmanager
def figure_style() -> Iterator[None]:
    """Matplotlib's defaults and STYLE, whatever the user's own settings are; these come back at the end."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(
    rows: int, columns: int, width: float, height: float, title: str = "", **kwargs: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of width x height inches and its axes, (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def line_style(number: int) -> Any:
    """Of the layer or timescale of this number."""
    return _LINES[number % len(_LINES)]


def numbered_lines(what: str, numbers: Iterable[int]) -> list[Line2D]:
    """What a legend shows of layers or timescales: "layer 1" of number 0."""
    return [Line2D([], [], color="#444444", ls=line_style(k), label=f"{what} {k + 1}") for k in numbers]


def legend_below(
    figure: Figure, styles: Mapping[str, ModelStyle], models: Container[str], extra: Sequence[Any] = ()
) -> None:
    """One legend below all panels: a line and marker for each of the models, then the `extra` handles."""
    shown = [style for model, style in styles.items() if model in models]
    handles = [Line2D([], [], color=style.color, marker=style.marker, label=style.name) for style in shown]
    handles += extra
    if handles:
        columns = _legend_columns([len(str(handle.get_label())) for handle in handles], figure)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def _legend_columns(lengths: list[int], figure: Figure) -> int:
    """The most columns that fit, from the number of letters of each label: 5 points a letter, 42 a handle."""
    room = 72 * figure.get_size_inches()[0]
    for columns in range(len(lengths), 1, -1):
        by_column = [chunk.max() for chunk in np.array_split(np.array(lengths), columns)]
        if sum(5 * int(longest) + 42 for longest in by_column) <= room:
            return columns
    return 1


def save_figure(figure: Figure, folder: Path, stem: str, *, pdf: bool = False) -> None:
    """Write stem.png, and stem.pdf where asked for, which takes as long again; without dates or versions, so
    that the same figure is the same bytes."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")  # laid out once, not again for each file
    # The canvases' own methods: `savefig` would draw everything once more to lay it out.
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # A palette takes a third of the bytes, which a report holds in its page.
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    drawn = drawn.quantize(COLORS, Image.Quantize.FASTOCTREE)
    drawn.save(folder / f"{stem}.png", dpi=(figure.dpi, figure.dpi))
    if pdf:
        no_metadata = {"CreationDate": None, "Creator": None, "Producer": None}
        FigureCanvasPdf(figure).print_pdf(folder / f"{stem}.pdf", metadata=no_metadata)


def no_data(ax: Axes, reason: str) -> Axes:
    """Say in the middle of an empty panel why it is empty."""
    ax.text(0.5, 0.5, reason, transform=ax.transAxes, ha="center", va="center", color="#666666", wrap=True)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax
