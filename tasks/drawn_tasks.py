"""Tasks of token targets whose training examples are drawn anew each epoch, by a rule for any length.

    task = drawn_task(settings, name="hold", title="Sample and hold", length=128, longer=(512, 2048), ...)

Draws come from (seed, task, split, epoch), so training, validation and test have streams of their own.
Symbols: n examples, N tokens, I ids of a position.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.random_draws import RandomDraws
from tasks.task_data import DataSettings, TaskData, TaskForm
from tasks.token_dataset import TokenDataset

Ids = NDArray[Any]
Draw = Callable[[RandomDraws, int, int], tuple[Ids, Ids]]  # draws, n, N -> tokens (n, N[, I]), labels (n, N)
SPLITS = ("train", "val", "test")


def drawn_task(
    settings: DataSettings,
    *,
    name: str,
    title: str,
    form: TaskForm,
    draw: Callable[[str], Draw],
    symbols: tuple[str, ...],
    class_names: tuple[str, ...],
    sizes: dict[str, int],
    length: int,
    longer: tuple[int, ...],
    about: dict[str, Any],
) -> TaskData:
    """The task at a length.

    draw: of a split, how its examples are drawn. symbols: the printable form of each token id, 0 = pad.
    sizes: of each split, how many examples by default. longer: lengths of further tests, each of about as
    many tokens as the first. about: what its provenance says of its source."""
    sizes, seed = settings.sizes(sizes), settings.data_seed
    smallest = np.min_scalar_type(len(symbols) - 1)

    def split(of: str, count: int, length: int, seed: int, *purpose: int) -> TokenDataset:
        tokens, labels = draw(of)(RandomDraws(seed, name, of, *purpose), count, length)
        flat = tokens.reshape(count * length, *tokens.shape[2:]).astype(smallest)
        return TokenDataset(flat, np.arange(count + 1) * length, labels.ravel(), token_targets=True)

    def drawn(cell_seed: int, epoch: int) -> TokenDataset:
        return split("train", sizes["train"], length, cell_seed, seed, epoch)

    fixed = {of: split(of, sizes[of], length, seed) for of in ("val", "test")}
    tests = {str(n): split("test", max(1, sizes["test"] * length // n), n, seed, n) for n in longer}
    digest = hashlib.sha256()
    for part in (*fixed.values(), *tests.values()):
        digest.update(part.tokens.astype(part.tokens.dtype.newbyteorder("<")).tobytes())
        digest.update(part.labels.astype("<i8").tobytes())
    provenance: dict[str, Any] = {
        "task": name,
        **about,
        "sha256": digest.hexdigest(),
        "tokens": length,
        "vocab_size": len(symbols),
        "data_seed": seed,
        "sizes": sizes,
    }
    return TaskData(
        name=name,
        title=title,
        vocab_size=len(symbols),
        num_classes=len(class_names),
        class_names=class_names,
        train=drawn(seed, 0),
        **fixed,
        symbols=symbols.__getitem__,
        provenance=provenance,
        form=form,
        drawn=drawn,
        longer_tests=tests,
    )
