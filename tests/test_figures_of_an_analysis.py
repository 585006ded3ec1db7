"""What the figures of an analysis draw is what its summary.csv says."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from results_fixture import MODELS, tidy

from reporting.analysis import make_analysis
from reporting.attention_figures import distance_figure, plot_maps
from reporting.comparison_figures import forest_figure, gain_at_cost_figure, plot_lengths
from reporting.figure_style import ModelStyle, figure_style, model_styles, new_figure
from reporting.metrics import ACCURACY, BITS, PERCENT
from reporting.run_results import read_joined
from reporting.seed_statistics import estimate
from reporting.task_figures import all_figures
from reporting.training_figures import plot_curves, plot_learned
from reporting.verdicts import compare

STYLES = model_styles(MODELS)


@pytest.fixture(scope="module")
def figures(holed: Path) -> dict[str, Figure]:
    """The figures by the kind in their names, laid out."""
    with figure_style():
        drawn = all_figures(make_analysis(read_joined([holed])))
        found = {note.stem.removesuffix("_listops"): figure for _, note, figure in drawn}
        for figure in found.values():
            figure.draw_without_rendering()
    return found


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


def bars_of(ax: Axes, along: int) -> list[np.ndarray]:
    """The ends of the error bars along x, 0, or y, 1."""
    bars = [one.get_segments()[0] for one in ax.collections if isinstance(one, LineCollection)]
    return [bar[:, along] for bar in bars]


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_accuracy_is_that_of_the_table(figures: dict[str, Figure], summary: pd.DataFrame) -> None:
    [ax] = figures["accuracy"].axes
    names = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
    assert names == [style.name for style in STYLES.values()]  # one without a result keeps its place
    done = {model: values for model in STYLES if (values := values_of(summary, model, ACCURACY))}
    marks = [one for one in ax.collections if isinstance(one, PathCollection)]
    seeds = dict(zip(done, marks, strict=True))
    for model, values in done.items():
        style, expected = STYLES[model], 100 * np.array(values)
        np.testing.assert_allclose(marks_of(ax, style), [[expected.mean(), names.index(style.name)]])
        np.testing.assert_allclose(np.asarray(seeds[model].get_offsets())[:, 0], expected)
        np.testing.assert_allclose(np.asarray(seeds[model].get_facecolor())[0], to_rgba(style.color))
    assert len(done) == 3 and "no result (2 failed, 1 missing)" in texts_of(figures["accuracy"])
    expected_bars = [100 * np.array(estimate(values)[2:]) for values in done.values()]
    np.testing.assert_allclose(bars_of(ax, 0), expected_bars)
    levels = [str(line.get_label()) for line in ax.get_lines() if ":" in str(line.get_label())]
    assert levels[:2] == ["chance: 10.0 %", "largest class: 17.5 %"]


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


def test_metrics_of_unlike_units_have_panels_right_is_a_gain_and_a_verdict_is_filled() -> None:
    curve = 0.01 * np.arange(3) ** 2
    shares = {"conventional": [0.5] * 3, "gravitational": [*(0.6 + curve)], "multi_timescale": [0.4999] * 3}
    bits_of = {"conventional": [3.0] * 3, "gravitational": [*(2.8 + curve)]}
    differences = compare(pd.concat([tidy(shares, task="t"), tidy(bits_of, BITS.best, task="b")]))
    forest = forest_figure(differences, STYLES, "forest")
    gains = gain_at_cost_figure([(row, 1.5) for row in differences], STYLES, "Conventional", "gain")
    for figure in (forest, gains):
        points, bits = figure.axes
        labels = [points.get_xlabel(), points.get_ylabel(), bits.get_xlabel(), bits.get_ylabel()]
        assert "gain in points of accuracy" in labels[:2] and "bits per byte saved" in labels[2:]
        for ax, gain in ((points, 10 + 5 / 3), (bits, 0.2 - 0.05 / 3)):
            [mark] = marks_of(ax, STYLES["gravitational"])
            assert mark[1 if ax.get_ylabel() else 0] == pytest.approx(gain)
        filled = {line.get_marker(): line.get_markerfacecolor() != "white" for line in points.get_lines()}
        assert filled["s"] and not filled["^"]
    assert texts_of(gains) == ["t", "b"]  # the tasks of the verdicts
    assert "0.0 [0.0, 0.0]  no relevant difference" in texts_of(forest)  # of -0.01 points


def test_maps_that_hold_no_weights_are_drawn_and_not_fatal() -> None:
    columns = ["model", "layer", "timescale", "low", "high", "share"]
    rows = [("multi_timescale", 0, timescale, 0, 1, 0.0) for timescale in (0, 1)]
    learned = pd.DataFrame(columns=["scalar", "model", "seed", "epoch", "layer", "timescale", "value"])
    figure = distance_figure(pd.DataFrame(rows, columns=columns), learned, STYLES, "empty")
    figure.draw_without_rendering()
    assert "no weights" in texts_of(figure)


def test_no_label_leaves_its_figure(figures: dict[str, Figure]) -> None:
    for kind, figure in figures.items():
        box = figure.bbox.padded(1.5)
        for ax in figure.axes:
            ticks = [*ax.get_xticklabels(), *ax.get_yticklabels()]
            for label in [*ticks, *ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label]:
                extent = label.get_window_extent()
                inside = all(box.contains(*corner) for corner in (extent.min, extent.max))
                hidden = not label.get_visible() or not label.get_text() or not ax.axison
                beyond = label in ticks and not ax.bbox.padded(2).overlaps(extent)
                assert inside or hidden or beyond, f"{kind}: {label.get_text()!r} is cut"


def test_marks_of_weight_by_distance_are_whole(figures: dict[str, Figure]) -> None:
    for ax in figures["attention_distance"].axes:
        heights = np.concatenate([marks_of(ax, style).reshape(-1, 2)[:, 1] for style in STYLES.values()])
        low, high = ax.get_ylim()
        assert low < 0.95 * heights.min() and heights.max() < 0.95 * high


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


def test_curves_are_by_steps_or_else_by_whole_epochs_however_few(figures: dict[str, Figure]) -> None:
    for epochs, steps in ((1, None), (2, None), (30, None), (3, 40.0)):
        epoch = np.arange(1, epochs + 1)
        table = pd.DataFrame({"epoch": epoch, "steps": steps and steps * epoch, "loss": 0.5, "seed": 0})
        table = table.assign(model="gravitational", state="done", scalar="G", layer=0, timescale=0, value=1.0)
        axes = new_figure(1, 2, 6, 3)[1][0]
        curves = plot_curves(table, STYLES, axes[0], "loss")
        assert curves.get_xlabel() == ("optimizer steps" if steps else "epoch")
        assert marks_of(curves, STYLES["gravitational"])[-1, 0] == epochs * (steps or 1)
        for ax in (curves, plot_learned(table, STYLES["gravitational"], axes[1])):
            low, high = ax.get_xlim()
            ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
            assert ticks and all(tick == round(tick) for tick in ticks)
    levels = {str(line.get_label()): line for line in figures["learning_curves"].axes[1].get_lines()}
    [target] = [level for label, level in levels.items() if label.startswith("target")]
    height = float(np.asarray(target.get_ydata())[0])
    assert "chance" in levels and target.get_label() == f"target: {height:.1f} %"


def test_quality_by_length_has_the_mean_its_interval_and_the_trained_length() -> None:
    lengths, seeds = np.array([64, 128, 256]), np.arange(3)
    table = pd.DataFrame({"length": np.repeat(lengths, 3), "seed": np.tile(seeds, 3)})
    table = table.assign(model="gravitational", value=0.9 - table["seed"] / 10 - table["length"] / 1000)
    ax = plot_lengths(table, STYLES, new_figure(1, 1, 6, 3)[1][0, 0], PERCENT)
    assert np.asarray(ax.get_lines()[0].get_xdata()).tolist() == [64, 64]
    np.testing.assert_allclose(marks_of(ax, STYLES["gravitational"])[:, 1], 100 * (0.8 - lengths / 1000))
    expected = 100 * np.array(estimate((0.9 - seeds / 10 - 0.064).tolist())[2:])
    np.testing.assert_allclose(bars_of(ax, 1)[0], expected)
