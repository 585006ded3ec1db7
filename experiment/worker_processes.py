"""--workers: several processes on this machine that work through one results folder.

    outcome = WorkerProcesses(grid, arguments).run()

They share the cells out by the cells' locks. What they print is shown line by line behind their number. A
signal is passed on to them, and they stop with a checkpoint. One that dies is told and started anew, and its
cell goes on from its checkpoint. They are no part of the terminal's process group, so that Ctrl-C reaches
them once; should this process be killed, they stop after the step in progress.
"""

import argparse
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch

from command_line import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED
from experiment.cell_lock import was_held_by
from experiment.experiment_grid import Grid, Outcome
from experiment.many_cells import Deaths, child_arguments, outcome_of_all, reopen
from experiment.plan_files import PROG
from experiment.stop_request import EXIT_RUN_AGAIN

SCRIPT = Path(__file__).resolve().parent.parent / PROG
ENDED_BY_ITSELF = (EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_RUN_AGAIN)
LISTEN_SECONDS = 0.2
SHORTEST_MINUTES = 1e-5


def devices_in_turn(device: torch.device, workers: int, gpus: int) -> list[str]:
    """Each worker's device: where no GPU was chosen by its number, all of them in turn."""
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{number % gpus}" for number in range(workers)]
    return [str(device)] * workers


class WorkerProcesses:
    """The processes by number, and the lines that come from them; None for the end of a process."""

    def __init__(self, grid: Grid, arguments: argparse.Namespace) -> None:
        self.grid, self.arguments = grid, arguments
        self.running: dict[int, subprocess.Popen[str]] = {}
        self.lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self.deaths = Deaths(grid.root)
        self.devices: list[str] = []

    def run(self) -> Outcome:
        workers = min(self.arguments.workers, len(reopen(self.grid)))
        self.devices = devices_in_turn(self.grid.plan.device, workers, torch.cuda.device_count())
        try:
            for number in range(workers):
                self.start(number)
            self.listen()
        finally:
            for process in self.running.values():
                process.terminate()
            for process in self.running.values():
                process.wait()
        return outcome_of_all(self.grid)

    def start(self, number: int) -> None:
        device = self.devices[number]
        argv = child_arguments(self.grid, self.arguments, device, self.devices.count(device))
        if (minutes := self.grid.stop.minutes_left) is not None:
            argv += ["--max-minutes", str(max(SHORTEST_MINUTES, minutes))]
        # All places of modules: a model of the user's is to be found too.
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        threads = str(torch.get_num_threads())
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"},
            process_group=0,
        )
        self.running[number] = process
        threading.Thread(target=self.relay, args=(number, process), daemon=True).start()

    def relay(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.lines.put((number, line.rstrip()))
        self.lines.put((number, None))

    def listen(self) -> None:
        """Until the last process has ended."""
        told: set[int] = set()
        while self.running:
            if self.grid.stop.signum is not None:
                for process in self.running.values():
                    if process.pid not in told:
                        told.add(process.pid)
                        process.terminate()
            with contextlib.suppress(queue.Empty):
                number, line = self.lines.get(timeout=LISTEN_SECONDS)
                if line is None:
                    self.ended(number)
                elif line:
                    self.say(number, line)

    def say(self, number: int, line: str) -> None:
        with contextlib.suppress(OSError):  # a pipe that was closed is no failure of a cell
            print(f"[{number + 1}] {line}", flush=True)

    def ended(self, number: int) -> None:
        """Start the process anew where it was ended and there is something left for it to do."""
        process = self.running.pop(number)
        code = process.wait()
        if code in ENDED_BY_ITSELF or self.grid.stop.reason:
            return
        how = f"exit code {code}" if code > 0 else f"{signal.strsignal(-code)} (signal {-code})"
        cells = (cell for cell in self.grid.cells if was_held_by(cell.folder(self.grid.root), process.pid))
        cell = next(cells, None)
        again = self.deaths.note(cell, how) or cell is not None
        if self.grid.choice.fail_fast and self.grid.some_gave_up():
            again = False
        again = again and bool(self.grid.to_run())
        where = f" in {cell}" if cell else ""
        self.say(number, f"ended{where}: {how}" + ("; started anew" if again else ""))
        if again:
            self.start(number)
