"""A whole run at its smallest, cells that fail, mistakes found before any work, what is shown."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from results_fixture import report_of, rewrite
from run_cases import HERE, Refused, cells, plan_of, records, resume, run, states

import run_experiment
from command_line import LARGEST_WHOLE
from data_pipeline import TASKS, DataUnavailableError, TaskData, load_task
from experiment import run_plan, tensorboard_log
from experiment.cells import LEASE
from experiment.models import COMPARED, MODELS
from experiment.plan_files import read_plan
from experiment.run_overview import results_table
from experiment.run_plan import PRESETS
from experiment.run_progress import RunProgress, TerminalProgress, duration, make_progress
from results_folder import Cell, CellRecord, read_json, read_results
from train_and_evaluate import ModelSettings, TrainingSettings

VALUES = dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy"), 0.5)
EPOCH = {"epoch": 1, "train_seconds": 7.0, "eval_seconds": 1.0} | VALUES


@pytest.fixture(autouse=True)
def data_anew() -> None:
    """What a test loads, or fails to, is not what an earlier one did."""
    run_plan.load_once.cache_clear()


# A whole run


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of the smoke preset, run once with its analysis."""
    return run(tmp_path_factory.mktemp("smoke"))


def test_the_smoke_preset_writes_every_file_of_every_model_and_compares_them(smoke: Path) -> None:
    assert [(record.cell, record.state) for record in records(smoke)] == [
        (Cell("listops", model, 0), "done") for model in COMPARED
    ]
    expected = {"checkpoint_best.pt", "checkpoint_last.pt", "attention_patterns.npz", "metrics.jsonl"}
    expected |= {"config.json", "status.json", "result.json"}
    for folder in cells(smoke):
        assert {file.name for file in folder.iterdir()} == expected  # and no temporary one
    assert (smoke / "analysis" / "report.html").is_file()


def test_configs_tell_what_was_run_on_what(smoke: Path) -> None:
    assert read_plan(smoke) == plan_of(*HERE)
    info = read_json(smoke / "config.json")["task_info"]["listops"]
    assert (info["num_classes"], info["chance"], info["test_size"]) == (10, 0.1, 32)
    assert 0.1 <= info["majority"] < 1
    environment = read_json(smoke / "environment.json")
    assert (environment["torch"], environment["device"]) == (torch.__version__, "cpu")
    cell = records(smoke)[1]
    assert cell.config["model_class"] == "gravitational_attention.GravitationalAttention"
    assert cell.config["attention_arguments"]["softening"] == 0.1 and cell.result is not None
    assert cell.config["parameters"] == cell.result["parameters"] > cell.result["attention_parameters"] > 0


@pytest.mark.usefixtures("compared")
@pytest.mark.filterwarnings("ignore")  # of TensorBoard's own imports
def test_tensorboard_is_shown_the_numbers_of_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [cell] = records(run(tmp_path, "--models", "gravitational_multi_timescale", "--tensorboard"))
    events = EventAccumulator(str(cell.folder / tensorboard_log.FOLDER))
    events.Reload()
    shown = {
        (event.step, tag): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
    }
    of_epochs = [(row["epoch"], tensorboard_log.scalars(row)) for row in cell.metrics]
    written = {(epoch, tag): value for epoch, values in of_epochs for tag, value in values if tag != "epoch"}
    assert shown == pytest.approx(written, rel=1e-6)
    assert len(of_epochs) == 2 and (2, "learned/layer0/gamma/0/0") in shown and (1, "val_accuracy") in shown


@pytest.mark.usefixtures("compared")
def test_an_interrupted_run_notes_where_it_was_and_ends_with_its_code(tmp_path: Path) -> None:
    models = ["conventional", "user_models:Terminated", "gravitational"]
    root = run(tmp_path, "--models", *models, "--max-epochs", "1", code=143)
    assert states(root) == ["done", "interrupted", "pending"] and not list(root.rglob(LEASE))
    assert records(root)[1].reason == "stopped by SIGTERM"


def test_a_failed_analysis_is_told_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "analyze_results", None)
    assert states(run(tmp_path, "--models", "conventional", "--max-epochs", "1", code=1)) == ["done"]
    shown = capsys.readouterr()
    assert "the analysis failed: ModuleNotFoundError" in shown.err and "--retry-failed" not in shown.out


