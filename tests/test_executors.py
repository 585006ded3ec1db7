"""--workers and --ray: the same results from several processes, and what becomes of those that are killed."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from cell_cases import meanwhile, outcome
from run_cases import HERE, PATIENCE, SMOKE, cells, only, records, states, wait_for_checkpoint

import run_experiment
from command_line import InputError
from experiment import executors
from experiment.cells import LEASE, CellJob
from experiment.executors import (
    MOST_DEATHS,
    ParallelExecutor,
    Resources,
    cells_on_a_device,
    connect_to_ray,
    devices_in_turn,
)
from experiment.run_progress import RunProgress
from experiment.stop_request import StopRequest
from results_folder import SHARED_BY, Cell, read_json
from run_experiment import chosen_resources, make_parser

REPOSITORY, HERE_FOLDER = Path(run_experiment.__file__).parent, Path(__file__).parent
# A run without the comparison, whose figures take longer than the cells.
SCRIPT = (
    "import sys, run_experiment\n"
    "run_experiment.analyze_run = lambda root: True\n"
    "sys.exit(run_experiment.main(sys.argv[1:]))\n"
)
SLEEPY = ["--models", "user_models:Sleepy", "--seeds", "0", "1"]
TWO = ["--workers", "2", "--threads", "1"]
TWO_OF_RAY = ["--ray", "--cpus-per-cell", str((os.cpu_count() or 1) / 2), "--threads", "1"]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the package ray is not installed (requirements-ray.txt)"
)


pytestmark = pytest.mark.usefixtures("compared")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two cells of SLEEPY, run undisturbed in this process."""
    parent = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_experiment, "analyze_run", lambda root: True)
        assert run_experiment.main([*HERE, *SLEEPY, "--output-dir", str(parent)]) == 0
    return only(parent)


def same_files(one: Path, other: Path) -> None:
    """Each file of two results folders holds the same, but for times, memory and who shared a device."""
    ours = {"argv", "command", "created", "workers"}
    configs = [json.loads((root / "config.json").read_text()) for root in (one, other)]
    assert configs[0] | dict.fromkeys(ours) == configs[1] | dict.fromkeys(ours)
    assert read_json(one / "environment.json") == read_json(other / "environment.json")
    for left, right in zip(cells(one), cells(other), strict=True):
        assert {path.name for path in left.iterdir()} == {path.name for path in right.iterdir()}
        assert outcome(left) == outcome(right)
        settings: list[dict[str, Any]] = [read_json(folder / "config.json") for folder in (left, right)]
        assert settings[0] | {SHARED_BY: 1} == settings[1] | {SHARED_BY: 1}


def holder(parent: Path, seed: int) -> int:
    """The process that works on the cell of that seed."""
    pid = filelock.SoftFileLease(cells(only(parent))[seed] / LEASE, lease_duration=180.0).pid
    assert pid is not None
    return pid


# What comes out


