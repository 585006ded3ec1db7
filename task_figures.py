"""Which figures a comparison has, one task at a time, and how each is to be read.

    for note, figure in TaskFigures(analysis, task, stem, epochs, progress, patterns, styles).draw():
        save_figure(figure, folder, note.stem)

File names hold the task's own name. Every title holds the notice of smoke runs and stand-in data.
"""

from collections import Counter
from collections.abc import Iterator

import pandas as pd
from matplotlib.figure import Figure

from attention_figures import attention_figure, distance_figure, learned_figure, mass_figure, shown_example
from comparison_tables import (
    ACCURACY,
    BASELINE,
    CONVERGENCE,
    distance_table,
    improvements,
    radar_scores,
)
from evaluate_performance import AttentionPatterns, token_masses
from figure_style import ModelStyle, drawable
from figures import (
    Panel,
    accuracy_figure,
    bars_figure,
    curves_figure,
    improvement_figure,
    radar_figure,
)
from report_blocks import FigureNote
from results_folder import Cell, file_name
from summary_tables import MIB, Analysis
from text_tables import short

LONGEST_STEM = 60
BARS = "Bar: mean over seeds; marks: one per seed; black: 95 % t interval of the mean, where n is at least 2."
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
Drawn = Iterator[tuple[FigureNote, Figure]]


def task_stems(tasks: list[str]) -> dict[str, str]:
    """A task's name as a part of file names; a number is added where two would be the same."""
    stems: dict[str, str] = {}
    for number, task in enumerate(tasks):
        stem = file_name(task)[:LONGEST_STEM]
        stems[task] = f"{stem}_{number}" if stem in stems.values() else stem
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
            yield from self._comparisons()
        yield from self._attention()
        if len(self.learned):
            yield self._learned()

    def _note(self, kind: str, what: str, caption: str) -> tuple[FigureNote, str]:
        """The figure's note, and its title with the notice."""
        notice = self.analysis.notice(self.task)
        title = f"{what}: {drawable(self.facts.title, 60)}"
        return FigureNote(f"{kind}_{self.stem}", f"{what}, {self.task}", caption), (
            f"{title}\n{drawable(notice, 90)}" if notice else title
        )

    def _accuracy(self) -> tuple[FigureNote, Figure]:
        note, title = self._note(
            "accuracy",
            "Test accuracy",
            f"{BARS} The bars start at 0. Lines: guessing, and always naming the largest class.",
        )
        values = self.table[self.table["metric"] == ACCURACY]
        levels = {"chance": self.facts.chance, "majority": self.facts.majority}
        return note, accuracy_figure(values, self.styles, title, absent=self.absent, **levels)

    def _curves(self) -> tuple[FigureNote, Figure]:
        note, title = self._note(
            "learning_curves",
            "Learning curves",
            "Thick: mean over the finished seeds, as far as all of them ran; band: from the smallest to the "
            "largest seed; thin: each seed. Dotted, ending in a cross: a cell that did not finish. Training "
            "accuracy is taken while the weights change and dropout is on, so it may lie below validation.",
        )
        return note, curves_figure(self.epochs, self.styles, title, chance=self.facts.chance)

    def _comparisons(self) -> Drawn:
        note, title = self._note(
            "convergence",
            "Convergence",
            f"{BARS} Fewer is faster. Left: the first epoch at 90 % of the best validation accuracy, which "
            "guessing already meets on two classes. Right: 90 % of the way from chance to the best.",
        )
        yield note, bars_figure(self.table, self.styles, CONVERGENCE_PANELS, title, absent=self.absent)
        note, title = self._note(
            "cost",
            "Cost",
            f"{BARS} Times hold for this machine only: compare models, not runs on different machines. Peak "
            "memory on a CPU counts the whole process, its libraries included.",
        )
        yield note, bars_figure(self.table, self.styles, COST_PANELS, title, absent=self.absent)
        gains = improvements(self.table)
        others = {model: style for model, style in self.styles.items() if model != BASELINE}
        if len(gains) and others:
            name = self.styles[BASELINE].name
            note, title = self._note(
                "improvement",
                f"Relative improvement over {name}",
                f"In percent of {name}'s value with the same seed: right of 0 the model gains accuracy or "
                "saves epochs, time or memory. Marks: one per seed; black: mean and 95 % t interval, where n "
                "is at least 2. An interval that holds 0 is no sign of a difference.",
            )
            yield note, improvement_figure(gains, others, IMPROVEMENT_PANELS, title)
        note, title = self._note(
            "radar",
            "Accuracy and efficiency, 1 = best of these models",
            "Each axis is scaled to the best model of this task, from means over seeds: accuracy / the "
            "highest accuracy; the fewest epochs to converge (above chance) / epochs; the shortest time per "
            "epoch / time; the smallest peak memory / memory. 0.5 is half as good as the best. An open line: "
            "a model without that number. The area has no meaning, and the radar shows no uncertainty.",
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
            "Share of a query's weight on keys at each distance, in bins that double in width, so that even "
            "weights rise to the right; mean over queries of long validation examples, heads and seeds. "
            "Thick: mean over timescales; thin: each timescale, 1 being the first in the module.",
        )
        yield note, distance_figure(distance_table(self.patterns), self.styles, title)
        masses = {
            model: token_masses([one for cell, one in self.patterns.items() if cell.model == model])
            for model in self.styles
        }
        masses = {model: tokens for model, tokens in masses.items() if tokens}
        if masses:
            note, title = self._note(
                "masses",
                "Heaviest and lightest tokens (as keys)",
                "Mass of a token as a key over the mean mass of its example, mean over layers, timescales, "
                "heads, examples and seeds; in brackets how often it occurs there. 1: an average token. A "
                "token that occurs once or twice says little.",
            )
            yield note, mass_figure(masses, self.styles, title)

    def _attention_map(self, cell: Cell, style: ModelStyle) -> tuple[FigureNote, Figure]:
        one = self.patterns[cell]
        example, shown = shown_example(one)
        length = int(one.lengths[example])
        cut = f"the first {shown} of {length} tokens of" if shown < length else "all tokens of"
        note, title = self._note(
            f"attention_{file_name(cell.model)[:LONGEST_STEM]}",
            f"Attention of {style.name}",
            f"Weights before dropout, mean over heads, for {cut} one validation example (seed {cell.seed}). "
            "Row: the query; column: the key it attends to. Bright: more weight, on a square-root scale that "
            "the panels share; the scale differs between models.",
        )
        return note, attention_figure(one, title)

    def _learned(self) -> tuple[FigureNote, Figure]:
        note, title = self._note(
            "learned",
            "Learned horizons and strength of gravity",
            "Horizon 1 / (1 - gamma): the distance in tokens over which the weight falls to about a third; "
            "t: timescale. G: strength of gravity, 1 at the start. Line: one per layer and timescale, mean "
            "over heads and seeds; band: smallest to largest. A flat line has learned nothing.",
        )
        return note, learned_figure(self.learned, self.styles, title)
