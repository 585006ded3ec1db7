"""Published test accuracies of the Long Range Arena, to draw beside a run of the same size, and never else.

    for line in comparable(results, "listops"):
        print(line.name, line.accuracy, line.source)

A run on shorter texts, fewer examples or words instead of bytes is another task under the same name: it has
no comparable published figure.
"""

from dataclasses import dataclass

from results_folder import Results

SIZES = ("min_length", "max_length", "train_size", "val_size", "test_size")
DRAWN = ("Transformer, LRA", "Local attention", "S4-v2")  # more lines would lie on one another


@dataclass(frozen=True)
class Published:
    """A model's test accuracy, from 0 to 1, and where it is printed."""

    name: str
    accuracy: float
    source: str


_PERCENTS = (  # of ListOps and of Text (IMDb bytes)
    ("Transformer, LRA", 36.37, 64.27, "google-research/long-range-arena, README"),
    ("Transformer, xformers", 37.5, 62.66, "xformers, BENCHMARKS.md"),
    ("Transformer, 5 seeds", 37.11, 65.21, "Mega, table 2"),
    ("Transformer, 3 seeds, 2 layers", 38.37, 61.95, "Skyformer, table 1"),
    ("Gaussian-kernel attention", 38.78, 60.22, "Skyformer, table 1"),
    ("Local attention", 36.1, 60.2, "FlashAttention, table 3"),
    ("S4-v2", 59.6, 86.8, "S4, table 10"),
    ("Mega", 63.14, 90.43, "Mega, table 2"),
)
PUBLISHED = {
    "listops": tuple(Published(name, listops / 100, source) for name, listops, _, source in _PERCENTS),
    "imdb": tuple(Published(name, text / 100, source) for name, _, text, source in _PERCENTS),
}


def comparable(results: Results, task: str) -> tuple[Published, ...]:
    """The published figures that the task's results may be held against: those of the full preset's data,
    unchanged. Empty where the settings say otherwise or do not say."""
    settings = results.config.get("settings")
    data = settings.get("data") if isinstance(settings, dict) else None
    mine = data.get(task) if isinstance(data, dict) else None
    if results.config.get("preset") != "full" or not isinstance(mine, dict):
        return ()
    whole = all(mine.get(name) is None for name in SIZES)
    return PUBLISHED.get(task, ()) if whole and mine.get("tokenizer") == "byte" else ()
