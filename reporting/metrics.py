"""What a task is measured by: its name, unit and direction, and how it is read from a row or a result.

    metric = metric_named("bits_per_byte")          # InputError names those that there are
    metric.read(row, "val_{}")                      # row["val_loss"] / ln 2
    metric.shown(2.9172), metric.gain(-0.1)         # "2.917 bits", 0.1: less is better

Files hold loss (nats per predicted token or example) and accuracy under the same keys for every task; the
metric says which of them counts. bits per byte = loss / ln 2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from command_line import choose

ACCURACY = "test_accuracy_best"


@dataclass(frozen=True)
class Metric:
    """name: in files. source: "accuracy" or "loss", what it is made of. factor: of the source to the metric.
    scale, unit, digits: how it is shown. step: the unit of a difference. relevant: the smallest difference
    that matters, in the metric's own scale. most: what a value, 0 at the least, can be."""

    name: str
    source: str
    factor: float
    scale: float
    unit: str
    step: str
    digits: int
    more_is_better: bool
    relevant: float
    most: float

    @property
    def title(self) -> str:
        """In words."""
        return self.name.replace("_", " ")

    @property
    def best(self) -> str:
        """Its name in the tidy table: on the test split, with the weights of the best validation epoch."""
        return f"test_{self.name}_best"

    @property
    def last(self) -> str:
        return f"test_{self.name}_last"

    def at_length(self, length: int) -> str:
        return f"test_{self.name}_at_{length}"

    @property
    def label(self) -> str:
        """For a heading or an axis: "accuracy (%)"."""
        return f"{self.title} ({self.unit})" if self.unit == "%" else self.title

    @property
    def margin(self) -> str:
        """The smallest relevant difference in words: "1 point"."""
        size = f"{self.scale * self.relevant:g}"
        return f"{size} {self.step.removesuffix('s') if size == '1' else self.step}"

    def read(self, row: Mapping[str, Any], key: str) -> float | None:
        """The metric of a row whose keys are `key` with the source's name in it; None where there is none."""
        value = number(row.get(key.format(self.source)))
        return value * self.factor if value is not None and 0 <= value * self.factor <= self.most else None

    def gain(self, difference: float) -> float:
        """The difference, positive where it is an improvement."""
        return difference if self.more_is_better else -difference

    def shown(self, value: float) -> str:
        return f"{self.scale * value:.{self.digits}f} {self.unit}"

    def difference(self, value: float) -> str:
        text = f"{self.scale * value:+.{self.digits}f}"
        return text if float(text) else text[1:]  # neither +0.0 nor -0.0

    def chance_level(self, chance: float | None) -> float | None:
        """The metric of guessing evenly, from a share of right answers: itself, or -log2 of it."""
        if self.source == "accuracy":
            return chance
        return -math.log2(chance) if chance else None


PERCENT = Metric("accuracy", "accuracy", 1.0, 100.0, "%", "points", 1, True, 0.01, 1.0)
BITS = Metric("bits_per_byte", "loss", 1 / math.log(2), 1.0, "bits", "bits", 3, False, 0.02, math.inf)
METRICS = {metric.name: metric for metric in (PERCENT, BITS)}


def metric_named(name: object) -> Metric:
    return METRICS[choose(str(name), METRICS, "metric")]


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
