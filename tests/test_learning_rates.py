"""Of several learning rates each model and task takes the best on validation, and every model tries them
all."""

import math
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from cell_cases import metrics_of, outcome
from results_fixture import make_results, report_of
from run_cases import HERE, Refused, plan_of, quick_leases, resume, run, run_undisturbed, write_lease

import run_experiment
from analyze_results import analyze
from command_line import InputError
from experiment.run_plan import PRESETS, TUNING_SEEDS
from experiment.tuning import record_choice
from reporting.learning_rates import Trial, Tuning, best_of, read_tuning, trial_of, tuning_file, write_tuning
from reporting.metrics import METRICS, PERCENT
from results_folder import Cell, CellRecord, read_cell, read_json, write_status

MODELS = ("conventional", "discounted")
RATES = (0.001, 0.01)
GRID = ["--models", *MODELS, "--learning-rate", "0.01", "0.001", "--seeds", "0", "1"]
pytestmark = pytest.mark.usefixtures("compared")


def trials(model: str) -> list[Cell]:
    return [Cell("listops", model, seed, rate) for rate in RATES for seed in TUNING_SEEDS]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder whose learning rates were chosen, done."""
    return run_undisturbed(tmp_path_factory, *GRID)


def test_each_model_tries_all_rates_with_a_seed_of_their_own_and_results_take_the_best(tuned: Path) -> None:
    for model in MODELS:
        tuning = read_tuning(tuned, "listops", model)
        assert tuning is not None and tuning.seeds == TUNING_SEEDS
        best: dict[float, list[float]] = {rate: [] for rate in RATES}
        for cell in trials(model):
            assert cell.trial is not None
            folder = tuned / "listops" / model / "tuning" / f"lr{cell.trial:g}" / f"seed{cell.seed}"
            rows, result = metrics_of(folder), read_json(folder / "result.json")
            assert cell.folder(tuned) == folder and {row["learning_rate"] for row in rows} == {cell.trial}
            best[cell.trial].append(max(row["val_accuracy"] for row in rows))
            # What chooses a rate never sees the test split.
            assert result["test_accuracy_best"] == rows[result["best_epoch"] - 1]["val_accuracy"]
        means = {rate: fmean(values) for rate, values in best.items()}
        assert {trial.learning_rate: trial.value for trial in tuning.trials} == pytest.approx(means)
        assert means[tuning.chosen] == max(means.values())
        for seed in (0, 1):
            record = read_cell(tuned, Cell("listops", model, seed))
            assert {row["learning_rate"] for row in record.metrics} == {tuning.chosen}
            assert record.config["training_settings"]["learning_rate"] == tuning.chosen


def test_a_cell_of_an_array_runs_the_trials_that_it_needs_and_a_resumed_run_ends_in_the_same_bits(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run(tmp_path, *GRID, "--prepare")
    resume(root, "--cell-index", "1")
    own, others = [*trials("discounted"), Cell("listops", "discounted", 0)], trials("conventional")
    for cell in (*own, *others, Cell("listops", "conventional", 0)):
        assert read_cell(root, cell).state == ("done" if cell in own else "pending")
    for cell in others:
        shutil.copytree(cell.folder(tuned), cell.folder(root), dirs_exist_ok=True)
    write_status(others[0].folder(root), "running")
    quick_leases(monkeypatch)
    write_lease(others[0].folder(root))  # another machine's, whose result is waited for until it is gone
    assert resume(root) == 0
    for model in MODELS:
        assert read_tuning(root, "listops", model) == read_tuning(tuned, "listops", model)
        cell = Cell("listops", model, 1)
        assert outcome(cell.folder(root)) == outcome(cell.folder(tuned))


def test_a_rate_that_diverges_is_no_candidate_and_without_any_the_results_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ["--models", "conventional", "--max-epochs", "1", "--learning-rate", "1e30"]
    root = run(tmp_path / "one", *rates, "0.01", "--fail-fast")
    tuning = read_tuning(root, "listops", "conventional")
    assert tuning is not None and (tuning.chosen, tuning.trials[1].state) == (0.01, "diverged")
    root = run(tmp_path / "none", *rates, "1e31", code=1)
    assert read_tuning(root, "listops", "conventional") is None
    record = read_cell(root, Cell("listops", "conventional", 0))
    assert record.state == "failed" and "no learning rate of 1e+30, 1e+31 could be" in record.reason
    assert "tuning/lr1e+30" in capsys.readouterr().out


def test_another_grid_is_refused_on_resuming(tuned: Path, refused: Refused) -> None:
    assert resume(tuned, "--learning-rate", "0.01", "0.001") == 0  # the same, in another order
    said = refused(run_experiment.main, "--resume", tuned, "--learning-rate", 0.01)
    assert "--learning-rate is 0.001 0.01 there and 0.01 here" in said


def test_a_preset_may_have_a_grid_and_one_rate_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS["smoke"].training, "learning_rate", (0.01, 0.001))
    plan = plan_of(*HERE)
    assert plan.learning_rates == RATES and len(plan.trials) == 2 * 4 * len(TUNING_SEEDS)
    plan = plan_of(*HERE, "--learning-rate", "0.003")
    assert plan.learning_rates == () and plan.trials == [] and plan.training_settings.learning_rate == 0.003


def test_the_best_is_that_of_the_tasks_own_metric() -> None:
    def record(rows: list[dict[str, Any]], state: str = "done") -> CellRecord:
        return CellRecord(Cell("t", "m", TUNING_SEEDS[0], 0.1), Path(), state, metrics=rows)

    rows = [{"val_accuracy": 0.9, "val_loss": 2.0}, {"val_accuracy": 0.5, "val_loss": 1.0}]
    bits = METRICS["bits_per_byte"]
    assert trial_of([record(rows)], 0.1, PERCENT) == Trial(0.1, "done", 0.9, 2.0)
    assert trial_of([record(rows)], 0.1, bits) == Trial(0.1, "done", 1 / math.log(2), 1.0)
    assert trial_of([record(rows), record(rows[1:])], 0.1, PERCENT) == Trial(0.1, "done", 0.7, 1.5)
    assert trial_of([record(rows), record(rows, "diverged")], 0.1, bits) == Trial(0.1, "diverged")
    assert trial_of([record([]), record(rows)], 0.1, bits) == Trial(0.1, "failed")
    low, high = Trial(0.001, "done", 2.0, 1.4), Trial(0.01, "done", 3.0, 2.1)
    assert (best_of([low, high], PERCENT), best_of([low, high], bits)) == (0.01, 0.001)
    # Of equal values the lower loss counts, and then the lower rate.
    equal = [Trial(0.001, "done", 1.0, 0.2), Trial(0.003, "done", 1.0, 0.1), Trial(0.01, "done", 1.0, 0.1)]
    assert best_of(equal, PERCENT) == 0.003
    assert best_of([Trial(0.1, "failed")], PERCENT) is None


# In results folders made up


def untrained(parent: Path, *models: str) -> Path:
    return make_results(parent, models=models, seeds=(0,), epochs=1, patterns=False)


@pytest.mark.usefixtures("texts_alone")
def test_the_report_shows_the_grid_and_warns_of_a_best_at_its_end(tmp_path: Path) -> None:
    root = untrained(tmp_path, *MODELS)
    grid = (Trial(0.001, "done", 0.3, 1.0), Trial(0.003, "done", 0.4, 1.0), Trial(0.01, "diverged"))
    for model, part in zip(MODELS, (grid, grid[:2]), strict=True):
        write_tuning(root, "listops", model, Tuning("accuracy", TUNING_SEEDS, part, 0.003))
    analyze(root)
    text = report_of(root)
    assert "| Conventional | listops | 30.0 % | 40.0 % | diverged | 0.003 |" in text
    assert "| 30.0 % | 40.0 % | – | 0.003 (an end of the grid) |" in text  # noqa: RUF001
    [warning] = [line for line in text.splitlines() if "lies at an end of the grid" in line]
    assert "Discounted, one timescale 0.003" in warning and "Conventional" not in warning
    # A choice that is made stays.
    record_choice(root, plan_of(*HERE, *GRID), Cell("listops", MODELS[0], 0), [])
    assert read_tuning(root, "listops", MODELS[0]) == Tuning("accuracy", TUNING_SEEDS, grid, 0.003)


@pytest.mark.usefixtures("texts_alone")
def test_a_damaged_choice_is_named_and_loses_no_analysis(tmp_path: Path) -> None:
    root = untrained(tmp_path, MODELS[0])
    for damage in ("[]", "{", '{"trials": [], "metric": "accuracy", "seeds": [1], "chosen": 0.1}'):
        tuning_file(root, "listops", MODELS[0]).write_text(damage)
        with pytest.raises(InputError, match=r"learning_rate.json is no outcome of a tuning; remove it"):
            read_tuning(root, "listops", MODELS[0])
    analyze(root)
    assert "**Learning rates unknown.**" in report_of(root)
