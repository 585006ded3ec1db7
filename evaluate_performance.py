"""One run's numbers and figures: when it converged, what its attention looks at, how it learned.

    python evaluate_performance.py RESULTS/listops/gravitational/seed0
    python evaluate_performance.py RESULTS/listops/gravitational/seed0 --pdf

prints the numbers and draws the figures into RESULTS/analysis/listops_gravitational_seed0/ (which a new
analysis of RESULTS clears away), with explorer.html: where each token looks, and who looks at it. Everything
is read from the results folder; no checkpoint is opened.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from command_line import EXIT_DONE, InputError, Parser, described, exit_code
from reporting.attention_explorer import explorer_page
from reporting.attention_figures import (
    attention_figure,
    distance_figure,
    mass_figure,
    rows_of_maps,
    shown_example,
)
from reporting.attention_numbers import attention_entropy, share_within, token_masses
from reporting.comparison_tables import CONVERGENCE, distance_table, epoch_table, learned_table, metric_table
from reporting.figure_style import figure_style, model_styles, save_figure
from reporting.run_results import models_of, task_facts
from reporting.training_figures import curves_figure, learned_figure
from results_folder import (
    ANALYSIS,
    PATTERNS,
    SHARED_BY,
    AttentionPatterns,
    CellRecord,
    Results,
    file_name,
    read_attention_patterns,
    read_results,
    replaced_folder,
    write_text,
)

PROG = "evaluate_performance.py"
EXPLORER = "explorer.html"
MAP_TOKENS, MAP_HEADS = 32, 8  # the most of a map that can be read


def run_numbers(results: Results, record: CellRecord, patterns: AttentionPatterns | None) -> list[str]:
    """What there is to say about one run, a line each."""
    lines = [f"{record.cell}: {record.state}" + (f" ({record.reason})" if record.reason else "")]
    numbers: dict[str, Any] = dict(record.result or {})
    measured = metric_table(replace(results, cells=[record]), {})
    computed = measured[measured["metric"].isin(["convergence_epoch", CONVERGENCE])]
    numbers |= dict(zip(computed["metric"], computed["value"].astype(int).tolist(), strict=True))
    if SHARED_BY in record.config:
        numbers[SHARED_BY] = record.config[SHARED_BY]
    if record.metrics:
        numbers |= {f"last {name}": value for name, value in record.metrics[-1].items()}
    if patterns is not None:
        numbers["attention_entropy"] = float(attention_entropy(patterns).mean())
        for distance in patterns.distance_edges[1:].tolist():
            numbers[f"attention_share_within_{distance}"] = float(share_within(patterns, distance).mean())
        if masses := token_masses([patterns]):
            numbers["heaviest_tokens"] = " ".join(symbol for symbol, _, _ in masses[:8])
            numbers["lightest_tokens"] = " ".join(symbol for symbol, _, _ in masses[:-9:-1])
    for name, value in numbers.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        if isinstance(value, str) and value:
            lines.append(f"  {name:32}{value}")
    return lines


def draw_run(
    results: Results, record: CellRecord, patterns: AttentionPatterns | None, folder: Path, pdf: bool = False
) -> list[str]:
    """Draw the run's learning curves, learned scalars and attention into `folder`, and make the explorer of
    its attention; returns the file names."""
    styles = model_styles(models_of(results))
    facts = task_facts(results, record.cell.task)
    notice = " (smoke test)" if results.config.get("preset") == "smoke" else ""
    title = f"{styles[record.cell.model].name} on {record.cell.task}, seed {record.cell.seed}{notice}"
    only = replace(results, cells=[record])
    learned = learned_table(only)
    drawn = []

    def save(stem: str, figure: Figure) -> None:
        save_figure(figure, folder, stem, pdf=pdf)
        drawn.append(f"{stem}.png")

    with figure_style():
        if record.metrics:
            epochs = epoch_table(only)
            curves = curves_figure(epochs, styles, title, metric=facts.metric, level=facts.level)
            save("learning_curves", curves)
        if len(learned):
            save("learned", learned_figure(learned, styles, title))
        if patterns is None:
            return drawn
        shares = distance_table({record.cell: patterns})
        save("attention_distance", distance_figure(shares, learned, styles, title))
        if masses := token_masses([patterns]):
            save("masses", mass_figure({record.cell.model: masses}, styles, title))
        example, tokens = shown_example(patterns, MAP_TOKENS)
        for layer in range(len(patterns.maps)):
            rows = rows_of_maps(patterns, f"layer {layer + 1}", layer, example, tokens, MAP_HEADS)
            symbols = patterns.symbols[example, :tokens]
            save(f"attention_layer{layer + 1}", attention_figure(rows, symbols, title))
    names = {record.cell.model: styles[record.cell.model].name}
    page = explorer_page(title, {record.cell: patterns}, names, {record.cell.task: facts})
    write_text(folder / EXPLORER, page)
    return [*drawn, EXPLORER]


def find_run(folder: Path) -> tuple[Results, CellRecord]:
    """The results folder around a run's folder, and the run; InputError where it is none of the planned."""
    folder = folder.resolve()
    root = folder.parent.parent.parent
    if not (root / "config.json").is_file():
        raise InputError(f"{folder} is not a run; give RESULTS/task/model/seed0 of a results folder")
    results = read_results(root)
    for record in results.cells:
        if record.folder.resolve() == folder:
            return results, record
    raise InputError(f"{folder} is not among the runs that {root / 'config.json'} planned")


def evaluate(folder: Path, pdf: bool = False) -> None:
    """Print one run's numbers and draw its figures, where there is anything to draw; pdf: also as PDFs.

    Raises InputError where `folder` is no run of a results folder, or nothing can be written."""
    results, record = find_run(folder)
    analysis = results.root / ANALYSIS
    if analysis.is_symlink():
        raise InputError(f"{analysis} is a link; nothing is written through it: remove it")
    patterns, why = None, ""
    try:
        patterns = read_attention_patterns(record.folder / PATTERNS)
    except ValueError as error:
        why = f"no attention patterns: {error}"
    print("\n".join(filter(None, [*run_numbers(results, record, patterns), why])))
    if patterns is None and not record.metrics:
        print("figures: nothing to draw")
        return
    cell = record.cell
    target = analysis / f"{file_name(cell.task)}_{file_name(cell.model)}_seed{cell.seed}"
    try:
        analysis.mkdir(exist_ok=True)
        with replaced_folder(target) as fresh:
            drawn = draw_run(results, record, patterns, fresh, pdf)
    except OSError as error:
        raise InputError(f"the figures cannot be written to {target}: {error}") from error
    print(f"figures: {target} ({', '.join(drawn)})")


def make_parser() -> Parser:
    parser = Parser(prog=PROG, **described(__doc__))
    parser.add_argument("folder", type=Path, metavar="RUN", help="RESULTS/task/model/seed0: a run's folder")
    parser.add_argument("--pdf", action="store_true", help="save each figure as a PDF too")
    return parser


def run(argv: list[str] | None) -> int:
    arguments = make_parser().parse_args(argv)
    evaluate(arguments.folder, arguments.pdf)
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    return exit_code(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
