"""Where cells run: in this process, in several processes of this machine, or as tasks of a Ray cluster.

    with make_executor(resources, template, progress, stop, cells) as executor:
        executor.run(cell)              # returns when it has begun, or here when it has ended
        executor.join()                 # until all have ended; StoppedError where that was asked for

All run `run_cell` on a `CellJob`. A process that dies ends its own cell's attempt alone: that is told, and
the cell begins again from its last checkpoint, until it has cost MOST_DEATHS processes, and is failed.
"""

import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import queue
import re
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from command_line import InputError, check_package, first_line, given_path, keep_streams
from experiment.cells import (
    GIVEN_UP,
    HEARTBEAT_SECONDS,
    LEASE_SECONDS,
    LEFT,
    LEFT_FAR,
    CellJob,
    Ended,
    LeasedError,
    leased,
    run_cell,
)
from experiment.run_progress import RunProgress
from experiment.stop_request import EXIT_RUN_AGAIN, StoppedError, StopRequest
from results_folder import Cell, write_status

MOST_DEATHS = 3  # of processes in one cell, which is failed then
LISTEN_SECONDS = 0.2
SHORTEST_MINUTES = 1e-5
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Resources:
    """What a run takes of its machines.

    workers: processes. threads: CPU threads of each. ray: the address of a cluster, "local", or None. cpus,
    gpus: what a cell takes of the cluster."""

    workers: int = 1
    threads: int = 1
    ray: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0


class Executor:
    """Runs cells in this process, one after the other.

    left: by cell that another process holds, the outcome. gave_up: whether a cell failed or diverged."""

    def __init__(self, template: CellJob, progress: RunProgress, stop: StopRequest) -> None:
        self.template, self.progress, self.stop = template, progress, stop
        self.left: dict[Cell, Ended] = {}
        self.gave_up = False

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.close()

    def run(self, cell: Cell) -> None:
        self.stop.check()
        self.ended(cell, run_cell(replace(self.template, cell=cell), self.progress.of(cell), self.stop.check))

    def join(self) -> None:
        """Until all cells have ended."""

    def ended(self, cell: Cell, outcome: Ended) -> None:
        if outcome.state in (LEFT, LEFT_FAR):
            self.left[cell] = outcome
        else:
            self.left.pop(cell, None)
        # A trial may diverge: that is what a grid of learning rates is to find out.
        self.gave_up |= outcome.state in GIVEN_UP and (cell.trial is None or outcome.state == "failed")
        self.progress.cell_ended(cell, *outcome)


class ParallelExecutor(Executor):
    """Runs cells elsewhere, `slots` at a time; a subclass submits them and knows what a death looks like."""

    deaths: tuple[type[BaseException], ...]

    def __init__(self, template: CellJob, progress: RunProgress, stop: StopRequest, slots: int) -> None:
        super().__init__(template, progress, stop)
        self.free = list(range(slots))[::-1]
        self.running: dict[Future[Ended], tuple[Cell, int]] = {}
        self.died: Counter[Cell] = Counter()

    def submit(self, job: CellJob, slot: int) -> Future[Ended]:
        raise NotImplementedError

    def listen(self) -> None:
        """Show what the cells have told meanwhile."""

    def request_stop(self) -> None:
        """Ask the running cells to stop."""

    def run(self, cell: Cell) -> None:
        while not self.free:
            self.collect()
        if self.stop.reason:
            self.join()
        self.begin(cell, self.free.pop())

    def begin(self, cell: Cell, slot: int) -> None:
        # A process that died with its machine left a lease, which runs out.
        wait = LEASE_SECONDS + HEARTBEAT_SECONDS if self.died[cell] else 0.0
        self.running[self.submit(replace(self.template, cell=cell, wait=wait), slot)] = cell, slot

    def join(self) -> None:
        while self.running:
            self.collect()
        self.stop.check()

    def collect(self) -> None:
        """Wait a moment, and take what has ended."""
        if self.stop.reason:
            self.request_stop()
        done, _ = concurrent.futures.wait(
            self.running, LISTEN_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
        )
        self.listen()
        for future in done:
            cell, slot = self.running.pop(future)
            try:
                self.ended(cell, future.result())
            except self.deaths as error:
                if self.goes_on_after(cell, first_line(error)):
                    self.begin(cell, slot)
                    continue
            self.free.append(slot)

    def goes_on_after(self, cell: Cell, how: str) -> bool:
        """Tell of a process that died in a cell; whether to try again."""
        if self.stop.reason:
            return False
        self.died[cell] += 1
        again = self.died[cell] < MOST_DEATHS
        self.progress.note(cell, f"its process died ({how})" + ("; it begins again" if again else ""))
        if not again:
            reason = f"{MOST_DEATHS} processes died in it, the last: {how}"
            with contextlib.suppress(LeasedError), leased(cell.folder(self.template.root)):
                write_status(cell.folder(self.template.root), "failed", reason)
            self.ended(cell, Ended("failed", reason))
        return again


