"""Compare the models of one or several results folders: tables, figures and a report, from their files alone.

    python analyze_results.py results_20260101_120000
    python analyze_results.py results_20260101_120000 results_20260102_120000 --output-dir comparison
    python analyze_results.py results_20260101_120000 --baseline gravitational --pdf

The first makes results_20260101_120000/analysis/ anew (report.html, report.md, summary.csv, summary.md,
summary.tex, figures/*.png). The second takes several folders as one run: more seeds, more models, another
machine. It refuses, naming the first difference, to mix presets, settings, data or arithmetic.
Without --output-dir the analysis of several folders goes to analysis_joined/ in the first of them. The same
results give the same bytes. Deleting an analysis loses nothing, and a failure leaves the old one. Cells that
are missing, failed or diverged are named, not dropped. Needs neither torch nor a checkpoint.

Exit codes: 0 the analysis is made; 2 bad arguments, no results folder, or a place that cannot be written.
"""

import multiprocessing
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from command_line import EXIT_DONE, InputError, Parser, described, exit_code, usable_cores
from reporting.analysis import Analysis, make_analysis
from reporting.analysis_report import render_report
from reporting.comparison_tables import TIMED_METRICS
from reporting.figure_style import figure_style, save_figure
from reporting.run_results import MIXED, read_joined
from reporting.summary_tables import tables
from reporting.task_figures import DrawnFigure, all_figures
from reporting.text_tables import latex_table, markdown_table
from results_folder import ANALYSIS, replaced_folder, write_text

PROG = "analyze_results.py"
JOINED = "analysis_joined"
LATEX_HEAD = r"% Needs \usepackage{booktabs,graphicx}."


def analyze(
    folder: Path,
    *others: Path,
    output: Path | None = None,
    allow_differences: bool = False,
    baseline: str | None = None,
    processes: int = 1,
    pdf: bool = False,
) -> Path:
    """Make the analysis of one or several folders anew and return its folder.

    It goes to `output`; by default to analysis/ in `folder`, or analysis_joined/ where there are `others`.
    baseline: the model that differences are taken to; by default `default_baseline`. processes: how many draw
    figures where there are more than two tasks; they import the main module again. pdf: also as PDFs. Raises
    InputError where one is no results folder, two must not be mixed, `baseline` is no model, or nothing can
    be written."""
    joined = read_joined([folder, *others], allow_differences=allow_differences)
    target = output or folder / (JOINED if others else ANALYSIS)
    if output:
        check_replaceable(output)
    analysis = make_analysis(joined, baseline)
    with replaced_folder(target) as fresh:
        (fresh / "figures").mkdir()
        if processes > 1 and len(analysis.facts) > 2:
            drawn = draw_side_by_side(analysis, fresh / "figures", processes, pdf)
        else:
            drawn = draw(analysis, fresh / "figures", pdf)
        shown = tables(analysis)
        write_text(fresh / "summary.csv", summary_csv(analysis))
        write_text(fresh / "summary.md", "\n\n".join(map(markdown_table, shown)) + "\n")
        write_text(fresh / "summary.tex", "\n\n".join([LATEX_HEAD, *map(latex_table, shown)]) + "\n")
        for name, text in render_report(analysis, drawn, fresh / "figures").items():
            write_text(fresh / name, text)
    return target


def draw(
    analysis: Analysis, folder: Path, pdf: bool = False, only: Sequence[str] | None = None
) -> dict[str, list[DrawnFigure]]:
    """Save the figures, of all tasks or of some; what was drawn, by task."""
    drawn: dict[str, list[DrawnFigure]] = {}
    with figure_style():
        for task, note, figure in all_figures(analysis, only):
            save_figure(figure, folder, note.stem, pdf=pdf)
            drawn.setdefault(task, []).append(note)
    return drawn


def draw_side_by_side(
    analysis: Analysis, folder: Path, processes: int, pdf: bool = False
) -> dict[str, list[DrawnFigure]]:
    """`draw`, with a job for each task; the same bytes."""
    parts = ["", *analysis.facts]
    context = multiprocessing.get_context("spawn")
    # Ctrl-C is for this process, which waits for the others.
    ignore: dict[str, Any] = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(min(processes, len(parts)), context, **ignore) as pool:
        jobs = []
        for part in parts:
            patterns = {cell: one for cell, one in analysis.patterns.items() if cell.task == part}
            jobs.append(pool.submit(draw, replace(analysis, patterns=patterns), folder, pdf, [part]))
        try:
            return {task: notes for job in jobs for task, notes in job.result().items()}
        finally:
            pool.shutdown(cancel_futures=True)


def check_replaceable(target: Path) -> None:
    """InputError where `target` holds something else than an analysis, which would be lost."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target} is no folder; choose another --output-dir")
    names = {path.name for path in target.iterdir()}
    if names and not {"report.md", "summary.csv"} <= names:
        raise InputError(f"{target} holds something else than an analysis; choose another --output-dir")


def summary_csv(analysis: Analysis) -> str:
    """The tidy table: task, model, seed, metric, value, notice (smoke run, shared device)."""
    notices = [
        analysis.notice(task, timed=metric in TIMED_METRICS)
        for task, metric in zip(analysis.table["task"], analysis.table["metric"], strict=True)
    ]
    return analysis.table.assign(notice=notices).to_csv(index=False, lineterminator="\n")


def make_parser() -> Parser:
    parser = Parser(prog=PROG, **described(__doc__))
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="DIR", help="results folders made by run_experiment.py"
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help=f"where the analysis goes; an older analysis there is replaced (default: {ANALYSIS}/ in the "
        f"folder, {JOINED}/ in the first of several)",
    )
    parser.add_argument(
        "--baseline",
        metavar="MODEL",
        help="the model that differences are taken to, as it was named with --models (default: conventional, "
        "or the first model where that was not run)",
    )
    parser.add_argument("--pdf", action="store_true", help="save each figure as a PDF too")
    parser.add_argument(
        MIXED,
        action="store_true",
        help="compare folders although settings, data or arithmetic differ; the report says so first",
    )
    return parser


def run(argv: list[str] | None) -> int:
    arguments = make_parser().parse_args(argv)
    folders: Sequence[Path] = arguments.folders
    try:
        made = analyze(
            *folders,
            output=arguments.output_dir,
            allow_differences=arguments.allow_differences,
            baseline=arguments.baseline,
            processes=usable_cores() if __name__ == "__main__" else 1,
            pdf=arguments.pdf,
        )
    except OSError as error:
        raise InputError(f"the analysis of {folders[0]} cannot be written: {error}") from error
    print(f"report: {made / 'report.html'}")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    return exit_code(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
