"""Runs at their smallest, and what tests ask of their results folders."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import run_experiment
from experiment import cells as lease_times
from experiment.run_plan import RunPlan, make_plan
from results_folder import CellRecord, read_results

SMOKE = ["--preset", "smoke", "--device", "cpu"]
ONE_PROCESS = ["--workers", "1", "--threads", "1"]
HERE = [*SMOKE, *ONE_PROCESS]  # in this process
FAR = "gpu7"  # another machine
Refused = Callable[..., str]  # what the fixture `refused` is
PATIENCE = 120.0  # seconds, for what another process does
# A run without the comparison, whose figures take longer than the cells.
SCRIPT = (
    "import sys, run_experiment\n"
    "run_experiment.analyze_run = lambda root: True\n"
    "sys.exit(run_experiment.main(sys.argv[1:]))\n"
)


def plan_of(*argv: str) -> RunPlan:
    return make_plan(run_experiment.make_parser().parse_args(argv))


def run(parent: Path, *argv: str, code: int = 0) -> Path:
    """Run the smoke preset in this process, unless told otherwise, to this exit code; the results folder."""
    assert run_experiment.main([*HERE, *argv, "--output-dir", str(parent)]) == code
    return only(parent)


def resume(root: Path, *argv: str) -> int:
    return run_experiment.main([*ONE_PROCESS, "--resume", str(root), *argv])


def run_undisturbed(factory: pytest.TempPathFactory, *argv: str) -> Path:
    """A results folder for the tests of a module, done and not compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_experiment, "analyze_run", lambda root: True)
        return run(factory.mktemp("undisturbed"), *argv)


def start(*argv: str, sleep: float = 0.0) -> subprocess.Popen[str]:
    """A process of its own that runs `argv` and compares nothing; `sleep`: of user_models:Sleepy."""
    paths = f"{Path(run_experiment.__file__).parent}:{Path(__file__).parent}"
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "SLEEP": str(sleep), "PYTHONUNBUFFERED": "1"}
    command, pipe = [sys.executable, "-c", SCRIPT, *argv], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | own)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit code, output and errors, when it and all that it started have ended."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def only(parent: Path) -> Path:
    """The one results folder in a folder."""
    [root] = parent.glob("results_*")
    return root


def records(root: Path) -> list[CellRecord]:
    return read_results(root).cells


def states(root: Path) -> list[str]:
    return [record.state for record in records(root)]


def cells(root: Path) -> list[Path]:
    return [record.folder for record in records(root)]


def quick_leases(patch: pytest.MonkeyPatch) -> None:
    """Leases run out after a second, and are looked at often."""
    for name, seconds in (("LEASE", 1.0), ("HEARTBEAT", 0.05), ("LOOK_AGAIN", 0.05)):
        patch.setattr(lease_times, f"{name}_SECONDS", seconds)


def write_lease(folder: Path, pid: int = 11, host: str = FAR) -> None:
    """The lease of a process that renews it no more."""
    lines = ["filelock/2", f"pid={pid}", f"host={host}", "mode=lease", "token=abc"]
    lines += [f"duration={lease_times.LEASE_SECONDS!r}", ""]
    (folder / lease_times.LEASE).write_text("\n".join(lines))


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what}: waited for in vain"
        time.sleep(0.02)
