"""What a task is asked for and what it is: the data settings and a task's data.

`data_pipeline.py` makes one of the other.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import check_settings, given_path, setting
from tasks.array_cache import default_cache_folder
from tasks.token_dataset import IGNORED, TokenDataset

TARGETS = ("sequence", "token")
METRICS = ("accuracy", "bits_per_byte")


@dataclass(frozen=True)
class DataSettings:
    """Data

    None stands for the task's own default. Raises InputError for values outside their ranges."""

    data_dir: str | None = setting(
        None,
        "folder with the archive of IMDb (or its tree), that of CIFAR-10, or basic_train.tsv, ... of ListOps",
    )
    cache_dir: str | None = setting(
        None, "where downloads and read texts are kept; not set: ~/.cache/attention-comparison"
    )
    tokenizer: str = setting("byte", "tokens of the text tasks", choices=("byte", "word"))
    word_vocabulary: int = setting(20_000, "most frequent training words kept by --tokenizer word", minimum=1)
    min_length: int | None = setting(
        None, "listops: expressions are longer than this; not set: 500", minimum=0
    )
    max_length: int | None = setting(
        None,
        "texts are cut to this many tokens (not set: 4096), expressions are shorter (2000), windows of bytes "
        "(128) and examples of generated tasks (their own) have this length",
        minimum=1,
    )
    train_size: int | None = setting(None, "training examples; not set: all", minimum=1)
    val_size: int | None = setting(None, "validation examples; not set: all", minimum=1)
    test_size: int | None = setting(None, "test examples; not set: all", minimum=1)
    data_seed: int = setting(0, "seed of splits, subsets and made-up data", minimum=0)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def given_sizes(self) -> dict[str, int | None]:
        return {"train": self.train_size, "val": self.val_size, "test": self.test_size}

    def sizes(self, default: dict[str, int]) -> dict[str, int]:
        """The size of each split, as given or else by default."""
        return {name: default[name] if size is None else size for name, size in self.given_sizes.items()}

    @property
    def data_folder(self) -> Path | None:
        return given_path(self.data_dir, "--data-dir") if self.data_dir else None

    @property
    def cache_folder(self) -> Path:
        return given_path(self.cache_dir, "--cache-dir") if self.cache_dir else default_cache_folder()


@dataclass(frozen=True)
class TaskForm:
    """What a task asks of the encoder.

    target: one label for a "sequence", or at every marked "token". causal: no token sees a later one.
    positions: whether they are added. metric: what selects the best epoch, "accuracy" or "bits_per_byte".
    """

    target: str = "sequence"
    causal: bool = False
    positions: bool = True
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        for value, known in ((self.target, TARGETS), (self.metric, METRICS)):
            if value not in known:
                raise ValueError(f"expected one of {', '.join(known)}, got '{value}'")


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task, ready for training.

    name: its true name, of folders and tables. title: for figures. symbols: the printable form of a token id.
    provenance: where the data come from and how they were made, as JSON.
    drawn: where training data are drawn anew, the examples of (seed, epoch); `train` is then an epoch that
        no cell trains on, for sizes and examples. longer_tests: by length, tests beside that of `test`.
    Raises ValueError where the targets of a split are not those that form and num_classes promise.
    """

    name: str
    title: str
    vocab_size: int
    num_classes: int
    class_names: tuple[str, ...]
    train: TokenDataset
    val: TokenDataset
    test: TokenDataset
    symbols: Callable[[int], str]
    provenance: dict[str, Any]
    form: TaskForm = field(default_factory=TaskForm)
    drawn: Callable[[int, int], TokenDataset] | None = None
    longer_tests: dict[str, TokenDataset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split in (self.train, self.val, self.test, *self.longer_tests.values()):
            self._check_targets(split)

    def train_of(self, seed: int, epoch: int) -> TokenDataset:
        """The epoch's training examples: the same each epoch, or drawn anew from (seed, epoch)."""
        if self.drawn is None:
            return self.train
        examples = self.drawn(seed, epoch)
        self._check_targets(examples)
        return examples

    def _check_targets(self, split: TokenDataset) -> None:
        name, form = self.name, "token" if split.token_targets else "sequence"
        if form != self.form.target:
            raise ValueError(f"task {name}: {self.form.target} targets expected, got {form} targets")
        targets = split.labels[split.labels != IGNORED] if split.token_targets else split.labels
        for target in (targets.min(initial=0), targets.max(initial=0)):
            if not 0 <= target < self.num_classes:
                raise ValueError(f"task {name}: targets must be 0 to {self.num_classes - 1}, got {target}")
