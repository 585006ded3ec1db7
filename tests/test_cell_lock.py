"""One process at a time works in a cell's folder, and a lock outlives no process for long."""

import json
import multiprocessing
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from experiment.cell_lock import LOCK, CellLock, LockedError, LockLostError, this_process

from experiment import cell_lock
from results_folder import WriteError


def write_lock(folder: Path, age: float = 0.0, **changes: Any) -> None:
    (folder / LOCK).write_text(json.dumps(asdict(replace(this_process(), **changes))))
    then = time.time() - age
    os.utime(folder / LOCK, (then, then))


def test_a_lock_that_is_held_is_refused_with_its_holders_host_and_process(tmp_path: Path) -> None:
    lock = CellLock.take(tmp_path)
    with pytest.raises(LockedError, match=rf"process {os.getpid()} on .* works on it"):
        CellLock.take(tmp_path)
    lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    again = CellLock.take(tmp_path)
    assert again.took_over == ""
    again.release()


def test_a_lock_of_a_process_that_ended_is_taken_over_at_once_and_that_is_told(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    process.start()
    process.join()
    assert process.pid is not None
    write_lock(tmp_path, pid=process.pid, host="here")
    lock = CellLock.take(tmp_path)
    assert lock.took_over == f"process {process.pid} on here had it, and has ended"
    lock.release()


def test_a_process_id_that_is_used_again_is_not_taken_for_its_first_owner(tmp_path: Path) -> None:
    write_lock(tmp_path, started="1")
    lock = CellLock.take(tmp_path)
    assert "has ended" in lock.took_over
    lock.release()


def test_another_machines_lock_is_stale_only_when_it_was_not_renewed_for_long(tmp_path: Path) -> None:
    other: dict[str, Any] = {"machine": "another", "host": "there", "pid": 7}
    write_lock(tmp_path, age=cell_lock.STALE_SECONDS - 20, **other)
    with pytest.raises(LockedError, match="process 7 on there works on it"):
        CellLock.take(tmp_path)
    write_lock(tmp_path, age=cell_lock.STALE_SECONDS + 20, **other)
    lock = CellLock.take(tmp_path)
    assert lock.took_over == "process 7 on there had it, and has not been heard of for 200 s"
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}', "null"])
def test_a_lock_that_cannot_be_read_is_respected_until_it_is_stale(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(LockedError, match="a process that left no name"):
        CellLock.take(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    CellLock.take(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_whose_lock_was_taken_over_finds_out_and_does_not_remove_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = CellLock.take(tmp_path)
    write_lock(tmp_path, host="another")
    lock.check()  # renewed a moment ago: not looked at
    slept = time.time() + 3 * cell_lock.HEARTBEAT_SECONDS
    monkeypatch.setattr(time, "time", lambda: slept)
    with pytest.raises(LockLostError, match="not ours any more"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "another"


def test_a_lock_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_lock, "HEARTBEAT_SECONDS", 0.02)
    lock = CellLock.take(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / LOCK).stat().st_mtime > time.time() - 60
    lock.release()


def test_a_take_over_that_was_broken_off_does_not_block_for_ever(tmp_path: Path) -> None:
    write_lock(tmp_path, machine="another", age=1000)
    guard = tmp_path / f"{LOCK}.takeover"
    guard.touch()
    with pytest.raises(LockedError, match="about to take it over"):
        CellLock.take(tmp_path)
    os.utime(guard, (0, 0))
    with pytest.raises(LockedError):
        CellLock.take(tmp_path)
    CellLock.take(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_or_cannot_be_written_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        CellLock.take(tmp_path / "gone")

    def refuse(*_: object) -> bool:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(cell_lock, "_create", refuse)
    with pytest.raises(WriteError, match="Read-only file system"):
        CellLock.take(tmp_path)


def compete(folder: Path, rounds: int) -> list[str]:
    """Take stale locks again and again; what this process got, with the others' presence while it had it."""
    got = []
    for number in range(rounds):
        place = folder / str(number)
        try:
            lock = CellLock.take(place)
        except LockedError:
            continue
        try:
            (place / "work").touch(exist_ok=False)
            got.append(str(number))
        except FileExistsError:
            pass  # another had finished it before
        finally:
            lock.release()
    return got


def test_of_many_processes_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    rounds = 20
    for number in range(rounds):
        (tmp_path / str(number)).mkdir()
        write_lock(tmp_path / str(number), pid=2**22 + 5, started="1")
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        got = [name for part in pool.starmap(compete, [(tmp_path, rounds)] * 4) for name in part]
    assert len(got) == len(set(got))
    assert len(got) >= rounds - 3
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["work"] * len(got)
