"""What accuracy costs is added up from the epochs, and a target is one for all models."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reporting.accuracy_against_cost import progress_metrics, progress_table, target_qualities
from reporting.metrics import BITS
from reporting.run_results import TaskFacts
from results_folder import Cell, CellRecord, Results

FACTS = TaskFacts("t", "T", 0.5, None, None, 2, {})
OF_BITS = TaskFacts("t", "T", 1 / 256, None, None, 256, {}, BITS)


def record(
    model: str, accuracies: list[float], seconds: list[float | None], state: str = "done"
) -> CellRecord:
    rows = [
        {"epoch": epoch, "val_accuracy": accuracy, "train_seconds": spent, "train_tokens": 1000}
        for epoch, (accuracy, spent) in enumerate(zip(accuracies, seconds, strict=True), 1)
    ]
    return CellRecord(Cell("t", model, 0), Path(), state, metrics=rows)


def progress_of(*records: CellRecord) -> pd.DataFrame:
    return progress_table(Results(Path(), {}, {}, list(records)))


def metrics_of(progress: pd.DataFrame, model: str, targets: dict[str, float]) -> dict[str, float]:
    rows = progress_metrics(progress, targets, {"t": FACTS})
    mine = rows[rows["model"] == model]
    return dict(zip(mine["metric"], mine["value"], strict=True))


def test_time_and_tokens_add_up_and_are_unknown_from_an_epoch_without_them_on() -> None:
    progress = progress_of(record("a", [0.1, 0.2, 0.3], [2.0, 3.0, None]))
    np.testing.assert_array_equal(progress["seconds"], [2.0, 5.0, np.nan])
    np.testing.assert_array_equal(progress["tokens"], [1000.0, 2000.0, 3000.0])
    assert metrics_of(progress, "a", {}) == {"tokens_to_best": 3000.0}
    progress = progress_of(record("a", [0.1, 0.2, 0.3], [2.0, None, 4.0]))
    np.testing.assert_array_equal(progress["seconds"], [2.0, np.nan, np.nan])


def test_the_target_is_nine_tenths_of_the_way_from_chance_to_the_best_model() -> None:
    progress = progress_of(
        record("conventional", [0.4, 0.55, 0.5], [1.0] * 3), record("a", [0.6, 0.4, 0.5], [1.0] * 3)
    )
    assert target_qualities(progress, {"t": FACTS}) == {"t": pytest.approx(0.59)}
    assert target_qualities(progress, {"t": replace(FACTS, chance=0.6)}) == {}
    assert target_qualities(progress, {"t": replace(FACTS, chance=None)}) == {}
    unfinished = progress_of(record("conventional", [0.9], [1.0], "diverged"))
    assert target_qualities(unfinished, {"t": FACTS}) == {}


def test_where_less_is_better_the_target_is_below_chance_and_is_reached_from_above() -> None:
    rows = progress_of(record("a", [0.0] * 3, [1.0] * 3)).assign(quality=[6.0, 3.1, 3.0])
    targets = target_qualities(rows, {"t": OF_BITS})
    assert targets == {"t": pytest.approx(8 - 0.9 * 5)}  # chance is 8 bits, the best 3
    found = progress_metrics(rows, targets, {"t": OF_BITS}).set_index("metric")["value"]
    assert found["seconds_to_best"] == 3 and found["seconds_to_target"] == 2


def test_the_target_is_reached_at_its_first_epoch_or_not_at_all() -> None:
    progress = progress_of(
        record("a", [0.4, 0.59, 0.7, 0.6], [2.0, 3.0, 4.0, 5.0]),
        record("b", [0.4, 0.5, 0.45, 0.5], [1.0, 1.0, 1.0, 1.0]),
        record("c", [0.9], [1.0], "failed"),
    )
    reached = {"target_reached": 1.0, "seconds_to_target": 5.0, "tokens_to_target": 2000.0}
    best = {"seconds_to_best": 9.0, "tokens_to_best": 3000.0}
    assert metrics_of(progress, "a", {"t": 0.59}) == best | reached
    never = {"seconds_to_best": 2.0, "tokens_to_best": 2000.0, "target_reached": 0.0}
    assert metrics_of(progress, "b", {"t": 0.59}) == never  # of two equal epochs the first is the best
    assert metrics_of(progress, "c", {"t": 0.59}) == {}
