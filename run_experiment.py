"""Train every model on every task with every seed, then compare them.

    python run_experiment.py                      # the full comparison on a GPU, a quick one without
    python run_experiment.py --preset smoke       # every step once, tiny, in under a minute, offline
    python run_experiment.py --preset full --dry-run
    python run_experiment.py --models conventional my_package.my_module:MyAttention --tasks listops
    python run_experiment.py --models conventional gravitational gravitational,normalization=force
    python run_experiment.py --preset full --max-minutes 55          # ends with exit code 75, and then:
    python run_experiment.py --resume results_20260101_120000        # until it ends with 0
    python run_experiment.py --preset full --prepare                 # for a job array: once, and then each
    python run_experiment.py --resume results_20260101_120000 --cell-index $SLURM_ARRAY_TASK_ID
    torchrun --standalone --nproc-per-node 4 run_experiment.py       # each cell on 4 GPUs, or 4 CPU processes

Results go to a new folder `results_YYYYmmdd_HHMMSS` (see results_folder.py), the comparison into its
`analysis/`. A run that was stopped or killed goes on with --resume, from the last epoch's end, or from the
last step where it was stopped by a signal or its time limit. Several processes, also of several machines,
may work on one folder at a time: each takes cells that no other has, and the last one compares; --workers
and --ray start them (docs/scaling.md). Resume only folders that you trust: the models that one names as
package.module:Class are imported.

With torchrun all processes train one cell together, each a share of every batch. Where --dropout is 0 the
result is that of one process up to the order of float sums; else they draw other masks. Where a process dies,
--max-restarts starts all anew: the same command goes on in the folder that it made, each time with all of
--max-minutes. An error in a cell ends all processes too, and leaves the cell to be gone on with. torchrun
itself ends with 0 or 1, and tells the exit code below in its report.

Exit codes: 0 all cells done; 1 some cell failed or diverged, the others ran, or results could not be
written; 2 bad arguments or input, found before any work; 75 not all done, run again; 130 or 143
interrupted by SIGINT or SIGTERM, resumable.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from command_line import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    InputError,
    Parser,
    add_settings,
    exit_code,
    one_line,
)
from data_pipeline import TASKS, DataSettings, TaskData
from experiment.cell_lock import CellLock, LockedError
from experiment.distributed import (
    agree,
    as_one,
    earlier_folder,
    from_first,
    join,
    launched,
    rank,
    remember_folder,
)
from experiment.experiment_grid import Choice, Grid, accuracy_table, failure_table, verified_cell
from experiment.experiment_plan import (
    COMPARED,
    MODELS,
    PRESETS,
    Plan,
    attention_arguments,
    attention_factory,
    check_output_folder,
    find_device,
    load_tasks,
    make_plan,
    settings_by_cell,
)
from experiment.experiment_progress import duration
from experiment.many_cells import add_options, check_options, run_cells
from experiment.model_cost import count_parameters
from experiment.model_variants import OWN, SYNTAX
from experiment.plan_files import (
    PROG,
    check_data,
    check_space,
    environment_changes,
    parameter_counts,
    read_plan,
    write_cells,
    write_plan,
)
from experiment.stop_request import StoppedError, StopRequest
from experiment.tensorboard_log import check_tensorboard
from experiment.time_estimate import estimate_time
from experiment.transformer_classifier import ModelSettings
from results_folder import create_results_folder
from train_and_evaluate import TrainingSettings

__all__ = ["MODELS", "PRESETS", "main"]


def make_parser() -> Parser:
    intro, examples, rest = (__doc__ or "").split("\n\n", 2)
    parser = Parser(prog=PROG, description=f"{intro}\n\n{rest}", epilog=f"examples:\n{examples}")
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
        help="names from --list or package.module:Class, each also with settings of its own, "
        "gravitational,softening=1.0 or multi_timescale,gammas=0.6:0.9,learn_gammas=false "
        f"(default: {' '.join(COMPARED)})",
    )
    run.add_argument("--tasks", nargs="+", metavar="TASK", help="names from --list (default: the preset's)")
    run.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="(default: the preset's)")
    run.add_argument(
        "--output-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where the results folder is made (default: .)",
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    run.add_argument(
        "--list", action="store_true", help="show presets, models, tasks and the cells' numbers, and end"
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="show cells, parameters and times measured on a few steps, write nothing, and end",
    )
    run.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write each epoch's numbers for TensorBoard (pip install -r requirements-tensorboard.txt)",
    )
    _add_resilience(parser)
    add_options(parser)
    for settings in (ModelSettings, TrainingSettings, DataSettings):
        add_settings(parser, settings)
    return parser


def _add_resilience(parser: Parser) -> None:
    group = parser.add_argument_group("Stopping, going on, sharing")
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RESULTS",
        help="finish a results folder, with its settings; options given again must be the same",
    )
    group.add_argument(
        "--retry-failed", action="store_true", help="with --resume: run failed and diverged cells again"
    )
    group.add_argument(
        "--max-minutes",
        type=float,
        metavar="M",
        help="stop after the step in which M minutes have passed since the start, with exit code 75; longer "
        "than one pass over the validation or the test examples takes (default: no limit)",
    )
    group.add_argument(
        "--cell-index",
        type=int,
        metavar="I",
        help="run the cell with this number of --list alone, counted from 0; without --resume in a new "
        "folder of its own, so give the jobs of an array one that --prepare made (default: all cells)",
    )
    group.add_argument(
        "--prepare", action="store_true", help="make the results folder with its plan, run nothing, and end"
    )
    group.add_argument(
        "--fail-fast", action="store_true", help="start no cell after one that failed or diverged"
    )


def _described(name: str, settings: ModelSettings) -> str:
    """A model's size and what can be set of it, or why it cannot be built with these settings."""
    own = attention_arguments(name, settings)
    try:
        parameters = count_parameters(attention_factory(name, settings)())
    except ValueError as error:
        return f"{'-':>9}  not with these settings: {error}"
    shared = ("embed_dim", "num_heads", "dropout", "batch_first")
    shown = [f"{key}={value}" for key, value in own.items() if key not in shared]
    return f"{parameters:>9,}  {' '.join(shown)}".rstrip()


