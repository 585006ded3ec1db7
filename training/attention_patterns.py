"""What the attention of a trained model looks at: maps of short examples, masses, and weight by distance.

    patterns = attention_patterns(model, model.attentions, task, seed=0, device=device)
    write_arrays(folder / PATTERNS, patterns)

The arrays are those of `results_folder.AttentionPatterns`, for K examples of at most M tokens, T timescales
and H heads: maps in float16, masses in float32, shares by distance in float64, the mean over the queries of
a few long examples. Examples are validation examples chosen by the seed alone, so that models of one seed
show the same ones.
Nothing is kept on the modules: the layers' inputs are caught by hooks that live for one forward pass.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline import Batch, TaskData, TokenDataset
from tasks.token_dataset import IGNORED, PAD_ID, pad_batch

Model = Callable[[Tensor, Tensor], Tensor]  # tokens (N, L), key_padding_mask (N, L) -> logits (N, C)

EXAMPLES = 4
MAP_TOKENS = 64
DISTANCE_TOKENS = 1024
# 0, 1, 2, 4, ..., 1024: fixed, so that cells can be averaged.
DISTANCE_EDGES = np.concatenate([[0], 2 ** np.arange(DISTANCE_TOKENS.bit_length())])


class NoAttentionMapsError(ValueError):
    """The module gives no weights per head: it can be trained, but not shown."""


@torch.no_grad()
def attention_patterns(
    model: Model, attentions: Sequence[nn.Module], task: TaskData, seed: int, device: torch.device
) -> dict[str, np.ndarray]:
    """The arrays, by name. `attentions` are those of the model, which is in eval mode.

    Raises NoAttentionMapsError where a module has neither `attention_maps` nor weights per head.
    """
    lengths = task.val.lengths
    shown = choose_examples(lengths <= MAP_TOKENS, seed)
    long = choose_examples(lengths >= min(DISTANCE_TOKENS, np.median(lengths)), seed)
    examples = task.val.take(shown, MAP_TOKENS)
    distant = task.val.take(long, DISTANCE_TOKENS)
    return {
        **_short_examples(model, attentions, examples, task.symbols, device, task.form.causal),
        "distance_edges": DISTANCE_EDGES,
        "distance_share": _distance_share(model, attentions, distant, device, task.form.causal),
    }


def choose_examples(wanted: np.ndarray, seed: int) -> np.ndarray:
    """Positions of up to 4 examples, drawn by seed: of the wanted (n,) where they suffice, else of all."""
    candidates = np.flatnonzero(wanted) if wanted.sum() >= EXAMPLES else np.arange(len(wanted))
    generator = np.random.default_rng([seed, EXAMPLES])
    return np.sort(generator.choice(candidates, min(EXAMPLES, len(candidates)), replace=False))


def _short_examples(
    model: Model,
    attentions: Sequence[nn.Module],
    examples: TokenDataset,
    symbol: Callable[[int], str],
    device: torch.device,
    causal: bool,
) -> dict[str, np.ndarray]:
    """Maps and masses of the examples; predictions are for what is shown of them."""
    batch = _padded(examples, range(len(examples)), device)
    padding = batch.key_padding_mask
    logits, inputs = _layer_inputs(model, attentions, batch.tokens, padding)
    labels, predictions = _last_labels(batch.labels.cpu().numpy(), logits)
    true_pair = ~(padding[:, None, None, :, None] | padding[:, None, None, None, :])
    layers = zip(attentions, inputs, strict=True)
    maps = [_maps(*layer, padding, causal).where(true_pair, 0.0) for layer in layers]
    ids = batch.tokens.int().cpu().numpy()
    tokens = ids if ids.ndim == 2 else ids[..., 0]
    words = ids.reshape(*tokens.shape, -1).tolist()
    symbols = [[" ".join(symbol(i) for i in position if i != PAD_ID) for position in row] for row in words]
    return {
        "tokens": tokens,
        "symbols": np.array(symbols, dtype=np.str_),
        "lengths": examples.lengths,
        "labels": labels,
        "predictions": predictions,
        "maps": torch.stack(maps).half().cpu().numpy(),
        **_masses(attentions, inputs, padding),
    }


def _last_labels(labels: np.ndarray, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions (K,): of token targets (K, M), those of the last token that is asked for."""
    answers = logits.argmax(-1).cpu().numpy()
    if labels.ndim == 1:
        return labels, answers
    asked = labels != IGNORED
    last = labels.shape[1] - 1 - asked[:, ::-1].argmax(1)
    rows = np.arange(len(labels))
    return labels[rows, last], answers[rows, last]


