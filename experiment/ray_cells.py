"""--ray: each cell as a task of a Ray cluster, whose machines all have this code and the results folder.

    outcome = RayCells(grid, arguments).run()

A task is `run_experiment.py --resume --cell-index` in a process of Ray's; what it prints is shown when it
ends. Where its process or machine died, that is told and the cell is a task again, which goes on from the
checkpoint. Ray itself retries nothing, so that nothing is retried in silence or for ever. Needs the package
ray (requirements-ray.txt), which nothing else does.
"""

import argparse
import contextlib
import importlib.util
import io
import logging
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

from command_line import InputError
from experiment.cell_lock import HEARTBEAT_SECONDS, LOCK, STALE_SECONDS
from experiment.experiment_grid import Grid, Outcome, verified_cell
from experiment.experiment_plan import find_device
from experiment.many_cells import Deaths, child_arguments, outcome_of_all, reopen
from experiment.stop_request import EXIT_RUN_AGAIN
from results_folder import Cell

LISTEN_SECONDS = 0.5
CONNECT_SECONDS = 10.0
LOOK_AGAIN_SECONDS = 2.0


def check_ray(arguments: argparse.Namespace) -> None:
    """Connect to the cluster. InputError where there is none, or where no machine of it can run a cell."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray needs the package ray: pip install -r requirements-ray.txt")
    if arguments.gpus_per_cell is not None:
        if arguments.gpus_per_cell > 1:
            raise InputError(f"--gpus-per-cell must be at most 1, got {arguments.gpus_per_cell}")
        if find_device(arguments.device).type != "cuda":
            raise InputError("--gpus-per-cell needs a run on CUDA; see --device")
    _connect(arguments.ray)
    _check_fits(arguments.cpus_per_cell or 1.0, arguments.gpus_per_cell or 0.0)


def _connect(address: str) -> None:
    if address not in ("local", "auto"):
        found = re.fullmatch(r"([^/\s]+):(\d{1,5})", address)
        if found is None:
            raise InputError(f"--ray takes HOST:PORT, auto or nothing, got '{address}'")
        try:  # Ray itself tries for minutes
            socket.create_connection((found[1], int(found[2])), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"--ray {address}: no cluster answers there: {error}") from error
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"--ray {address}: {str(error).splitlines()[0]}") from error


def _largest(kind: str) -> float:
    """The CPUs or GPUs of the machine that has most of them."""
    import ray

    return max((node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)


def _check_fits(cpus: float, gpus: float) -> None:
    for kind, wanted in (("CPU", cpus), ("GPU", gpus)):
        there = _largest(kind)
        if wanted > there:
            raise InputError(
                f"a cell takes {wanted:g} {kind}s, and no machine of the cluster has more than {there:g}"
            )


def cells_on_a_device(cpus: float, gpus: float, largest: float, cells: int) -> int:
    """How many cells may run on one device at a time: a GPU, or the CPU of a machine with `largest` cores."""
    return max(1, min(cells, int(1 / gpus + 1e-6) if gpus else int(largest / cpus + 1e-6)))


def run_cell(argv: list[str], folder: str) -> str:
    """The task: run a cell and return what it printed. Waits for the lock that a dead machine left."""
    import run_experiment

    give_up = time.monotonic() + STALE_SECONDS + HEARTBEAT_SECONDS
    said = io.StringIO()
    while True:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = run_experiment.main(argv)
        if code != EXIT_RUN_AGAIN or not (Path(folder) / LOCK).exists() or time.monotonic() > give_up:
            return said.getvalue()
        time.sleep(LOOK_AGAIN_SECONDS)


class RayCells:
    """The tasks that are under way, with their cells."""

    def __init__(self, grid: Grid, arguments: argparse.Namespace) -> None:
        import ray

        self.grid, self.arguments = grid, arguments
        on_gpu = grid.plan.device.type == "cuda"
        self.cpus = arguments.cpus_per_cell or 1.0
        self.gpus = arguments.gpus_per_cell or (1.0 if on_gpu else 0.0)
        _check_fits(self.cpus, self.gpus)
        self.task: Any = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(run_cell)
        self.under_way: dict[Any, Cell] = {}
        self.deaths = Deaths(grid.root)
        self.cells: list[Cell] = []
        self.ended = 0

    def run(self) -> Outcome:
        import ray

        try:
            self.cells = reopen(self.grid)
            for cell in self.cells:
                self.submit(cell)
            self.listen()
        finally:
            ray.shutdown()
        return outcome_of_all(self.grid)

    def submit(self, cell: Cell) -> None:
        sharing = cells_on_a_device(self.cpus, self.gpus, _largest("CPU"), len(self.cells))
        argv = child_arguments(self.grid, self.arguments, self.grid.plan.device.type, sharing)
        argv += ["--cell-index", str(self.grid.plan.cells.index(cell))]
        self.under_way[self.task.remote(argv, str(cell.folder(self.grid.root).resolve()))] = cell

    def listen(self) -> None:
        """Until the last task has ended."""
        import ray

        cancelled: set[Any] = set()
        while self.under_way:
            for task, cell in self.under_way.items():
                if task not in cancelled and self.is_to_end(cell):
                    cancelled.add(task)
                    ray.cancel(task)  # to a task that runs a SIGINT: it writes a checkpoint
            done, _ = ray.wait(list(self.under_way), timeout=LISTEN_SECONDS)
            for task in done:
                cell = self.under_way.pop(task)
                try:
                    self.tell(cell, ray.get(task))
                except (ray.exceptions.RayError, KeyboardInterrupt) as error:
                    if task not in cancelled:
                        self.died(cell, error)

    def is_to_end(self, cell: Cell) -> bool:
        if self.grid.stop.reason:
            return True
        if not self.grid.choice.fail_fast or not self.grid.some_gave_up():
            return False
        return verified_cell(self.grid.root, cell).state != "running"

    def tell(self, cell: Cell, lines: str) -> None:
        self.ended += 1
        self.say(f"[{self.ended}/{len(self.cells)}] {cell}")
        for line in lines.splitlines():
            self.say(f"  {line.removeprefix(f'{cell}: ')}")

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a pipe that was closed is no failure of a cell
            print(line, flush=True)

    def died(self, cell: Cell, error: BaseException) -> None:
        how = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        again = self.deaths.note(cell, how)
        self.say(f"the task of {cell} ended: {how}" + ("; a task anew" if again else ""))
        if again:
            self.submit(cell)