def listing(arguments: argparse.Namespace) -> str:
    root = arguments.resume
    plan = make_plan(arguments) if root is None else read_plan(root, arguments)
    lines = ["presets:"]
    lines += [f"  {name:32}{preset.summary}" for name, preset in PRESETS.items()]
    lines += [
        f"models (* compared by default), as of preset {plan.preset}: parameters in a layer, own settings:"
    ]
    for name in MODELS:
        lines.append(f"{'*' if name in COMPARED else ' ':>2}{name:32}{_described(name, plan.model)}")
    lines += ["  package.module:Class".ljust(34) + "any class with the interface of nn.MultiheadAttention"]
    lines += [f"  {SYNTAX}".ljust(34) + f"the same with settings of its own: {', '.join(OWN)}"]
    lines += ["tasks:"]
    for task, load in TASKS.items():
        lines.append(f"  {task:32}{' '.join((load.__doc__ or '').split('.')[0].split())}")
    lines += [f"cells of {root or f'preset {plan.preset}'}, by the number that --cell-index takes:"]
    for index, cell in enumerate(plan.cells):
        lines.append(f"{index:6}  {cell}" + (f"  {verified_cell(root, cell).state}" if root else ""))
    return "\n".join(lines)


def dry_run(plan: Plan, tasks: dict[str, TaskData]) -> int:
    """Print what would be run and how long it would take; EXIT_FAILED where a model cannot take a step."""
    parameters = parameter_counts(plan, tasks)
    print(f"preset {plan.preset} on {plan.device}: {len(plan.cells)} cells, seeds {plan.seeds}")
    width = max(48, *(len(f"{task}/{name}") + 2 for task, name in parameters))
    print(f"{'task/model':{width}}{'parameters':>12}{'step':>11}{'epoch':>9}{'cell, at most':>15}")
    total, failed = 0.0, False
    for (task, name), count in parameters.items():
        settings = settings_by_cell(plan, tasks)[task, name]
        factory = attention_factory(name, settings)
        try:
            estimate = estimate_time(factory, tasks[task], settings, plan.training, plan.device)
        except Exception as error:
            failed = True
            print(
                f"{f'{task}/{name}':{width}}{count:12,}  fails: {(str(error).splitlines() or [''])[0]}",
                flush=True,
            )
            continue
        total += estimate.cell * len(plan.seeds)
        times = f"{estimate.step * 1000:8,.0f} ms{duration(estimate.epoch):>9}{duration(estimate.cell):>15}"
        print(f"{f'{task}/{name}':{width}}{count:12,}{times}", flush=True)
    print(f"in all at most about {duration(total)}; nothing was written")
    return EXIT_FAILED if failed else EXIT_DONE


