"""Train every model on every task with every seed, then compare them.

    python run_experiment.py                      # the full comparison on a GPU, a quick one without
    python run_experiment.py --preset smoke       # every step once, tiny, in under a minute, offline
    python run_experiment.py --preset full --dry-run
    python run_experiment.py --models conventional gravitational,softening=0.01 --tasks listops
    python run_experiment.py --learning-rate 0.001 0.003 0.01        # each model and task takes its best
    python run_experiment.py --models conventional my_package.my_module:MyAttention,temperature=2.0
    python run_experiment.py --preset full --max-minutes 55          # ends with exit code 75, and then:
    python run_experiment.py --resume results_20260101_120000        # until it ends with 0
    python run_experiment.py --preset full --prepare                 # for a job array: once, and then each
    python run_experiment.py --resume results_20260101_120000 --cell-index $SLURM_ARRAY_TASK_ID

Results go to a new folder `results_YYYYmmdd_HHMMSS` (see results_folder.py), the comparison into its
`analysis/`. On a CPU each core runs a cell of its own, with one thread (--workers, --threads). A run that was
stopped or killed goes on with --resume, each cell from the end of its last epoch. Several processes, also of
several machines, may work on one folder: each takes cells that no other has, and the last one compares.
Resume only folders that you trust: the models that one names as package.module:Class are imported.

Exit codes: 0 all cells done; 1 some cell failed or diverged, or a task was left out, the others ran, or
results could not be written; 2 bad arguments or input, found before any work; 75 not all done, run again;
130 or 143 interrupted by SIGINT or SIGTERM, resumable.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from command_line import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    InputError,
    Parser,
    add_settings,
    check_package,
    described,
    exit_code,
    one_line,
    option_name,
    usable_cores,
)
from data_pipeline import DataSettings
from experiment.cells import GIVEN_UP, LEFT_FAR, SETTLED, CellJob, LeasedError, freed, leased, verified_cell
from experiment.executors import Executor, Resources, connect_to_ray, make_executor
from experiment.models import COMPARED, SYNTAX
from experiment.plan_files import (
    PROG,
    check_data,
    check_space,
    environment_changes,
    given_places,
    placed,
    read_plan,
    refuse_changes,
    write_cells,
    write_plan,
)
from experiment.run_overview import dry_run, failure_table, listing, results_table
from experiment.run_plan import PRESETS, RunPlan, check_output_folder, find_device, load_tasks, make_plan
from experiment.run_progress import RunProgress, make_progress
from experiment.stop_request import EXIT_RUN_AGAIN, StoppedError, StopRequest
from experiment.tuning import record_choice
from reporting.learning_rates import read_tuning
from results_folder import Cell, create_results_folder, write_status
from train_and_evaluate import ModelSettings, TrainingSettings

MOST_WORKERS = 1024


def make_parser() -> Parser:
    parser = Parser(prog=PROG, **described(__doc__))
    run = parser.add_argument_group("Run")
    run.add_argument(
        "--preset",
        default="auto",
        metavar="|".join(("auto", *PRESETS)),
        help="settings to start from; auto: full on a GPU, else quick (default: auto)",
    )
    run.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"names from --list or package.module:Class, each also with settings of its own, {SYNTAX} "
        f"(default: {' '.join(COMPARED)})",
    )
    run.add_argument("--tasks", nargs="+", metavar="TASK", help="names from --list (default: the preset's)")
    run.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="(default: the preset's)")
    text = "where the results folder is made (default: .)"
    run.add_argument("--output-dir", type=Path, default=Path(), metavar="DIR", help=text)
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    text = "show presets, models with their settings, tasks and the cells' numbers, and end"
    run.add_argument("--list", action="store_true", help=text)
    text = "show cells, parameters and times measured on a few steps, write nothing, and end"
    run.add_argument("--dry-run", action="store_true", help=text)
    text = "also write each epoch's numbers for TensorBoard (pip install -r requirements-tensorboard.txt)"
    run.add_argument("--tensorboard", action="store_true", help=text)
    _add_resuming(parser)
    _add_resources(parser)
    for settings in (ModelSettings, TrainingSettings, DataSettings):
        add_settings(parser, settings)
    return parser


def _add_resuming(parser: Parser) -> None:
    group = parser.add_argument_group("Stopping, resuming, sharing")
    text = "finish a results folder, with its settings; options given again must be the same"
    group.add_argument("--resume", type=Path, metavar="RESULTS", help=text)
    text = "with --resume: run failed and diverged cells again"
    group.add_argument("--retry-failed", action="store_true", help=text)
    text = "stop after M minutes, with exit code 75; epochs in progress are lost (default: no limit)"
    group.add_argument("--max-minutes", type=float, metavar="M", help=text)
    text = (
        "run the cell with this number of --list alone, counted from 0; without --resume in a new folder of "
        "its own, so give the jobs of an array one that --prepare made (default: all cells)"
    )
    group.add_argument("--cell-index", type=int, metavar="I", help=text)
    text = "make the results folder with its plan, run nothing, and end"
    group.add_argument("--prepare", action="store_true", help=text)
    text = "start no cell after one that failed or diverged"
    group.add_argument("--fail-fast", action="store_true", help=text)


def _add_resources(parser: Parser) -> None:
    group = parser.add_argument_group("Cells side by side")
    text = "processes on this machine, on several GPUs in turn; auto: one a core on a CPU, one on GPUs"
    group.add_argument("--workers", default="auto", metavar="K", help=f"{text} (default: auto)")
    text = (
        "CPU threads of each process; another number changes the last bits of the results (default: 1 with "
        "--workers auto on a CPU, else PyTorch's number shared out; with --ray, --cpus-per-cell)"
    )
    group.add_argument("--threads", type=int, metavar="T", help=text)
    text = "a Ray task per cell, on the cluster at HOST:PORT or auto, else on this machine's cores"
    more = " (pip install -r requirements-ray.txt)"
    group.add_argument("--ray", nargs="?", const="local", metavar="ADDRESS", help=text + more)
    for kind, default in (("cpus", "1"), ("gpus", "1 on CUDA, else 0")):
        text = f"with --ray: {kind.upper()[:3]}s that a cell takes, also a fraction (default: {default})"
        group.add_argument(f"--{kind}-per-cell", type=float, metavar="X", help=text)


def chosen_resources(arguments: argparse.Namespace) -> Resources:
    """What the options say of workers, threads and Ray; InputError where they contradict each other."""
    on_gpu = find_device(arguments.device).type == "cuda"
    many = arguments.ray is not None or arguments.workers not in ("auto", "1")
    if many and (arguments.prepare or arguments.cell_index is not None):
        way = "--workers" if arguments.ray is None else "--ray"
        other = "--prepare" if arguments.cell_index is None else "--cell-index"
        raise InputError(f"{way} is for many cells, so it cannot go with {other}")
    for name, value in (("--workers", arguments.workers), ("--threads", arguments.threads)):
        number = str(value).isdecimal() and 1 <= int(value) <= MOST_WORKERS
        if value not in (None, "auto") and not number:
            raise InputError(f"{name} must be 1 to {MOST_WORKERS}, got {value}")
    if arguments.ray is None:
        for name in ("cpus_per_cell", "gpus_per_cell"):
            if getattr(arguments, name) is not None:
                raise InputError(f"{option_name(name)} needs --ray")
        auto = arguments.workers == "auto"
        workers = int(arguments.workers) if not auto else 1 if on_gpu else usable_cores()
        threads = 1 if auto and not on_gpu else max(1, torch.get_num_threads() // workers)
        return Resources(workers, arguments.threads or threads)
    if arguments.workers != "auto":
        raise InputError("--ray and --workers exclude each other: Ray starts its own processes")
    cpus, gpus = arguments.cpus_per_cell, arguments.gpus_per_cell
    for name, value in (("--cpus-per-cell", cpus), ("--gpus-per-cell", gpus)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be above 0 and finite, got {value}")
    if gpus is not None and (gpus > 1 or not on_gpu):
        why = f"must be at most 1, got {gpus}" if gpus > 1 else "needs a run on CUDA; see --device"
        raise InputError(f"--gpus-per-cell {why}")
    cpus = cpus or 1.0
    threads = arguments.threads or max(1, int(cpus))
    return Resources(1, threads, arguments.ray, cpus, gpus or (1.0 if on_gpu else 0.0))


# The results folder


def prepared(arguments: argparse.Namespace, argv: list[str], workers: int) -> tuple[Path, RunPlan]:
    """A new results folder with its plan. Raises InputError before anything is written."""
    plan = make_plan(arguments)
    check_output_folder(arguments.output_dir)
    if arguments.preset == "auto":
        on_gpu = plan.device.type == "cuda"
        why = "a GPU is in use" if on_gpu else "no GPU is in use; --preset full is the whole comparison"
        print(f"preset {plan.preset}: {why}", flush=True)
    plan, tasks = load_tasks(plan, leave_out=not PRESETS[plan.preset].complete)
    check_space(arguments.output_dir, plan, tasks, chosen_cells(plan, arguments))
    root = create_results_folder(arguments.output_dir)
    write_plan(root, plan, tasks, argv, workers)
    return root, plan


def resumed(arguments: argparse.Namespace) -> tuple[Path, RunPlan]:
    """A results folder that is there, and its plan. Raises InputError where they or the data do not fit."""
    root: Path = arguments.resume
    plan = read_plan(root)
    refuse_changes(root, plan, arguments)
    for model in plan.models:
        model.check(plan.model_settings)
    plan, tasks = load_tasks(placed(plan, given_places(arguments), arguments.device))
    check_data(root, tasks)
    if changes := environment_changes(root, plan):
        print(f"this is not where {root} was begun, so bits may differ: {changes}")
    open_cells = [
        cell
        for cell in chosen_cells(plan, arguments)
        if verified_cell(root, cell).state != "done" and not rate_is_chosen(root, cell)
    ]
    check_space(root, plan, tasks, open_cells)
    write_cells(root, plan, tasks)
    if arguments.retry_failed:
        for cell in open_cells:
            if verified_cell(root, cell).state in GIVEN_UP:
                write_status(cell.folder(root), "pending", "to be tried again")
    return root, plan


def chosen_cells(plan: RunPlan, arguments: argparse.Namespace) -> list[Cell]:
    """The cells that this process is to run: all, or the one of --cell-index, with the trials of learning
    rates that come before them."""
    index, count = arguments.cell_index, len(plan.cells)
    if index is None:
        return [*plan.trials, *plan.cells]
    if not 0 <= index < count:
        raise InputError(f"--cell-index must be 0 to {count - 1}, got {index}; see --list")
    cell = plan.cells[index]
    return [*plan.trials_for(cell), cell]


# The loop, and the comparison


def run_cells(root: Path, plan: RunPlan, chosen: Iterable[Cell], executor: Executor, fail_fast: bool) -> None:
    """Every model on every task with every seed: each a cell in its folder, unless it is settled. Before
    them, where there are several learning rates, the trials of each, until all that a result needs are
    over: those that other processes work on are waited for, and taken over where they end."""

    def run_open(cells: Iterable[Cell]) -> None:
        for cell in cells:
            executor.left.pop(cell, None)
            if is_open(root, cell) and not (fail_fast and executor.gave_up):
                executor.run(cell)
        executor.join()

    if plan.learning_rates:
        run_open(cell for cell in plan.trials if cell in chosen)
        run_open(freed(root, list(executor.left), executor.stop.check, to_the_end=True))
        for cell in [cell for cell in plan.cells if cell in chosen]:
            records = [verified_cell(root, one) for one in plan.trials_for(cell)]
            if all(record.state in SETTLED for record in records):
                record_choice(root, plan, cell, records)
            else:  # a trial was stopped: --resume goes on with it
                chosen = [one for one in chosen if one != cell]
    run_open(
        cell
        for seed in plan.seeds  # outermost: a run that is cut off is still a comparison
        for task in plan.tasks
        for model in plan.models
        if (cell := Cell(task, model.name, seed)) in chosen
    )
    far = [cell for cell, ended in executor.left.items() if ended.state == LEFT_FAR]
    run_open(freed(root, far, executor.stop.check))


def is_open(root: Path, cell: Cell) -> bool:
    """Whether a cell is neither done nor given up, or its files are damaged, and its trial is still of
    use."""
    if rate_is_chosen(root, cell):
        return False
    record = verified_cell(root, cell)
    return record.state not in SETTLED or record.damaged


def rate_is_chosen(root: Path, cell: Cell) -> bool:
    """Whether a cell is a trial and the choice it was for is made, which stays."""
    return cell.trial is not None and read_tuning(root, cell.task, cell.model) is not None


def analyze_run(root: Path) -> bool:
    """Compare the cells; a failure here loses no result. Returns whether it worked."""
    try:
        from analyze_results import analyze  # the figure libraries take seconds, in every worker

        with leased(root):
            analyze(root, processes=usable_cores())
    except LeasedError as error:
        print(f"analysis: left to another process ({error})")
    except Exception as error:
        print(f"{PROG}: the analysis failed: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"the results are whole: {analysis_command(root)}", file=sys.stderr)
        return False
    else:
        print(f"analysis: {root / 'analysis' / 'report.html'}")
    return True


def run_and_compare(
    root: Path, plan: RunPlan, arguments: argparse.Namespace, resources: Resources, stop: StopRequest
) -> int:
    """Run the cells, compare them where none is left, and tell what came of them."""
    chosen = chosen_cells(plan, arguments)
    to_run = [cell for cell in chosen if is_open(root, cell)]
    side_by_side = min(resources.workers, max(1, len(to_run))) if resources.ray is None else 1
    epochs = {cell: plan.training_settings_of(cell.task).max_epochs for cell in to_run}
    progress = make_progress(epochs, side_by_side)
    template = CellJob(root, Cell("", "", 0), str(plan.device), given_places(arguments), side_by_side)
    template = replace(template, tensorboard=arguments.tensorboard)
    go_on = f"python {PROG} --resume {shlex.quote(str(root))}"
    executor = make_executor(resources, template, progress, stop, len(to_run))
    try:
        with stop.signals_heard(), executor:
            run_cells(root, plan, chosen, executor, arguments.fail_fast)
    except (StoppedError, KeyboardInterrupt) as stopped:
        return told_of_stop(str(stopped) or "interrupted", go_on, root, progress, stop)
    records = [verified_cell(root, cell) for cell in plan.cells]
    settled = all(record.state in SETTLED for record in records)
    tried = [verified_cell(root, cell) for cell in plan.trials]
    own = {record.state for record in records if record.cell in chosen}
    own |= {record.state for record in tried if record.cell in chosen and record.state == "failed"}
    gave_up = bool(own & set(GIVEN_UP))
    code = EXIT_FAILED if gave_up else EXIT_DONE if own <= {"done"} else EXIT_RUN_AGAIN
    if settled and not analyze_run(root):
        code = EXIT_FAILED
    print(results_table(plan, records))
    if failures := failure_table([*tried, *records]):
        print(failures)
    for task, why in plan.unavailable.items():
        print(f"left out: {task}: {why}")
    for cell, ended in executor.left.items():
        print(f"left to another process: {cell} ({ended.text})")
    if gave_up and settled:
        print(f"to try what failed again: {go_on} --retry-failed")
    elif not settled:
        print(f"not all cells are done: {go_on}")
    return EXIT_FAILED if code == EXIT_DONE and plan.unavailable else code


def analysis_command(root: Path) -> str:
    return f"python analyze_results.py {shlex.quote(str(root))}"


def told_of_stop(why: str, go_on: str, root: Path, progress: RunProgress, stop: StopRequest) -> int:
    kept = f"what is done is kept: go on with {go_on}, or {analysis_command(root)}"
    if not progress.epochs_done:
        kept = f"no epoch was finished, so nothing was gained: give it more time than an epoch takes: {go_on}"
    print(f"{PROG}: {why}; {kept}", file=sys.stderr)
    return EXIT_INTERRUPTED if why == "interrupted" else stop.exit_code


def run(argv: list[str]) -> int:
    arguments = make_parser().parse_args(argv)
    stop = StopRequest(arguments.max_minutes)
    if arguments.retry_failed and arguments.resume is None:
        raise InputError("--retry-failed needs --resume with the results folder whose cells failed")
    if arguments.tensorboard:
        check_package("tensorboard")
    resources = chosen_resources(arguments)
    torch.set_num_threads(resources.threads)
    if arguments.list or arguments.dry_run:
        root = arguments.resume
        plan = make_plan(arguments) if root is None else read_plan(root)
        if arguments.dry_run:
            return dry_run(*load_tasks(plan, leave_out=root is None and not PRESETS[plan.preset].complete))
        print(listing(plan, root))
        return EXIT_DONE
    if resources.ray is not None:
        connect_to_ray(resources)
    if arguments.resume is None:
        root, plan = prepared(arguments, argv, resources.workers)
    else:
        root, plan = resumed(arguments)
    count = sum(is_open(root, cell) for cell in chosen_cells(plan, arguments))
    print(
        f"results: {root} ({count} of {len(plan.trials) + len(plan.cells)} cells to run, preset "
        f"{plan.preset}, {plan.device})",
        flush=True,
    )
    if plan.preset == "smoke":
        print("smoke: a test that everything runs; its figures mean nothing")
    return EXIT_DONE if arguments.prepare else run_and_compare(root, plan, arguments, resources, stop)


def main(argv: list[str] | None = None) -> int:
    def attempt() -> int:
        try:
            return run(sys.argv[1:] if argv is None else argv)
        except OSError as error:
            print(f"{PROG}: error: the results cannot be written: {one_line(error)}", file=sys.stderr)
            return EXIT_FAILED

    return exit_code(PROG, attempt)


if __name__ == "__main__":
    sys.exit(main())
