"""A task's own metric is read, compared and shown in its direction, also at lengths beyond the trained."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from results_fixture import make_results, report_of, rewrite, write
from run_cases import Refused

from analyze_results import analyze, main
from experiment.cells import verified_cell
from reporting.analysis import make_analysis
from reporting.comparison_tables import convergence_epoch
from reporting.figure_style import figure_style
from reporting.metrics import METRICS
from reporting.run_results import read_joined
from reporting.task_figures import TaskView, task_figures
from reporting.verdicts import compare
from results_folder import Cell, read_results

BITS = METRICS["bits_per_byte"]
MODELS = ("conventional", "gravitational")
SEEDS = (0, 1, 2)


@pytest.fixture
def bits(tmp_path: Path) -> Path:
    """A task of bytes: seed k has 3 + k / 100 bits with softmax attention, and 0.1 bits less with gravity."""
    root = make_results(
        tmp_path / "bits", tasks=("bytes",), models=MODELS, seeds=SEEDS, patterns=False, epochs=3
    )
    config = json.loads((root / "config.json").read_text())
    config["task_info"]["bytes"] |= {"metric": "bits_per_byte", "num_classes": 256, "chance": 1 / 256}
    write(root / "config.json", config)
    for seed in SEEDS:
        for model, less in zip(MODELS, (0.0, 0.1), strict=True):
            folder, value = (
                Cell("bytes", model, seed).folder(root),
                3 + seed / 100 - less + seed**2 / 1000 * less,
            )
            by_length = {"512": {"loss": 2.4, "accuracy": 0.3}, "128": {"loss": 2.1, "accuracy": 0.4}}
            result = {"metric": "bits_per_byte", "test_loss_best": value * math.log(2)}
            rewrite(folder / "result.json", **result, test_by_length=by_length)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for row, loss in zip(rows, (5.0, 2.2, 2.1 - less), strict=True):
                row |= {"val_loss": loss, "steps": 20 * row["epoch"]}
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.usefixtures("texts_alone")
def test_less_is_better_in_tables_findings_and_latex(bits: Path) -> None:
    analyze(bits)
    text = report_of(bits)
    assert "from the lowest, which is the best: Gravitational 2.910 bits" in text
    assert "Gravitational against Conventional: -0.100 bits of test bits per byte on average" in text
    assert "better at the 0.05 level" in text and "largest class" not in text.split("## Definitions")[0]
    assert "| 128 tokens | 512 tokens |" in text and "2.1 / ln" not in text
    assert "Conventional 3.030 bits to 3.462 bits" in text  # 2.1 and 2.4 nats
    assert "chance 8.000 bits" in text
    assert "test bits per byte" in (bits / "analysis" / "summary.tex").read_text()
    table = pd.read_csv(bits / "analysis" / "summary.csv")
    at = table[table["metric"] == BITS.at_length(512)]["value"]
    assert at.tolist() == pytest.approx([2.4 / math.log(2)] * 6)


def test_figures_of_bits_are_drawn_and_quality_by_length_marks_the_trained_one(bits: Path) -> None:
    view = TaskView(make_analysis(read_joined([bits])), "bytes", "bytes")
    with figure_style():
        figures = {note.stem: figure for note, figure in task_figures(view)}
    [ax] = figures["accuracy_bytes"].axes
    assert [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")] == []
    assert max(ax.get_xlim()) < 4  # guessing, 8 bits, is no line of it
    labels = [ax.get_ylabel() for ax in figures["learning_curves_bytes"].axes]
    assert labels == ["training bits per byte", "validation bits per byte"]
    curves = figures["learning_curves_bytes"].axes[1].get_lines()
    assert any(np.allclose(np.asarray(line.get_ydata(), float)[0], 5 / math.log(2)) for line in curves)
    [ax] = figures["lengths_bytes"].axes
    assert np.asarray(ax.get_lines()[0].get_xdata()).tolist() == [128, 128]
    assert ax.get_ylabel() == "test bits per byte"
    assert figures["accuracy_bytes"].axes[0].get_xlabel() == "test bits per byte"


def test_gains_and_convergence_hold_for_bits() -> None:
    seeds = ((0, 4.0, 3.0), (1, 4.2, 3.1), (2, 4.4, 3.4))
    rows = [("t", "conventional", seed, BITS.best, base) for seed, base, _ in seeds]
    rows += [("t", "a", seed, BITS.best, value) for seed, _, value in seeds]
    [row] = compare(pd.DataFrame(rows, columns=["task", "model", "seed", "metric", "value"]))
    assert row.gain.mean == pytest.approx(3.1 / 3) and row.gain.low < row.gain.mean < row.gain.high
    assert convergence_epoch([6.0, 3.4, 3.0], 8.0, BITS) == 2  # 4.6 of 5 bits
    assert convergence_epoch([8.0, 9.0], 8.0, BITS) is None


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ({"val_loss": 0.0}, 0.0),
        ({"val_loss": math.log(2)}, 1.0),
        *[({"val_loss": bad}, None) for bad in (-1.0, math.nan, math.inf, None, "2", True)],
        ({"val_accuracy": 0.5}, None),
    ],
)
def test_bits_are_the_loss_over_ln_2_or_nothing(row: dict[str, Any], value: float | None) -> None:
    assert BITS.read(row, "val_{}") == value


def test_a_finished_cell_without_its_metric_is_run_again(bits: Path) -> None:
    cell = Cell("bytes", "conventional", 0)
    rewrite(cell.folder(bits) / "result.json", epochs_run=3)
    assert verified_cell(bits, cell).state == "done"
    for values, why in (
        ({"test_loss_best": None}, "has no test_loss_best"),
        ({"metric": "f1"}, "unknown metric 'f1'"),
    ):
        rewrite(cell.folder(bits) / "result.json", **values)
        record = verified_cell(bits, cell)
        assert record.state == "failed" and why in record.reason


@pytest.mark.parametrize("metric", ["f1", 3, None, ["accuracy"]])
def test_an_unknown_metric_of_a_task_is_one_line_and_exit_code_2(
    metric: object, bits: Path, refused: Refused
) -> None:
    config = json.loads((bits / "config.json").read_text())
    config["task_info"]["bytes"]["metric"] = metric
    write(bits / "config.json", config)
    said = refused(main, bits)
    assert "task bytes: unknown metric" in said and "bits_per_byte" in said


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"metric": "f1"}, "is of the metric f1"),
        ({"metric": "accuracy"}, "is of the metric accuracy"),
        ({"test_loss_best": None}, "has no test_loss_best"),
        ({"test_loss_best": -0.5}, "has no test_loss_best"),
    ],
)
def test_a_result_of_another_metric_than_its_task_is_no_result(
    values: dict[str, Any], why: str, bits: Path
) -> None:
    cell = Cell("bytes", "conventional", 0)
    rewrite(cell.folder(bits) / "result.json", **values)
    records = {record.cell: record for record in read_joined([bits]).results.cells}
    assert records[cell].state == "failed" and why in records[cell].reason


@pytest.mark.usefixtures("texts_alone")
@pytest.mark.parametrize("by_length", [None, [], "x", {"-1": {}, "a": {}, "64": 3, "9" * 12: {"loss": 1.0}}])
def test_what_is_no_length_is_left_out(by_length: object, bits: Path) -> None:
    for record in read_results(bits).cells:
        rewrite(record.folder / "result.json", test_by_length=by_length)
    analyze(bits)
    assert "by length" not in report_of(bits)
