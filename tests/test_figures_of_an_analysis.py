"""What the figures of an analysis draw is what its summary.csv says."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from results_fixture import MODELS

from reporting.analysis import make_analysis
from reporting.attention_figures import distance_figure, plot_maps
from reporting.figure_style import figure_style, model_styles, new_figure, save_figure
from reporting.mass_figures import shaded_figure
from reporting.metrics import ACCURACY
from reporting.run_results import read_joined
from reporting.seed_statistics import estimate
from reporting.task_figures import CONVERGENCE_PANELS, COST_PANELS, TaskView, task_figures
from reporting.training_figures import plot_curves, plot_learned

STYLES = model_styles(MODELS)


@pytest.fixture(scope="module")
def figures(holed: Path) -> dict[str, Figure]:
    """The figures by the kind in their names."""
    view = TaskView(make_analysis(read_joined([holed])), "listops", "listops")
    with figure_style():
        return {note.stem.removesuffix("_listops"): figure for note, figure in task_figures(view)}


@pytest.fixture(scope="module")
def summary(holed: Path) -> pd.DataFrame:
    return pd.read_csv(holed / "analysis" / "summary.csv", float_precision="round_trip")


def values_of(summary: pd.DataFrame, model: str, metric: str) -> list[float]:
    mine = summary[(summary["model"] == model) & (summary["metric"] == metric)]
    return [float(value) for value in mine.sort_values("seed")["value"]]


def is_of(marks: Any, color: str) -> bool:
    """Whether marks are those of the model of this colour."""
    return bool(len(marks.get_facecolor()) and to_hex(marks.get_facecolor()[0]) == color.lower())


def test_accuracy_is_that_of_the_table(figures: dict[str, Figure], summary: pd.DataFrame) -> None:
    [ax] = figures["accuracy"].axes
    for model, style in STYLES.items():
        drawn = [np.asarray(line.get_xdata()) for line in ax.get_lines() if line.get_marker() == style.marker]
        expected = 100 * np.array(values_of(summary, model, ACCURACY))
        if len(expected):
            np.testing.assert_allclose(drawn[0], [expected.mean()])
            seeds = [np.asarray(one.get_offsets())[:, 0] for one in ax.collections if is_of(one, style.color)]
            np.testing.assert_allclose(seeds[0], expected)
        else:
            assert not drawn and "no result (2 failed, missing)" in [text.get_text() for text in ax.texts]
    ends = [bar.get_segments()[0][:, 0] for bar in ax.collections if isinstance(bar, LineCollection)]
    done = [values for model in STYLES if (values := values_of(summary, model, ACCURACY))]
    np.testing.assert_allclose(ends, [100 * np.array(estimate(values)[2:]) for values in done])
    levels = [str(line.get_label()) for line in ax.get_lines() if ":" in str(line.get_label())]
    assert levels[:2] == ["chance: 10.0 %", "largest class: 17.5 %"]


@pytest.mark.parametrize("kind", ["cost", "convergence"])
def test_bars_are_the_means_of_the_table(
    kind: str, figures: dict[str, Figure], summary: pd.DataFrame
) -> None:
    panels = {"cost": COST_PANELS, "convergence": CONVERGENCE_PANELS}[kind]
    for ax, panel in zip(figures[kind].axes, panels, strict=True):
        bars = [bar.get_width() for bar in ax.patches if isinstance(bar, Rectangle)]
        numbers = [values_of(summary, model, panel.metric) for model in MODELS]
        assert bars == pytest.approx([panel.scale * np.mean(one) for one in numbers if one])


def test_the_trade_off_is_that_of_the_table(figures: dict[str, Figure], summary: pd.DataFrame) -> None:
    ax = figures["accuracy_time"].axes[2]
    for model, style in STYLES.items():
        seconds = values_of(summary, model, "seconds_to_best")
        accuracy = 100 * np.array(values_of(summary, model, ACCURACY))
        drawn = [
            np.asarray(line.get_xydata()) for line in ax.get_lines() if line.get_marker() == style.marker
        ]
        if seconds:
            np.testing.assert_allclose(drawn[0], np.stack([seconds, accuracy], 1))
            np.testing.assert_allclose(drawn[1], [[np.mean(seconds), accuracy.mean()]])


def test_maps_that_hold_no_weights_and_masses_of_0_are_drawn_and_not_fatal(tmp_path: Path) -> None:
    columns = ["model", "layer", "timescale", "low", "high", "share"]
    rows = [("multi_timescale", 0, timescale, 0, 1, 0.0) for timescale in (0, 1)]
    learned = pd.DataFrame(columns=["scalar", "model", "seed", "epoch", "layer", "timescale", "value"])
    masses = {"gravitational": (["a", "b"], np.array([0.0, 2.0]))}
    with figure_style():
        figures = [
            distance_figure(pd.DataFrame(rows, columns=columns), learned, STYLES, "empty"),
            shaded_figure(masses, STYLES, "light"),
        ]
        for number, figure in enumerate(figures):
            save_figure(figure, tmp_path, str(number))
    assert "no weights" in [text.get_text() for ax in figures[0].axes for text in ax.texts]


def test_no_label_leaves_its_figure(figures: dict[str, Figure]) -> None:
    for kind, figure in figures.items():
        FigureCanvasAgg(figure).draw()
        box = figure.bbox.padded(1.5)
        for ax in figure.axes:
            labels = [*ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts, ax.title]
            labels += [ax.xaxis.label, ax.yaxis.label]
            for label in labels:
                extent = label.get_window_extent()
                inside = box.containsx(extent.x0) and box.containsx(extent.x1)
                inside = inside and box.containsy(extent.y0) and box.containsy(extent.y1)
                hidden = not label.get_visible() or not label.get_text() or not ax.axison
                ticks = label in (*ax.get_xticklabels(), *ax.get_yticklabels())
                assert inside or hidden or (ticks and not ax.bbox.padded(2).overlaps(extent)), (
                    f"{kind}: {label.get_text()!r} is cut"
                )


def test_a_grid_of_maps_has_a_row_per_query_and_a_column_per_key() -> None:
    maps = np.arange(24.0).reshape(2, 3, 2, 2)  # (layers x timescales, heads, queries, keys)
    ax = plot_maps(maps, np.array(["a", "b"]), ["upper", "lower"], new_figure(1, 1, 6, 4)[1][0, 0])
    image = ax.collections[0].get_array()
    assert image is not None
    drawn = np.ma.masked_invalid(image).filled(np.nan).reshape(5, 8)
    np.testing.assert_array_equal(drawn[3:5, 6:8], maps[1, 2])
    assert np.isnan(drawn[2]).all() and np.isnan(drawn[:, [2, 5]]).all()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "", "a", "b"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "", "a", "b", "", "a", "b"]


@pytest.mark.parametrize("epochs", [1, 2, 3, 30])
def test_an_axis_of_epochs_has_whole_ticks_however_few_there_are(epochs: int) -> None:
    shown = range(1, epochs + 1)
    rows = [{"model": MODELS[0], "seed": 0, "state": "done", "epoch": epoch, "loss": 0.5} for epoch in shown]
    scalars = [
        {"scalar": "share", "layer": 0, "timescale": 0, "epoch": epoch, "value": 1.0} for epoch in shown
    ]
    _, axes = new_figure(1, 2, 6, 3)
    plot_curves(pd.DataFrame(rows), STYLES, axes[0, 0], "loss")
    plot_learned(pd.DataFrame(scalars), STYLES[MODELS[0]], axes[0, 1])
    for ax in axes[0]:
        low, high = ax.get_xlim()
        ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)
