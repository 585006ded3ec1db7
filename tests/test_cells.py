"""One process at a time works on a cell, and a lease outlives no process for long."""

import multiprocessing
import os
import socket
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from unittest.mock import Mock

import filelock
import pytest
from run_cases import FAR, quick_leases, write_lease

from experiment import cells
from experiment.cells import LEASE, LeasedError, LeaseLostError, freed, leased
from results_folder import Cell, WriteError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_leases(monkeypatch)


def refusal(folder: Path) -> LeasedError:
    with pytest.raises(LeasedError) as refused, leased(folder):
        pass
    return refused.value


def test_a_lease_that_is_held_is_refused_with_its_holders_host_and_process(tmp_path: Path) -> None:
    with leased(tmp_path) as check:
        refused = refusal(tmp_path)
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(refused) and not refused.far
        check()
    assert list(tmp_path.iterdir()) == []


def test_another_hosts_lease_is_respected_until_it_was_not_renewed_for_long(tmp_path: Path) -> None:
    write_lease(tmp_path)
    refused = refusal(tmp_path)
    assert f"process 11 on {FAR} works on it" in str(refused) and refused.far
    with leased(tmp_path, wait=5.0):
        assert f"host={socket.gethostname()}" in (tmp_path / LEASE).read_text()


@pytest.mark.parametrize("content", ["", "filelock/2\npid=1"])
def test_a_lease_that_cannot_be_read_is_respected_and_does_not_block_for_ever(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / LEASE).write_text(content)
    assert "a process that left no name" in str(refusal(tmp_path))
    if not content:
        os.utime(tmp_path / LEASE, (0, 0))
    with leased(tmp_path, wait=10.0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_whose_lease_was_taken_over_finds_out_and_does_not_remove_the_others(
    tmp_path: Path,
) -> None:
    with leased(tmp_path) as check:
        (tmp_path / LEASE).unlink()
        write_lease(tmp_path)
        with pytest.raises(LeaseLostError, match="not ours any more"):
            end = time.monotonic() + 10
            while time.monotonic() < end:
                check()
                time.sleep(0.01)
    assert f"host={FAR}" in (tmp_path / LEASE).read_text()


def test_a_folder_that_cannot_be_written_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = Mock(side_effect=OSError(30, "Read-only file system"))
    monkeypatch.setattr(filelock.SoftFileLease, "acquire", refuse)
    with pytest.raises(WriteError, match="Read-only file system"), leased(tmp_path):
        pass


def test_cells_of_other_machines_are_freed_when_released_or_not_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "HEARTBEAT_SECONDS", 0.9)  # so much longer a busy machine may take to see it
    dead, released, alive = (Cell("listops", name, 0) for name in ("dead", "released", "alive"))
    for cell in (dead, released, alive):
        cell.folder(tmp_path).mkdir(parents=True)
        write_lease(cell.folder(tmp_path))

    def renew() -> None:
        os.utime(alive.folder(tmp_path) / LEASE)
        (released.folder(tmp_path) / LEASE).unlink(missing_ok=True)

    assert list(freed(tmp_path, (dead, released, alive), renew)) == [released, dead]


def together(barrier: Barrier) -> None:
    """In a process of its own, begin when all have come so far; none of the living loses its lease."""
    cells.LEASE_SECONDS = 30.0
    barrier.wait(120)


def compete(places: list[Path]) -> list[str]:
    """Take dead processes' leases one after the other; what this process got, alone."""
    got = []
    for place in places:
        try:
            with leased(place):
                (place / "work").touch(exist_ok=False)
                got.append(place.name)
        except (LeasedError, FileExistsError):
            continue  # another has it, or had finished it before
    return got


def test_of_many_processes_that_find_a_dead_ones_lease_one_gets_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "LEASE_SECONDS", 600.0)
    with leased(tmp_path):
        host = (tmp_path / LEASE).read_text().split("host=")[1].split("\n")[0]  # as a lease says it
    places = [tmp_path / str(number) for number in range(20)]
    for place in places:
        place.mkdir()
        write_lease(place, 2**22 + 5, host)
    # Not forks of this process, whose threads (Ray's, of other tests) may hold a lock for ever in them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiment.cells"])  # imported once for all four
    with context.Pool(4, together, (context.Barrier(4),)) as pool:
        got = [name for part in pool.map(compete, [places] * 4) for name in part]
    assert len(got) == len(set(got)) >= 17
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["work"] * len(got)
