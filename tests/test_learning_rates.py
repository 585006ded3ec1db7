"""Of several learning rates each model and task takes the best on validation, and every model tries them
all."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from cell_cases import metrics_of, outcome
from results_fixture import make_results, report_of
from run_cases import HERE, only

import run_experiment
from analyze_results import analyze
from command_line import InputError
from experiment import tuning as tuning_module
from experiment.run_plan import PRESETS, TUNING_SEEDS, make_plan
from reporting.learning_rates import Trial, Tuning, best_of, read_tuning, trial_of, tuning_file, write_tuning
from reporting.metrics import METRICS, PERCENT
from results_folder import Cell, CellRecord, read_cell, write_status

MODELS = ("conventional", "discounted")
GRID = [*HERE, "--models", *MODELS, "--learning-rate", "0.01", "0.001", "--seeds", "0", "1"]
pytestmark = pytest.mark.usefixtures("compared")


def trials(model: str) -> list[Cell]:
    return [Cell("listops", model, seed, rate) for rate in (0.001, 0.01) for seed in TUNING_SEEDS]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder whose learning rates were chosen, done."""
    parent = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_experiment, "analyze_run", lambda root: True)
        assert run_experiment.main([*GRID, "--output-dir", str(parent)]) == 0
    return only(parent)


def test_each_model_tries_all_rates_with_a_seed_of_their_own_and_results_take_the_best(tuned: Path) -> None:
    for model in MODELS:
        tuning = read_tuning(tuned, "listops", model)
        assert tuning is not None and tuning.seeds == TUNING_SEEDS
        best: dict[float, list[float]] = {0.001: [], 0.01: []}
        for cell in trials(model):
            rows = metrics_of(cell.folder(tuned))
            folder = tuned / "listops" / model / "tuning" / f"lr{cell.trial:g}" / f"seed{cell.seed}"
            assert cell.folder(tuned) == folder and {row["learning_rate"] for row in rows} == {cell.trial}
            best[cell.trial or 0.0].append(max(row["val_accuracy"] for row in rows))
        means = {rate: sum(values) / len(TUNING_SEEDS) for rate, values in best.items()}
        assert {trial.learning_rate: trial.value for trial in tuning.trials} == pytest.approx(means)
        assert means[tuning.chosen] == max(means.values())
        for seed in (0, 1):
            folder = Cell("listops", model, seed).folder(tuned)
            assert {row["learning_rate"] for row in metrics_of(folder)} == {tuning.chosen}
            config = json.loads((folder / "config.json").read_text())
            assert config["training_settings"]["learning_rate"] == tuning.chosen


def test_what_chooses_a_rate_never_sees_the_test_split(tuned: Path) -> None:
    for cell in trials("conventional"):
        result = json.loads((cell.folder(tuned) / "result.json").read_text())
        rows = metrics_of(cell.folder(tuned))
        assert result["test_accuracy_best"] == rows[result["best_epoch"] - 1]["val_accuracy"]


def test_a_resumed_run_chooses_the_same_and_ends_in_the_same_bits(tuned: Path, tmp_path: Path) -> None:
    assert run_experiment.main([*GRID, "--prepare", "--output-dir", str(tmp_path)]) == 0
    root = only(tmp_path)
    done, stopped = trials("conventional"), trials("discounted")[0]
    for cell in (*done, stopped):
        shutil.copytree(cell.folder(tuned), cell.folder(root), dirs_exist_ok=True)
    write_status(stopped.folder(root), "interrupted", "stopped")
    assert run_experiment.main(["--workers", "1", "--resume", str(root)]) == 0
    for model in MODELS:
        assert read_tuning(root, "listops", model) == read_tuning(tuned, "listops", model)
        cell = Cell("listops", model, 1)
        assert outcome(cell.folder(root)) == outcome(cell.folder(tuned))
    before = tuning_file(root, "listops", "discounted").stat().st_mtime_ns
    assert run_experiment.main(["--workers", "1", "--resume", str(root)]) == 0
    assert tuning_file(root, "listops", "discounted").stat().st_mtime_ns == before


def test_one_cell_of_an_array_runs_the_trials_that_it_needs_and_no_others(tmp_path: Path) -> None:
    assert run_experiment.main([*GRID, "--prepare", "--output-dir", str(tmp_path)]) == 0
    root = only(tmp_path)
    run_experiment.main(["--resume", str(root), "--workers", "1", "--cell-index", "1"])
    states = {
        str(cell): read_cell(root, cell).state
        for model in MODELS
        for cell in (*trials(model), Cell("listops", model, 0))
    }
    assert {name for name, state in states.items() if state == "done"} == {
        *map(str, trials("discounted")),
        "listops/discounted/seed0",
    }


def test_a_rate_that_diverges_is_no_candidate_and_without_any_the_results_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [*HERE, "--models", "conventional", "--learning-rate", "0.01", "1e30", "--fail-fast"]
    assert run_experiment.main([*models, "--output-dir", str(tmp_path / "one")]) == 0
    tuning = read_tuning(only(tmp_path / "one"), "listops", "conventional")
    assert tuning is not None and (tuning.chosen, tuning.trials[1].state) == (0.01, "diverged")
    models[models.index("0.01")] = "1e31"
    models.remove("--fail-fast")
    assert run_experiment.main([*models, "--output-dir", str(tmp_path / "none")]) == 1
    root = only(tmp_path / "none")
    assert read_tuning(root, "listops", "conventional") is None
    record = read_cell(root, Cell("listops", "conventional", 0))
    assert record.state == "failed" and "no learning rate of 1e+30, 1e+31 could be" in record.reason
    assert "tuning/lr1e+30" in capsys.readouterr().out


