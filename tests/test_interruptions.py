"""Processes that are told to stop, killed, or set to one folder, and disks that are full or gone.

The long version, with 20 killed runs: pytest tests/test_interruptions.py -m slow
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cell_cases import outcome
from run_cases import HERE, cells, finish, only, resume, run, run_undisturbed, start, states, wait_until

import run_experiment
from experiment.stop_request import StopRequest
from results_folder import read_json

SLEEPY = ["--models", "user_models:Sleepy"]
PLAIN = ["--models", "conventional"]
pytestmark = pytest.mark.usefixtures("compared")


# Signals


def test_two_signals_at_once_are_one_and_a_later_one_is_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` sends its signal to the process and to its group."""
    stop, sent = StopRequest(), []
    with stop.signals_heard():
        stop.check()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.reason, stop.exit_code) == ("stopped by SIGTERM", 143)
        monkeypatch.setattr(time, "monotonic", lambda: stop._heard + 1.1)
        monkeypatch.setattr(os, "kill", lambda *order: sent.append(order))
        stop._hear(signal.SIGTERM, None)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert sent == [(os.getpid(), signal.SIGTERM)]


# Killed


def kill_and_resume(parent: Path, draws: random.Random, most: int) -> tuple[Path, int]:
    """Kill a run, and each that goes on with it, at random times, until one ends by itself or `most` died."""
    argv = [*HERE, *SLEEPY, "--max-epochs", "6", "--output-dir", str(parent)]
    for kills in range(most):
        process = start(*argv, sleep=0.02)
        assert process.stdout is not None
        assert any("results: " in line for line in process.stdout)
        root = only(parent)
        argv = ["--workers", "1", "--resume", str(root)]
        try:
            process.wait(draws.uniform(0.0, 1.2))
        except subprocess.TimeoutExpired:
            process.kill()
        code, _, _ = finish(process)
        for path in root.rglob("*.json"):
            assert path.name.startswith(".") or isinstance(read_json(path), dict)
        if code != -signal.SIGKILL:
            assert code == 0
            return root, kills
    assert resume(root) == 0
    return root, most


@pytest.mark.parametrize(("runs", "most"), [(1, 1), pytest.param(20, 3, marks=pytest.mark.slow)])
def test_runs_killed_at_random_times_go_on_to_the_same_bits(
    runs: int, most: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    [whole] = cells(run_undisturbed(tmp_path_factory, *SLEEPY, "--max-epochs", "6"))
    kills = 0
    for number in range(runs):
        root, killed = kill_and_resume(tmp_path / str(number), random.Random(number), most)
        kills += killed
        [folder] = cells(root)
        assert states(root) == ["done"] and outcome(folder) == outcome(whole), number
        assert not [path.name for path in folder.iterdir() if path.name.startswith((".", "lease"))]
    assert kills >= runs


# One folder


def test_two_processes_on_one_folder_run_each_cell_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run(tmp_path, *SLEEPY, "--seeds", "0", "1", "2", "--prepare")
    monkeypatch.setenv("SLEEP", "0.05")
    other = start("--workers", "1", "--resume", str(root), sleep=0.05)
    wait_until(lambda: "running" in states(root), "the other's first cell")
    code = resume(root)
    others_code, others_out, _ = finish(other)
    assert sorted({code, others_code}) in ([0], [0, 75])
    out = capsys.readouterr().out + others_out
    trained = re.findall(r"^(\S+/seed\d): epoch 1/2", out, re.MULTILINE)
    assert sorted(trained) == [f"listops/user_models:Sleepy/seed{seed}" for seed in range(3)]
    assert states(root) == ["done"] * 3 and not list(root.rglob("lease*"))


# Disks


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 3 MB, on which a run begins although that is known to be too small."""
    monkeypatch.setattr(run_experiment, "check_space", lambda *_: None)
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs can only be mounted by root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What stderr has been told, which is one line."""
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_on_a_full_disk_and_on_a_read_only_one_a_run_ends_in_one_line_and_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, root = run(tmp_path / "whole", *PLAIN), run(small_disk, *PLAIN, "--prepare")
    before = {path: path.read_bytes() for path in root.rglob("*.json")}
    ballast = small_disk / "ballast"
    capsys.readouterr()
    for free in (60_000, 0):
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - free))
        assert resume(root) == 1
        assert "No space left on device" in only_line(capsys)
        for path in root.rglob("*.json"):
            assert isinstance(read_json(path), dict)
        assert all(path.read_bytes() == before[path] or path.name == "status.json" for path in before)
        ballast.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert resume(root) == 1
    assert "Read-only file system" in only_line(capsys)
    run(small_disk, *PLAIN, code=2)
    assert "cannot write to" in only_line(capsys)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert resume(root) == 0
    assert outcome(cells(root)[0]) == outcome(cells(whole)[0])


@pytest.mark.parametrize("what", ["cell", "root"])
def test_a_folder_that_vanishes_is_told_in_one_line_and_not_made_again(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def vanish(*_: object) -> None:
        root = only(tmp_path)
        shutil.rmtree(root if what == "root" else cells(root)[0])

    monkeypatch.setattr("experiment.run_progress.RunProgress.epoch_ended", vanish)
    assert run_experiment.main([*HERE, *PLAIN, "--output-dir", str(tmp_path)]) == 1
    assert "No such file or directory" in only_line(capsys)
    assert bool(list(tmp_path.iterdir())) == (what == "cell")