def _padded(examples: TokenDataset, chosen: range, device: torch.device) -> Batch:
    """These examples as a batch of at least one token: an example may be empty."""
    longest = int(examples.lengths[chosen].max(initial=1))
    return pad_batch(examples, np.asarray(chosen), longest, device)


def _masses(attentions: Sequence[nn.Module], inputs: list[Tensor], padding: Tensor) -> dict[str, np.ndarray]:
    found: dict[str, list[Tensor]] = {}
    for attention, x in zip(attentions, inputs, strict=True):
        masses = getattr(attention, "masses", None)
        if masses is None:
            return {}
        for role, mass in masses(x, x).items():
            found.setdefault(f"{role}_mass", []).append(mass.masked_fill(padding[:, None, None, :], 0.0))
    return {name: torch.stack(layers).float().cpu().numpy() for name, layers in found.items()}


def _distance_share(
    model: Model,
    attentions: Sequence[nn.Module],
    examples: TokenDataset,
    device: torch.device,
    causal: bool,
) -> np.ndarray:
    """(layers, T, H, B), from one example at a time for the memory's sake."""
    totals = []  # of each example
    queries = 0
    for number in range(len(examples)):
        tokens = _padded(examples, range(number, number + 1), device).tokens
        nothing = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=device)
        _, inputs = _layer_inputs(model, attentions, tokens, nothing)
        layers = zip(attentions, inputs, strict=True)
        totals.append(torch.stack([_by_distance(_maps(*layer, nothing, causal)[0]) for layer in layers]))
        queries += tokens.shape[1]
    return (sum(totals[1:], totals[0]) / queries).cpu().numpy()


def _by_distance(maps: Tensor) -> Tensor:
    """Weights (T, H, L, L) -> their sum over all pairs of each distance bin, (T, H, B), float64."""
    position = torch.arange(maps.shape[-1], device=maps.device)
    distance = (position[:, None] - position).abs()
    edges = torch.from_numpy(DISTANCE_EDGES[1:-1]).to(maps.device)
    bins = torch.bucketize(distance, edges, right=True)
    sums = [maps.where(bins == number, 0.0).double().sum((-2, -1)) for number in range(len(edges) + 1)]
    return torch.stack(sums, -1)


def _layer_inputs(
    model: Model, attentions: Sequence[nn.Module], ids: Tensor, mask: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The logits, and what each attention was given as query, key and value: (N, L, E)."""
    inputs: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    with contextlib.ExitStack() as hooks:
        for attention in attentions:
            hooks.enter_context(attention.register_forward_pre_hook(catch))
        return model(ids, mask), inputs


def causal_arguments(attention: nn.Module, x: Tensor) -> dict[str, Any]:
    """What makes self-attention over x (N, L, E) causal."""
    if getattr(attention, "builds_causal_mask", False):
        return {"is_causal": True}
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    return {"is_causal": True, "attn_mask": mask}


def _maps(attention: nn.Module, x: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """(N, T, H, L, L), float32; T = 1 for a module that only has the interface of nn.MultiheadAttention."""
    only = causal_arguments(attention, x) if causal else {}
    attention_maps = getattr(attention, "attention_maps", None)
    if attention_maps is not None:
        maps = attention_maps(x, x, key_padding_mask=mask, **only)
    else:
        asked = {"need_weights": True, "average_attn_weights": False, **only}
        _, weights = attention(x, x, x, key_padding_mask=mask, **asked)
        maps = None if weights is None else weights.unsqueeze(1)
    length = x.shape[1]
    if maps is None or maps.dim() != 5 or maps.shape[0] != len(x) or maps.shape[-2:] != (length, length):
        got = None if maps is None else tuple(maps.shape)
        raise NoAttentionMapsError(
            f"{type(attention).__name__} gives no weights of shape (N, T, H, {length}, {length}): got {got}"
        )
    return maps.float()


def learned_scalars(attentions: Sequence[nn.Module]) -> dict[str, dict[str, list[list[float]]]]:
    """What the mechanism shows of itself, by layer: each (T, H), with the digits that float32 has."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for index, attention in enumerate(attentions):
        scalars: dict[str, Tensor] = getattr(attention, "learned_scalars", dict)()
        for name, value in scalars.items():
            rows = [[float(f"{x:.7g}") for x in row] for row in value.tolist()]
            found.setdefault(f"layer{index}", {})[name] = rows
    return found