def test_another_grid_is_refused_on_resuming(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--workers", "1", "--resume", str(tuned), "--learning-rate"]
    assert run_experiment.main([*argv, "0.01", "0.001"]) == 0  # the same, in another order
    assert run_experiment.main([*argv, "0.01"]) == 2
    assert "--learning-rate is 0.001 0.01 there and 0.01 here" in capsys.readouterr().err


def test_a_preset_may_have_a_grid_and_one_rate_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS["smoke"].training, "learning_rate", (0.01, 0.001))
    parse = run_experiment.make_parser().parse_args
    plan = make_plan(parse(HERE))
    assert plan.learning_rates == (0.001, 0.01) and len(plan.trials) == 2 * 4 * len(TUNING_SEEDS)
    plan = make_plan(parse([*HERE, "--learning-rate", "0.003"]))
    assert plan.learning_rates == () and plan.trials == [] and plan.training_settings.learning_rate == 0.003


def record(rows: list[dict[str, Any]], state: str = "done") -> CellRecord:
    return CellRecord(Cell("t", "m", TUNING_SEEDS[0], 0.1), Path(), state, metrics=rows)


def test_the_best_is_that_of_the_tasks_own_metric() -> None:
    rows = [{"val_accuracy": 0.9, "val_loss": 2.0}, {"val_accuracy": 0.5, "val_loss": 1.0}]
    bits = METRICS["bits_per_byte"]
    assert trial_of([record(rows)], 0.1, PERCENT) == Trial(0.1, "done", 0.9, 2.0)
    assert trial_of([record(rows)], 0.1, bits) == Trial(0.1, "done", 1 / math.log(2), 1.0)
    assert trial_of([record(rows), record(rows[1:])], 0.1, PERCENT) == Trial(0.1, "done", 0.7, 1.5)
    assert trial_of([record(rows), record(rows, "diverged")], 0.1, bits) == Trial(0.1, "diverged")
    assert trial_of([record([]), record(rows)], 0.1, bits) == Trial(0.1, "failed")
    low, high = Trial(0.001, "done", 2.0, 1.4), Trial(0.01, "done", 3.0, 2.1)
    assert (best_of([low, high], PERCENT), best_of([low, high], bits)) == (0.01, 0.001)


def test_of_equal_values_the_lower_loss_counts_and_then_the_lower_rate() -> None:
    equal = [Trial(0.001, "done", 1.0, 0.2), Trial(0.003, "done", 1.0, 0.1), Trial(0.01, "done", 1.0, 0.1)]
    assert best_of(equal, PERCENT) == 0.003
    assert best_of([Trial(0.1, "failed")], PERCENT) is None


@pytest.mark.usefixtures("texts_alone")
def test_the_report_shows_the_grid_and_warns_of_a_best_at_its_end(tmp_path: Path) -> None:
    root = make_results(tmp_path, tasks=("listops",), models=MODELS, seeds=(0,), epochs=1, patterns=False)
    grid = (Trial(0.001, "done", 0.3, 1.0), Trial(0.003, "done", 0.4, 1.0), Trial(0.01, "diverged"))
    write_tuning(root, "listops", MODELS[0], Tuning("accuracy", TUNING_SEEDS, grid, 0.003))
    write_tuning(root, "listops", MODELS[1], Tuning("accuracy", TUNING_SEEDS, grid[:2], 0.003))
    analyze(root)
    text = report_of(root)
    assert "| Conventional | listops | 30.0 % | 40.0 % | diverged | 0.003 |" in text
    assert "| 30.0 % | 40.0 % | – | 0.003 (an end of the grid) |" in text  # noqa: RUF001
    [warning] = [line for line in text.splitlines() if "lies at an end of the grid" in line]
    assert "Discounted, one timescale 0.003" in warning and "Conventional" not in warning


@pytest.mark.usefixtures("texts_alone")
@pytest.mark.parametrize(
    "damage", ["[]", "{", '{"trials": [], "metric": "accuracy", "seeds": [1], "chosen": 0.1}']
)
def test_a_damaged_choice_is_named_and_loses_no_analysis(damage: str, tmp_path: Path) -> None:
    root = make_results(tmp_path, tasks=("listops",), models=MODELS[:1], seeds=(0,), epochs=1, patterns=False)
    tuning_file(root, "listops", MODELS[0]).write_text(damage)
    with pytest.raises(InputError, match=r"learning_rate.json is no outcome of a tuning; remove it"):
        read_tuning(root, "listops", MODELS[0])
    analyze(root)
    assert "**Learning rates unknown.**" in report_of(root)


def test_a_choice_that_is_made_stays(tuned: Path, tmp_path: Path) -> None:
    tuning = Tuning("accuracy", TUNING_SEEDS, (Trial(0.1, "done", 0.5, 1.0),), 0.1)
    root = make_results(tmp_path, tasks=("listops",), models=MODELS[:1], seeds=(0,), epochs=1, patterns=False)
    write_tuning(root, "listops", MODELS[0], tuning)
    plan = make_plan(run_experiment.make_parser().parse_args(GRID))
    tuning_module.record_choice(root, plan, Cell("listops", MODELS[0], 0), [])
    assert read_tuning(root, "listops", MODELS[0]) == tuning
