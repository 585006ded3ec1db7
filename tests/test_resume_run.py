"""A results folder that is resumed: what is run, what is refused, what is said, how it ends."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cell_cases import outcome
from results_fixture import put, rewrite
from run_cases import HERE, Refused, cells, quick_leases, resume, run, run_undisturbed, states, write_lease

import run_experiment
from experiment import cells as cells_module
from experiment.cells import LEASE, LeaseLostError
from results_folder import Cell, read_json, write_status

ANALYZE_RUN = run_experiment.analyze_run
CELLS = ["--models", "conventional", "discounted", "--seeds", "0", "1"]
pytestmark = pytest.mark.usefixtures("compared")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder of two models and two seeds, done."""
    return run_undisturbed(tmp_path_factory, *CELLS)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results"))


def mtimes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# What is run


def test_a_finished_folder_is_compared_again_and_no_cell_is_touched(
    copy: Path, compared: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = [mtimes(folder) for folder in cells(copy)]
    assert resume(copy) == 0
    assert [mtimes(folder) for folder in cells(copy)] == before and compared == [copy]
    assert "0 of 4 cells to run" in capsys.readouterr().out


DAMAGES: dict[str, Callable[[Path], object]] = {
    "status": lambda cell: (cell / "status.json").write_text("{"),
    "settings": lambda cell: (cell / "config.json").write_text("{"),
    "result": lambda cell: (cell / "result.json").write_text('{"schema_version": 1'),
    "accuracy": lambda cell: rewrite(cell / "result.json", test_accuracy_best=1.5),
    "epochs": lambda cell: (cell / "metrics.jsonl").write_text('{"epoch": 1}\n'),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_cell_that_only_seems_done_is_run_again_to_the_same_bits_and_the_others_are_not(
    damage: str, copy: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell, *others = cells(copy)
    before = [mtimes(folder) for folder in others]
    DAMAGES[damage](cell)
    assert resume(copy) == 0
    shown, whole = capsys.readouterr().out, cells(finished)[0]
    # Settings are written anew from the run's, and all else of the cell is whole.
    assert f"{int(damage != 'settings')} of 4 cells to run" in shown
    assert ("run again: " in shown) == (damage not in ("gone", "settings"))
    assert states(copy) == ["done"] * 4 and outcome(cell) == outcome(whole)
    assert (cell / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert [mtimes(folder) for folder in others] == before


def test_a_time_limit_ends_with_75_and_the_folder_is_finished_cell_by_cell_and_the_last_one_compares(
    tmp_path: Path, finished: Path, compared: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = run(tmp_path, *CELLS, "--max-minutes", "1e-5", code=75)
    assert states(root)[1:] == ["pending"] * 3 and states(root)[0] in ("pending", "interrupted")
    said = capsys.readouterr().err
    assert "the time limit of 1e-05 minutes was reached; no epoch was finished" in said
    assert f"--resume {root}" in said
    for index in "203":
        assert resume(root, "--cell-index", index) == 0 and compared == []
    assert resume(root, "--list") == 0
    shown = capsys.readouterr().out
    assert "1  listops/discounted/seed0  pending" in shown and "2  listops/conventional/seed1  done" in shown
    # The rest, with the same settings once more, and another place.
    again = [*CELLS, "--embed-dim", "16", "--max-length", "40", "--cache-dir", str(tmp_path)]
    assert run_experiment.main([*HERE, *again, "--resume", str(root)]) == 0 and compared == [root]
    assert [outcome(folder) for folder in cells(root)] == [outcome(folder) for folder in cells(finished)]


def test_failed_cells_are_told_and_run_again_only_when_that_is_asked_for_and_fail_fast_starts_none_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOOD", "bad")
    models = ["user_models:Moody", "user_models:Exploding", "conventional"]
    root = run(tmp_path, "--models", *models, "--fail-fast", code=1)
    assert states(root) == ["failed", "pending", "pending"] and compared == []
    monkeypatch.delenv("MOOD")
    capsys.readouterr()
    assert resume(root) == 1 and states(root) == ["failed", "diverged", "done"]
    shown, error = capsys.readouterr().out, cells(root)[0] / "error.txt"
    assert "failed: listops/user_models:Moody/seed0: RuntimeError: not today (user_models.py:" in shown
    assert "Exploding/seed0: the training loss is nan in epoch 1, step 1" in shown
    assert f"traceback: {error}" in shown and "not today" in error.read_text()
    assert f"--resume {root} --retry-failed" in shown
    assert resume(root, "--retry-failed") == 1
    assert states(root) == ["done", "diverged", "done"] and not error.exists()


# One folder, many processes


def test_a_cell_by_number_without_a_folder_makes_one_with_the_whole_plan(
    tmp_path: Path, refused: Refused
) -> None:
    for index in ("4", "-1"):
        said = refused(run_experiment.main, *HERE, *CELLS, "--output-dir", tmp_path, "--cell-index", index)
        assert f"--cell-index must be 0 to 3, got {index}" in said and not list(tmp_path.iterdir())
    assert states(run(tmp_path, *CELLS, "--cell-index", "3")) == ["pending", "pending", "pending", "done"]


def test_a_cell_of_another_machine_is_left_to_it_until_its_lease_runs_out(
    copy: Path, compared: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = cells(copy)
    for folder in (first, second):
        write_status(folder, "running")
    write_lease(first)
    with monkeypatch.context() as patch:
        patch.setattr(run_experiment, "freed", lambda *_: iter(()))  # no patience
        assert resume(copy) == 75
    assert states(copy) == ["running", "done", "done", "done"] and compared == []
    left = "left to another process: listops/conventional/seed0 (process 11 on gpu7"
    assert left in capsys.readouterr().out
    quick_leases(monkeypatch)
    write_lease(first)
    assert resume(copy) == 0 and not (first / LEASE).exists()
    assert "seed0: taken over from a process that has ended" in capsys.readouterr().out


def test_a_cell_whose_lease_is_lost_is_left_as_it_is(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = cells(copy)[0]
    (cell / "checkpoint_last.pt").unlink()
    write_status(cell, "pending")

    @contextlib.contextmanager
    def lost(folder: Path, wait: float) -> Iterator[Callable[[], None]]:
        def check() -> None:
            raise LeaseLostError("it is another's")

        yield check

    monkeypatch.setattr(cells_module, "leased", lost)
    assert resume(copy) == 75
    assert states(copy)[0] == "running" and not (cell / "checkpoint_last.pt").exists()
    assert "left: it is another's" in capsys.readouterr().out


def test_of_two_processes_that_find_all_done_one_compares(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lease(copy)
    assert ANALYZE_RUN(copy) and not (copy / "analysis").exists()
    assert "analysis: left to another process (process 11 on gpu7" in capsys.readouterr().out


# What is refused


def test_changed_settings_are_refused_with_each_difference(finished: Path, refused: Refused) -> None:
    argv = "--embed-dim 32 --dropout 0 --batch-size 5 --max-length 77 --seeds 0 --preset full"
    said = refused(run_experiment.main, "--resume", finished, *argv.split())
    differences = "embed-dim 16 32, dropout 0.1 0.0, batch-size 16 5, max-length 40 77, preset smoke full"
    for name, there, here in map(str.split, differences.split(", ")):
        assert f"--{name} is {there} there and {here} here" in said
    assert "--seeds is 0 1 there and 0 here" in said


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("schema_version", 9, "schema version 9, this program reads 1"),
        ("settings", {}, "its config.json is another's"),
        ("seeds", ["x"], "its config.json is another's"),
        ("cells", [], "its cells are not those of its tasks, models and seeds"),
        ("models", ["conventional"], "its cells are not those"),
        ("models", ["conventional", "newtonian"], "unknown model 'newtonian'"),
        ("task_info", {}, "the data of listops are not those"),
        ("settings model embed_dim", "16", "embed_dim is '16'"),
        ("settings model embed_dim", True, "embed_dim is True"),
        ("settings model colour", 1, "unknown setting 'colour'"),
        ("settings model dropout", 2, "--dropout must be at least 0 and below 1"),
    ],
)
def test_a_folder_of_another_kind_is_refused_in_one_line(
    place: str, value: Any, message: str, copy: Path, refused: Refused
) -> None:
    put(copy / "config.json", place, value)
    assert message in refused(run_experiment.main, "--resume", copy)


def test_a_folder_made_before_a_setting_existed_has_its_default(copy: Path) -> None:
    training = read_json(copy / "config.json")["settings"]["training"]
    assert training.pop("divergence_steps") == 3
    put(copy / "config.json", "settings training", training)
    assert resume(copy) == 0


def test_a_cell_folder_that_leads_out_is_not_written_through(
    copy: Path, tmp_path: Path, refused: Refused
) -> None:
    cell, outside = Cell("listops", "conventional", 0).folder(copy), tmp_path / "outside"
    shutil.rmtree(cell)
    outside.mkdir()
    cell.symlink_to(outside)
    assert "a link that leads out of" in refused(run_experiment.main, "--resume", copy)
    assert list(outside.iterdir()) == []
