"""The choice of learning rates: each model on each task tries every rate of the grid, and the best is
recorded.

    record_choice(root, plan, cell, records)        # once the trials of a (task, model) are settled
    training = training_of(root, plan, cell)        # ValueError where none of its trials was finished

Trials are cells like results, with seeds that no result uses; they never see the test split. The choice is a
function of their files alone, so whichever process records it writes the same, and what is recorded stays.
"""

from dataclasses import replace
from pathlib import Path

from experiment.run_plan import TUNING_SEEDS, RunPlan
from reporting.learning_rates import Tuning, best_of, read_tuning, trial_of, write_tuning
from reporting.run_results import task_facts
from results_folder import Cell, CellRecord, read_results
from train_and_evaluate import TrainingSettings


def record_choice(root: Path, plan: RunPlan, cell: Cell, records: list[CellRecord]) -> None:
    """Record the best of a result's trials, if one was finished; a choice that is there stays."""
    if read_tuning(root, cell.task, cell.model) is not None:
        return
    metric = task_facts(read_results(root), cell.task).metric
    trials = tuple(
        trial_of([record for record in records if record.cell.trial == rate], rate, metric)
        for rate in plan.learning_rates
    )
    chosen = best_of(trials, metric)
    if chosen is not None:
        write_tuning(root, cell.task, cell.model, Tuning(metric.name, TUNING_SEEDS, trials, chosen))


def training_of(root: Path, plan: RunPlan, cell: Cell) -> TrainingSettings:
    """The training settings of a cell: of a trial with its own rate, of a result with the one chosen."""
    settings = plan.training_settings_of(cell.task)
    if not plan.learning_rates:
        return settings
    if cell.trial is not None:
        return replace(settings, learning_rate=cell.trial)
    tuning = read_tuning(root, cell.task, cell.model)
    if tuning is None:
        rates = ", ".join(f"{rate:g}" for rate in plan.learning_rates)
        raise ValueError(
            f"no learning rate of {rates} could be trained with; see {cell.task}/{cell.model}/tuning"
        )
    return replace(settings, learning_rate=tuning.chosen)
