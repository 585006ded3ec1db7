"""A results folder that is resumed: what is run, what is refused, what is said, how it ends."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cell_cases import outcome
from run_cases import HERE, Refused, cells, only, states
from test_cells import write_lease

import run_experiment
from experiment import cells as cells_module
from experiment.cells import LEASE, LeaseLostError
from experiment.plan_files import refuse_changes
from experiment.run_plan import make_plan
from results_folder import Cell, write_json, write_status

ANALYZE_RUN = run_experiment.analyze_run
RESUME = ("--workers", "1", "--threads", "1", "--resume")
CELLS = [*HERE, "--models", "conventional", "discounted", "--seeds", "0", "1"]
pytestmark = pytest.mark.usefixtures("compared")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder of two models and two seeds, done."""
    parent = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_experiment, "analyze_run", lambda root: True)
        assert run_experiment.main([*CELLS, "--output-dir", str(parent)]) == 0
    return only(parent)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results"))


def resume(root: Path, *argv: str) -> int:
    return run_experiment.main([*RESUME, str(root), *argv])


def changed(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text()) | values)


def mtimes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# What is run


def test_a_finished_folder_is_compared_again_and_no_cell_is_touched(
    copy: Path, compared: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = [mtimes(folder) for folder in cells(copy)]
    assert resume(copy) == 0
    assert [mtimes(folder) for folder in cells(copy)] == before
    assert compared == [copy]
    assert "0 of 4 cells to run" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["status", "result", "accuracy", "epochs", "gone"])