def test_gpus_are_taken_in_turn_unless_one_was_chosen() -> None:
    assert devices_in_turn("cuda", 3, 2) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices_in_turn("cuda:1", 2, 2) == ["cuda:1", "cuda:1"]
    assert devices_in_turn("cpu", 2, 0) == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("argv", "cores", "workers", "threads"),
    [
        ([], 6, 6, 1),
        (["--threads", "3"], 6, 6, 3),
        (["--workers", "1"], 6, 1, 6),
        (["--workers", "2"], 6, 2, 3),
        (["--workers", "7"], 6, 7, 1),
        (["--workers", "4", "--threads", "2"], 6, 4, 2),
        (["--ray", "--cpus-per-cell", "2.5"], 6, 1, 2),
    ],
)
def test_a_cpu_gives_each_cell_a_core_and_threads_are_shared_out_among_workers(
    argv: list[str], cores: int, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    torch.set_num_threads(cores)
    resources = chosen_resources(make_parser().parse_args([*SMOKE, *argv]))
    assert (resources.workers, resources.threads) == (workers, threads)


def test_how_many_cells_share_a_device_of_a_cluster_is_what_fits_on_it() -> None:
    assert cells_on_a_device(cpus=1, gpus=0, largest=16, cells=24) == 16
    assert cells_on_a_device(cpus=1, gpus=0, largest=16, cells=3) == 3
    assert cells_on_a_device(cpus=4, gpus=1, largest=16, cells=24) == 1
    assert cells_on_a_device(cpus=1, gpus=0.1, largest=16, cells=24) == 10


# Who is killed or stopped


def kill_first(run: Path) -> int:
    """Kill the process that works on the first cell once an epoch is over."""
    wait_for_checkpoint(run, 0)
    pid = holder(run, 0)
    os.kill(pid, signal.SIGKILL)
    return pid


@needs_ray
@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_tasks_of_ray_make_the_files_that_one_process_makes_although_one_of_them_is_killed(
    whole: Path, tmp_path: Path, compared: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLEEP", "0.2")
    with meanwhile(lambda: kill_first(tmp_path)):
        assert run_experiment.main([*SMOKE, *SLEEPY, *TWO_OF_RAY, "--output-dir", str(tmp_path)]) == 0
    root = only(tmp_path)
    assert compared == [root] and states(root) == ["done", "done"]
    same_files(whole, root)
    shared = [[record.config.get(SHARED_BY) for record in records(one)] for one in (whole, root)]
    assert shared == [[None] * 2, [2] * 2]


def test_a_worker_that_is_killed_is_replaced_and_a_signal_stops_them_all_until_the_run_resumes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLEEP", "0.4")

    def kill_and_stop() -> None:
        killed, end = kill_first(tmp_path), time.monotonic() + PATIENCE
        while states(only(tmp_path)) != ["running", "done"] or holder(tmp_path, 0) == killed:
            assert time.monotonic() < end, "no worker took the place of the killed one"
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(kill_and_stop):
        assert run_experiment.main([*SMOKE, *SLEEPY, *TWO, "--output-dir", str(tmp_path)]) == 143
    root, said = only(tmp_path), capsys.readouterr()
    assert "Sleepy/seed0: its process died (" in said.out and "; it begins again" in said.out
    assert states(root) == ["interrupted", "done"] and not list(root.rglob(LEASE))
    assert f"--resume {root}" in said.err and "Traceback" not in said.out + said.err
    monkeypatch.delenv("SLEEP")
    assert run_experiment.main(["--workers", "1", "--threads", "1", "--resume", str(root)]) == 0
    assert capsys.readouterr().out.count("resumes after epoch 1") == 1
    assert [outcome(folder) for folder in cells(root)] == [outcome(folder) for folder in cells(whole)]


def test_a_cell_in_which_too_many_processes_died_is_failed(whole: Path, tmp_path: Path) -> None:
    cell, root = Cell("listops", "user_models:Sleepy", 0), Path(shutil.copytree(whole, tmp_path / "run"))
    template = CellJob(root, cell)
    executor = ParallelExecutor(template, RunProgress({cell: 2}), StopRequest(), 1)
    assert [executor.goes_on_after(cell, "Killed") for _ in range(MOST_DEATHS)] == [True, True, False]
    assert states(root) == ["failed", "done"] and executor.gave_up
    assert not (cell.folder(root) / LEASE).exists()


@pytest.mark.slow
def test_workers_whose_parent_is_killed_stop_after_the_step(tmp_path: Path) -> None:
    paths = {"PYTHONPATH": f"{REPOSITORY}:{HERE_FOLDER}", "SLEEP": "0.5"}
    argv = [*SMOKE, *SLEEPY, *TWO, "--output-dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *argv], stdout=subprocess.DEVNULL, env=os.environ | paths
    )
    wait_for_checkpoint(tmp_path, 0, 1)
    process.kill()
    process.wait()
    end = time.monotonic() + PATIENCE
    while states(only(tmp_path)) != ["interrupted"] * 2:
        assert time.monotonic() < end, "a worker goes on"
        time.sleep(0.1)
    assert {record.reason for record in records(only(tmp_path))} == {
        "the process that started this one has ended"
    }


@pytest.mark.slow
def test_fail_fast_and_retry_failed_hold_for_all_workers_together(
    tmp_path: Path, compared: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--models", "user_models:Broken", "user_models:Sleepy", "--seeds", "0", "1"]
    monkeypatch.setenv("SLEEP", "0.5")
    assert run_experiment.main([*SMOKE, *models, *TWO, "--output-dir", str(tmp_path), "--fail-fast"]) == 1
    root = only(tmp_path)
    assert compared == []
    assert states(root) in (["failed", state, "pending", "pending"] for state in ("done", "pending"))
    monkeypatch.delenv("SLEEP")
    capsys.readouterr()
    assert run_experiment.main(["--resume", str(root), *TWO, "--retry-failed"]) == 1
    assert states(root) == ["failed", "done", "failed", "done"] and compared == [root]
    tried = capsys.readouterr().out.split("test accuracy  ")[0]
    assert tried.count("Broken/seed0: failed: RuntimeError: too long for me") == 1  # once, by one of them


# Mistakes


@needs_ray
def test_a_cell_that_no_machine_of_the_cluster_can_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr("ray.init", lambda **options: done.append("began"))
    monkeypatch.setattr("ray.shutdown", lambda: done.append("ended"))
    monkeypatch.setattr(executors, "_largest", lambda kind: 2.0)
    with pytest.raises(InputError, match=r"a cell takes 9999 CPUs, and no machine .* has more than 2"):
        connect_to_ray(Resources(ray="local", cpus=9999.0))
    assert done == ["began", "ended"]