def analyze_run(root: Path) -> bool:
    """Compare the cells; a failure here loses no result. Returns whether it worked."""
    from analyze_results import analyze  # needs the figure libraries: not before they are needed

    try:
        lock = CellLock.take(root)
    except LockedError as error:
        print(f"analysis: left to another process ({error})")
        return True
    try:
        analyze(root)
    except Exception as error:
        print(f"{PROG}: the analysis failed: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"the results are whole: python analyze_results.py {root}", file=sys.stderr)
        return False
    finally:
        lock.release()
    print(f"analysis: {root / 'analysis' / 'report.html'}")
    return True


def prepared(arguments: argparse.Namespace, argv: list[str]) -> tuple[Path, Plan, dict[str, TaskData]]:
    """A new results folder with its plan. Raises InputError before anything is written."""
    plan = make_plan(arguments)
    check_output_folder(arguments.output_dir)
    _check_index(arguments, plan)
    if arguments.preset == "auto":
        on_gpu = plan.device.type == "cuda"
        why = "a GPU is in use" if on_gpu else "no GPU is in use; --preset full is the whole comparison"
        print(f"preset {plan.preset}: {why}", flush=True)
    plan, tasks = load_tasks(plan)
    chosen = plan.cells if arguments.cell_index is None else [plan.cells[arguments.cell_index]]
    check_space(arguments.output_dir, plan, tasks, chosen)
    root = create_results_folder(arguments.output_dir)
    write_plan(root, plan, tasks, argv)
    return root, plan, tasks


def resumed(arguments: argparse.Namespace) -> tuple[Path, Plan, dict[str, TaskData]]:
    """A results folder that is there, its plan and its data. Raises InputError where they do not fit."""
    root: Path = arguments.resume
    plan = read_plan(root, arguments)
    _check_index(arguments, plan)
    _, tasks = load_tasks(plan)
    check_data(root, plan, tasks)
    changes = environment_changes(root, plan)
    if changes:
        print(f"this is not where {root} was begun, so bits may differ: {changes}")
    return root, plan, tasks


def opened(arguments: argparse.Namespace, argv: list[str]) -> tuple[Path, Plan, dict[str, TaskData]]:
    """The results folder, its plan and its data: rank 0 finds or makes it, the others resume it."""
    own: list[tuple[Path, Plan, dict[str, TaskData]]] = []

    def open_first() -> Path:
        own.append(prepared(arguments, argv) if arguments.resume is None else resumed(arguments))
        remember_folder(own[0][0])
        return own[0][0]

    arguments.resume = from_first(open_first)
    return agree(lambda: own[0] if own else resumed(arguments))


def _check_index(arguments: argparse.Namespace, plan: Plan) -> None:
    index, count = arguments.cell_index, len(plan.cells)
    if index is not None and not 0 <= index < count:
        raise InputError(f"--cell-index must be 0 to {count - 1}, got {index}; see --list")


def run_part(grid: Grid) -> int:
    """Run cells for another process, which compares them and tells what came of them."""
    try:
        with grid.stop.signals_heard():
            return grid.run().exit_code
    except StoppedError:
        return grid.stop.exit_code


def run_grid(grid: Grid, arguments: argparse.Namespace) -> int:
    """Run the cells, compare them where none is left, and tell what came of them."""
    root, plan = grid.root, grid.plan
    go_on = f"python {PROG} --resume {shlex.quote(str(root))}"
    keep = f"what is done is kept: go on with {go_on}, or python analyze_results.py {root}"
    try:
        with grid.stop.signals_heard():
            outcome = run_cells(grid, arguments)
    except StoppedError as stopped:
        print(f"{PROG}: {stopped}; {keep}", file=sys.stderr)
        return grid.stop.exit_code
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; {keep}", file=sys.stderr)
        return EXIT_INTERRUPTED
    code = outcome.exit_code
    if outcome.settled and rank() == 0 and not analyze_run(root):
        code = EXIT_FAILED
    print(accuracy_table(plan, outcome.records))
    if failures := failure_table(outcome.records):
        print(failures)
    for cell, holder in outcome.elsewhere.items():
        print(f"left to another process: {cell} ({holder})")
    if code == EXIT_FAILED and outcome.settled:
        print(f"to try what failed again: {go_on} --retry-failed")
    elif not outcome.settled:
        print(f"not all cells are done: {go_on}")
    return code


def run(argv: list[str]) -> int:
    arguments = make_parser().parse_args(argv)
    processes, since = arguments.one_of
    part = processes is not None
    stop = StopRequest(arguments.max_minutes, parent=os.getppid() if part else None)
    if arguments.retry_failed and arguments.resume is None:
        raise InputError("--retry-failed needs --resume with the results folder whose cells failed")
    if arguments.dry_run and launched():
        raise InputError("--dry-run measures one process: leave torchrun out")
    if arguments.tensorboard:
        check_tensorboard()
    check_options(arguments)
    if arguments.list:
        print(listing(arguments))
        return EXIT_DONE
    if arguments.dry_run:
        plan = make_plan(arguments) if arguments.resume is None else read_plan(arguments.resume, arguments)
        return dry_run(*load_tasks(plan))
    join(find_device(arguments.device))
    arguments.resume = from_first(lambda: arguments.resume or earlier_folder())
    new = arguments.resume is None
    root, plan, tasks = opened(arguments, argv)
    given = arguments.cell_index, arguments.retry_failed, arguments.fail_fast, arguments.tensorboard
    choice = Choice(*given, processes, since)
    grid = Grid(root, plan, tasks, stop, choice)
    if not new:
        from_first(lambda: check_space(root, plan, tasks, grid.to_run()))
        from_first(lambda: write_cells(root, plan, tasks))
    if part:
        return run_part(grid)
    cells = f"{len(grid.to_run())} of {len(plan.cells)} cells to run"
    print(f"results: {root} ({cells}, preset {plan.preset}, {plan.device})", flush=True)
    if plan.preset == "smoke":
        print("smoke: a test that everything runs; its figures mean nothing")
    return EXIT_DONE if arguments.prepare else run_grid(grid, arguments)


def attempt(argv: list[str]) -> int:
    try:
        return exit_code(PROG, lambda: run(argv))
    except OSError as error:
        print(f"{PROG}: error: the results cannot be written: {one_line(error)}", file=sys.stderr)
        return EXIT_FAILED


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    return exit_code(PROG, lambda: as_one(lambda: attempt(given)))


if __name__ == "__main__":
    sys.exit(main())
