"""Token sequences of many lengths in one flat array, and the padded batches made from them.

    for batch in training_batches(dataset, 32, seed=0, epoch=1):
        logits = model(batch.tokens, batch.key_padding_mask)      # (N, L), (N, L) True = pad

Training batches are cut from length buckets: the examples are shuffled, taken in pools of
`POOL_BATCHES` batches, sorted by length within each pool, cut into batches, and the batches are shuffled.
So a batch holds similar lengths, little of it is padding, and the order still differs from epoch to epoch.

Symbols: n examples of a split, N examples of a batch, L its length in tokens. Pad id is 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.random_draws import RandomDraws

PAD_ID = 0
IGNORED = -100  # the label of a token at which nothing is predicted
POOL_BATCHES = 64


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """One split of a task.

    tokens: (total,) uint8, uint16 or int32, the examples one after the other; (total, I) where each
        position has I ids.
    offsets: (n + 1,) int64, example i is tokens[offsets[i] : offsets[i + 1]].
    labels: (n,) int64, 0..num_classes - 1; or, with token_targets, (total,), IGNORED where none is asked for.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    token_targets: bool = False

    def __post_init__(self) -> None:
        if self.token_targets:
            if len(self.labels) != len(self.tokens):
                raise ValueError(f"{len(self.tokens)} tokens need a label each, got {len(self.labels)}")
        elif self.offsets.shape != (len(self.labels) + 1,):
            raise ValueError(f"{len(self.labels)} labels need one offset more, got {len(self.offsets)}")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens) or (self.lengths < 0).any():
            raise ValueError("offsets must rise from 0 to the number of tokens")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens of each example."""
        return np.diff(self.offsets)

    def example(self, index: int) -> NDArray[Any]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def take(self, chosen: NDArray[np.int64], max_length: int | None = None) -> "TokenDataset":
        """The chosen examples in the order given, each cut to its first `max_length` tokens."""
        lengths = self.lengths[chosen]
        if max_length is not None:
            lengths = np.minimum(lengths, max_length)
        starts = self.offsets[chosen]
        spans = list(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))

        def cut(flat: NDArray[Any]) -> NDArray[Any]:
            return np.concatenate([flat[:0], *(flat[start:stop] for start, stop in spans)])

        labels = cut(self.labels) if self.token_targets else self.labels[chosen]
        return TokenDataset(cut(self.tokens), offsets_of(lengths), labels, self.token_targets)


def offsets_of(lengths: NDArray[np.integer[Any]] | Sequence[int]) -> NDArray[np.int64]:
    """(n + 1,) offsets of sequences of these lengths laid end to end."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def concatenate(parts: Sequence[TokenDataset]) -> TokenDataset:
    """The examples of all parts, in their order."""
    return TokenDataset(
        np.concatenate([part.tokens for part in parts]),
        offsets_of(np.concatenate([part.lengths for part in parts])),
        np.concatenate([part.labels for part in parts]),
    )


def count_identical(splits: dict[str, TokenDataset]) -> dict[str, int]:
    """How many examples of a split are in another too: "train in test", "val in train", "val in test"."""
    found = {
        name: [split.example(index).tobytes() for index in range(len(split))]
        for name, split in splits.items()
    }
    known = {name: set(examples) for name, examples in found.items()}
    return {
        f"{one} in {other}": sum(example in known[other] for example in found[one])
        for one, other in (("train", "test"), ("val", "train"), ("val", "test"))
    }


def stratified_choice(labels: NDArray[np.int64], size: int, seed: int, *purpose: str) -> NDArray[np.int64]:
    """`size` positions of `labels` in ascending order, each class with its share to within one example.

    Of one seed and purpose, a class's smaller choice lies within its larger one."""
    if not 0 <= size <= len(labels):
        raise ValueError(f"cannot choose {size} of {len(labels)} examples")
    order = RandomDraws(seed, "stratified choice", *purpose).order(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * size / max(1, len(labels))
    quotas = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(quotas - exact, kind="stable")
    quotas[largest_remainders[: size - quotas.sum()]] += 1
    chosen = [order[labels[order] == kind][:quota] for kind, quota in zip(classes, quotas, strict=True)]
    return np.sort(np.concatenate([*chosen, np.zeros(0, np.int64)]).astype(np.int64))


@dataclass(frozen=True, eq=False)
class Batch:
    """A padded batch.

    tokens: (N, L) int64, or (N, L, I). key_padding_mask: (N, L) bool, True = pad.
    labels: (N,) int64, or (N, L). index: (N,) int64, the examples' positions in their split.
    predictions: how many labels count.
    """

    tokens: torch.Tensor
    key_padding_mask: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    predictions: int


def training_batches(
    dataset: TokenDataset,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    pad_to: str | int = "longest",
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Every example once, in batches of similar lengths; order and make-up follow from (seed, epoch) alone.

    pad_to: "longest" of the batch, or a number of tokens at least as large as the longest example.
    Raises ValueError where the batch size or pad_to cannot be met."""
    _check(dataset, batch_size, pad_to)
    draws = RandomDraws(seed, "training batches", epoch)
    order = draws.order(len(dataset))
    lengths = dataset.lengths
    pool = POOL_BATCHES * batch_size
    for start in range(0, len(order), pool):
        members = order[start : start + pool]
        order[start : start + pool] = members[np.argsort(lengths[members], kind="stable")]
    batches = _cut(order, batch_size)
    return (pad_batch(dataset, batches[k], pad_to, device) for k in draws.order(len(batches)))


def evaluation_batches(
    dataset: TokenDataset,
    batch_size: int,
    *,
    pad_to: str | int = "longest",
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Every example once, the longest first: hardly any padding, and too little memory shows at once."""
    _check(dataset, batch_size, pad_to)
    order = np.argsort(-dataset.lengths, kind="stable")
    return (pad_batch(dataset, index, pad_to, device) for index in _cut(order, batch_size))


def _cut(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _check(dataset: TokenDataset, batch_size: int, pad_to: str | int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    longest = int(dataset.lengths.max(initial=0))
    if isinstance(pad_to, str) and pad_to != "longest":
        raise ValueError(f"pad_to must be 'longest' or a number of tokens, got '{pad_to}'")
    if not isinstance(pad_to, str) and pad_to < longest:
        raise ValueError(f"pad_to must be at least the longest example's {longest} tokens, got {pad_to}")


def pad_batch(
    dataset: TokenDataset,
    index: NDArray[np.int64],
    pad_to: str | int = "longest",
    device: torch.device | str = "cpu",
) -> Batch:
    """The examples at these positions (N,) of the split, padded at the end."""
    lengths = dataset.offsets[index + 1] - dataset.offsets[index]
    width = int(lengths.max(initial=0)) if isinstance(pad_to, str) else pad_to
    column = np.arange(width)
    padding = column >= lengths[:, None]  # (N, L)
    source = np.where(padding, 0, dataset.offsets[index][:, None] + column)
    tokens = dataset.tokens[source].astype(np.int64)
    tokens[padding] = PAD_ID
    labels = dataset.labels[source] if dataset.token_targets else dataset.labels[index]
    if dataset.token_targets:
        labels[padding] = IGNORED

    def tensor(part: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(part)).to(device)

    predictions = int((labels != IGNORED).sum())
    return Batch(tensor(tokens), tensor(padding), tensor(labels), tensor(index), predictions)
