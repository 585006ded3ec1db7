"""Two trained models on the same test examples: McNemar's test, one pair of cells of equal seed at a time.

    predictions, reasons = read_predictions(results)
    rows = compare_predictions(predictions)         # a PairedPredictions per task, model and seed

It tells whether these two trained models would differ on further examples of the same kind. It does not tell
the mechanism from the luck of a seed: for that the seeds are the unit (`comparison_tables.compare`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from reporting.array_files import read_arrays
from reporting.comparison_tables import BASELINE, done_cells
from reporting.seed_statistics import holm, mcnemar_p
from results_folder import Cell, Results

PREDICTIONS = "test_predictions.npz"


@dataclass(frozen=True)
class Predictions:
    """A cell's answers on the test split, in the split's order: predictions and labels, both (n,)."""

    predictions: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        for name in ("predictions", "labels"):
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype.kind not in "iu" or array.shape != self.labels.shape:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected whole numbers (n,)")


class PairedPredictions(NamedTuple):
    """A model against the baseline with one seed, on n examples; only_*: right with that one alone."""

    task: str
    model: str
    seed: int
    n: int
    only_model: int
    only_baseline: int
    p: float
    p_holm: float


def read_predictions(results: Results) -> tuple[dict[Cell, Predictions], dict[Cell, str]]:
    """The test predictions of the finished cells, and why a cell has none that can be used."""
    found, reasons = {}, {}
    for record in done_cells(results):
        try:
            found[record.cell] = Predictions(
                **read_arrays(record.folder / PREDICTIONS, ("predictions", "labels"))
            )
        except (TypeError, ValueError) as error:
            reasons[record.cell] = str(error)
    return found, reasons


def compare_predictions(
    predictions: dict[Cell, Predictions], baseline: str = BASELINE
) -> list[PairedPredictions]:
    """Each model against the baseline of the same task and seed, with Holm's correction over all pairs.

    A pair that was not tested on the same labels is none."""
    pairs = []
    for cell, mine in predictions.items():
        other = predictions.get(Cell(cell.task, baseline, cell.seed))
        if cell.model == baseline or other is None or not np.array_equal(mine.labels, other.labels):
            continue
        right, base_right = mine.predictions == mine.labels, other.predictions == other.labels
        only_model, only_baseline = int((right & ~base_right).sum()), int((base_right & ~right).sum())
        p = mcnemar_p(only_model, only_baseline)
        counts = len(right), only_model, only_baseline
        pairs.append(PairedPredictions(cell.task, cell.model, cell.seed, *counts, p, p_holm=p))
    corrected = holm([pair.p for pair in pairs])
    return [pair._replace(p_holm=p_holm) for pair, p_holm in zip(pairs, corrected, strict=True)]
