"""A whole run at its smallest, cells that fail, mistakes found before any work, what is shown."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from results_fixture import report_of
from run_cases import HERE, SMOKE, Refused, cells, only, records

import analyze_results
import run_experiment
from data_pipeline import TASKS, DataUnavailableError, TaskData, load_task
from experiment import run_plan
from experiment.cells import LEASE, CellJob, run_cell
from experiment.models import COMPARED, MODELS
from experiment.plan_files import read_plan
from experiment.run_overview import results_table
from experiment.run_plan import PRESETS, RunPlan, load_tasks, make_plan
from experiment.run_progress import RunProgress, TerminalProgress, duration, make_progress
from results_folder import Cell, CellRecord, read_results
from run_experiment import make_parser
from train_and_evaluate import ModelSettings


@pytest.fixture(autouse=True)
def data_anew() -> None:
    """What a test loads, or fails to, is not what an earlier one did."""
    run_plan.load_once.cache_clear()


def plan_of(*argv: str) -> RunPlan:
    return make_plan(make_parser().parse_args(argv))


def states(root: Path) -> dict[str, str]:
    return {record.cell.model: record.state for record in read_results(root).cells}


# A whole run


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of the smoke preset, run once with its analysis."""
    parent = tmp_path_factory.mktemp("smoke")
    assert run_experiment.main([*HERE, "--output-dir", str(parent)]) == 0
    return only(parent)


def test_the_smoke_preset_finishes_every_model_and_compares_them(smoke: Path) -> None:
    assert [(record.cell, record.state) for record in records(smoke)] == [
        (Cell("listops", model, 0), "done") for model in COMPARED
    ]
    assert (smoke / "analysis" / "report.html").is_file()


def test_a_run_writes_every_file_of_every_cell_and_leaves_no_temporary_one(smoke: Path) -> None:
    expected = {
        *("config.json", "status.json", "metrics.jsonl", "result.json"),
        *("checkpoint_best.pt", "checkpoint_last.pt", "attention_patterns.npz"),
    }
    for record in read_results(smoke).cells:
        assert {file.name for file in record.folder.iterdir()} == expected
    assert (smoke / "environment.json").is_file()


