"""Processes that are told to stop, killed, or set to one folder, and disks that are full or gone.

The long version, with 20 killed runs: pytest tests/test_interruptions.py -m slow
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cell_cases import outcome
from run_cases import HERE, only

import run_experiment
from experiment.stop_request import StopRequest
from results_folder import Cell, read_json, read_results

REPOSITORY, TESTS = Path(run_experiment.__file__).parent, Path(__file__).parent
# Without the comparison, whose figures take longer than the run.
SCRIPT = (
    "import sys, run_experiment\n"
    "run_experiment.analyze_run = lambda root: True\n"
    "sys.exit(run_experiment.main(sys.argv[1:]))\n"
)
RUN = [*HERE, "--models", "user_models:Sleepy"]
CELL = Cell("listops", "user_models:Sleepy", 0)


def start(*argv: str, sleep: float = 0.0) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}:{TESTS}",
        "OMP_NUM_THREADS": "1",
        "SLEEP": str(sleep),
        "PYTHONUNBUFFERED": "1",
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *argv], stdout=pipe, stderr=pipe, text=True, env=environment
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    """Read the process's lines until one has the word."""
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(f"the process ended without '{word}'")


pytestmark = pytest.mark.usefixtures("compared")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder whose only cell ran without interruption, in this process."""
    parent = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_experiment, "analyze_run", lambda root: True)
        assert run_experiment.main([*RUN, "--max-epochs", "6", "--output-dir", str(parent)]) == 0
    return only(parent)


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


@pytest.mark.slow
def test_the_second_signal_ends_the_process_at_once(whole: Path, tmp_path: Path) -> None:
    process = start(*RUN, "--max-epochs", "6", "--output-dir", str(tmp_path), sleep=2.5)
    wait_for(process, "smoke: ")
    time.sleep(0.5)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    returned, _, err = finish(process)
    # Within the step of 2.5 s, or within the first one after the first signal was seen.
    assert returned in (-signal.SIGTERM, 143) and time.monotonic() - started < 6
    assert "Traceback" not in err
    assert run_experiment.main(["--workers", "1", "--resume", str(only(tmp_path))]) == 0
    assert outcome(CELL.folder(only(tmp_path))) == outcome(CELL.folder(whole))


# Killed


def kill_and_resume(parent: Path, draws: random.Random, most: int) -> tuple[Path, int]:
    """Kill a run, and each that goes on with it, at random times, until one ends by itself or `most` died."""
    process = start(*RUN, "--max-epochs", "6", "--output-dir", str(parent), sleep=0.02)
    kills = 0
    wait_for(process, "results: ")
    root = only(parent)
    while True:
        try:
            process.wait(draws.uniform(0.0, 1.2))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        finish(process)
        for path in root.rglob("*.json"):
            assert path.name.startswith(".") or isinstance(read_json(path), dict)
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0
            return root, kills
        if kills >= most:
            assert run_experiment.main(["--workers", "1", "--resume", str(root)]) == 0
            return root, kills
        process = start("--workers", "1", "--resume", str(root), sleep=0.02)
        wait_for(process, "results: ")


def check_killed_runs(runs: int, most: int, whole: Path, tmp_path: Path) -> int:
    kills = 0
    for number in range(runs):
        parent = tmp_path / str(number)
        parent.mkdir()
        root, killed = kill_and_resume(parent, random.Random(number), most)
        kills += killed
        folder = CELL.folder(root)
        assert outcome(folder) == outcome(CELL.folder(whole)), number
        assert read_results(root).cells[0].state == "done"
        assert not [path.name for path in folder.iterdir() if path.name.startswith((".", "lease"))]
    return kills


def test_a_run_killed_at_random_times_goes_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    assert check_killed_runs(1, 1, whole, tmp_path) >= 1


@pytest.mark.slow
def test_20_of_20_runs_killed_at_random_times_go_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    kills = check_killed_runs(20, 3, whole, tmp_path)
    print(f"{kills} kills in 20 runs")
    assert kills >= 20


# One folder


def test_two_processes_on_one_folder_run_each_cell_once(tmp_path: Path) -> None:
    seeds = ["0", "1", "2"]
    assert run_experiment.main([*RUN, "--seeds", *seeds, "--prepare", "--output-dir", str(tmp_path)]) == 0
    root = only(tmp_path)
    processes = [start("--workers", "1", "--resume", str(root), sleep=0.05) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(finish, processes))
    assert [returned for returned, _, _ in ends if returned not in (0, 75)] == []
    assert 0 in [returned for returned, _, _ in ends]
    trained = [
        cell for _, out, _ in ends for cell in re.findall(r"^(\S+/seed\d): epoch 1/2", out, re.MULTILINE)
    ]
    assert sorted(trained) == sorted(str(record.cell) for record in read_results(root).cells)
    assert {record.state for record in read_results(root).cells} == {"done"}
    assert not list(root.rglob("lease*"))


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs can only be mounted by root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def unchecked_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin although the disk is known to be too small."""
    monkeypatch.setattr(run_experiment, "check_space", lambda *_: None)


