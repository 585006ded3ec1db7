"""--ray: the cells as tasks of a local cluster, whose processes are killed and stopped; mistakes."""

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cell_cases import meanwhile, outcome
from experiment.cell_lock import LOCK

import run_experiment
from experiment.executors import cells_on_a_device
from results_folder import SHARED_BY, CellRecord, read_json, read_results

SMOKE = ["--preset", "smoke", "--device", "cpu"]
# Long enough for a process to be killed within a cell.
LONGER = [*SMOKE, "--max-epochs", "20", "--patience", "20"]
TWO_AT_ONCE = ["--ray", "--cpus-per-cell", str((os.cpu_count() or 1) / 2), "--threads", "1"]
PATIENCE = 120.0
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the package ray is not installed (requirements-ray.txt)"
)


@pytest.fixture(autouse=True)
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Which folders were to be compared; one thread."""
    folders: list[Path] = []

    def analyze_run(root: Path) -> bool:
        folders.append(root)
        return True

    monkeypatch.setattr(run_experiment, "analyze_run", analyze_run)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folders
    torch.set_num_threads(before)


def only(parent: Path) -> Path:
    [root] = parent.glob("results_*")
    return root


def in_training(parent: Path, model: str) -> Path:
    """The folder of this model's cell of ListOps, as soon as there is a checkpoint of it."""
    end = time.monotonic() + PATIENCE
    while not (found := list(parent.glob(f"*/listops/{model}/seed0/checkpoint_last.pt"))):
        assert time.monotonic() < end, "there is no checkpoint"
        time.sleep(0.02)
    return found[0].parent


def cells(root: Path) -> list[CellRecord]:
    return read_results(root).cells


@needs_ray
@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_a_local_cluster_makes_the_files_of_one_process_although_a_worker_is_killed_in_mid_cell(
    tmp_path: Path, compared: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_experiment.main([*LONGER, "--threads", "1", "--output-dir", str(tmp_path / "one")]) == 0

    def kill() -> None:
        folder = in_training(tmp_path / "ray", "multi_timescale")
        os.kill(read_json(folder / LOCK)["pid"], signal.SIGKILL)

    capsys.readouterr()
    with meanwhile(kill):
        assert run_experiment.main([*LONGER, *TWO_AT_ONCE, "--output-dir", str(tmp_path / "ray")]) == 0
    one, other = only(tmp_path / "one"), only(tmp_path / "ray")
    assert compared == [one, other]
    assert [record.state for record in cells(other)] == ["done"] * 8
    for left, right in zip(cells(one), cells(other), strict=True):
        assert outcome(left.folder) == outcome(right.folder)
        assert {path.name for path in left.folder.iterdir()} == {path.name for path in right.folder.iterdir()}
    assert {record.config[SHARED_BY] for record in cells(other)} == {2}
    out = capsys.readouterr().out
    assert "the task of listops/multi_timescale/seed0 ended: WorkerCrashedError" in out
    assert out.count("  goes on after epoch ") == 1 and "taken over: process" in out
    assert "[8/8] " in out and out.count("  done: test accuracy ") == 8


@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_a_signal_stops_the_tasks_after_a_step_and_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*LONGER, "--tasks", "listops", "--models", "multi_timescale", "conventional", "discounted"]
    assert run_experiment.main([*argv, "--output-dir", str(tmp_path / "one")]) == 0
    one = only(tmp_path / "one")

    def stop() -> None:
        in_training(tmp_path / "ray", "multi_timescale")
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(stop):
        assert run_experiment.main([*argv, *TWO_AT_ONCE, "--output-dir", str(tmp_path / "ray")]) == 143
    root = only(tmp_path / "ray")
    assert cells(root)[0].state == "interrupted" and not (cells(root)[0].folder / LOCK).exists()
    assert f"--resume {root}" in capsys.readouterr().err
    assert run_experiment.main(["--resume", str(root)]) == 0
    assert [outcome(record.folder) for record in cells(root)] == [
        outcome(record.folder) for record in cells(one)
    ]


def test_how_many_cells_share_a_device_is_what_fits_on_it() -> None:
    assert cells_on_a_device(cpus=1, gpus=0, largest=16, cells=24) == 16
    assert cells_on_a_device(cpus=1, gpus=0, largest=16, cells=3) == 3
    assert cells_on_a_device(cpus=4, gpus=1, largest=16, cells=24) == 1
    assert cells_on_a_device(cpus=1, gpus=0.25, largest=16, cells=24) == 4
    assert cells_on_a_device(cpus=1, gpus=0.1, largest=16, cells=24) == 10


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ray", "nowhere"], "--ray takes HOST:PORT, auto or nothing, got 'nowhere'"),
        (["--ray", "127.0.0.1:1"], "--ray 127.0.0.1:1: no cluster answers there"),
        (["--ray", "127.0.0.1:99999"], "--ray 127.0.0.1:99999: no cluster answers there"),
        (["--ray", "--gpus-per-cell", "2"], "--gpus-per-cell must be at most 1, got 2.0"),
        (["--ray", "--gpus-per-cell", "1"], "--gpus-per-cell needs a run on CUDA"),
        pytest.param(["--ray", "auto"], "--ray auto: Could not find any running Ray", marks=needs_ray),
        pytest.param(["--ray", "--cpus-per-cell", "9999"], "a cell takes 9999 CPUs, and no", marks=needs_ray),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_is_not_there_or_too_small_is_one_line_before_any_work(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert run_experiment.main([*SMOKE, *argv, "--output-dir", str(tmp_path)]) == 2
    streams = capsys.readouterr()
    assert message in streams.err and streams.err.count("\n") == 1 and streams.out == ""
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_option_is_one_line_and_exit_code_2_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_experiment.main([*SMOKE, "--ray", "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "requirements-ray.txt" in error
    assert list(tmp_path.iterdir()) == []
