"""Time the making of LRA's ListOps data set: 100,000 labelled expressions of 500 to 2,000 tokens, one core.

    python benchmarks/listops_generation.py
    python benchmarks/listops_generation.py --expressions 10000 --write --json listops.json

The anchor is the generator of the Long Range Arena itself (lra_benchmarks/data/listops.py of
google-research/long-range-arena): 330 s to draw 100,000 expressions on one core and 400 s to evaluate and
write them, 730 s in all, measured on another machine. Our figure is without writing; --write adds it.
"""

import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: Python looks for modules in this folder only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from command_line import EXIT_DONE, InputError, Parser, described, exit_code
from results_folder import write_json
from tasks.listops import ListOpsSettings, generate_splits
from tasks.listops_tsv import write_files

LRA_SECONDS, LRA_EXPRESSIONS = 730, 100_000
HELD_OUT = 0.02  # share of the validation and of the test split


def measure(expressions: int, seed: int, write: bool) -> dict[str, Any]:
    """Make the expressions, and write them into a folder that is thrown away; the figures of both."""
    held_out = int(HELD_OUT * expressions)
    sizes = {"train": expressions - 2 * held_out, "val": held_out, "test": held_out}
    wall, processor = time.perf_counter(), time.process_time()
    splits = generate_splits(ListOpsSettings(), sizes, seed)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    anchor = LRA_SECONDS * expressions / LRA_EXPRESSIONS
    figures: dict[str, Any] = {
        "expressions": expressions,
        "tokens": sum(len(split.tokens) for split in splits.values()),
        "seconds": round(wall, 3),
        "processor_seconds": round(processor, 3),
        "seconds_of_lra": anchor,
        "times_faster": round(anchor / wall, 1),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    if write:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            write_files(Path(folder), splits)
            figures["seconds_to_write"] = round(time.perf_counter() - started, 3)
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = Parser(**described(__doc__))
    parser.add_argument("--expressions", type=int, default=LRA_EXPRESSIONS, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--write", action="store_true", help="also time writing the three .tsv files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures into this file")
    arguments = parser.parse_args(argv)

    def run() -> int:
        if arguments.expressions < 1 or arguments.seed < 0:
            raise InputError("--expressions must be at least 1 and --seed at least 0")
        if arguments.json and not arguments.json.absolute().parent.is_dir():
            raise InputError(f"cannot write {arguments.json}: its folder does not exist")
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        figures = measure(arguments.expressions, arguments.seed, arguments.write)
        for name, value in figures.items():
            print(f"{name:20}{value}")
        if arguments.json:
            write_json(arguments.json, figures)
        return EXIT_DONE

    return exit_code("listops_generation.py", run)


if __name__ == "__main__":
    sys.exit(main())
