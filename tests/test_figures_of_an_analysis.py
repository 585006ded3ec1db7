"""What the figures of an analysis draw is what its summary.csv says."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from results_fixture import MODELS, tidy

from reporting.analysis import make_analysis
from reporting.attention_figures import distance_figure, plot_maps
from reporting.comparison_figures import forest_figure, gain_at_cost_figure, plot_gain_at_cost, plot_lengths
from reporting.figure_style import ModelStyle, figure_style, model_styles, new_figure, save_figure
from reporting.metrics import ACCURACY, METRICS
from reporting.run_results import read_joined
from reporting.seed_statistics import estimate
from reporting.task_figures import all_figures
from reporting.training_figures import curves_figure, plot_curves, plot_learned
from reporting.verdicts import compare

STYLES = model_styles(MODELS)
BITS = METRICS["bits_per_byte"]


@pytest.fixture(scope="module")
def figures(holed: Path) -> dict[str, Figure]:
    """The figures by the kind in their names."""
    analysis = make_analysis(read_joined([holed]))
    with figure_style():
        return {note.stem.removesuffix("_listops"): figure for _, note, figure in all_figures(analysis)}


@pytest.fixture(scope="module")
def summary(holed: Path) -> pd.DataFrame:
    return pd.read_csv(holed / "analysis" / "summary.csv", float_precision="round_trip")


def values_of(summary: pd.DataFrame, model: str, metric: str) -> list[float]:
    mine = summary[(summary["model"] == model) & (summary["metric"] == metric)]
    return [float(value) for value in mine.sort_values("seed")["value"]]


def marks_of(ax: Axes, style: ModelStyle) -> np.ndarray:
    """The (x, y) of a model's marks, (marks, 2)."""
    lines = [line for line in ax.get_lines() if line.get_marker() == style.marker]
    return np.array([xy for line in lines for xy in np.asarray(line.get_xydata())])


def is_of(marks: Any, color: str) -> bool:
    """Whether marks are those of the model of this colour."""
    return bool(len(marks.get_facecolor()) and to_hex(marks.get_facecolor()[0]) == color.lower())


def test_accuracy_is_that_of_the_table(figures: dict[str, Figure], summary: pd.DataFrame) -> None:
    [ax] = figures["accuracy"].axes
    names = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
    assert names == [style.name for style in STYLES.values()]  # one without a result keeps its place
    done = {model: values for model in STYLES if (values := values_of(summary, model, ACCURACY))}
    for model, values in done.items():
        style, expected = STYLES[model], 100 * np.array(values)
        np.testing.assert_allclose(marks_of(ax, style), [[expected.mean(), names.index(style.name)]])
        seeds = [np.asarray(one.get_offsets())[:, 0] for one in ax.collections if is_of(one, style.color)]
        np.testing.assert_allclose(seeds[0], expected)
    assert len(done) == 3 and "no result (2 failed, 1 missing)" in [text.get_text() for text in ax.texts]
    ends = [bar.get_segments()[0][:, 0] for bar in ax.collections if isinstance(bar, LineCollection)]
    np.testing.assert_allclose(ends, [100 * np.array(estimate(values)[2:]) for values in done.values()])
    levels = [str(line.get_label()) for line in ax.get_lines() if ":" in str(line.get_label())]
    assert levels[:2] == ["chance: 10.0 %", "largest class: 17.5 %"]


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_forest_and_gains_are_paired_differences(figures: dict[str, Figure], summary: pd.DataFrame) -> None:
    base = dict(enumerate(values_of(summary, "conventional", ACCURACY)))
    [forest], [gains] = figures["differences"].axes, figures["gain_at_cost"].axes
    times = values_of(summary, "conventional", "seconds_per_epoch")
    for model, seeds in (("multi_timescale", (0, 2)), ("gravitational_multi_timescale", (0, 1, 2))):
        style = STYLES[model]
        mine = values_of(summary, model, ACCURACY)
        gain = 100 * np.mean([value - base[seed] for value, seed in zip(mine, seeds, strict=True)])
        spent = values_of(summary, model, "seconds_per_epoch")
        cost = np.mean([value / times[seed] for value, seed in zip(spent, seeds, strict=True)])
        np.testing.assert_allclose(marks_of(forest, style)[:, 0], [gain])
        np.testing.assert_allclose(marks_of(gains, style), [[cost, gain]])
        assert [text for text in texts_of(figures["differences"]) if text.startswith(f"{gain:+.1f} [")]
    labels = [label.get_text() for label in forest.get_yticklabels()]
    assert labels == ["listops", "Multi-timescale", "Gravitational multi-timescale"]  # gravity has no result


def test_a_mark_is_filled_where_there_is_a_verdict_and_there_alone() -> None:
    mine = {gain: [0.51 + gain + 0.02 * (seed % 2) for seed in range(8)] for gain in (0.1, 0.0)}
    base = [0.5 + 0.01 * seed for seed in range(8)]
    models = {"conventional": base, "gravitational": mine[0.1], "multi_timescale": mine[0.0]}
    differences = compare(tidy(models, task="t"))
    ax = plot_gain_at_cost([(row, 2.0) for row in differences], STYLES, new_figure(1, 1, 6, 3)[1][0, 0])
    filled = {str(line.get_marker()): line.get_markerfacecolor() != "white" for line in ax.get_lines()}
    assert filled["s"] and not filled["^"]
    assert [text.get_text() for text in ax.texts] == ["t"]  # the task of the verdict