# Processes of this machine


class ProcessExecutor(ParallelExecutor):
    """A pool of one process for each slot, so that a death breaks one slot alone."""

    deaths = (BrokenProcessPool,)

    def __init__(
        self, template: CellJob, progress: RunProgress, stop: StopRequest, resources: Resources
    ) -> None:
        super().__init__(template, progress, stop, resources.workers)
        context = multiprocessing.get_context("spawn")
        self.messages, self.stopped = context.Queue(), context.Event()
        shared = self.messages, self.stopped, resources.threads, os.getpid()
        self.new_pool = lambda: ProcessPoolExecutor(1, context, initializer=_begin_worker, initargs=shared)
        self.pools = [self.new_pool() for _ in range(resources.workers)]
        self.devices = devices_in_turn(template.device, resources.workers, torch.cuda.device_count())

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        for pool in self.pools:
            pool.shutdown()
        super().__exit__(*error)

    def submit(self, job: CellJob, slot: int) -> Future[Ended]:
        device = self.devices[slot]
        job = replace(job, device=device, sharing=self.devices.count(device))
        try:
            return self.pools[slot].submit(_run_in_worker, job)
        except BrokenProcessPool:
            self.pools[slot] = self.new_pool()
            return self.pools[slot].submit(_run_in_worker, job)

    def listen(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                method, arguments = self.messages.get_nowait()
                getattr(self.progress, method)(*arguments)

    def request_stop(self) -> None:
        self.stopped.set()


def devices_in_turn(device: str, workers: int, gpus: int) -> list[str]:
    """Each worker's device: where no GPU was chosen by its number, all of them in turn."""
    if device == "cuda":
        return [f"cuda:{number % gpus}" for number in range(workers)]
    return [device] * workers


class _Messages(RunProgress):
    """In a worker: sends the lines of its cells to the process that shows them."""

    def __init__(self, messages: Any) -> None:
        super().__init__({})
        self.messages = messages

    def note(self, cell: Cell, text: str) -> None:
        self.messages.put(("note", (cell, text)))

    def epoch_ended(self, cell: Cell, row: dict[str, Any]) -> None:
        self.messages.put(("epoch_ended", (cell, row)))


_worker: dict[str, Any] = {}  # of a worker process: what it was begun with
_busy = threading.Lock()  # held while it runs a cell


def _begin_worker(messages: Any, stopped: Any, threads: int, parent: int) -> None:
    keep_streams()
    torch.set_num_threads(threads)
    _worker.update(progress=_Messages(messages), stop=StopRequest(parent=parent, also=stopped.is_set))
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone and its cell has stopped: it would wait for another one."""
    while os.getppid() == parent:
        time.sleep(1.0)
    with _busy:
        os._exit(EXIT_RUN_AGAIN)


def _run_in_worker(job: CellJob) -> Ended:
    stop, progress = _worker["stop"], _worker["progress"]
    try:
        with _busy, stop.signals_heard():
            return run_cell(job, progress.of(job.cell), stop.check)
    except StoppedError as error:
        return Ended("interrupted", str(error))


# Tasks of a Ray cluster


class RayExecutor(ParallelExecutor):
    """A Ray task for each cell; the cluster's machines all have this code and the results folder. Ray itself
    retries nothing, so that nothing is retried in silence or for ever."""

    def __init__(
        self, template: CellJob, progress: RunProgress, stop: StopRequest, resources: Resources, cells: int
    ) -> None:
        super().__init__(template, progress, stop, max(1, cells))
        import ray  # only here: it is an extra (requirements-ray.txt)

        self.ray, self.deaths = ray, (ray.exceptions.RayError,)
        sharing = cells_on_a_device(resources.cpus, resources.gpus, _largest("CPU"), cells)
        places = {name: str(given_path(path).resolve()) for name, path in template.places.items()}
        self.template = replace(template, root=template.root.resolve(), places=places, sharing=sharing)
        options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_retries": 0}
        self.task: Any = ray.remote(**options)(_run_as_task)
        self.threads = resources.threads
        self.references: dict[Future[Ended], Any] = {}

    def __exit__(self, *error: object) -> None:
        self.ray.shutdown()
        super().__exit__(*error)

    def submit(self, job: CellJob, slot: int) -> Future[Ended]:
        reference = self.task.remote(
            job, self.threads, self.stop.minutes_left, self.progress.epochs[job.cell]
        )
        future: Future[Ended] = reference.future()
        self.references[future] = reference
        return future

    def request_stop(self) -> None:
        while self.references:
            _, reference = self.references.popitem()
            self.ray.cancel(reference)  # to a task that runs an interrupt: its cell is noted as such


def _run_as_task(job: CellJob, threads: int, minutes: float | None, epochs: int) -> Ended:
    keep_streams()
    torch.set_num_threads(threads)
    stop = StopRequest(None if minutes is None else max(minutes, SHORTEST_MINUTES))
    try:
        return run_cell(job, RunProgress({job.cell: epochs}).of(job.cell), stop.check)
    except StoppedError as error:
        return Ended("interrupted", str(error))


def cells_on_a_device(cpus: float, gpus: float, largest: float, cells: int) -> int:
    """How many cells may run on one device at a time: a GPU, or the CPU of a machine with `largest` cores."""
    return max(1, min(cells, int(1 / gpus + 1e-6) if gpus else int(largest / cpus + 1e-6)))


def connect_to_ray(resources: Resources) -> None:
    """InputError where there is no cluster, or no machine of it can run a cell."""
    check_package("ray")
    import ray

    address = resources.ray or "local"
    if address not in ("local", "auto"):
        found = re.fullmatch(r"([^/\s]+):(\d{1,5})", address)
        if found is None:
            raise InputError(f"--ray takes HOST:PORT, auto or nothing, got '{address}'")
        try:  # Ray itself tries for minutes
            socket.create_connection((found[1], int(found[2])), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"--ray {address}: no cluster answers there: {error}") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # epochs of several cells look alike to it
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    dashboard = False if address == "local" else None  # None: as the cluster has it
    try:
        ray.init(
            address=address,
            include_dashboard=dashboard,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"--ray {address}: {str(error).splitlines()[0]}") from error
    for kind, wanted in (("CPU", resources.cpus), ("GPU", resources.gpus)):
        there = _largest(kind)
        if wanted > there:
            ray.shutdown()
            raise InputError(
                f"a cell takes {wanted:g} {kind}s, and no machine of the cluster has more than {there:g}"
            )


def _largest(kind: str) -> float:
    """The CPUs or GPUs of the machine that has most of them."""
    import ray

    return max((node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)


def make_executor(
    resources: Resources, template: CellJob, progress: RunProgress, stop: StopRequest, cells: int
) -> Executor:
    """The executor for so many cells."""
    if resources.ray is not None:
        return RayExecutor(template, progress, stop, resources, cells)
    if min(resources.workers, cells) > 1:
        return ProcessExecutor(template, progress, stop, resources)
    return Executor(template, progress, stop)
