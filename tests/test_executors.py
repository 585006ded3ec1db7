"""--workers and --ray: the same results from several processes, and what becomes of those that are killed."""

import importlib.util
import os
import shutil
import signal
from pathlib import Path

import filelock
import pytest
import torch
from cell_cases import meanwhile, outcome
from run_cases import SMOKE, cells, only, records, resume, run, run_undisturbed, start, states, wait_until

from command_line import InputError
from experiment import executors
from experiment.cells import LEASE, CellJob
from experiment.executors import ParallelExecutor, Resources, cells_on_a_device, devices_in_turn
from experiment.run_progress import RunProgress
from experiment.stop_request import StopRequest
from results_folder import SHARED_BY, Cell, read_json
from run_experiment import chosen_resources, make_parser

SLEEPY = ["--models", "user_models:Sleepy", "--seeds", "0", "1"]
TWO = ["--workers", "2", "--threads", "1"]
TWO_OF_RAY = ["--workers", "auto", "--ray", "--cpus-per-cell", str((os.cpu_count() or 1) / 2)]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the package ray is not installed (requirements-ray.txt)"
)
pytestmark = pytest.mark.usefixtures("compared")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two cells of SLEEPY, run undisturbed in this process."""
    return run_undisturbed(tmp_path_factory, *SLEEPY)


# What a run takes


def test_gpus_are_taken_in_turn_unless_one_was_chosen_and_by_as_many_cells_as_fit() -> None:
    assert devices_in_turn("cuda", 3, 2) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices_in_turn("cuda:1", 2, 2) == ["cuda:1", "cuda:1"]
    assert devices_in_turn("cpu", 2, 0) == ["cpu", "cpu"]
    for cpus, gpus, planned, most in ((1, 0, 24, 16), (1, 0, 3, 3), (4, 1, 24, 1), (1, 0.1, 24, 10)):
        assert cells_on_a_device(cpus, gpus, largest=16, cells=planned) == most


def test_a_cpu_gives_each_cell_a_core_and_threads_are_shared_out_among_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    torch.set_num_threads(6)
    for argv, workers, threads in (
        *(("", 6, 1), ("--threads 3", 6, 3), ("--workers 1", 1, 6), ("--workers 2", 2, 3)),
        *(("--workers 7", 7, 1), ("--workers 4 --threads 2", 4, 2), ("--ray --cpus-per-cell 2.5", 1, 2)),
    ):
        resources = chosen_resources(make_parser().parse_args([*SMOKE, *argv.split()]))
        assert (resources.workers, resources.threads) == (workers, threads), argv


# Who is killed or stopped


def holder(root: Path, number: int = 0) -> int:
    """The process that works on a cell."""
    pid = filelock.SoftFileLease(cells(root)[number] / LEASE, lease_duration=180.0).pid
    assert pid is not None
    return pid


def wait_for_checkpoint(parent: Path, *seeds: int) -> None:
    """Until each seed has a cell whose first epoch is over, its checkpoint, which comes last, included."""
    places = [f"*/*/*/seed{seed}/checkpoint_last.pt" for seed in seeds]
    wait_until(lambda: all(list(parent.glob(place)) for place in places), "an epoch")


def kill_first(parent: Path) -> int:
    """Kill the process that works on the first cell once an epoch is over."""
    wait_for_checkpoint(parent, 0)
    pid = holder(only(parent))
    os.kill(pid, signal.SIGKILL)
    return pid


@needs_ray
@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_tasks_of_ray_make_the_files_that_one_process_makes_although_one_of_them_is_killed(
    whole: Path, tmp_path: Path, compared: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLEEP", "0.2")
    with meanwhile(lambda: kill_first(tmp_path)):
        root = run(tmp_path, *SLEEPY, *TWO_OF_RAY)
    assert compared == [root] and states(root) == ["done", "done"]
    own = dict.fromkeys(("argv", "command", "created", "workers"))
    one, other = (read_json(folder / "config.json") | own for folder in (whole, root))
    assert one == other
    assert read_json(whole / "environment.json") == read_json(root / "environment.json")
    for left, right in zip(records(whole), records(root), strict=True):
        names = [{path.name for path in record.folder.iterdir()} for record in (left, right)]
        assert names[0] == names[1] and outcome(left.folder) == outcome(right.folder)
        assert left.config | {SHARED_BY: 2} == right.config and SHARED_BY not in left.config


def test_a_worker_that_is_killed_is_replaced_and_a_signal_stops_them_all_until_the_run_resumes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLEEP", "0.2")
    parent = tmp_path / "my runs"  # a name that a command must quote

    def kill_and_stop() -> None:
        killed, root = kill_first(parent), only(parent)  # in this order
        wait_until(lambda: states(root) == ["running", "done"] and holder(root) != killed, "a new worker")
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(kill_and_stop):
        root = run(parent, *SLEEPY, *TWO, code=143)
    said = capsys.readouterr()
    assert "Sleepy/seed0: its process died (" in said.out and "; it begins again" in said.out
    assert states(root) == ["interrupted", "done"] and not list(root.rglob(LEASE))
    assert f"--resume '{root}', or python analyze_results.py '{root}'" in said.err
    assert "Traceback" not in said.out + said.err and records(root)[0].reason == "the run was asked to stop"
    monkeypatch.delenv("SLEEP")
    assert resume(root) == 0
    assert capsys.readouterr().out.count("resumes after epoch 1") == 1
    assert [outcome(folder) for folder in cells(root)] == [outcome(folder) for folder in cells(whole)]


def test_a_cell_in_which_too_many_processes_died_is_failed(whole: Path, tmp_path: Path) -> None:
    cell, root = Cell("listops", "user_models:Sleepy", 0), Path(shutil.copytree(whole, tmp_path / "run"))
    executor = ParallelExecutor(CellJob(root, cell), RunProgress({cell: 2}), StopRequest(), 1)
    goes_on = [executor.goes_on_after(cell, "Killed") for _ in range(executors.MOST_DEATHS)]
    assert goes_on == [True, True, False]
    assert states(root) == ["failed", "done"] and executor.gave_up
    assert not (cell.folder(root) / LEASE).exists()


@pytest.mark.slow
def test_workers_whose_parent_is_killed_stop_after_the_step(tmp_path: Path) -> None:
    with start(*SMOKE, *SLEEPY, *TWO, "--output-dir", str(tmp_path), sleep=0.5) as process:
        wait_for_checkpoint(tmp_path, 0, 1)
        workers = {holder(only(tmp_path), seed) for seed in (0, 1)}
        process.kill()
    wait_until(lambda: states(only(tmp_path)) == ["interrupted"] * 2, "workers that stop")
    reasons = {record.reason for record in records(only(tmp_path))}
    assert reasons == {"the process that started this one has ended"}
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "workers that leave")


# Mistakes


@needs_ray
def test_a_cell_that_no_machine_of_the_cluster_can_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr("ray.init", lambda **options: done.append("began"))
    monkeypatch.setattr("ray.shutdown", lambda: done.append("ended"))
    monkeypatch.setattr(executors, "_largest", lambda kind: 2.0)
    with pytest.raises(InputError, match=r"a cell takes 9999 CPUs, and no machine .* has more than 2"):
        executors.connect_to_ray(Resources(ray="local", cpus=9999.0))
    assert done == ["began", "ended"]
