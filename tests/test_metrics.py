"""A task's own metric is read, compared and shown in its direction, also at lengths beyond the trained."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from results_fixture import make_results, put, report_of, rewrite, rows_of, write_rows
from run_cases import Refused

from analyze_results import analyze, main
from experiment.cells import verified_cell
from reporting.analysis import make_analysis
from reporting.comparison_tables import convergence_epoch, length_table
from reporting.metrics import BITS
from reporting.run_results import read_joined
from reporting.task_figures import TaskView, task_figures
from results_folder import Cell, read_results

MODELS = ("conventional", "gravitational")
SEEDS = (0, 1, 2)
CELL = Cell("bytes", "conventional", 0)


@pytest.fixture
def bits(tmp_path: Path) -> Path:
    """A task of bytes: seed k has 3 + k / 100 bits with softmax attention, and 0.1 bits less with gravity."""
    root = make_results(tmp_path, tasks=("bytes",), models=MODELS, seeds=SEEDS, patterns=False, epochs=3)
    for name, known in (("metric", "bits_per_byte"), ("num_classes", 256), ("chance", 1 / 256)):
        put(root / "config.json", f"task_info bytes {name}", known)
    by_length = {"512": {"loss": 2.4, "accuracy": 0.3}, "128": {"loss": 2.1, "accuracy": 0.4}}
    for seed in SEEDS:
        for model, less in zip(MODELS, (0.0, 0.1), strict=True):
            folder = Cell("bytes", model, seed).folder(root)
            loss = (3 + seed / 100 - less + seed**2 / 1000 * less) * math.log(2)
            result = {"metric": "bits_per_byte", "test_loss_best": loss, "test_by_length": by_length}
            rewrite(folder / "result.json", **result)
            losses = (5.0, 2.2, 2.1 - less)
            rows = zip(rows_of(folder), losses, strict=True)
            write_rows(folder, (row | {"val_loss": at, "steps": 20 * row["epoch"]} for row, at in rows))
    return root


@pytest.mark.usefixtures("texts_alone")
def test_less_is_better_in_tables_findings_and_latex(bits: Path) -> None:
    analyze(bits)
    text = report_of(bits)
    assert "from the lowest, which is the best: Gravitational 2.910 bits" in text
    assert "Gravitational against Conventional: -0.100 bits of test bits per byte" in text
    assert "better at the 0.05 level" in text and "largest class" not in text.split("## Definitions")[0]
    assert "| 128 tokens | 512 tokens |" in text and "chance 8.000 bits" in text
    assert "Conventional 3.030 bits to 3.462 bits" in text  # 2.1 and 2.4 nats
    assert "test bits per byte" in (bits / "analysis" / "summary.tex").read_text()
    table = pd.read_csv(bits / "analysis" / "summary.csv")
    at = table[table["metric"] == BITS.at_length(512)]["value"]
    assert at.tolist() == pytest.approx([2.4 / math.log(2)] * 6)


def test_figures_of_bits_say_so_and_have_no_line_of_guessing(bits: Path) -> None:
    drawn = task_figures(TaskView(make_analysis(read_joined([bits])), "bytes", "bytes"))
    axes = {note.stem: figure.axes for note, figure in drawn}
    assert axes["accuracy_bytes"][0].get_legend_handles_labels() == ([], [])
    assert max(axes["accuracy_bytes"][0].get_xlim()) < 4  # guessing takes 8 bits
    labels = [ax.get_ylabel() for ax in axes["learning_curves_bytes"]]
    assert labels == ["training bits per byte", "validation bits per byte"]
    curves = axes["learning_curves_bytes"][1].get_lines()
    assert any(np.allclose(np.asarray(line.get_ydata(), float)[0], 5 / math.log(2)) for line in curves)
    assert axes["accuracy_bytes"][0].get_xlabel() == "test bits per byte"
    assert axes["lengths_bytes"][0].get_ylabel() == "test bits per byte"


def test_bits_are_the_loss_over_ln_2_or_nothing_and_converge_downwards() -> None:
    assert [BITS.read({"val_loss": loss}, "val_{}") for loss in (0.0, math.log(2))] == [0.0, 1.0]
    for none in (-1.0, math.nan, math.inf, None, "2", True):
        assert BITS.read({"val_loss": none, "val_accuracy": 0.5}, "val_{}") is None
    assert convergence_epoch([6.0, 3.4, 3.0], 8.0, BITS) == 2  # 4.6 of 5 bits
    assert convergence_epoch([8.0, 9.0], 8.0, BITS) is None


@pytest.mark.parametrize("metric", ["f1", None, ["accuracy"]])
def test_an_unknown_metric_is_refused_in_one_line(metric: object, bits: Path, refused: Refused) -> None:
    put(bits / "config.json", "task_info bytes metric", metric)
    said = refused(main, bits)
    assert "task bytes: unknown metric" in said and "bits_per_byte" in said


@pytest.mark.parametrize(
    ("values", "why", "when_resumed"),
    [
        ({"metric": "f1"}, "is of the metric f1", "unknown metric 'f1'"),
        ({"metric": "accuracy"}, "is of the metric accuracy", ""),
        *[({"test_loss_best": loss}, *["has no test_loss_best"] * 2) for loss in (None, -0.5)],
    ],
)
def test_a_result_without_the_metric_of_its_task_is_no_result_and_its_cell_is_run_again(
    values: dict[str, Any], why: str, when_resumed: str, bits: Path
) -> None:
    assert verified_cell(bits, CELL).state == "done"
    rewrite(CELL.folder(bits) / "result.json", **values)
    records = {record.cell: record for record in read_joined([bits]).results.cells}
    assert records[CELL].state == "failed" and why in records[CELL].reason
    verified = verified_cell(bits, CELL)  # which does not know the task's
    assert verified.state == ("failed" if when_resumed else "done") and when_resumed in verified.reason


def test_what_is_no_length_is_left_out(bits: Path) -> None:
    known = {"loss": 1.0}
    damaged: tuple[Any, ...] = (None, [], "x", {"-1": known, "a": known}, {"64": 3}, {"9" * 12: known})
    for record, by_length in zip(read_results(bits).cells, damaged, strict=True):
        rewrite(record.folder / "result.json", test_by_length=by_length)
    assert length_table(make_analysis(read_joined([bits])).table).empty
