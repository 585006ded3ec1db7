"""One run's numbers and figures: when it converged, what its attention looks at, how it learned.

    python evaluate_performance.py RESULTS/listops/gravitational/seed0

prints the numbers and draws the figures into RESULTS/analysis/listops_gravitational_seed0/ (which a new
analysis of RESULTS clears away). Everything is read from the results folder; no checkpoint is opened.

Symbols: K examples of at most M tokens, T timescales, H heads, B distance bins. Row i of a map holds the
weights of query i over the keys j. Importing needs numpy only, and draws nothing.
"""

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from results_folder import CellRecord, Results

PROG = "evaluate_performance.py"
PATTERNS = "attention_patterns.npz"
LARGEST_PATTERNS = 2**30  # bytes when unpacked: a larger file is not one of ours


def convergence_epoch(accuracies: Sequence[float], chance: float = 0.0) -> int | None:
    """The first epoch, counted from 1, with (accuracy - chance) / (best - chance) >= 0.9.

    With chance = 0 this is 90 % of the best, a rule that guessing meets on two classes. None where no epoch
    is above chance. The tolerance of 1e-9 is for rounding: accuracies are shares of far fewer examples.
    """
    best = max(accuracies, default=0.0)
    if not best > chance:
        return None
    reached = chance + 0.9 * (best - chance) - 1e-9
    return next(epoch for epoch, accuracy in enumerate(accuracies, 1) if accuracy >= reached)


@dataclass(frozen=True)
class AttentionPatterns:
    """attention_patterns.npz, checked. The masses are None where the mechanism has none.

    tokens (K, M) whole numbers, 0 = pad; symbols (K, M) text; lengths, labels, predictions (K,); maps
    (layers, K, T, H, M, M), rows that sum to 1 over true tokens, 0 elsewhere; key_mass, query_mass
    (layers, K, T, H, M); distance_edges (B + 1,), distance_share (layers, T, H, B): the share of a query's
    weight at edge_b <= |i - j| < edge_(b + 1) in long examples.
    """

    tokens: np.ndarray
    symbols: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    maps: np.ndarray
    distance_edges: np.ndarray
    distance_share: np.ndarray
    key_mass: np.ndarray | None = None
    query_mass: np.ndarray | None = None

    def __post_init__(self) -> None:
        examples, longest = self.tokens.shape if self.tokens.ndim == 2 else (0, 0)
        layers, _, timescales, heads = self.maps.shape[:4] if self.maps.ndim == 6 else (0, 0, 0, 0)
        bins = len(self.distance_edges) - 1 if self.distance_edges.ndim == 1 else 0
        expected: dict[str, tuple[tuple[int, ...], str]] = {
            "tokens": ((examples, longest), "iu"),
            "symbols": ((examples, longest), "U"),
            "lengths": ((examples,), "iu"),
            "labels": ((examples,), "iu"),
            "predictions": ((examples,), "iu"),
            "maps": ((layers, examples, timescales, heads, longest, longest), "f"),
            "distance_edges": ((bins + 1,), "iuf"),
            "distance_share": ((layers, timescales, heads, bins), "f"),
            "key_mass": ((layers, examples, timescales, heads, longest), "f"),
            "query_mass": ((layers, examples, timescales, heads, longest), "f"),
        }
        for name, (shape, kinds) in expected.items():
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape or array.dtype.kind not in kinds or 0 in shape:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected shape {shape}")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name} holds numbers that are not finite")
        if not ((self.lengths >= 1) & (self.lengths <= longest)).all():
            raise ValueError(f"lengths must be 1 to {longest}, got {self.lengths.tolist()}")
        if not (np.diff(self.distance_edges) > 0).all():
            raise ValueError(f"distance_edges must ascend, got {self.distance_edges.tolist()}")


def read_attention_patterns(path: Path) -> AttentionPatterns:
    """The patterns in a file; ValueError says why it holds none. Nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > LARGEST_PATTERNS:
            raise ValueError(f"it would unpack to {size:,} bytes")
        names = {field.name for field in fields(AttentionPatterns)}
        with np.load(path, allow_pickle=False) as arrays:
            return AttentionPatterns(**{name: arrays[name] for name in names & set(arrays.files)})
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} cannot be used: {error}") from error


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


def token_masses(patterns: Sequence[AttentionPatterns], role: str = "key") -> list[tuple[str, float, int]]:
    """(symbol, relative mass, occurrences) by falling mass; empty where the mechanism has no masses.

    A token's mass is taken relative to the mean of its example, layer, timescale and head, since G and the
    width of softplus set the scale: 1 is an average token, 2 pulls twice as hard.
    """
    found: dict[str, list[float]] = {}
    for one in patterns:
        masses = one.key_mass if role == "key" else one.query_mass
        if masses is None:
            continue
        for example, length in enumerate(one.lengths):
            mass = masses[:, example, ..., :length].astype(np.float64)
            mean = mass.mean(-1, keepdims=True)
            relative = np.divide(mass, mean, out=np.ones_like(mass), where=mean > 0).mean((0, 1, 2))
            for symbol, value in zip(one.symbols[example, :length], relative, strict=True):
                found.setdefault(str(symbol), []).append(float(value))
    rows = [(symbol, math.fsum(values) / len(values), len(values)) for symbol, values in found.items()]
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def run_numbers(results: Results, record: CellRecord) -> list[str]:
    """What there is to say about one cell, a line each."""
    lines = [f"{record.cell}: {record.state}" + (f" ({record.reason})" if record.reason else "")]
    for row in record.metrics[-1:]:
        lines.append(
            f"epoch {row['epoch']}: "
            + ", ".join(
                f"{name} {row[name]:.4g}"
                for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
                if isinstance(row.get(name), int | float)
            )
        )
    for name, value in (record.result or {}).items():
        if isinstance(value, int | float) and name != "schema_version":
            lines.append(f"{name:32}{value:,}" if isinstance(value, int) else f"{name:32}{value:.6g}")
    return lines
