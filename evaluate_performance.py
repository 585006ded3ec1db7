"""One run's numbers and figures: when it converged, what its attention looks at, how it learned.

    python evaluate_performance.py RESULTS/listops/gravitational/seed0

prints the numbers and draws the figures into RESULTS/analysis/listops_gravitational_seed0/ (which a new
analysis of RESULTS clears away). Everything is read from the results folder; no checkpoint is opened.

Symbols: K examples of at most M tokens, T timescales, H heads, B distance bins. Row i of a map holds the
weights of query i over the keys j. Importing needs numpy only, and draws nothing.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from command_line import EXIT_DONE, InputError, Parser, exit_code
from reporting.array_files import read_arrays
from results_folder import (
    ANALYSIS,
    SHARED_BY,
    CellRecord,
    Results,
    file_name,
    read_results,
    replaced_folder,
)

PROG = "evaluate_performance.py"
PATTERNS = "attention_patterns.npz"


def convergence_epoch(accuracies: Sequence[float], chance: float = 0.0) -> int | None:
    """The first epoch, counted from 1, with (accuracy - chance) / (best - chance) >= 0.9.

    With chance = 0 this is 90 % of the best, a rule that guessing meets on two classes. None where no epoch
    is above chance. The tolerance of 1e-9 is for rounding: accuracies are shares of far fewer examples.
    """
    best = max(accuracies, default=0.0)
    if not best > chance:
        return None
    reached = chance + 0.9 * (best - chance) - 1e-9
    return next(epoch for epoch, accuracy in enumerate(accuracies, 1) if accuracy >= reached)


@dataclass(frozen=True)
class AttentionPatterns:
    """attention_patterns.npz, checked. The masses are None where the mechanism has none.

    tokens (K, M) whole numbers, 0 = pad; symbols (K, M) text; lengths, labels, predictions (K,); maps
    (layers, K, T, H, M, M), rows that sum to 1 over true tokens, 0 elsewhere; key_mass, query_mass
    (layers, K, T, H, M); distance_edges (B + 1,), distance_share (layers, T, H, B): the share of a query's
    weight at edge_b <= |i - j| < edge_(b + 1) in long examples.
    """

    tokens: np.ndarray
    symbols: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    maps: np.ndarray
    distance_edges: np.ndarray
    distance_share: np.ndarray
    key_mass: np.ndarray | None = None
    query_mass: np.ndarray | None = None

    def __post_init__(self) -> None:
        examples, longest = self.tokens.shape if self.tokens.ndim == 2 else (0, 0)
        layers, _, timescales, heads = self.maps.shape[:4] if self.maps.ndim == 6 else (0, 0, 0, 0)
        bins = len(self.distance_edges) - 1 if self.distance_edges.ndim == 1 else 0
        expected: dict[str, tuple[tuple[int, ...], str]] = {
            "tokens": ((examples, longest), "iu"),
            "symbols": ((examples, longest), "U"),
            "lengths": ((examples,), "iu"),
            "labels": ((examples,), "iu"),
            "predictions": ((examples,), "iu"),
            "maps": ((layers, examples, timescales, heads, longest, longest), "f"),
            "distance_edges": ((bins + 1,), "iuf"),
            "distance_share": ((layers, timescales, heads, bins), "f"),
            "key_mass": ((layers, examples, timescales, heads, longest), "f"),
            "query_mass": ((layers, examples, timescales, heads, longest), "f"),
        }
        for name, (shape, kinds) in expected.items():
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape or array.dtype.kind not in kinds or 0 in shape:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected shape {shape}")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name} holds numbers that are not finite")
        if not ((self.lengths >= 1) & (self.lengths <= longest)).all():
            raise ValueError(f"lengths must be 1 to {longest}, got {self.lengths.tolist()}")
        if not (np.diff(self.distance_edges) > 0).all():
            raise ValueError(f"distance_edges must ascend, got {self.distance_edges.tolist()}")


def read_attention_patterns(path: Path) -> AttentionPatterns:
    """The patterns in a file; ValueError says why it holds none. Nothing in it is executed."""
    arrays = read_arrays(path, (field.name for field in fields(AttentionPatterns)))
    try:
        return AttentionPatterns(**arrays)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be used: {error}") from error


def attention_entropy(patterns: AttentionPatterns) -> np.ndarray:
    """How evenly a query spreads its weight, (layers, T, H): 1 = over all tokens alike, 0 = on one token.

    The entropy of a row over the log of the number of tokens, the mean over the queries of all examples.
    Examples of one token say nothing and are left out; NaN where there are no others.
    """
    sums, queries = np.zeros(np.delete(patterns.maps.shape[:4], 1)), 0
    for example, length in enumerate(patterns.lengths):
        if length > 1:
            weights = patterns.maps[:, example, ..., :length, :length].astype(np.float64)
            logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
            sums -= (weights * logs).sum((-2, -1)) / math.log(length)
            queries += int(length)
    return sums / queries if queries else np.full(sums.shape, np.nan)


def share_within(patterns: AttentionPatterns, distance: float) -> np.ndarray:
    """The share of a query's weight at |i - j| < distance, (layers, T, H). `distance` is one of the edges."""
    return patterns.distance_share[..., patterns.distance_edges[1:] <= distance].sum(-1)


