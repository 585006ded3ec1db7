"""How a pair is weighed (`Score`) and which pairs are blocked (`Mask`): what a module tells the engine.

A `Score` is data, not a callback, so that every backend can fuse it and a test can compare any backend
with the dense formula for any score. `Score.logits` is that formula: attention is its softmax over keys.
A new mechanism is a new score; only speed needs more.

Symbols and masks: see attention_module.py. q is (N, T', H, L, D), k and v are (N, T', H, S, D).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clock:
    """Time that passes at a rate of each token's own, in place of the distance |i - j|: a weight is
    multiplied by `exp(-|query_i - key_j|)`. `log_decay` is the special case of a constant rate, -log gamma.

    query: (N, T, H, L), key: (N, T, H, S): the time at each token, falling nowhere along the sequence.
    """

    query: Tensor
    key: Tensor

    def log_discount(self) -> Tensor:
        """`-|query_i - key_j|` (N, T, H, L, S)."""
        return -(self.query.unsqueeze(-1) - self.key.unsqueeze(-2)).abs()


@dataclass(frozen=True)
class DotProduct:
    """Scaled dot product, `q_i . k_j * scale` (Vaswani et al. 2017), optionally with exponential decay.

    log_decay: log gamma, (T, H), below 0: adds `|i - j| log gamma` to the logit, so that a weight is
    multiplied by gamma for each step of distance.
    discount: "weights", or "logits": the logit is multiplied by gamma^|i - j| instead. For comparison only.
    clock: a decay by a rate of each token, beside or instead of log_decay's.
    """

    scale: float
    log_decay: Tensor | None = None
    discount: Literal["weights", "logits"] = "weights"
    clock: Clock | None = None

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """(N, T, H, L, S) logits without decay."""
        return q @ k.mT * self.scale


@dataclass(frozen=True)
class Gravity:
    """Newton's law with Plummer softening: `F_ij = G m_i m_j / (r2_ij + softening)^(distance_power / 2)`.

    distance "euclidean": `r2_ij = |q_i - k_j|^2 / D`. "cosine": `r2_ij = 1 - cos(q_i, k_j)`, which is the
    Euclidean one of `normalised` q and k. "manhattan": `r2_ij = (|q_i - k_j|_1 / D)^2`.
    normalization "softmax": the weights are softmax_j(F_ij). "force": they are F_ij / sum_j F_ij, which is
    the softmax of log F_ij; G and m_i scale a whole row, cancel, and are None.

    softening, distance_power: numbers above 0, or learned, (T, H); a learned power goes with "force" only.
    key_mass:    (N, T, H, S), above 0.
    query_mass:  (N, T, H, L), above 0, or None with "force".
    log_gravity: log G, (T, H), or None with "force".
    log_decay:   log gamma, (T, H), below 0, or None: weights are multiplied by gamma^|i - j|.
    discount:    "weights", or "logits": the force is multiplied by gamma^|i - j| instead; not with "force".
    clock:       a decay by a rate of each token, beside or instead of log_decay's.
    """

    key_mass: Tensor
    query_mass: Tensor | None
    log_gravity: Tensor | None
    softening: float | Tensor
    distance_power: float | Tensor = 2.0
    normalization: Literal["softmax", "force"] = "softmax"
    log_decay: Tensor | None = None
    discount: Literal["weights", "logits"] = "weights"
    clock: Clock | None = None
    distance: Literal["euclidean", "cosine", "manhattan"] = "euclidean"

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """(N, T, H, L, S) logits without decay."""
        softening, power = (
            x[:, :, None, None] if isinstance(x, Tensor) else x for x in (self.softening, self.distance_power)
        )
        softened = self.squared_distance(q, k) + softening
        strength = self.strength()
        if strength is None:
            return self.key_mass.log().unsqueeze(-2) - power / 2 * softened.log()
        return strength.unsqueeze(-1) * self.key_mass.unsqueeze(-2) * softened.pow(-power / 2)

    def strength(self) -> Tensor | None:
        """`G m_i` (N, T, H, L), or None with "force"."""
        if self.query_mass is None or self.log_gravity is None:
            return None
        return self.log_gravity.exp().unsqueeze(-1) * self.query_mass

    def squared_distance(self, q: Tensor, k: Tensor) -> Tensor:
        """`r2_ij` (N, T', H, L, S)."""
        if self.distance == "manhattan":
            # Entry by entry: an (L, S, D) tensor is made for a gradient only.
            entries = zip(q.unbind(-1), k.unbind(-1), strict=True)
            differences = ((a.unsqueeze(-1) - b.unsqueeze(-2)).abs() for a, b in entries)
            return (functools.reduce(torch.add, differences) / q.shape[-1]).square()
        q, k = (normalised(q), normalised(k)) if self.distance == "cosine" else (q, k)
        return squared_distance(q, k) / q.shape[-1]

    def as_euclidean(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, "Gravity"]:
        """q, k and score of the same logits, without the cosine."""
        if self.distance != "cosine":
            return q, k, self
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k = (normalised(x.to(dtype)).to(x.dtype) for x in (q, k))
        return q, k, replace(self, distance="euclidean")


Score = DotProduct | Gravity
LARGEST_POSITION = 2**24  # up to which float32 has every distance
FIELDS = ("key_mass", "query_mass", "log_gravity", "log_decay", "softening", "distance_power")


def split_score(score: Score) -> tuple[Score, tuple[Tensor | None, ...]]:
    """The score without its tensors, and those, in the order of FIELDS, then the clocks': an
    `autograd.Function` is to be given them one by one."""
    found = {name: getattr(score, name, None) for name in FIELDS}
    tensors = {name: x for name, x in found.items() if isinstance(x, Tensor)}
    clock = (None, None) if score.clock is None else (score.clock.query, score.clock.key)
    without: dict[str, Any] = dict.fromkeys(tensors)
    return replace(score, clock=None, **without), (*map(tensors.get, FIELDS), *clock)


def join_score(score: Score, tensors: Sequence[Tensor | None]) -> Score:
    """The inverse of `split_score`."""
    *of_score, query_clock, key_clock = tensors
    named = zip(FIELDS, of_score, strict=True)
    fields: dict[str, Any] = {name: x for name, x in named if x is not None}
    if query_clock is not None and key_clock is not None:
        fields["clock"] = Clock(query_clock, key_clock)
    return replace(score, **fields)


def with_strength(score: Gravity) -> Gravity:
    """The same score with A_i = G m_i in place of the masses of queries, and log G = 0: a kernel gives the
    gradient of A_i row by row, autograd those of G and m_i."""
    strength = score.strength()
    if strength is None or score.log_gravity is None:
        return score
    return replace(score, query_mass=strength, log_gravity=torch.zeros_like(score.log_gravity))


def normalised(x: Tensor) -> Tensor:
    """`x / sqrt(2 mean_d x_d^2)` (..., D): of two such vectors `|a - b|^2 / D = 1 - cos(a, b)`. The small
    number keeps the gradient of a vector of zeros finite."""
    return x * (2 * x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def squared_distance(q: Tensor, k: Tensor) -> Tensor:
    """`|q_i - k_j|^2` (..., L, S) from one matrix product, never from an (L, S, D) tensor."""
    norms = q.square().sum(-1, keepdim=True) + k.square().sum(-1).unsqueeze(-2)
    return (norms - 2 * q @ k.mT).clamp(min=0)


@dataclass(frozen=True)
class Mask:
    """Which keys a query may not attend to, and what is added to its logits; made by `merge_masks`.

    padding: (N, S) bool, True = blocked, or None.
    pairs:   (N or 1, 1, H or 1, L or 1, S) bool (True = blocked) or float (added to the logits), or None.
    causal:  block j > i.
    query_offset: the position of the first query; that of the first key is 0. Distances count from it, too.
    """

    padding: Tensor | None = None
    pairs: Tensor | None = None
    causal: bool = False
    query_offset: int = 0

    def positions(self, query_length: int, key_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of queries i (L, 1) and of keys j (S,)."""
        i = torch.arange(self.query_offset, self.query_offset + query_length, device=device)
        return i[:, None], torch.arange(key_length, device=device)

    def without_tensors(self) -> "Mask":
        return replace(self, padding=None, pairs=None)

    def dense(self, query_length: int, key_length: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """`blocked`, broadcastable to (N, T, H, L, S), and the finite part of the float mask, or None."""
        blocked = torch.zeros(1, 1, 1, 1, 1, dtype=torch.bool, device=device)
        added = None
        if self.padding is not None:
            blocked = blocked | self.padding[:, None, None, None, :]
        if self.pairs is not None and self.pairs.dtype == torch.bool:
            blocked = blocked | self.pairs
        elif self.pairs is not None:
            minus_infinity = self.pairs == -math.inf
            blocked, added = blocked | minus_infinity, self.pairs.masked_fill(minus_infinity, 0.0)
        if self.causal:
            i, j = self.positions(query_length, key_length, device)
            blocked = blocked | (j > i)
        return blocked, added


def merge_masks(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    batch: int,
    num_heads: int,
    query_length: int,
    key_length: int,
    query_offset: int = 0,
) -> Mask:
    """Check the masks of `nn.MultiheadAttention`'s forward and put them into one `Mask`.

    key_padding_mask: (N, S) bool or float. attn_mask: (L, S) or (N * H, L, S) bool or float. All given masks
    hold together. ValueError names both shapes where one does not fit.
    """
    if type(query_offset) is not int or not 0 <= query_offset <= LARGEST_POSITION - query_length:
        largest = f"from 0 to 2**24 less the number of queries, here {LARGEST_POSITION - query_length}"
        raise ValueError(f"query_offset must be a whole number {largest}, got {query_offset!r}")
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"{name} must be of a boolean or floating type, got {mask.dtype}")
    pairs = None
    if attn_mask is not None:
        shapes = [(query_length, key_length), (batch * num_heads, query_length, key_length)]
        if tuple(attn_mask.shape) not in shapes:
            raise ValueError(
                f"attn_mask must have shape {shapes[0]} or {shapes[1]}, got {tuple(attn_mask.shape)}"
            )
        pairs = attn_mask.view(-1, 1, 1 if attn_mask.dim() == 2 else num_heads, query_length, key_length)
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (batch, key_length):
            expected, got = (batch, key_length), tuple(key_padding_mask.shape)
            raise ValueError(f"key_padding_mask must have shape {expected}, got {got}")
        if key_padding_mask.dtype != torch.bool:
            blocked = key_padding_mask == -math.inf
            finite = key_padding_mask.masked_fill(blocked, 0.0)
            if finite.requires_grad or bool(finite.any()):
                added = finite[:, None, None, None, :]
                pairs = added if pairs is None else _as_added(pairs, added.dtype) + added
            return Mask(blocked, pairs, is_causal, query_offset)
    return Mask(key_padding_mask, pairs, is_causal, query_offset)


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