def test_all_json_of_a_run_is_strict(smoke: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    texts = [path.read_text() for path in smoke.rglob("*.json")]
    texts += [line for path in smoke.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(texts) == 2 + 4 * 3 + 4 * 2
    for text in texts:
        assert isinstance(json.loads(text, parse_constant=refuse), dict)


def test_the_runs_config_tells_what_was_run_on_what(smoke: Path) -> None:
    config = json.loads((smoke / "config.json").read_text())
    assert (config["schema_version"], config["preset"], config["seeds"]) == (1, "smoke", [0])
    assert config["settings"]["training"]["max_epochs"] == 2
    assert (
        config["settings"]["data"]["listops"]["max_length"] == PRESETS["smoke"].data["listops"]["max_length"]
    )
    info = config["task_info"]["listops"]
    assert (info["num_classes"], info["chance"], config["unavailable"]) == (10, 0.1, {})
    assert info["test_size"] == PRESETS["smoke"].data["listops"]["test_size"]
    assert 0.1 <= info["majority"] < 1
    environment = json.loads((smoke / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["device"] == "cpu"


def test_a_cells_config_has_the_models_class_arguments_and_size(smoke: Path) -> None:
    cell = Cell("listops", "gravitational", 0)
    config = json.loads((cell.folder(smoke) / "config.json").read_text())
    result = json.loads((cell.folder(smoke) / "result.json").read_text())
    assert config["model_class"] == "gravitational_attention.GravitationalAttention"
    assert config["attention_arguments"]["softening"] == 0.1
    assert config["parameters"] == result["parameters"] > result["attention_parameters"] > 0


def test_all_models_of_a_run_show_the_same_examples(smoke: Path) -> None:
    shown = []
    for model in ("conventional", "multi_timescale"):
        with np.load(Cell("listops", model, 0).folder(smoke) / "attention_patterns.npz") as arrays:
            shown.append(arrays["tokens"])
            assert arrays["maps"].shape[2] == (1 if model == "conventional" else 3)
    np.testing.assert_array_equal(*shown)


# Models of one's own, and cells that end badly


@pytest.mark.usefixtures("compared")
def test_a_cell_that_fails_or_diverges_is_shown_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["user_models:Broken", "user_models:Exploding", "conventional"]
    assert run_experiment.main([*HERE, "--output-dir", str(tmp_path), "--models", *models]) == 1
    assert states(only(tmp_path)) == dict(zip(models, ("failed", "diverged", "done"), strict=True))
    shown = capsys.readouterr().out
    assert "failed: listops/user_models:Broken/seed0: RuntimeError: too long for me" in shown
    assert (
        "diverged: listops/user_models:Exploding/seed0: the training loss is nan in epoch 1, step 1" in shown
    )


@pytest.mark.usefixtures("compared")
def test_an_interrupted_run_notes_where_it_was_and_ends_with_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models, parent = ["conventional", "user_models:Terminated", "gravitational"], tmp_path / "my runs"
    assert run_experiment.main([*HERE, "--output-dir", str(parent), "--models", *models]) == 143
    root = only(parent)
    assert list(states(root).values()) == ["done", "interrupted", "pending"]
    status = json.loads((cells(root)[1] / "status.json").read_text())
    assert status["reason"] == "stopped by SIGTERM" and not list(root.rglob(LEASE))
    assert f"analyze_results.py '{root}'" in capsys.readouterr().err


@pytest.mark.parametrize("failing", ["analysis", "import"])
def test_a_failed_analysis_is_told_and_loses_nothing(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(root: Path) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(analyze_results, "analyze", fail)
    if failing == "import":
        monkeypatch.setitem(sys.modules, "analyze_results", None)
    argv = [*HERE, "--models", "conventional", "--max-epochs", "1", "--output-dir", str(tmp_path)]
    assert run_experiment.main(argv) == 1
    assert states(only(tmp_path)) == {"conventional": "done"}
    why = {"analysis": "RuntimeError: no ink", "import": "ModuleNotFoundError"}[failing]
    shown = capsys.readouterr()
    assert f"the analysis failed: {why}" in shown.err
    assert "--retry-failed" not in shown.out


@pytest.mark.usefixtures("compared")
def test_each_task_is_loaded_once_for_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def spy(name: str, settings: Any) -> TaskData:
        loaded.append(name)
        return load_task(name, settings)

    monkeypatch.setattr(run_plan, "load_task", spy)
    argv = ["--models", "conventional", "gravitational", "--max-epochs", "1"]
    assert run_experiment.main([*HERE, *argv, "--output-dir", str(tmp_path)]) == 0
    assert loaded == ["listops"] and len(records(only(tmp_path))) == 2


# Mistakes


def without_imdb(name: str, settings: Any) -> TaskData:
    if name == "imdb":
        raise DataUnavailableError("IMDb is missing: curl -LO https://example.org/imdb.tar.gz")
    return load_task(name, settings)


def test_full_without_imdb_ends_with_the_download_command_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setattr(run_plan, "load_task", without_imdb)
    said = refused(run_experiment.main, "--preset", "full", "--device", "cpu", "--output-dir", tmp_path)
    assert "curl -LO https://example.org/imdb.tar.gz" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("texts_alone")
def test_a_task_that_is_unavailable_is_left_out_and_said_everywhere_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_plan, "load_task", without_imdb)
    argv = [*HERE, "--tasks", "imdb", "listops", "--models", "conventional", "--output-dir", str(tmp_path)]
    assert run_experiment.main(argv) == 1
    root = only(tmp_path)
    assert states(root) == {"conventional": "done"}
    out = capsys.readouterr().out
    assert out.startswith("imdb is left out, its data are unavailable: IMDb is missing: curl")
    assert "left out: imdb: IMDb is missing" in out
    assert read_results(root).config["tasks"] == ["listops"]
    assert "**Left out: imdb.** Its data were unavailable: IMDb is missing: curl" in report_of(root)
    assert run_experiment.main(["--workers", "1", "--resume", str(root), "--tasks", "imdb", "listops"]) == 1


def test_a_run_without_any_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_plan, "load_task", without_imdb)
    with pytest.raises(DataUnavailableError, match="curl"):
        load_tasks(plan_of("--preset", "quick", "--tasks", "imdb"), leave_out=True)


# The plan


def test_without_a_gpu_the_default_is_quick_and_with_one_full(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_of("--device", "cpu").preset == "quick"
    monkeypatch.setattr(run_plan, "find_device", lambda name: torch.device("cuda"))
    assert plan_of().preset == "full"


def test_full_is_the_seed_configuration() -> None:
    plan = plan_of("--preset", "full", "--device", "cpu")
    model, training = plan.model_settings, plan.training_settings
    assert model == ModelSettings()
    sizes = (model.embed_dim, model.num_heads, model.num_layers, model.feed_forward_dim)
    assert sizes == (128, 4, 2, 512)
    rates = (training.batch_size, training.learning_rate, training.weight_decay, training.gradient_clip)
    assert rates == (32, 1e-4, 1e-5, 1.0)
    assert (training.max_epochs, training.patience, plan.seeds) == (20, 10, (0, 1, 2))
    assert plan.tasks == ("imdb", "listops")


def test_an_option_goes_before_the_preset_and_the_preset_before_the_default() -> None:
    plan = plan_of("--preset", "smoke", "--embed-dim", "24", "--max-length", "50")
    model = plan.model_settings
    assert (model.embed_dim, model.num_heads, model.dropout) == (24, 2, 0.1)
    assert {plan.data_settings[task].max_length for task in plan.tasks} == {50}
    assert plan.data_settings["listops"].train_size == PRESETS["smoke"].data["listops"]["train_size"]


def test_cells_go_seed_by_seed_so_that_a_part_is_still_a_comparison() -> None:
    plan = plan_of(*SMOKE, "--models", "conventional", "gravitational", "--seeds", "3", "4")
    assert [str(cell) for cell in plan.cells] == [
        "listops/conventional/seed3",
        "listops/gravitational/seed3",
        "listops/conventional/seed4",
        "listops/gravitational/seed4",
    ]


# What is shown


def test_a_dry_run_shows_measured_times_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_experiment.main([*HERE, "--dry-run", "--models", "conventional", "discounted"]) == 0
    shown = capsys.readouterr().out
    assert "listops/conventional" in shown
    assert "listops/discounted" in shown
    assert " ms" in shown
    assert not list(tmp_path.iterdir())


def test_a_dry_run_tells_which_model_cannot_take_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_experiment.main([*HERE, "--dry-run", "--models", "user_models:Broken"]) == 1
    assert "fails: RuntimeError: too long for me" in capsys.readouterr().out


def test_the_list_names_every_preset_model_and_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_experiment.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name in (*PRESETS, *MODELS, *TASKS):
        assert f"  {name}" in shown or f"*{name}" in shown


def test_the_help_gives_examples_groups_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_experiment.main(["--help"])
    shown = capsys.readouterr().out
    for part in ("Run:", "Model:", "Training:", "examples:", "--preset smoke", "(default: 128)"):
        assert part in shown


@pytest.mark.usefixtures("compared")
def test_on_a_terminal_there_are_bars_with_loss_and_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("training.training_progress.READ_EVERY_SECONDS", 0.0)
    cell = Cell("listops", "conventional", 0)
    progress = make_progress({cell: 2}, side_by_side=1)
    assert isinstance(progress, TerminalProgress)
    argv = [*HERE, "--models", "conventional", "--prepare", "--output-dir", str(tmp_path)]
    assert run_experiment.main(argv) == 0
    state, text = run_cell(CellJob(only(tmp_path), cell), progress.of(cell), lambda: None)
    progress.cell_ended(cell, state, text)
    progress.close()
    streams = capsys.readouterr()
    assert "listops/conventional/seed0: epoch 2/2: training loss" in streams.out
    assert "listops/conventional/seed0, epoch 2" in streams.err


@pytest.mark.usefixtures("compared")
def test_a_preset_has_settings_and_seeds_of_a_task_which_options_overrule_and_a_folder_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    own = {"seeds": [0], "num_layers": 2, "max_epochs": 1}
    monkeypatch.setitem(PRESETS["smoke"].by_task, "hold", own)
    argv = [*HERE, "--models", "conventional", "--tasks", "hold", "listops", "--max-length", "12"]
    plan = plan_of(*argv, "--num-layers", "3")
    assert plan.model_settings_of("hold").num_layers == plan.model_settings_of("listops").num_layers == 3
    assert plan.training_settings_of("hold").max_epochs == 1 < plan.training_settings_of("listops").max_epochs
    plan = plan_of(*argv, "--seeds", "0", "4")
    assert plan.seeds_of("hold") == plan.seeds_of("listops") == (0, 4)
    assert run_experiment.main([*argv, "--output-dir", str(tmp_path)]) == 0
    root = only(tmp_path)
    plan = read_plan(root)
    assert plan.by_task == {"hold": own} and plan.model_settings_of("listops").num_layers == 1
    rows = {task: (root / task / "conventional/seed0/metrics.jsonl").read_text() for task in plan.tasks}
    assert rows["hold"].count("\n") == 1 < rows["listops"].count("\n")
    said = refused(run_experiment.main, "--resume", root, "--num-layers", 1)
    assert "--num-layers is 2 there and 1 here" in said
    config = json.loads((root / "config.json").read_text())
    config["settings"]["by_task"]["hold"]["layers"] = 2
    (root / "config.json").write_text(json.dumps(config))
    assert "unknown settings ['layers'] of hold" in refused(run_experiment.main, "--resume", root)


def test_the_time_left_is_that_of_all_epochs_to_come_shared_out(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (Cell("listops", name, 0) for name in ("a", "b"))
    progress = RunProgress({first: 3, second: 3}, side_by_side=2)
    numbers = dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy"), 0.5)
    progress.epoch_ended(first, {"epoch": 1, "train_seconds": 7.0, "eval_seconds": 1.0, **numbers})
    assert "8.0 s, at most about 20 s left" in capsys.readouterr().out  # 5 epochs of 8 s, two at a time
    progress.cell_ended(first, "done", "early")
    progress.epoch_ended(second, {"epoch": 1, "train_seconds": 7.0, "eval_seconds": 1.0, **numbers})
    assert "at most about 8.0 s left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.42, "0.4 s"), (45, "45 s"), (600, "10 min"), (3 * 3600 + 1800, "3.5 h")]
)
def test_durations_are_rounded_to_what_matters(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_the_table_at_the_end_shows_each_task_by_its_own_metric() -> None:
    argv = ["--preset", "study", "--tasks", "recall", "hold"]
    argv += ["--models", "conventional", "gravitational"]
    plan = plan_of(*argv, "--seeds", "0", "1")
    bits = {"metric": "bits_per_byte", "test_loss_best": 2 * math.log(2), "test_accuracy_best": 0.5}
    records = [
        CellRecord(cell, Path(), "done", result=bits if cell.task == "hold" else {"test_accuracy_best": 0.25})
        for cell in plan.cells
    ]
    [last] = [number for number, cell in enumerate(plan.cells) if cell == Cell("hold", "gravitational", 1)]
    records[last] = CellRecord(plan.cells[last], Path(), "diverged")
    lines = results_table(plan, records).splitlines()
    assert lines[0].startswith("test accuracy or bits per byte")
    assert lines[1].split(maxsplit=1)[1].split("  ")[-1] == "2.000 bits (n = 2)"
    assert lines[2].endswith("25.0 % (n = 2)  2.000 bits (n = 1) diverged")