def test_a_cell_that_only_seems_done_is_run_again_to_the_same_bits_and_the_others_are_not(
    damage: str, copy: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell, *others = cells(copy)
    before = [mtimes(folder) for folder in others]
    if damage == "status":
        (cell / "status.json").write_text("{")
    elif damage == "result":
        (cell / "result.json").write_bytes((cell / "result.json").read_bytes()[:50])
    elif damage == "accuracy":
        changed(cell / "result.json", test_accuracy_best=1.5)
    elif damage == "epochs":
        (cell / "metrics.jsonl").write_text((cell / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    else:
        shutil.rmtree(cell)
    assert resume(copy) == 0
    shown = capsys.readouterr().out
    assert "1 of 4 cells to run" in shown
    assert ("run again: " in shown) == (damage != "gone")
    assert states(copy) == ["done"] * 4
    assert outcome(cell) == outcome(cells(finished)[0])
    assert [mtimes(folder) for folder in others] == before


def test_a_cells_settings_that_are_damaged_are_written_anew(copy: Path) -> None:
    cell = cells(copy)[0]
    before = (cell / "config.json").read_bytes()
    (cell / "config.json").write_text("{")
    assert resume(copy) == 0
    assert (cell / "config.json").read_bytes() == before


def test_a_time_limit_ends_with_75_and_the_same_command_with_resume_finishes(
    tmp_path: Path, finished: Path, compared: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    limited = [*CELLS, "--max-minutes", "1e-5"]
    assert run_experiment.main([*limited, "--output-dir", str(tmp_path)]) == 75
    root = only(tmp_path)
    assert states(root)[1:] == ["pending"] * 3 and states(root)[0] in ("pending", "interrupted")
    said = capsys.readouterr().err
    assert "the time limit of 1e-05 minutes was reached; no epoch was finished, so nothing was gained" in said
    assert f"give it more time than an epoch takes: python run_experiment.py --resume {root}" in said
    assert compared == []
    assert run_experiment.main([*CELLS, "--resume", str(root)]) == 0
    assert compared == [root]
    assert [outcome(folder) for folder in cells(root)] == [outcome(folder) for folder in cells(finished)]


def test_failed_cells_are_told_and_run_again_only_when_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOOD", "bad")
    argv = [*HERE, "--models", "user_models:Moody", "conventional", "--output-dir", str(tmp_path)]
    assert run_experiment.main(argv) == 1
    root = only(tmp_path)
    shown = capsys.readouterr().out
    assert "failed: listops/user_models:Moody/seed0: RuntimeError: not today (user_models.py:" in shown
    error = cells(root)[0] / "error.txt"
    assert f"traceback: {error}" in shown and "not today" in error.read_text()
    assert f"--resume {root} --retry-failed" in shown
    monkeypatch.delenv("MOOD")
    assert resume(root) == 1
    assert states(root) == ["failed", "done"]
    assert resume(root, "--retry-failed") == 0
    assert states(root) == ["done", "done"]
    assert not error.exists()


def test_fail_fast_starts_no_cell_after_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: list[Path]
) -> None:
    monkeypatch.setenv("MOOD", "bad")
    argv = [
        *HERE,
        "--models",
        "user_models:Moody",
        "conventional",
        "--output-dir",
        str(tmp_path),
        "--fail-fast",
    ]
    assert run_experiment.main(argv) == 1
    assert states(only(tmp_path)) == ["failed", "pending"]
    assert compared == []


# One folder, many processes


def test_a_prepared_folder_is_finished_cell_by_cell_by_number_and_the_last_one_compares(
    tmp_path: Path, finished: Path, compared: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_experiment.main([*CELLS, "--prepare", "--output-dir", str(tmp_path)]) == 0
    root = only(tmp_path)
    assert states(root) == ["pending"] * 4
    for index in (2, 0, 3, 1):
        assert compared == []
        assert resume(root, "--cell-index", str(index)) == 0
    assert compared == [root]
    capsys.readouterr()
    assert run_experiment.main(["--list", "--resume", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "     2  listops/conventional/seed1  done" in shown
    assert [outcome(folder) for folder in cells(root)] == [outcome(folder) for folder in cells(finished)]


def test_a_cell_by_number_without_a_folder_makes_one_with_the_whole_plan(tmp_path: Path) -> None:
    assert run_experiment.main([*CELLS, "--cell-index", "3", "--output-dir", str(tmp_path)]) == 0
    assert states(only(tmp_path)) == ["pending", "pending", "pending", "done"]


@pytest.mark.parametrize("index", ["4", "-1"])
def test_a_cell_of_a_number_that_there_is_not_is_refused(
    index: str, tmp_path: Path, refused: Refused
) -> None:
    said = refused(run_experiment.main, *CELLS, "--output-dir", tmp_path, "--cell-index", index)
    assert f"--cell-index must be 0 to 3, got {index}" in said and list(tmp_path.iterdir()) == []


def test_a_cell_of_another_machine_is_left_to_it_until_its_lease_runs_out(
    copy: Path,
    compared: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second, *_ = cells(copy)
    for folder in (first, second):
        write_status(folder, "running")
    write_lease(first, 11)
    no_patience: Callable[..., Iterator[Cell]] = lambda *_: iter(())  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(run_experiment, "freed", no_patience)
        assert resume(copy) == 75
    assert states(copy) == ["running", "done", "done", "done"]
    assert (
        "left to another process: listops/conventional/seed0 (process 11 on gpu7" in capsys.readouterr().out
    )
    assert compared == []
    monkeypatch.setattr(cells_module, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(cells_module, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(cells_module, "LOOK_AGAIN_SECONDS", 0.05)
    write_lease(first, 11)
    assert resume(copy) == 0
    assert "seed0: taken over from a process that has ended" in capsys.readouterr().out
    assert not (first / LEASE).exists()


def test_a_cell_that_another_process_finished_in_the_meantime_is_not_run_again(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = cells(copy)[0]
    write_status(cell, "pending")
    leased = cells_module.leased

    @contextlib.contextmanager
    def leased_late(folder: Path, wait: float = 0.0) -> Iterator[Callable[[], None]]:
        write_status(folder, "done")
        with leased(folder, wait) as check:
            yield check

    monkeypatch.setattr(cells_module, "leased", leased_late)
    before = mtimes(cell)["result.json"]
    assert resume(copy) == 0
    assert "done: another process ran it" in capsys.readouterr().out
    assert mtimes(cell)["result.json"] == before


def test_a_cell_whose_lease_is_lost_is_left_as_it_is(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = cells(copy)[0]
    (cell / "checkpoint_last.pt").unlink()
    write_status(cell, "pending")

    @contextlib.contextmanager
    def lost(folder: Path, wait: float = 0.0) -> Iterator[Callable[[], None]]:
        def check() -> None:
            raise LeaseLostError("it is another's")

        yield check

    monkeypatch.setattr(cells_module, "leased", lost)
    assert resume(copy) == 75
    assert states(copy)[0] == "running"
    assert not (cell / "checkpoint_last.pt").exists()
    assert "left: it is another's" in capsys.readouterr().out


def test_of_two_processes_that_find_all_done_one_compares(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lease(copy, 11)
    assert ANALYZE_RUN(copy)
    assert "analysis: left to another process (process 11 on gpu7" in capsys.readouterr().out
    assert not (copy / "analysis").exists()


# What is refused


@pytest.mark.parametrize(
    ("argv", "difference"),
    [
        (["--embed-dim", "32"], "--embed-dim is 16 there and 32 here"),
        (["--learning-rate", "0.5"], "--learning-rate is 0.001 there and 0.5 here"),
        (["--max-length", "77"], "--max-length is 40 there and 77 here"),
        (["--seeds", "0"], "--seeds is 0 1 there and 0 here"),
        (["--models", "conventional"], "--models is conventional discounted there and conventional here"),
        (["--preset", "full"], "--preset is smoke there and full here"),
        (
            ["--embed-dim", "32", "--dropout", "0"],
            "--embed-dim is 16 there and 32 here; --dropout is 0.1 there",
        ),
    ],
)
def test_changed_settings_are_refused_with_their_difference(
    argv: list[str], difference: str, finished: Path, refused: Refused
) -> None:
    assert difference in refused(run_experiment.main, *RESUME, finished, *argv)


def test_the_same_settings_may_be_given_again(finished: Path, tmp_path: Path) -> None:
    again = [*CELLS, "--embed-dim", "16", "--max-length", "40", "--cache-dir", str(tmp_path)]
    assert resume(finished, *again) == 0


def test_an_option_of_one_task_that_means_nothing_to_another_may_be_given_again() -> None:
    argv = [*HERE, "--tasks", "hold", "listops", "--min-length", "6", "--tokenizer", "word"]
    arguments = run_experiment.make_parser().parse_args(argv)
    plan = make_plan(arguments)
    assert (plan.data_settings["hold"].tokenizer, plan.data_settings["listops"].tokenizer) == ("byte", "word")
    refuse_changes(Path("run"), plan, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 9}, "schema version 9, this program reads 1"),
        ({"settings": {}}, "its config.json is another's"),
        ({"cells": []}, "its cells are not those of its tasks, models and seeds"),
        ({"models": ["conventional", "newtonian"]}, "unknown model 'newtonian'"),
        ({"models": ["conventional"]}, "its cells are not those"),
        ({"seeds": ["x"]}, "its config.json is another's"),
        ({"task_info": {}}, "the data of listops are not those"),
    ],
)
def test_a_folder_of_another_kind_is_refused_in_one_line(
    change: dict[str, Any], message: str, copy: Path, refused: Refused
) -> None:
    changed(copy / "config.json", **change)
    assert message in refused(run_experiment.main, *RESUME, copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [("embed_dim", "16"), ("embed_dim", True), ("num_heads", [1]), ("colour", 1), ("dropout", 2)],
)
def test_settings_of_a_wrong_type_or_name_are_refused(
    name: str, value: Any, copy: Path, refused: Refused
) -> None:
    settings = json.loads((copy / "config.json").read_text())["settings"]
    settings["model"][name] = value
    changed(copy / "config.json", settings=settings)
    assert "cannot be resumed" in refused(run_experiment.main, *RESUME, copy)


def test_a_folder_made_before_a_setting_existed_has_its_default(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())["settings"]
    del settings["training"]["divergence_steps"]
    changed(copy / "config.json", settings=settings)
    assert resume(copy) == 0


def test_a_cell_folder_that_leads_out_is_not_written_through(
    copy: Path, tmp_path: Path, refused: Refused
) -> None:
    cell = Cell("listops", "conventional", 0).folder(copy)
    shutil.rmtree(cell)
    (tmp_path / "outside").mkdir()
    cell.symlink_to(tmp_path / "outside")
    assert "a link that leads out of" in refused(run_experiment.main, *RESUME, copy)
    assert list((tmp_path / "outside").iterdir()) == []
