"""A lock on a folder: of several processes, also of several machines, one works in it.

    lock = CellLock.take(folder)        # LockedError where a living process has it
    lock.check()                        # now and then: LockLostError where it was taken over
    lock.release()

The lock is the file lock.json, which only one process can create; it names host and process. Its time is
renewed every 20 seconds by a thread. It is stale, and is taken over, where its process is gone from this
machine, or where it was not renewed for 3 minutes. Times are compared on the file server's clock alone, so
that the machines' clocks need not agree. A process that slept through that time finds its lock lost, and
writes no more. Needs a file system on which a file is created exclusively (NFS from version 3 on).
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from results_folder import WriteError, read_json

LOCK = "lock.json"
HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 180.0
ATTEMPTS = 3


class LockedError(Exception):
    """Another process has the lock; the message names it."""


class LockLostError(Exception):
    """The lock was taken over by another process, whose folder it is now."""


@dataclass(frozen=True)
class Owner:
    """A process. machine: what a process id is unique in: a running system and, on it, a name space.

    started: in the system's clock ticks, since process ids are used again. token: of one taking.
    """

    host: str
    pid: int
    machine: str
    started: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_gone(self) -> bool:
        """Whether the process is known to have ended; of another machine's nothing is known."""
        if self.machine != _machine() or not self.machine:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            return False
        return self.started != _start_of(self.pid)


def this_process() -> Owner:
    pid = os.getpid()
    return Owner(socket.gethostname(), pid, _machine(), _start_of(pid), secrets.token_hex(8))


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process of this machine started; empty where that cannot be known."""
    try:
        # The name, in parentheses, may hold spaces; the start is the 20th field behind it: see proc(5).
        return (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()[19]
        )
    except (OSError, IndexError):
        return ""


class CellLock:
    """A lock that is held. took_over: from whom, and why; empty where it was free."""

    def __init__(self, path: Path, owner: Owner, took_over: str) -> None:
        self.path, self.owner, self.took_over = path, owner, took_over
        self._lost = False
        self._seen = time.time()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path) -> "CellLock":
        """Raises LockedError where another process has the lock, WriteError where none can be made."""
        path, owner, took_over = folder / LOCK, this_process(), ""
        for _ in range(ATTEMPTS):
            try:
                if _create(path, owner):
                    return cls(path, owner, took_over)
                holder, why = _holder(path)
                if not why:
                    raise LockedError(f"{holder} works on it")
                if not _remove_stale(path):
                    raise LockedError("another process is about to take it over")
            except FileNotFoundError:
                if not folder.is_dir():
                    raise
                continue  # released meanwhile
            except OSError as error:
                raise WriteError(error.errno, error.strerror, str(path)) from error
            took_over = f"{holder} had it, and {why}"
        raise LockedError("others take and release it")

    def check(self) -> None:
        """Raise LockLostError where the lock is another's. Reads the file only after a pause in which the
        heartbeat was missed, as after a suspension."""
        # Wall time: the monotonic clock stands still while a machine sleeps.
        if not self._lost and abs(time.time() - self._seen) > 2 * HEARTBEAT_SECONDS:
            self._look()
        if self._lost:
            raise LockLostError(f"{self.path} is not ours any more: it was taken over or removed")

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        self._look()
        if not self._lost:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _look(self) -> None:
        """Note whether the lock is still ours; a file system that does not answer says nothing."""
        try:
            self._lost = _read(self.path) != self.owner
        except FileNotFoundError:
            self._lost = True
        except OSError:
            return
        self._seen = time.time()

    def _renew(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS) and not self._lost:
            self._look()
            if not self._lost:
                with contextlib.suppress(OSError):
                    os.utime(self.path)


def holder_of(folder: Path) -> str:
    """Who works in the folder; empty where nobody does, as far as is known."""
    try:
        holder, stale = _holder(folder / LOCK)
    except FileNotFoundError:
        return ""
    return "" if stale else f"{holder} works on it"


def was_held_by(folder: Path, pid: int) -> bool:
    """Whether the folder's lock names this machine's process `pid`."""
    try:
        owner = _read(folder / LOCK)
    except FileNotFoundError:
        return False
    return owner is not None and (owner.pid, owner.machine) == (pid, _machine())


def _create(path: Path, owner: Owner) -> bool:
    """Whether the lock could be made: no other process had it."""
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            json.dump(asdict(owner), file)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)  # on a full disk: a lock without a name would lock us out
        raise
    return True


def _read(path: Path) -> Owner | None:
    """Whose lock it is; None where that cannot be read, as for the moment in which it is written."""
    path.stat()  # FileNotFoundError where there is none
    try:
        return Owner(**read_json(path))
    except (ValueError, TypeError):
        return None


def _holder(path: Path) -> tuple[str, str]:
    """Who has the lock, and why it is stale; empty where it is not."""
    owner = _read(path)
    if owner is not None and owner.is_gone():
        return str(owner), "has ended"
    age = _age(path)
    name = str(owner or "a process that left no name")
    return name, f"has not been heard of for {age:.0f} s" if age > STALE_SECONDS else ""


def _age(path: Path) -> float:
    """Seconds since a file's last change, on the clock of the file system that it lies on."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _remove_stale(path: Path) -> bool:
    """Remove a stale lock. Of several processes that see it one does; whether it was this one.

    It is looked at again while nobody else may remove it: else a lock that was just taken could go."""
    guard = path.with_name(f"{path.name}.takeover")
    try:
        guard.touch(exist_ok=False)
    except FileExistsError:
        if _age(guard) > STALE_SECONDS:  # its process ended in the middle
            guard.unlink(missing_ok=True)
        return False
    try:
        stale = bool(_holder(path)[1])
        if stale:
            path.unlink()
        return stale
    finally:
        guard.unlink(missing_ok=True)
