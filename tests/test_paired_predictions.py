"""McNemar's test is made on the answers of two cells of equal seed to the same examples, and on none else."""

from pathlib import Path

import numpy as np
import pytest
from results_fixture import make_results

from reporting.comparison_tables import usable
from reporting.paired_predictions import PREDICTIONS, Predictions, compare_predictions, read_predictions
from results_folder import Cell, read_results

LABELS = np.array([0, 1, 1, 0, 1, 0, 1, 1])


def answers(wrong: list[int], labels: np.ndarray = LABELS) -> Predictions:
    predictions = labels.copy()
    predictions[wrong] = 1 - predictions[wrong]
    return Predictions(predictions, labels)


def test_a_pair_is_counted_by_hand() -> None:
    found = compare_predictions(
        {Cell("t", "conventional", 0): answers([0, 1, 2, 3, 4, 5]), Cell("t", "a", 0): answers([0, 7])}
    )
    # right with a alone: 1 2 3 4 5; with the baseline alone: 7; p = 2 (1 + 6) / 2^6
    assert found == [("t", "a", 0, 8, 5, 1, 2 * 7 / 64, 2 * 7 / 64)]


def test_pairs_have_equal_seeds_and_labels_and_share_one_correction() -> None:
    other = np.flip(LABELS).copy()
    found = compare_predictions(
        {
            Cell("t", "conventional", 0): answers([0, 1, 2, 3, 4, 5]),
            Cell("t", "conventional", 1): answers([0, 1, 2, 3, 4, 5]),
            Cell("t", "a", 0): answers([]),
            Cell("t", "a", 1): answers([0]),
            Cell("t", "a", 2): answers([0]),
            Cell("t", "b", 0): answers([0], other),
            Cell("u", "b", 0): answers([0]),
        }
    )
    assert [(row.task, row.model, row.seed) for row in found] == [("t", "a", 0), ("t", "a", 1)]
    assert [(row.p, row.p_holm) for row in found] == [(0.03125, 0.0625), (0.0625, 0.0625)]


def test_unusable_predictions_are_named(tmp_path: Path) -> None:
    models = ("conventional", "gravitational", "multi_timescale")
    root = make_results(tmp_path, tasks=("listops",), models=models, seeds=(0,), patterns=False, epochs=1)
    folders = {model: Cell("listops", model, 0).folder(root) for model in models}
    np.savez(folders["gravitational"] / PREDICTIONS, predictions=np.zeros(3), labels=np.zeros(4, int))
    (folders["multi_timescale"] / PREDICTIONS).unlink()
    found, reasons = read_predictions(usable(read_results(root)))
    assert list(found) == [Cell("listops", "conventional", 0)]
    assert [cell.model for cell in reasons] == ["gravitational", "multi_timescale"]
    assert "expected whole numbers" in reasons[Cell("listops", "gravitational", 0)]
    assert "there is no test_predictions.npz" in reasons[Cell("listops", "multi_timescale", 0)]


@pytest.mark.parametrize("labels", [np.zeros((2, 2), int), np.zeros(3)])
def test_labels_that_are_no_row_of_whole_numbers_are_refused(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected whole numbers"):
        Predictions(labels, labels)
