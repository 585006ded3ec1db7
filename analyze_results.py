"""Compare the models of a results folder: tables, figures and a report, from its files alone.

    python analyze_results.py results_20260101_120000

makes results_20260101_120000/analysis/ anew (report.md, summary.csv, summary.md, summary.tex, figures/*.png
and *.pdf). The same results give the same bytes. Deleting it loses nothing, and a failure leaves the old one.
Cells that are missing, failed or diverged are named, not dropped. Needs neither torch nor a checkpoint.
"""

import sys
from pathlib import Path

import pandas as pd

from analysis_report import FigureNote, report
from command_line import EXIT_DONE, InputError, Parser, exit_code
from comparison_tables import (
    compare,
    epoch_table,
    learned_table,
    metric_table,
    models_of,
    read_patterns,
    summarize,
    task_facts,
    tasks_of,
    usable,
)
from figure_style import figure_style, model_styles, save_figure
from results_folder import ANALYSIS, read_results, replaced_folder, write_text
from summary_tables import Analysis, tables
from task_figures import TaskFigures, task_stems
from text_tables import latex_table, markdown_table

PROG = "analyze_results.py"
LATEX_HEAD = r"% Needs \usepackage{booktabs}."


def analyze(folder: Path) -> Path:
    """Make `folder`/analysis anew and return it.

    Raises InputError where `folder` is no results folder or cannot be written."""
    results = usable(read_results(folder))
    styles = model_styles(models_of(results))
    patterns, no_patterns = read_patterns(results)
    table = metric_table(results, patterns)
    analysis = Analysis(
        results=results,
        facts={task: task_facts(results, task) for task in tasks_of(results)},
        table=table,
        summary=summarize(table),
        differences=compare(table),
        learned=learned_table(results),
        names={model: style.name for model, style in styles.items()},
        no_patterns=no_patterns,
    )
    epochs = epoch_table(results)
    stems = task_stems(list(analysis.facts))
    with replaced_folder(folder / ANALYSIS) as fresh, figure_style():
        (fresh / "figures").mkdir()
        notes: dict[str, list[FigureNote]] = {task: [] for task in stems}
        for task, stem in stems.items():
            for note, figure in TaskFigures(analysis, task, stem, epochs, patterns, styles).draw():
                save_figure(figure, fresh / "figures", note.stem)
                notes[task].append(note)
        write_text(fresh / "summary.csv", summary_csv(analysis))
        write_text(fresh / "summary.md", "\n\n".join(map(markdown_table, tables(analysis))) + "\n")
        write_text(
            fresh / "summary.tex", "\n\n".join([LATEX_HEAD, *map(latex_table, tables(analysis))]) + "\n"
        )
        write_text(fresh / "report.md", report(analysis, notes))
    return folder / ANALYSIS


def summary_csv(analysis: Analysis) -> str:
    """The tidy table: task, model, seed, metric, value and the task's notice (smoke run, stand-in data)."""
    notices = {task: analysis.notice(task) for task in analysis.facts}
    table: pd.DataFrame = analysis.table.assign(notice=analysis.table["task"].map(notices))
    return table.to_csv(index=False, lineterminator="\n")


def make_parser() -> Parser:
    intro, example, rest = (__doc__ or "").split("\n\n", 2)
    parser = Parser(prog=PROG, description=f"{intro}\n\n{rest}", epilog=f"example:\n{example}")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a results folder made by run_experiment.py")
    return parser


def run(argv: list[str]) -> int:
    folder = make_parser().parse_args(argv).folder
    try:
        made = analyze(folder)
    except OSError as error:
        raise InputError(f"the analysis of {folder} cannot be written: {error}") from error
    print(f"report: {made / 'report.md'}")
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    return exit_code(PROG, lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