def test_metrics_of_unlike_units_have_panels_of_their_own_and_right_is_a_gain() -> None:
    curve = 0.01 * np.arange(3) ** 2
    accuracies = {"conventional": [0.5] * 3, "gravitational": (0.6 + curve).tolist()}
    bits_of = {"conventional": [3.0] * 3, "gravitational": (2.8 + curve).tolist()}
    differences = compare(pd.concat([tidy(accuracies, task="t"), tidy(bits_of, BITS.best, task="b")]))
    for figure in (
        forest_figure(differences, STYLES, "forest"),
        gain_at_cost_figure([(row, 1.5) for row in differences], STYLES, "Conventional", "gain"),
    ):
        points, bits = figure.axes
        labels = [points.get_xlabel(), points.get_ylabel(), bits.get_xlabel(), bits.get_ylabel()]
        assert "gain in points of accuracy" in labels[:2] and "bits per byte saved" in labels[2:]
        for ax, gain in ((points, 10 + 5 / 3), (bits, 0.2 - 0.05 / 3)):
            [mark] = marks_of(ax, STYLES["gravitational"])
            assert mark[1 if ax.get_ylabel() else 0] == pytest.approx(gain)


def test_maps_that_hold_no_weights_are_drawn_and_not_fatal(tmp_path: Path) -> None:
    columns = ["model", "layer", "timescale", "low", "high", "share"]
    rows = [("multi_timescale", 0, timescale, 0, 1, 0.0) for timescale in (0, 1)]
    learned = pd.DataFrame(columns=["scalar", "model", "seed", "epoch", "layer", "timescale", "value"])
    with figure_style():
        figure = distance_figure(pd.DataFrame(rows, columns=columns), learned, STYLES, "empty")
        save_figure(figure, tmp_path, "empty")
    assert "no weights" in texts_of(figure)


def test_no_label_leaves_its_figure(figures: dict[str, Figure]) -> None:
    for kind, figure in figures.items():
        FigureCanvasAgg(figure).draw()
        box = figure.bbox.padded(1.5)
        for ax in figure.axes:
            ticks = [*ax.get_xticklabels(), *ax.get_yticklabels()]
            for label in [*ticks, *ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label]:
                extent = label.get_window_extent()
                inside = all(box.contains(*corner) for corner in (extent.min, extent.max))
                hidden = not label.get_visible() or not label.get_text() or not ax.axison
                beyond = label in ticks and not ax.bbox.padded(2).overlaps(extent)
                assert inside or hidden or beyond, f"{kind}: {label.get_text()!r} is cut"


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
    epoch = np.arange(1, epochs + 1)
    curve = pd.DataFrame({"epoch": epoch}).assign(model=MODELS[0], seed=0, state="done", steps=None, loss=0.5)
    scalars = pd.DataFrame({"epoch": epoch}).assign(scalar="share", layer=0, timescale=0, value=1.0)
    _, axes = new_figure(1, 2, 6, 3)
    plot_curves(curve, STYLES, axes[0, 0], "loss")
    plot_learned(scalars, STYLES[MODELS[0]], axes[0, 1])
    for ax in axes[0]:
        low, high = ax.get_xlim()
        ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) for tick in ticks)


def test_learning_curves_are_by_steps_and_by_epochs_where_no_steps_are_on_record() -> None:
    epoch = np.tile([1, 2, 3], 2)
    quality = dict.fromkeys(("train_accuracy", "train_loss", "val_accuracy", "val_loss"), 0.1 * epoch)
    epochs = pd.DataFrame({"epoch": epoch, "steps": 40.0 * epoch, "seed": [0] * 3 + [1] * 3} | quality)
    epochs = epochs.assign(model="gravitational", state="done")
    for table, label, last in ((epochs, "optimizer steps", 120), (epochs.assign(steps=None), "epoch", 3)):
        figure = curves_figure(table, STYLES, "curves", level=0.1, target=0.27)
        assert {ax.get_xlabel() for ax in figure.axes} == {label} and len(figure.axes) == 4
        [mean] = [line for line in figure.axes[0].get_lines() if line.get_label() == "Gravitational"]
        assert max(np.asarray(mean.get_xdata())) == last
        levels = [line.get_label() for line in figure.axes[1].get_lines()]
        assert "target: 27.0 %" in levels and "chance" in levels


def test_quality_by_length_has_the_mean_its_interval_and_the_trained_length() -> None:
    rows = [("gravitational", seed, length, 0.9 - seed / 10 - length / 1000)
        for seed in (0, 1, 2) for length in (64, 128, 256)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["model", "seed", "length", "value"])
    ax = plot_lengths(table, STYLES, new_figure(1, 1, 6, 3)[1][0, 0], METRICS["accuracy"])
    assert np.asarray(ax.get_lines()[0].get_xdata()).tolist() == [64, 64]
    means = marks_of(ax, STYLES["gravitational"])[:, 1]
    np.testing.assert_allclose(means, 100 * (0.8 - np.array([64, 128, 256]) / 1000))
    [bars] = [one for one in ax.collections if isinstance(one, LineCollection)]
    expected = 100 * np.array(estimate([0.9 - seed / 10 - 0.064 for seed in (0, 1, 2)])[2:])
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], expected)
