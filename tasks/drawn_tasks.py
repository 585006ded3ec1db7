"""Tasks of token targets whose training examples are drawn anew each epoch, by a rule for any length.

    task = drawn_task(recipe, "Sample and hold, 128 tokens", 128, (512, 2048), settings, about={})

Draws come from (seed, task, split, epoch), so training, validation and test have streams of their own.
Symbols: n examples, N tokens, I ids of a position.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.random_draws import RandomDraws
from tasks.task_data import DataSettings, TaskData, TaskForm
from tasks.token_dataset import TokenDataset

Ids = NDArray[Any]
Draw = Callable[[RandomDraws, int, int], tuple[Ids, Ids]]  # draws, n, N -> tokens (n, N[, I]), labels (n, N)
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Recipe:
    """What a task is at any length.

    draw: of each split, how its examples are drawn. symbols: the printable form of each token id, 0 = pad.
    sizes: of each split, how many examples by default."""

    name: str
    form: TaskForm
    draw: Mapping[str, Draw]
    symbols: tuple[str, ...]
    class_names: tuple[str, ...]
    sizes: dict[str, int]

    def split(self, split: str, count: int, length: int, seed: int, *purpose: str | int) -> TokenDataset:
        tokens, labels = self.draw[split](RandomDraws(seed, self.name, split, *purpose), count, length)
        small = np.min_scalar_type(len(self.symbols) - 1)
        flat = tokens.reshape(count * length, *tokens.shape[2:]).astype(small)
        return TokenDataset(flat, np.arange(count + 1) * length, labels.ravel(), token_targets=True)


def drawn_task(
    recipe: Recipe,
    title: str,
    length: int,
    longer: tuple[int, ...],
    settings: DataSettings,
    about: dict[str, Any],
) -> TaskData:
    """The task at a length; longer: those of its further tests, each of about as many tokens as the first.
    about: what its provenance says of its source."""
    sizes = settings.sizes(recipe.sizes)
    seed = settings.data_seed

    def drawn(cell_seed: int, epoch: int) -> TokenDataset:
        return recipe.split("train", sizes["train"], length, cell_seed, seed, epoch)

    fixed = {split: recipe.split(split, sizes[split], length, seed) for split in ("val", "test")}
    tests = {str(n): recipe.split("test", max(1, sizes["test"] * length // n), n, seed, n) for n in longer}
    digest = hashlib.sha256()
    for part in (*fixed.values(), *tests.values()):
        digest.update(part.tokens.astype(part.tokens.dtype.newbyteorder("<")).tobytes())
        digest.update(part.labels.astype("<i8").tobytes())
    provenance: dict[str, Any] = {
        "task": recipe.name,
        **about,
        "sha256": digest.hexdigest(),
        "tokens": length,
        "vocab_size": len(recipe.symbols),
        "data_seed": seed,
        "sizes": sizes,
    }
    return TaskData(
        name=recipe.name,
        title=title,
        vocab_size=len(recipe.symbols),
        num_classes=len(recipe.class_names),
        class_names=recipe.class_names,
        train=drawn(seed, 0),
        **fixed,
        symbols=recipe.symbols.__getitem__,
        provenance=provenance,
        form=recipe.form,
        drawn=drawn,
        longer_tests=tests,
    )
