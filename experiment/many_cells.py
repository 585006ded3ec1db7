"""Many cells at once: the options for it, and what its two ways, processes and Ray, have in common.

    add_options(parser)
    check_options(arguments)                     # InputError; connects to Ray where that is asked for
    outcome = run_cells(grid, arguments)         # here, in --workers processes, or on --ray

Whoever runs a cell runs `run_experiment.py --resume` and holds its lock. Cells of which several are on one
device at a time say so in their config.json: their times are not those of a cell that is alone.
"""

import argparse
import contextlib
import math
from collections import Counter
from pathlib import Path

import torch

from command_line import InputError, option_name
from experiment.cell_lock import CellLock, LockedError, holder_of
from experiment.distributed import launched
from experiment.experiment_grid import GIVEN_UP, Grid, Outcome, verified_cell
from experiment.plan_files import PLACES
from experiment.stop_request import StoppedError
from results_folder import Cell, write_status

MOST_DEATHS = 3  # of processes in one cell, which is failed then
MOST_WORKERS = 1024
NOT_WITH = ("cell_index", "prepare")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Many cells at once")
    group.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="K",
        help="so many processes on this machine, on several GPUs in turn (default: 1)",
    )
    group.add_argument(
        "--threads",
        type=int,
        metavar="T",
        help="CPU threads of each process; another number changes the last bits of the results (default: "
        "PyTorch's number shared out among the workers; with --ray, --cpus-per-cell)",
    )
    group.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="a Ray task per cell, on the cluster at HOST:PORT or auto, else on this machine's cores "
        "(pip install -r requirements-ray.txt)",
    )
    for kind, default in (("cpus", "1"), ("gpus", "1 on CUDA, else 0")):
        group.add_argument(
            f"--{kind}-per-cell",
            type=float,
            metavar="X",
            help=f"with --ray: {kind.upper()[:3]}s that a cell takes, also a fraction (default: {default})",
        )
    # Of a process that one of the ways started: how many share its device, and the grid's `since`.
    group.add_argument("--one-of", nargs=2, type=int, default=(None, None), help=argparse.SUPPRESS)


def check_options(arguments: argparse.Namespace) -> None:
    """Raises InputError; sets the number of threads that a cell has, for environment.json to tell."""
    if not 1 <= arguments.workers <= MOST_WORKERS:
        raise InputError(f"--workers must be 1 to {MOST_WORKERS}, got {arguments.workers}")
    if arguments.threads is not None and not 1 <= arguments.threads <= MOST_WORKERS:
        raise InputError(f"--threads must be 1 to {MOST_WORKERS}, got {arguments.threads}")
    if arguments.ray is not None and arguments.workers > 1:
        raise InputError("--ray and --workers exclude each other: Ray starts its own processes")
    way = "--ray" if arguments.ray is not None else "--workers" if arguments.workers > 1 else ""
    if way and launched():
        raise InputError(f"{way} starts processes of its own: leave torchrun out")
    for name in NOT_WITH if way else ():
        given = getattr(arguments, name)
        if given is not None and given is not False:
            raise InputError(f"{way} runs many cells, so it cannot go with {option_name(name)}")
    for name in ("cpus_per_cell", "gpus_per_cell"):
        value = getattr(arguments, name)
        if value is not None and arguments.ray is None:
            raise InputError(f"{option_name(name)} needs --ray")
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{option_name(name)} must be above 0 and finite, got {value}")
    if arguments.ray is not None:
        from experiment.ray_cells import check_ray

        check_ray(arguments)
    shared = max(1, torch.get_num_threads() // arguments.workers)
    if arguments.ray is not None:
        shared = max(1, int(arguments.cpus_per_cell or 1))
    threads = arguments.threads or shared
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def run_cells(grid: Grid, arguments: argparse.Namespace) -> Outcome:
    """Run the cells in the way that was asked for. Raises as Grid.run does."""
    if arguments.ray is not None:
        from experiment.ray_cells import RayCells

        return RayCells(grid, arguments).run()
    if arguments.workers > 1:
        from experiment.worker_processes import WorkerProcesses

        return WorkerProcesses(grid, arguments).run()
    return grid.run()


def child_arguments(grid: Grid, arguments: argparse.Namespace, device: str, sharing: int) -> list[str]:
    """What a process is started with that is to run cells of the grid's folder."""
    argv = ["--resume", str(grid.root.resolve()), "--device", device]
    argv += ["--one-of", str(sharing), str(grid.since)]
    argv += ["--threads", str(torch.get_num_threads())]
    argv += [option_name(name) for name in ("fail_fast", "tensorboard") if getattr(arguments, name)]
    settings = next(iter(grid.plan.data.values()))  # the places are the same for all tasks
    for place in PLACES:
        if (folder := getattr(settings, place)) is not None:
            argv += [option_name(place), str(Path(folder).expanduser().resolve())]
    return argv


def reopen(grid: Grid) -> list[Cell]:
    """The cells to run; those given up before are pending again, so that each is tried once, whoever does."""
    cells = grid.to_run()
    for cell in cells:
        record = verified_cell(grid.root, cell)
        if record.state in GIVEN_UP and not record.damaged:
            write_status(record.folder, "pending", "to be tried again")
    return cells


class Deaths:
    """How often a process died in a cell, or (None) in none."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.counts: Counter[Cell | None] = Counter()

    def note(self, cell: Cell | None, how: str) -> bool:
        """Whether to try again; a cell in which too many died is failed."""
        self.counts[cell] += 1
        if self.counts[cell] < MOST_DEATHS:
            return True
        if cell is not None:
            with contextlib.suppress(LockedError):  # another process has it by now
                lock = CellLock.take(cell.folder(self.root))
                reason = f"{MOST_DEATHS} processes died in it, the last: {how}"
                write_status(cell.folder(self.root), "failed", reason)
                lock.release()
        return False


def outcome_of_all(grid: Grid) -> Outcome:
    """What the processes left. Raises StoppedError where they were asked to stop and cells are left."""
    left = grid.to_run()
    if left and grid.stop.reason:
        raise StoppedError(grid.stop.reason)
    grid.elsewhere = {cell: holder for cell in left if (holder := holder_of(cell.folder(grid.root)))}
    outcome = grid.outcome()
    outcome.broken = len(left) > len(grid.elsewhere) and not (grid.choice.fail_fast and grid.some_gave_up())
    return outcome
