"""What attention patterns say in numbers: how even attention is, how far it looks, which tokens are heavy.

Symbols: see results_folder.AttentionPatterns.
"""

import math
from collections.abc import Sequence

import numpy as np

from results_folder import AttentionPatterns


def attention_entropy(patterns: AttentionPatterns) -> np.ndarray:
    """How evenly a query spreads its weight, (layers, T, H): 1 = over all tokens alike, 0 = on one token.

    The entropy of a row over the log of the number of tokens, the mean over the queries of all examples.
    Examples of one token say nothing and are left out; NaN where there are no others.
    """
    sums, queries = np.zeros(np.delete(patterns.maps.shape[:4], 1)), 0
    for example, length in enumerate(patterns.lengths):
        if length > 1:
            weights = patterns.maps[:, example, ..., :length, :length].astype(np.float64)
            logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
            sums -= (weights * logs).sum((-2, -1)) / math.log(length)
            queries += int(length)
    return sums / queries if queries else np.full(sums.shape, np.nan)


def share_within(patterns: AttentionPatterns, distance: float) -> np.ndarray:
    """The share of a query's weight at |i - j| < distance, (layers, T, H). `distance` is one of the edges."""
    return patterns.distance_share[..., patterns.distance_edges[1:] <= distance].sum(-1)


def relative_masses(masses: np.ndarray) -> np.ndarray:
    """Masses of an example (layers, T, H, M) over their mean in each layer, timescale and head; then the mean
    over these: (M,). 1 where all masses are 0."""
    mass = masses.astype(np.float64)
    mean = mass.mean(-1, keepdims=True)
    return np.divide(mass, mean, out=np.ones_like(mass), where=mean > 0).mean((0, 1, 2))


def token_masses(patterns: Sequence[AttentionPatterns]) -> list[tuple[str, float, int]]:
    """Of keys, (symbol, relative mass, occurrences) by falling mass; empty where the mechanism has no masses.

    A token's mass is taken relative to the mean of its example, layer, timescale and head, since G and the
    width of softplus set the scale: 1 is an average token, 2 pulls twice as hard.
    """
    found: dict[str, list[float]] = {}
    for one in patterns:
        if one.key_mass is None:
            continue
        for example, length in enumerate(one.lengths):
            relative = relative_masses(one.key_mass[:, example, ..., :length])
            for symbol, value in zip(one.symbols[example, :length], relative, strict=True):
                found.setdefault(str(symbol), []).append(float(value))
    rows = [(symbol, math.fsum(values) / len(values), len(values)) for symbol, values in found.items()]
    return sorted(rows, key=lambda row: (-row[1], row[0]))
