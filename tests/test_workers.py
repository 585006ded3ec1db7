"""--workers: the same results from several processes, and what becomes of those that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cell_cases import meanwhile, outcome
from experiment.cell_lock import LOCK
from experiment.many_cells import Deaths, check_options

import run_experiment
from experiment.executors import MOST_DEATHS, devices_in_turn
from results_folder import SHARED_BY, read_json, read_results, write_status
from run_experiment import make_parser

REPOSITORY = Path(run_experiment.__file__).parent
# A run without the comparison, whose figures take longer than the cells.
SCRIPT = (
    "import sys, run_experiment\n"
    "run_experiment.analyze_run = lambda root: True\n"
    "sys.exit(run_experiment.main(sys.argv[1:]))\n"
)
USER_MODELS = """
import os, signal, time
from conventional_attention import ConventionalAttention

class Sleepy(ConventionalAttention):
    def forward(self, query, *rest, **options):
        if self.training and query.shape[1] > 3:
            time.sleep(float(os.environ.get("SLEEP", "0")))
        return super().forward(query, *rest, **options)

class Broken(ConventionalAttention):
    def forward(self, query, *rest, **options):
        if query.shape[1] > 3:
            raise RuntimeError("not today")
        return super().forward(query, *rest, **options)

class Deadly(ConventionalAttention):
    def forward(self, query, *rest, **options):
        if query.shape[1] > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(query, *rest, **options)
"""
SMOKE = ["--preset", "smoke", "--device", "cpu"]
SLEEPY = [*SMOKE, "--tasks", "listops", "--models", "models_of_mine:Sleepy", "--seeds", "0", "1"]
PATIENCE = 60.0


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "models_of_mine.py").write_text(USER_MODELS)
    return folder


@pytest.fixture(autouse=True)
def compared(code: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Which folders were to be compared; one thread, and the user's models, for us and for our workers."""
    folders: list[Path] = []

    def analyze_run(root: Path) -> bool:
        folders.append(root)
        return True

    monkeypatch.setattr(run_experiment, "analyze_run", analyze_run)
    monkeypatch.syspath_prepend(code)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folders
    torch.set_num_threads(before)


def wait_for_epoch(parent: Path, *seeds: int) -> None:
    """Until the first epoch of these cells of SLEEPY is over, its checkpoint, which comes last, included."""
    end = time.monotonic() + PATIENCE
    for seed in seeds:
        while not list(parent.glob(f"*/listops/*/seed{seed}/checkpoint_last.pt")):
            assert time.monotonic() < end, "no epoch was finished"
            time.sleep(0.05)


def only(parent: Path) -> Path:
    [root] = parent.glob("results_*")
    return root


def states(root: Path) -> list[str]:
    return [record.state for record in read_results(root).cells]


def cells(root: Path) -> list[Path]:
    return [record.folder for record in read_results(root).cells]


def processes_of(root: Path) -> list[int]:
    """The processes that were started with this folder in their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(root).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # ended meanwhile
    return found


def wait_until_gone(root: Path) -> None:
    end = time.monotonic() + PATIENCE
    while processes_of(root):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.1)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The two cells of SLEEPY, run undisturbed in this process."""
    assert run_experiment.main([*SLEEPY, "--output-dir", str(tmp_path / "whole")]) == 0
    return only(tmp_path / "whole")


def same_files(one: Path, other: Path) -> None:
    """Each file of two results folders holds the same, but for times, memory and who shared a device."""
    ours = {"argv", "command", "created"}
    configs = [json.loads((root / "config.json").read_text()) for root in (one, other)]
    assert configs[0] | dict.fromkeys(ours) == configs[1] | dict.fromkeys(ours)
    assert read_json(one / "environment.json") == read_json(other / "environment.json")
    for left, right in zip(cells(one), cells(other), strict=True):
        assert {path.name for path in left.iterdir()} == {path.name for path in right.iterdir()}
        assert outcome(left) == outcome(right)
        settings: list[dict[str, Any]] = [read_json(folder / "config.json") for folder in (left, right)]
        assert settings[0] | {SHARED_BY: 1} == settings[1] | {SHARED_BY: 1}


# What comes out


