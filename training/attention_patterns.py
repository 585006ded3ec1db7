"""What the attention of a trained model looks at: maps of short examples, masses, and weight by distance.

    patterns = attention_patterns(model, model.attentions, task, seed=0, device=device)
    np.savez_compressed("attention_patterns.npz", **patterns)

The arrays, for K examples of at most M tokens, layers in their order, T timescales and H heads:

    tokens (K, M) int32, 0 = pad; symbols (K, M) printable; lengths, labels, predictions (K,)
    maps (layers, K, T, H, M, M) float16; a row is a query's weights
    key_mass, query_mass (layers, K, T, H, M) float32, where the mechanism has masses
    distance_edges (B + 1,), distance_share (layers, T, H, B) float64: the share of a query's weight at
        distance edge_b <= |i - j| < edge_(b + 1), the mean over the queries of a few long examples

Examples are validation examples chosen by the seed alone, so that models of one seed show the same ones.
Nothing is kept on the modules: the layers' inputs are caught by hooks that live for one forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline import TaskData, TokenDataset

EXAMPLES = 4
MAP_TOKENS = 64
DISTANCE_TOKENS = 1024
# 0, 1, 2, 4, ..., 1024: fixed, so that cells can be averaged.
DISTANCE_EDGES = np.concatenate([[0], 2 ** np.arange(DISTANCE_TOKENS.bit_length())])


class NoAttentionMapsError(ValueError):
    """The module gives no weights per head: it can be trained, but not shown."""


@torch.no_grad()
def attention_patterns(
    model: Callable[[Tensor, Tensor], Tensor],
    attentions: Sequence[nn.Module],
    task: TaskData,
    seed: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """The arrays above. `model` maps tokens (N, L) and key_padding_mask (N, L) to logits, in eval mode.

    Raises NoAttentionMapsError where a module has neither `attention_maps` nor weights per head.
    """
    lengths = np.asarray(task.val.lengths)
    shown = choose_examples(lengths <= MAP_TOKENS, seed)
    long = choose_examples(lengths >= min(DISTANCE_TOKENS, np.median(lengths)), seed)
    patterns = _short_examples(model, attentions, task, shown, device)
    patterns["distance_edges"] = DISTANCE_EDGES
    patterns["distance_share"] = _distance_share(model, attentions, task.val, long, device)
    return patterns


def choose_examples(wanted: np.ndarray, seed: int) -> np.ndarray:
    """Positions of up to 4 examples, drawn by seed: of the wanted (n,) where they suffice, else of all."""
    candidates = np.flatnonzero(wanted) if wanted.sum() >= EXAMPLES else np.arange(len(wanted))
    generator = np.random.default_rng([seed, EXAMPLES])
    return np.sort(generator.choice(candidates, min(EXAMPLES, len(candidates)), replace=False))


def _short_examples(
    model: Callable[[Tensor, Tensor], Tensor],
    attentions: Sequence[nn.Module],
    task: TaskData,
    chosen: np.ndarray,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Maps and masses of the examples, each cut to its first 64 tokens; predictions are for what is shown."""
    examples = [np.asarray(task.val.example(int(index)))[:MAP_TOKENS] for index in chosen]
    lengths = np.array([len(example) for example in examples])
    tokens = np.zeros((len(examples), max(1, lengths.max())), dtype=np.int32)
    for row, example in zip(tokens, examples, strict=True):
        row[: len(example)] = example
    padding = np.arange(tokens.shape[1]) >= lengths[:, None]

    ids = torch.from_numpy(tokens).long().to(device)
    mask = torch.from_numpy(padding).to(device)
    logits, inputs = _layer_inputs(model, attentions, ids, mask)
    true_pair = ~(mask[:, None, None, :, None] | mask[:, None, None, None, :])
    layers = zip(attentions, inputs, strict=True)
    maps = [_maps(attention, x, mask).where(true_pair, 0.0) for attention, x in layers]
    symbols = [
        [task.symbols(int(token)) if known else "" for token, known in zip(row, ~pad, strict=True)]
        for row, pad in zip(tokens, padding, strict=True)
    ]
    return {
        "tokens": tokens,
        "symbols": np.array(symbols, dtype=np.str_),
        "lengths": lengths,
        "labels": np.asarray(task.val.labels)[chosen],
        "predictions": logits.argmax(-1).cpu().numpy(),
        "maps": torch.stack(maps).half().cpu().numpy(),
        **_masses(attentions, inputs, mask),
    }


