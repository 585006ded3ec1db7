"""Runs at their smallest, and what tests ask of their results folders."""

import time
from collections.abc import Callable
from pathlib import Path

from results_folder import CellRecord, read_results

SMOKE = ["--preset", "smoke", "--device", "cpu"]
HERE = [*SMOKE, "--workers", "1", "--threads", "1"]  # in this process
Refused = Callable[..., str]  # what the fixture `refused` is
PATIENCE = 120.0  # seconds, for what another process does


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


def wait_for_checkpoint(parent: Path, *seeds: int) -> None:
    """Until each seed has a cell whose first epoch is over, its checkpoint, which comes last, included."""
    end = time.monotonic() + PATIENCE
    for seed in seeds:
        while not list(parent.glob(f"*/*/*/seed{seed}/checkpoint_last.pt")):
            assert time.monotonic() < end, "no epoch was finished"
            time.sleep(0.02)