def test_two_workers_make_the_files_that_one_makes_and_the_comparison_is_made_once(
    tmp_path: Path, compared: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for workers in ("1", "2"):
        argv = [*SMOKE, "--threads", "1", "--workers", workers, "--output-dir", str(tmp_path / workers)]
        assert run_experiment.main(argv) == 0
        shown.append(capsys.readouterr().out)
    one, two = only(tmp_path / "1"), only(tmp_path / "2")
    assert compared == [one, two] and not (two / "analysis").exists()
    assert states(two) == ["done"] * 8
    same_files(one, two)
    lines, table = (part.splitlines() for part in shown[1].split("test accuracy  "))
    assert table == shown[0].split("test accuracy  ")[1].splitlines()
    assert len(lines) == 2 + 8 * 3  # two epochs and an end of each cell
    assert {line.split("]")[0] for line in lines[2:]} == {"[1", "[2"}
    assert all(line.split(": ")[0].endswith("/seed0") for line in lines[2:])
    shared = [
        [read_json(folder / "config.json").get(SHARED_BY) for folder in cells(root)] for root in (one, two)
    ]
    assert shared == [[None] * 8, [2] * 8]


def test_gpus_are_taken_in_turn_unless_one_was_chosen() -> None:
    assert devices_in_turn(torch.device("cuda"), 3, 2) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices_in_turn(torch.device("cuda:1"), 2, 2) == ["cuda:1", "cuda:1"]
    assert devices_in_turn(torch.device("cpu"), 2, 0) == ["cpu", "cpu"]


@pytest.mark.parametrize(("workers", "threads"), [("1", 6), ("2", 3), ("4", 1), ("7", 1)])
def test_the_threads_of_one_process_are_shared_out_among_the_workers(workers: str, threads: int) -> None:
    torch.set_num_threads(6)
    check_options(make_parser().parse_args(["--workers", workers]))
    assert torch.get_num_threads() == threads
    check_options(make_parser().parse_args(["--workers", workers, "--threads", "2"]))
    assert torch.get_num_threads() == 2


# Who is killed or stopped


def test_a_worker_that_is_killed_is_told_and_its_cell_goes_on_from_its_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLEEP", "0.3")

    def kill() -> None:
        wait_for_epoch(tmp_path, 0)
        os.kill(read_json(cells(only(tmp_path))[0] / LOCK)["pid"], signal.SIGKILL)

    with meanwhile(kill):
        assert run_experiment.main([*SLEEPY, "--workers", "2", "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "ended in listops/models_of_mine:Sleepy/seed0: Killed (signal 9); started anew" in out
    assert "seed0: goes on after epoch 1" in out
    root = only(tmp_path)
    assert states(root) == ["done", "done"]
    assert [outcome(folder) for folder in cells(root)] == [outcome(folder) for folder in cells(whole)]


@pytest.mark.slow
def test_a_cell_that_kills_its_workers_fails_and_the_others_are_done(
    tmp_path: Path, compared: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--models", "models_of_mine:Deadly", "conventional"]
    argv = [*SMOKE, "--tasks", "listops", *models, "--workers", "2", "--output-dir", str(tmp_path)]
    assert run_experiment.main(argv) == 1
    root = only(tmp_path)
    assert states(root) == ["failed", "done"] and compared == [root]
    assert "3 processes died in it, the last: Killed (signal 9)" in capsys.readouterr().out


def test_a_cell_in_which_too_many_processes_died_is_failed(whole: Path) -> None:
    record = read_results(whole).cells[0]
    write_status(record.folder, "running")
    deaths = Deaths(whole)
    assert [deaths.note(record.cell, "Killed") for _ in range(MOST_DEATHS)] == [True, True, False]
    assert states(whole) == ["failed", "done"]
    assert not (record.folder / LOCK).exists()


@pytest.mark.parametrize(
    ("signum", "code_"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_stops_all_workers_after_a_step_and_the_run_goes_on_to_the_same_bits(
    signum: int,
    code_: int,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLEEP", "0.5")

    def stop() -> None:
        wait_for_epoch(tmp_path, 0, 1)
        os.kill(os.getpid(), signum)

    with meanwhile(stop):
        assert run_experiment.main([*SLEEPY, "--workers", "2", "--output-dir", str(tmp_path)]) == code_
    root = only(tmp_path)
    assert processes_of(root) == []
    assert states(root) == ["interrupted", "interrupted"]
    assert not any((folder / LOCK).exists() for folder in cells(root))
    said = capsys.readouterr()
    assert f"--resume {root}" in said.err and "Traceback" not in said.out + said.err
    monkeypatch.delenv("SLEEP")
    assert run_experiment.main(["--resume", str(root)]) == 0
    assert capsys.readouterr().out.count("goes on after epoch 1, step") == 2
    assert [outcome(folder) for folder in cells(root)] == [outcome(folder) for folder in cells(whole)]


@pytest.mark.slow
def test_workers_whose_parent_is_killed_stop_after_the_step(code: Path, tmp_path: Path) -> None:
    paths = {"PYTHONPATH": f"{REPOSITORY}:{code}", "OMP_NUM_THREADS": "1", "SLEEP": "0.5"}
    argv = [*SLEEPY, "--workers", "2", "--output-dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *argv], stdout=subprocess.DEVNULL, env=os.environ | paths
    )
    wait_for_epoch(tmp_path, 0, 1)
    process.kill()
    process.wait()
    root = only(tmp_path)
    wait_until_gone(root)
    assert [(record.state, record.reason) for record in read_results(root).cells] == [
        ("interrupted", "the process that started this one has ended")
    ] * 2


@pytest.mark.slow
def test_a_time_limit_holds_for_the_workers_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SLEEPY, "--workers", "2", "--max-minutes", "1e-4", "--output-dir", str(tmp_path)]
    assert run_experiment.main(argv) == 75
    assert "the time limit of 0.0001 minutes was reached" in capsys.readouterr().err
    assert states(only(tmp_path))[0] == "interrupted"


@pytest.mark.slow
def test_fail_fast_and_retry_failed_hold_for_all_workers_together(
    tmp_path: Path,
    compared: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = ["--models", "models_of_mine:Broken", "models_of_mine:Sleepy", "--seeds", "0", "1"]
    argv = [*SMOKE, "--tasks", "listops", *models, "--workers", "2", "--output-dir", str(tmp_path)]
    monkeypatch.setenv("SLEEP", "0.5")
    assert run_experiment.main([*argv, "--fail-fast"]) == 1
    root = only(tmp_path)
    assert compared == []
    assert states(root) in (["failed", state, "pending", "pending"] for state in ("done", "pending"))
    monkeypatch.delenv("SLEEP")
    capsys.readouterr()
    assert run_experiment.main(["--resume", str(root), "--workers", "2", "--retry-failed"]) == 1
    assert states(root) == ["failed", "done", "failed", "done"] and compared == [root]
    tried = capsys.readouterr().out.split("test accuracy  ")[0]
    assert tried.count("Broken/seed0: failed: RuntimeError: not today") == 1  # once, by one of them


# Mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workers", "0"], "--workers must be 1 to 1024, got 0"),
        (["--workers", "-2"], "--workers must be 1 to 1024, got -2"),
        (["--threads", "0"], "--threads must be 1 to 1024, got 0"),
        (
            ["--workers", "2", "--cell-index", "0"],
            "--workers runs many cells, so it cannot go with --cell-index",
        ),
        (["--workers", "2", "--prepare"], "so it cannot go with --prepare"),
        (["--workers", "2", "--ray"], "--ray and --workers exclude each other"),
        (["--ray", "--cell-index", "0"], "--ray runs many cells, so it cannot go with --cell-index"),
        (["--cpus-per-cell", "1"], "--cpus-per-cell needs --ray"),
        (["--gpus-per-cell", "0.5"], "--gpus-per-cell needs --ray"),
        (["--ray", "--cpus-per-cell", "0"], "--cpus-per-cell must be above 0 and finite, got 0.0"),
        (["--ray", "--gpus-per-cell", "nan"], "--gpus-per-cell must be above 0 and finite, got nan"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_before_any_work(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_experiment.main([*SMOKE, *argv, "--output-dir", str(tmp_path)]) == 2
    streams = capsys.readouterr()
    assert message in streams.err and streams.err.count("\n") == 1 and streams.out == ""
    assert list(tmp_path.iterdir()) == []