# Data that cannot be had


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that were loaded, of which IMDb cannot be."""
    names: list[str] = []

    def load(name: str, settings: Any) -> TaskData:
        names.append(name)
        if name == "imdb":
            raise DataUnavailableError("IMDb is missing: curl -LO https://example.org/imdb.tar.gz")
        return load_task(name, settings)

    monkeypatch.setattr(run_plan, "load_task", load)
    return names


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("argv", ["--preset full", "--preset quick --tasks imdb"])
def test_full_without_imdb_or_a_run_without_any_task_ends_with_the_download_command_and_leaves_nothing(
    argv: str, tmp_path: Path, refused: Refused
) -> None:
    said = refused(run_experiment.main, *argv.split(), "--device", "cpu", "--output-dir", tmp_path)
    assert "curl -LO https://example.org/imdb.tar.gz" in said and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("texts_alone")
def test_a_task_that_is_unavailable_is_left_out_and_said_everywhere_and_each_other_is_loaded_once(
    loaded: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["--tasks", "imdb", "listops"]
    root = run(tmp_path, *tasks, "--models", "conventional", "--max-epochs", "1", code=1)
    assert states(root) == ["done"] and loaded == ["imdb", "listops"]
    out = capsys.readouterr().out
    assert out.startswith("imdb is left out, its data are unavailable: IMDb is missing: curl")
    assert "left out: imdb: IMDb is missing" in out
    assert read_results(root).config["tasks"] == ["listops"]
    assert "**Left out: imdb.** Its data were unavailable: IMDb is missing: curl" in report_of(root)
    assert resume(root, *tasks) == 1


# The plan


def test_without_a_gpu_the_default_is_quick_and_with_one_full_which_is_the_seed_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert plan_of("--device", "cpu").preset == "quick"
    monkeypatch.setattr(run_plan, "find_device", lambda name: torch.device("cuda"))
    plan = plan_of()
    assert plan.preset == "full"
    sizes: dict[str, Any] = {"embed_dim": 128, "num_heads": 4, "num_layers": 2, "feed_forward_dim": 512}
    rates: dict[str, Any] = {"learning_rate": 1e-4, "weight_decay": 1e-5, "gradient_clip": 1.0}
    assert plan.model_settings == ModelSettings(**sizes)
    assert plan.training_settings == TrainingSettings(batch_size=32, max_epochs=20, patience=10, **rates)
    assert (plan.tasks, plan.seeds) == (("imdb", "listops"), (0, 1, 2))


@pytest.mark.usefixtures("compared")
def test_a_preset_has_settings_and_seeds_of_a_task_which_options_overrule_and_a_folder_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    own = {"seeds": [0], "num_layers": 2, "max_epochs": 1}
    monkeypatch.setitem(PRESETS["smoke"].by_task, "hold", own)
    argv = ["--models", "conventional", "--tasks", "hold", "listops", "--max-length", "12"]
    plan = plan_of(*HERE, *argv, "--num-layers", "3", "--seeds", "0", "4")
    assert {plan.model_settings_of(task).num_layers for task in plan.tasks} == {3}
    assert [plan.training_settings_of(task).max_epochs for task in plan.tasks] == [1, 2]
    assert {plan.seeds_of(task) for task in plan.tasks} == {(0, 4)}
    data = plan.data_settings["listops"]
    assert (data.max_length, data.train_size) == (12, PRESETS["smoke"].data["listops"]["train_size"])
    root = run(tmp_path, *argv)
    plan = read_plan(root)
    assert plan.by_task == {"hold": own} and plan.model_settings_of("listops").num_layers == 1
    assert [len(record.metrics) for record in records(root)] == [1, 2]
    said = refused(run_experiment.main, "--resume", root, "--num-layers", 1)
    assert "--num-layers is 2 there and 1 here" in said
    settings = read_json(root / "config.json")["settings"]
    settings["by_task"]["hold"]["layers"] = 2
    rewrite(root / "config.json", settings=settings)
    assert "unknown settings ['layers'] of hold" in refused(run_experiment.main, "--resume", root)


@pytest.mark.parametrize(
    "options",
    [
        "--dropout 0 --weight-decay 1e40 --gradient-clip 1 --precision bf16 --compile --cache-dir .",
        f"--learning-rate 1 1e-30 --max-epochs {LARGEST_WHOLE} --match-parameters --tokenizer word",
        "--tasks hold listops --min-length 5 --max-length 9 --val-size 8 --data-seed 7 --no-compile",
    ],
)
def test_every_setting_that_is_accepted_is_read_back_from_a_folder(options: str, tmp_path: Path) -> None:
    root = run(tmp_path, *options.split(), "--prepare")
    assert read_plan(root) == plan_of(*HERE, *options.split())
    assert resume(root, *options.split(), "--prepare") == 0  # and is no change when it is given again


def test_an_option_that_means_nothing_to_a_task_is_not_its() -> None:
    data = plan_of(*HERE, "--tasks", "hold", "listops", "--tokenizer", "word").data_settings
    assert (data["hold"].tokenizer, data["listops"].tokenizer) == ("byte", "word")


# What is shown


def test_a_dry_run_shows_measured_times_in_columns_and_what_cannot_take_a_step_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = "gravitational_multi_timescale,normalization=force,softening=1.0,learn_gammas=false"
    models = ["conventional", long, "user_models:Broken"]
    assert run_experiment.main([*HERE, "--dry-run", "--models", *models]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("listops/")]
    assert [line.split()[0] for line in lines] == [f"listops/{model}" for model in models]
    assert " ms" in lines[0] and len(lines[0]) == len(lines[1])
    assert lines[2].endswith("fails: RuntimeError: too long for me") and not list(tmp_path.iterdir())


def test_the_list_names_every_preset_model_setting_task_and_cell(capsys: pytest.CaptureFixture[str]) -> None:
    variant = "gravitational,normalization=force"
    assert run_experiment.main([*HERE, "--list", "--models", variant]) == 0
    shown = capsys.readouterr().out
    for name in (*PRESETS, *MODELS, *TASKS):
        assert f"  {name}" in shown or f"*{name}" in shown
    tasks = shown.partition("\ntasks:\n")[2].partition("\ncells of")[0].splitlines()
    assert len({line[34:] for line in tasks}) == len(TASKS) and not any("partial" in line for line in tasks)
    for part in (f"0  listops/{variant}/seed0", "softening=0.1               Plummer", "learn_gammas=true "):
        assert part in shown


def test_on_a_terminal_there_are_bars_with_loss_and_accuracy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    cell = Cell("listops", "conventional", 0)
    progress = make_progress({cell: 2}, side_by_side=1)
    assert isinstance(progress, TerminalProgress)
    told = progress.of(cell)
    told.epoch_started(1, 5)
    told.steps_done(3, 0.5, 0.25)
    bar = str(progress.step_bar)
    assert f"{cell}, epoch 1:  60%" in bar and "loss 0.500, accuracy 25.0%" in bar
    told.epoch_ended(EPOCH)
    progress.cell_ended(cell, "done", "")
    progress.close()
    streams = capsys.readouterr()
    assert f"{cell}: epoch 1/2: training loss" in streams.out and "1/1" in streams.err


def test_the_time_left_is_that_of_all_epochs_to_come_shared_out(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (Cell("listops", name, 0) for name in ("a", "b"))
    progress = RunProgress({first: 3, second: 3}, side_by_side=2)
    progress.epoch_ended(first, EPOCH)
    assert "8.0 s, at most about 20 s left" in capsys.readouterr().out  # 5 epochs of 8 s, two at a time
    progress.cell_ended(first, "done", "early")
    progress.epoch_ended(second, EPOCH)
    assert "at most about 8.0 s left" in capsys.readouterr().out
    assert [duration(seconds) for seconds in (0.42, 45, 600, 12_600)] == ["0.4 s", "45 s", "10 min", "3.5 h"]


def test_the_table_at_the_end_shows_each_task_by_its_own_metric() -> None:
    argv = "--preset study --tasks recall hold --models conventional gravitational --seeds 0 1"
    plan = plan_of(*argv.split())
    bits = {"metric": "bits_per_byte", "test_loss_best": 2 * math.log(2), "test_accuracy_best": 0.5}
    results: dict[str, dict[str, Any]] = {"recall": {"test_accuracy_best": 0.25}, "hold": bits}
    records = [CellRecord(cell, Path(), "done", result=results[cell.task]) for cell in plan.cells]
    last = plan.cells.index(Cell("hold", "gravitational", 1))
    records[last] = CellRecord(plan.cells[last], Path(), "diverged")
    head, first, second = results_table(plan, records).splitlines()
    assert head.startswith("test accuracy or bits per byte")
    assert first.endswith("  2.000 bits (n = 2)")
    assert second.endswith("25.0 % (n = 2)  2.000 bits (n = 1) diverged")