PLAIN = [*HERE, "--models", "conventional"]
PLAIN_CELL = Cell("listops", "conventional", 0)


def only_line(text: str) -> str:
    [line] = text.splitlines()
    return line


@pytest.mark.usefixtures("unchecked_space")
@pytest.mark.parametrize("free", [0, 60_000])
def test_on_a_full_disk_a_run_ends_in_one_line_and_goes_on_when_there_is_room(
    free: int, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_experiment.main([*PLAIN, "--output-dir", str(tmp_path / "whole")]) == 0
    assert run_experiment.main([*PLAIN, "--prepare", "--output-dir", str(small_disk)]) == 0
    root = only(small_disk)
    before = {path: path.read_bytes() for path in root.rglob("*.json")}
    room = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(max(0, room - free)))
    capsys.readouterr()
    assert run_experiment.main(["--workers", "1", "--resume", str(root)]) == 1
    assert "No space left on device" in only_line(capsys.readouterr().err)
    for path in root.rglob("*"):
        if path.suffix == ".json":
            assert isinstance(json.loads(path.read_text()), dict)
    assert all((path.read_bytes() == before[path]) or path.name == "status.json" for path in before)
    (small_disk / "ballast").unlink()
    assert run_experiment.main(["--workers", "1", "--resume", str(root)]) == 0
    assert outcome(PLAIN_CELL.folder(root)) == outcome(PLAIN_CELL.folder(only(tmp_path / "whole")))


@pytest.mark.usefixtures("unchecked_space")
def test_a_read_only_folder_is_told_in_one_line_and_nothing_is_changed(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_experiment.main([*PLAIN, "--prepare", "--output-dir", str(small_disk)]) == 0
    root = only(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    capsys.readouterr()
    assert run_experiment.main(["--workers", "1", "--resume", str(root)]) == 1
    assert "Read-only file system" in only_line(capsys.readouterr().err)
    assert read_results(root).cells[0].state == "pending"
    assert run_experiment.main([*PLAIN, "--output-dir", str(small_disk)]) == 2
    assert "cannot write to" in only_line(capsys.readouterr().err)


@pytest.mark.usefixtures("unchecked_space")
@pytest.mark.parametrize("what", ["cell", "root"])
def test_a_folder_that_vanishes_is_told_in_one_line_and_not_made_again(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def vanish(*_: object) -> None:
        shutil.rmtree(only(tmp_path) if what == "root" else PLAIN_CELL.folder(only(tmp_path)))

    monkeypatch.setattr("experiment.run_progress.RunProgress.epoch_ended", vanish)
    assert run_experiment.main([*PLAIN, "--output-dir", str(tmp_path)]) == 1
    assert "No such file or directory" in only_line(capsys.readouterr().err)
    assert bool(list(tmp_path.iterdir())) == (what == "cell")
