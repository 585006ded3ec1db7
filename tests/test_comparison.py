"""The tables of a comparison are those a person gets by hand, and the figures draw what the tables hold."""

import math

import numpy as np
import pandas as pd
import pytest
from results_fixture import HOLES, make_results, tidy

from reporting.comparison_tables import convergence_epoch, epoch_table, mean_ratio, metric_table, summarize
from reporting.figure_style import MODEL_STYLES, drawable, model_styles, new_figure
from reporting.run_results import usable
from reporting.text_tables import (
    TextTable,
    code_block,
    latex,
    latex_table,
    markdown,
    markdown_table,
    short,
    short_p,
)
from reporting.training_figures import plot_curves
from reporting.verdicts import compare
from results_folder import Results, read_results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return usable(read_results(make_results(tmp_path_factory.mktemp("holed"), states=HOLES, patterns=False)))


def test_the_pure_tables_leave_their_input_alone(results: Results) -> None:
    table = metric_table(results, {})
    before = table.copy()
    for function in (summarize, compare):
        function(table)
    pd.testing.assert_frame_equal(table, before)


@pytest.mark.parametrize(
    ("accuracies", "chance", "epoch"),
    [
        *[([0.2, 0.5, 0.9, 1.0], 0.0, 3), ([0.2, 0.5, 0.89, 1.0], 0.0, 4)],
        ([0.52, 0.55, 0.6], 0.0, 2),  # guessing is 83 % of the best already
        ([0.52, 0.55, 0.6], 0.5, 3),  # (0.55 - 0.5) / 0.1 = 0.5
        ([0.7, 0.95, 1.0], 0.5, 2),  # exactly 0.9, which rounds to just below it
        *[([0.8, 0.3, 0.2], 0.1, 1), ([0.5], 0.1, 1)],
        *[([0.5, 0.45], 0.5, None), ([0.0, 0.0], 0.0, None), ([], 0.0, None)],
    ],
)
def test_convergence_is_the_first_epoch_at_90_percent_of_the_way_from_chance_to_the_best(
    accuracies: list[float], chance: float, epoch: int | None
) -> None:
    assert convergence_epoch(accuracies, chance) == epoch


def test_a_ratio_is_the_mean_of_those_of_the_same_seed() -> None:
    table = tidy({"conventional": [10.0, 20.0, 0.0], "a": [5.0, 40.0, 7.0, 9.0]}, "seconds_per_epoch")
    assert mean_ratio(table, "listops", "a", "seconds_per_epoch") == (0.5 + 2) / 2
    assert math.isnan(mean_ratio(table, "listops", "b", "seconds_per_epoch"))


def test_learning_curves_are_means_of_finished_seeds_and_mark_the_others(results: Results) -> None:
    epochs = epoch_table(results)
    styles = {"multi_timescale": MODEL_STYLES["multi_timescale"]}
    ax = new_figure(1, 1, 6, 3)[1][0, 0]
    plot_curves(epochs, styles, ax, "val_accuracy", 100.0)
    mine = epochs[(epochs["model"] == "multi_timescale") & (epochs["state"] == "done")]
    thick = next(line for line in ax.get_lines() if line.get_label() == "Multi-timescale")
    means = 100 * mine.groupby("epoch")["val_accuracy"].mean()
    np.testing.assert_allclose(np.asarray(thick.get_ydata()), means)
    crosses = [line for line in ax.get_lines() if line.get_marker() == "x"]
    assert [np.asarray(line.get_xdata()).tolist() for line in crosses] == [[3]]


def test_each_model_has_its_own_name_colour_and_marker() -> None:
    models = [*MODEL_STYLES, "a.b:Mine", "c.d:Mine", "e:Other"]
    styles = model_styles(models)
    for look in ("name", "color", "marker"):
        assert len({getattr(style, look) for style in styles.values()}) == len(models)
    assert styles["e:Other"].name == "Other" and styles["a.b:Mine"].name == "a.b:Mine"
    assert styles["conventional"] == model_styles(["conventional"])["conventional"]


def test_markup_characters_are_escaped_and_text_that_cannot_be_drawn_is_boxed_and_cut() -> None:
    assert drawable("a\nb\u0001\u6f22é") == "a□b□□é"
    assert drawable("x" * 50, 10) == "x" * 9 + "…"
    assert markdown("a_b|c*<i>\n&") == r"a\_b\|c\*\<i\> &amp;"
    assert latex("a_b & 5 % {$x^2$} \\") == r"a\_b \& 5 \% \{\$x\textasciicircum{}2\$\} \textbackslash{}"
    assert code_block("a ``` b", "sh").startswith("````sh\n")


def test_a_table_reads_the_same_in_markdown_and_in_latex() -> None:
    table = TextTable("A_title", ["model", "n"], [["x_y", "3"]], note="50 %")
    assert markdown_table(table) == "**A\\_title**\n\n| model | n |\n| --- | ---: |\n| x\\_y | 3 |\n\n50 %"
    tex = latex_table(table)
    assert r"\caption{A\_title. 50 \%}" in tex and r"\begin{tabular}{lr}" in tex and r"x\_y & 3 \\" in tex
    assert tex.index(r"\toprule") < tex.index(r"\midrule") < tex.index(r"\bottomrule")


def test_numbers_are_rounded_for_reading_and_small_p_values_are_not_shown_as_0() -> None:
    numbers = (0.01234, 0.85, 1.234, 12.34, 99.96, 1234.5, 3.0, 12345.0, -0.5, math.nan)
    shown = ["0.0123", "0.850", "1.23", "12.3", "100", "1,234", "3", "12,345", "-0.500", "–"]  # noqa: RUF001
    assert [short(number) for number in numbers] == shown
    assert [short_p(p) for p in (0.25, 0.03125, 1e-9, math.nan)] == ["0.25", "0.0312", "< 0.0001", "–"]  # noqa: RUF001
