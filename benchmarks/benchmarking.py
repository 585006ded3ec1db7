"""What the benchmarks share: neighbouring measurements, peak memory in a process of its own, results files.

A machine's speed changes by the minute. So each measurement of a case has one of the anchor right before it,
cases take turns, and what is reported is the median over rounds of the ratio of neighbours, and the ratio of
the least times, which other programs on the machine disturb least.
"""

import datetime
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from command_line import InputError, given_path
from experiment.run_plan import find_device
from results_folder import write_json
from training.run_environment import describe_environment

Seconds = dict[str, float]  # by phase
Step = Callable[[], Seconds]  # does the work once, timed


def chosen_device(name: str, threads: int | None) -> torch.device:
    """The device of that name, with that many threads on the CPU."""
    if threads is not None:
        torch.set_num_threads(threads)
    return find_device(name)


def clock(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_turns(anchor: Step, cases: Mapping[str, Step], repeats: int) -> dict[str, dict[str, Any]]:
    """Each case measured `repeats` times, right after the anchor each time, and once before to warm up.

    Returns for each case and phase: seconds (median), least_seconds, ratio (the median of those to the
    anchor's time just before) and ratio_of_least."""
    for step in (anchor, *cases.values()):
        step()
    pairs: dict[str, list[tuple[Seconds, Seconds]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, step in cases.items():
            pairs[name].append((anchor(), step()))
    least_of_anchor = {
        phase: min(before[phase] for measured in pairs.values() for before, _ in measured)
        for phase in next(iter(pairs.values()))[0][0]
    }
    return {
        name: {
            phase: {
                "seconds": statistics.median(own[phase] for _, own in measured),
                "least_seconds": min(own[phase] for _, own in measured),
                "ratio": statistics.median(own[phase] / before[phase] for before, own in measured),
                "ratio_of_least": min(own[phase] for _, own in measured) / least_of_anchor[phase],
            }
            for phase in least_of_anchor
        }
        for name, measured in pairs.items()
    }


def peak_process(device: torch.device) -> Callable[..., Any]:
    """`peak_process(device)(function, *arguments)` calls the function where peak memory can be told: on the
    CPU in a new process, whose resident set has nothing of earlier cases."""
    return _in_fresh_process if device.type == "cpu" else _here


def _in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _here(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def results_stem(folder: str, benchmark: str, device: torch.device) -> Path:
    """`<folder>/<date>_<device>_<benchmark>`, without suffix; InputError where the folder cannot be made."""
    place = given_path(folder, "--output-dir")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {folder} cannot be made: {error.strerror}") from error
    where = f"cpu-{torch.get_num_threads()}-threads" if device.type == "cpu" else device.type
    return place / f"{datetime.date.today().isoformat()}_{where}_{benchmark}"


def write_results(stem: Path, device: torch.device, settings: dict[str, Any], rows: Any) -> None:
    """The file `<stem>.json`: when and where it was measured, how, and what was found."""
    environment = describe_environment(device)
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    found = {"date": date, "environment": environment, "settings": settings, "results": rows}
    write_json(stem.with_name(f"{stem.name}.json"), found)
