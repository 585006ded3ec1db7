"""Which figures a comparison has, one task at a time, and how each is to be read.

    for note, figure in TaskFigures(analysis, task, stem, epochs, progress, patterns, styles).draw():
        save_figure(figure, folder, note.stem)

File names hold the task's own name. Every title holds the notice of smoke runs and stand-in data,
and one with times also that of cells that shared a device.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.figure import Figure

from evaluate_performance import AttentionPatterns, relative_masses, token_masses
from reporting import figure_captions as captions
from reporting.accuracy_against_cost import trade_offs
from reporting.attention_figures import (
    SHOWN_GRID_TOKENS,
    attention_figure,
    learned_figure,
    shown_example,
    shown_maps,
)
from reporting.comparison_tables import (
    ACCURACY,
    CONVERGENCE,
    distance_table,
    improvements,
    radar_scores,
)
from reporting.distance_figures import distance_figure
from reporting.figure_style import ModelStyle, drawable
from reporting.figures import (
    Panel,
    accuracy_figure,
    bars_figure,
    curves_figure,
    improvement_figure,
    radar_figure,
    reference_levels,
)
from reporting.mass_figures import mass_figure, shaded_figure
from reporting.progress_figures import progress_figure
from reporting.published_results import PUBLISHED, comparable
from reporting.report_blocks import FigureNote
from reporting.summary_tables import MIB, Analysis
from reporting.text_tables import short
from results_folder import Cell, file_name

LONGEST_STEM = 60
CONVERGENCE_PANELS = (
    Panel("convergence_epoch", "epochs to 90 % of the best validation accuracy", form=short, whole=True),
    Panel(
        CONVERGENCE,
        "the same, counted above chance",
        form=short,
        unmeasured="never above chance",
        whole=True,
    ),
)
COST_PANELS = (
    Panel("seconds_per_epoch", "seconds per training epoch", form=short),
    Panel("tokens_per_second", "training tokens per second", form=short),
    Panel("peak_memory_bytes", "peak memory (MiB)", 1 / MIB, form=short),
    Panel("parameters", "parameters", form=short),
)
IMPROVEMENT_PANELS = (
    (ACCURACY, "test accuracy: gain (%)"),
    (CONVERGENCE, "epochs to converge, above chance: saving (%)"),
    ("seconds_per_epoch", "time per epoch: saving (%)"),
    ("peak_memory_bytes", "peak memory: saving (%)"),
)
TIMED = ("accuracy_time", "cost", "improvement", "radar")  # figures with times or memory
Drawn = Iterator[tuple[FigureNote, Figure]]


def file_stems(names: Sequence[str]) -> dict[str, str]:
    """Names of tasks or models as parts of file names; a number is added where two would be the same."""
    stems: dict[str, str] = {}
    for number, name in enumerate(names):
        stem = file_name(name)[:LONGEST_STEM]
        stems[name] = f"{stem}_{number}" if stem in stems.values() else stem
    return stems


class TaskFigures:
    """The figures of one task, from the task's part of every table."""

    def __init__(
        self,
        analysis: Analysis,
        task: str,
        stem: str,
        epochs: pd.DataFrame,
        progress: pd.DataFrame,
        patterns: dict[Cell, AttentionPatterns],
        styles: dict[str, ModelStyle],
    ) -> None:
        self.analysis, self.task, self.stem, self.styles = analysis, task, stem, styles
        self.facts = analysis.facts[task]
        self.table = analysis.table[analysis.table["task"] == task]
        self.epochs = epochs[epochs["task"] == task]
        self.progress = progress[progress["task"] == task]
        self.learned = analysis.learned[analysis.learned["task"] == task]
        self.patterns = {cell: one for cell, one in patterns.items() if cell.task == task}
        self.absent = self._absent()

    def _absent(self) -> dict[str, str]:
        """Why a model has no result, by model: "no result (failed, 2 missing)"."""
        words = {}
        for model in self.styles:
            cells = [
                record
                for record in self.analysis.results.cells
                if (record.cell.task, record.cell.model) == (self.task, model)
            ]
            states = Counter(record.state for record in cells)
            if not states["done"]:
                counts = (f"{count} {state}" if count > 1 else state for state, count in states.items())
                words[model] = f"no result ({', '.join(counts) or 'not planned'})"
        return words

    def draw(self) -> Drawn:
        """One figure after the other, so that only one is in memory."""
        if len(self.absent) < len(self.styles):
            yield self._accuracy()
        if not self.epochs.empty:
            yield self._curves()
        if len(self.absent) < len(self.styles):
            yield self._progress()
            yield from self._comparisons()
        yield from self._attention()
        if len(self.learned):
            yield self._learned()

    def _note(self, kind: str, what: str, caption: str) -> tuple[FigureNote, str]:
        """The figure's note, and its title with the notice."""
        notice = self.analysis.notice(self.task, timed=kind in TIMED)
        title = f"{what}: {drawable(self.facts.title, 60)}"
        return FigureNote(f"{kind}_{self.stem}", f"{what}, {self.task}", caption), (
            f"{title}\n{drawable(notice, 90)}" if notice else title
        )

    def _accuracy(self) -> tuple[FigureNote, Figure]:
        note, title = self._note(
            "accuracy",
            "Test accuracy",
            captions.ACCURACY_POINTS.format(published=self._published()),
        )
        values = self.table[self.table["metric"] == ACCURACY]
        published = comparable(self.analysis.results, self.task)
        levels = reference_levels(self.facts.chance, self.facts.majority, published)
        return note, accuracy_figure(values, self.styles, title, levels, absent=self.absent)

    def _published(self) -> str:
        """What the caption says of published figures."""
        if comparable(self.analysis.results, self.task):
            return captions.PUBLISHED_DRAWN
        return captions.PUBLISHED_LEFT_OUT if self.task in PUBLISHED else ""

    def _curves(self) -> tuple[FigureNote, Figure]:
        note, title = self._note(
            "learning_curves",
            "Learning curves",
            captions.CURVES,
        )
        return note, curves_figure(self.epochs, self.styles, title, chance=self.facts.chance)

    def _progress(self) -> tuple[FigureNote, Figure]:
        note, title = self._note(
            "accuracy_time",
            "Accuracy against time and tokens",
            captions.PROGRESS,
        )
        target = self.analysis.targets.get(self.task)
        points = trade_offs(self.table)
        return note, progress_figure(self.progress, points, self.styles, title, target=target)

    def _comparisons(self) -> Drawn:
        note, title = self._note(
            "convergence",
            "Convergence",
            f"{captions.BARS} {captions.CONVERGENCE}",
        )
        yield note, bars_figure(self.table, self.styles, CONVERGENCE_PANELS, title, absent=self.absent)
        note, title = self._note(
            "cost",
            "Cost",
            f"{captions.BARS} {captions.COST}",
        )
        yield note, bars_figure(self.table, self.styles, COST_PANELS, title, absent=self.absent)
        baseline = self.analysis.baseline
        gains = improvements(self.table, baseline)
        others = {model: style for model, style in self.styles.items() if model != baseline}
        if len(gains) and others:
            name = self.styles[baseline].name
            note, title = self._note(
                "improvement",
                f"Relative improvement over {name}",
                captions.IMPROVEMENT.format(name=name),
            )
            yield note, improvement_figure(gains, others, IMPROVEMENT_PANELS, title)
        note, title = self._note(
            "radar",
            "Accuracy and efficiency, 1 = best of these models",
            captions.RADAR,
        )
        yield note, radar_figure(radar_scores(self.analysis.summary, self.task), self.styles, title)

    def _attention(self) -> Drawn:
        for model, style in self.styles.items():
            cell = next((cell for cell in self.patterns if cell.model == model), None)
            if cell is not None:
                yield self._attention_map(cell, style)
        if not self.patterns:
            return
        note, title = self._note(
            "attention_distance",
            "Attention weight by distance",
            captions.DISTANCE,
        )
        yield note, distance_figure(distance_table(self.patterns), self.learned, self.styles, title)
        masses = {
            model: token_masses([one for cell, one in self.patterns.items() if cell.model == model])
            for model in self.styles
        }
        masses = {model: tokens for model, tokens in masses.items() if tokens}
        if masses:
            note, title = self._note(
                "masses",
                "Heaviest and lightest tokens (as keys)",
                captions.MASSES,
            )
            yield note, mass_figure(masses, self.styles, title)
            yield self._shaded()

    def _shaded(self) -> tuple[FigureNote, Figure]:
        """An example of each model's first cell that has masses: the same one for models of equal seed."""
        examples, seeds = {}, set()
        for model in self.styles:
            for cell, one in self.patterns.items():
                if cell.model == model and one.key_mass is not None and model not in examples:
                    example = int(one.lengths.argmax())
                    length = int(one.lengths[example])
                    masses = relative_masses(one.key_mass[:, example, ..., :length])
                    examples[model] = one.symbols[example, :length].tolist(), masses
                    seeds.add(cell.seed)
        note, title = self._note(
            "mass_text",
            "One example, its tokens shaded by mass",
            captions.SHADED.format(seeds=", ".join(map(str, sorted(seeds)))),
        )
        return note, shaded_figure(examples, self.styles, title)

    def _attention_map(self, cell: Cell, style: ModelStyle) -> tuple[FigureNote, Figure]:
        one = self.patterns[cell]
        example, shown = shown_example(one, SHOWN_GRID_TOKENS)
        length, (layers, heads, _) = int(one.lengths[example]), shown_maps(one)
        parts = "all layers" if len(layers) == len(one.maps) else "the last layer"
        parts += " and heads" if heads == one.maps.shape[3] else f", {heads} of {one.maps.shape[3]} heads"
        cut = f"the first {shown} of {length} tokens of" if shown < length else "all tokens of"
        note, title = self._note(
            f"attention_{file_stems([*self.styles])[cell.model]}",
            f"Attention of {style.name}",
            captions.ATTENTION.format(cut=cut, seed=cell.seed, parts=parts),
        )
        return note, attention_figure(one, title)

    def _learned(self) -> tuple[FigureNote, Figure]:
        note, title = self._note(
            "learned",
            "Learned horizons and strength of gravity",
            captions.LEARNED,
        )
        return note, learned_figure(self.learned, self.styles, title)