def relative_masses(masses: np.ndarray) -> np.ndarray:
    """Masses of an example (layers, T, H, M) over their mean in each layer, timescale and head; then the mean
    over these: (M,). 1 where all masses are 0."""
    mass = masses.astype(np.float64)
    mean = mass.mean(-1, keepdims=True)
    return np.divide(mass, mean, out=np.ones_like(mass), where=mean > 0).mean((0, 1, 2))


def token_masses(patterns: Sequence[AttentionPatterns], role: str = "key") -> list[tuple[str, float, int]]:
    """(symbol, relative mass, occurrences) by falling mass; empty where the mechanism has no masses.

    A token's mass is taken relative to the mean of its example, layer, timescale and head, since G and the
    width of softplus set the scale: 1 is an average token, 2 pulls twice as hard.
    """
    found: dict[str, list[float]] = {}
    for one in patterns:
        masses = one.key_mass if role == "key" else one.query_mass
        if masses is None:
            continue
        for example, length in enumerate(one.lengths):
            relative = relative_masses(masses[:, example, ..., :length])
            for symbol, value in zip(one.symbols[example, :length], relative, strict=True):
                found.setdefault(str(symbol), []).append(float(value))
    rows = [(symbol, math.fsum(values) / len(values), len(values)) for symbol, values in found.items()]
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def run_numbers(record: CellRecord, patterns: AttentionPatterns | None) -> list[str]:
    """What there is to say about one run, a line each."""
    lines = [f"{record.cell}: {record.state}" + (f" ({record.reason})" if record.reason else "")]
    numbers: dict[str, Any] = dict(record.result or {})
    if SHARED_BY in record.config:
        numbers[SHARED_BY] = record.config[SHARED_BY]
    if record.metrics:
        numbers |= {f"last {name}": value for name, value in record.metrics[-1].items()}
    if patterns is not None:
        numbers["attention_entropy"] = float(attention_entropy(patterns).mean())
        for distance in patterns.distance_edges[1:].tolist():
            numbers[f"attention_share_within_{distance}"] = float(share_within(patterns, distance).mean())
        masses = token_masses([patterns])
        if masses:
            numbers["heaviest_tokens"] = " ".join(symbol for symbol, _, _ in masses[:8])
            numbers["lightest_tokens"] = " ".join(symbol for symbol, _, _ in masses[:-9:-1])
    for name, value in numbers.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        if isinstance(value, str) and value:
            lines.append(f"  {name:32}{value}")
    return lines