def _masses(attentions: Sequence[nn.Module], inputs: list[Tensor], mask: Tensor) -> dict[str, np.ndarray]:
    found: dict[str, list[Tensor]] = {}
    for attention, x in zip(attentions, inputs, strict=True):
        masses = getattr(attention, "masses", None)
        if masses is None:
            return {}
        for role, mass in masses(x, x).items():
            found.setdefault(f"{role}_mass", []).append(mass.masked_fill(mask[:, None, None, :], 0.0))
    return {name: torch.stack(layers).float().cpu().numpy() for name, layers in found.items()}


def _distance_share(
    model: Callable[[Tensor, Tensor], Tensor],
    attentions: Sequence[nn.Module],
    dataset: TokenDataset,
    chosen: np.ndarray,
    device: torch.device,
) -> np.ndarray:
    """(layers, T, H, B), from whole examples of up to 1,024 tokens, one at a time for the memory's sake."""
    totals: list[Tensor] = []
    queries = 0
    for ids, mask in _long_examples(dataset, chosen, device):
        _, inputs = _layer_inputs(model, attentions, ids, mask)
        layers = zip(attentions, inputs, strict=True)
        shares = [_by_distance(_maps(attention, x, mask)[0]) for attention, x in layers]
        totals = [total + share for total, share in zip(totals, shares, strict=True)] if totals else shares
        queries += ids.shape[1]
    return (torch.stack(totals) / queries).cpu().numpy()


def _long_examples(
    dataset: TokenDataset, chosen: np.ndarray, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for index in chosen:
        tokens = np.asarray(dataset.example(int(index)))[:DISTANCE_TOKENS].astype(np.int64)
        ids = torch.from_numpy(tokens if len(tokens) else np.zeros(1, np.int64)).to(device)[None]
        yield ids, torch.zeros_like(ids, dtype=torch.bool)


def _by_distance(maps: Tensor) -> Tensor:
    """Weights (T, H, L, L) -> their sum over all pairs of each distance bin, (T, H, B), float64."""
    position = torch.arange(maps.shape[-1], device=maps.device)
    distance = (position[:, None] - position).abs()
    edges = torch.from_numpy(DISTANCE_EDGES[1:-1]).to(maps.device)
    bins = torch.bucketize(distance, edges, right=True)
    sums = [maps.where(bins == number, 0.0).double().sum((-2, -1)) for number in range(len(edges) + 1)]
    return torch.stack(sums, -1)


def _layer_inputs(
    model: Callable[[Tensor, Tensor], Tensor], attentions: Sequence[nn.Module], ids: Tensor, mask: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The logits, and what each attention was given as query, key and value: (N, L, E)."""
    inputs: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    handles = [attention.register_forward_pre_hook(catch) for attention in attentions]
    try:
        return model(ids, mask), inputs
    finally:
        for handle in handles:
            handle.remove()


def _maps(attention: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """(N, T, H, L, L), float32; T = 1 for a module that only has the interface of nn.MultiheadAttention."""
    attention_maps = getattr(attention, "attention_maps", None)
    if attention_maps is not None:
        maps = attention_maps(x, x, key_padding_mask=mask)
    else:
        _, weights = attention(x, x, x, key_padding_mask=mask, need_weights=True, average_attn_weights=False)
        maps = None if weights is None else weights.unsqueeze(1)
    length = x.shape[1]
    if maps is None or maps.dim() != 5 or maps.shape[0] != len(x) or maps.shape[-2:] != (length, length):
        got = None if maps is None else tuple(maps.shape)
        raise NoAttentionMapsError(
            f"{type(attention).__name__} gives no weights of shape (N, T, H, {length}, {length}): got {got}"
        )
    return maps.float()