def draw_run(
    results: Results, record: CellRecord, patterns: AttentionPatterns | None, folder: Path
) -> list[str]:
    """Draw the run's learning curves, learned scalars and attention into `folder`; returns the file names."""
    # Not at the top: the trainer imports this file, and trains without the libraries that draw.
    from reporting import attention_figures, distance_figures, mass_figures
    from reporting.comparison_tables import distance_table, epoch_table, learned_table, models_of, task_facts
    from reporting.figure_style import figure_style, model_styles, save_figure
    from reporting.figures import curves_figure

    styles = model_styles(models_of(results))
    facts = task_facts(results, record.cell.task)
    notice = " (smoke test)" if results.config.get("preset") == "smoke" else ""
    notice += f" (stand-in for {facts.stand_in_for})" if facts.stand_in_for else ""
    title = f"{styles[record.cell.model].name} on {record.cell.task}, seed {record.cell.seed}{notice}"
    only = replace(results, cells=[record])
    figures: dict[str, Callable[[], Any]] = {}
    if record.metrics:
        epochs = epoch_table(only)
        figures["learning_curves"] = lambda: curves_figure(epochs, styles, title, chance=facts.chance)
    learned = learned_table(only)
    if len(learned):
        figures["learned"] = lambda: attention_figures.learned_figure(learned, styles, title)
    if patterns is not None:
        shares = distance_table({record.cell: patterns})
        figures["attention_distance"] = lambda: distance_figures.distance_figure(
            shares, learned, styles, title
        )
        masses = token_masses([patterns])
        if masses:
            by_model = {record.cell.model: masses}
            figures["masses"] = lambda: mass_figures.mass_figure(by_model, styles, title)
        layers, _, timescales = patterns.maps.shape[:3]
        for layer, timescale in itertools.product(range(layers), range(timescales)):
            place = f"layer {layer + 1}, timescale {timescale + 1}"
            figures[f"attention_layer{layer + 1}_timescale{timescale + 1}"] = functools.partial(
                attention_figures.head_figure, patterns, layer, timescale, f"{title}\n{place}"
            )
    with figure_style():
        for stem, draw in figures.items():
            save_figure(draw(), folder, stem)
    return [f"{stem}.png" for stem in figures]


def find_run(folder: Path) -> tuple[Results, CellRecord]:
    """The results folder around a run's folder, and the run; InputError where it is none of the planned."""
    folder = folder.resolve()
    if len(folder.parents) < 3 or not (folder.parents[2] / "config.json").is_file():
        raise InputError(f"{folder} is not a run; give RESULTS/task/model/seed0 of a results folder")
    results = read_results(folder.parents[2])
    for record in results.cells:
        if record.folder.resolve() == folder:
            return results, record
    raise InputError(f"{folder} is not among the runs that {folder.parents[2] / 'config.json'} planned")


def evaluate(folder: Path) -> None:
    """Print one run's numbers and draw its figures, where there is anything to draw.

    Raises InputError where `folder` is no run of a results folder, or nothing can be written."""
    results, record = find_run(folder)
    patterns, why = None, ""
    try:
        patterns = read_attention_patterns(record.folder / PATTERNS)
    except ValueError as error:
        why = f"no attention patterns: {error}"
    print("\n".join(filter(None, [*run_numbers(record, patterns), why])))
    if patterns is None and not record.metrics:
        print("figures: nothing to draw")
        return
    cell = record.cell
    target = results.root / ANALYSIS / f"{file_name(cell.task)}_{file_name(cell.model)}_seed{cell.seed}"
    if target.parent.is_symlink():
        raise InputError(f"{target.parent} is a link; nothing is written through it: remove it")
    try:
        target.parent.mkdir(exist_ok=True)
        with replaced_folder(target) as fresh:
            drawn = draw_run(results, record, patterns, fresh)
    except OSError as error:
        raise InputError(f"the figures cannot be written to {target}: {error}") from error
    print(f"figures: {target} ({', '.join(drawn)})")


def make_parser() -> Parser:
    intro, example, rest = (__doc__ or "").split("\n\n", 2)
    parser = Parser(prog=PROG, description=f"{intro}\n\n{rest}", epilog=f"example:\n{example}")
    parser.add_argument("folder", type=Path, metavar="RUN", help="RESULTS/task/model/seed0: a run's folder")
    return parser


def run(argv: list[str]) -> int:
    evaluate(make_parser().parse_args(argv).folder)
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    return exit_code(PROG, lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
