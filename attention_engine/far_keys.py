"""Which keys are so far from a row that decay makes all of them together weigh nothing.

Symbols and masks: see attention_module.py.
"""

import math

import torch
from torch import Tensor

from attention_engine.attention_scores import DotProduct, Mask, Score

# The share of a row's sum that skipped keys may weigh; less where gamma is learned: its gradient weighs them
# by |i - j|.
TOLERANCE, TOLERANCE_LEARNED_DECAY = 2.0**-24, 2.0**-34


@torch.no_grad()
def nearest_keys(
    mask: Mask, query_length: int, key_length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each row the nearest key that it may attend to, and how far it is, both (N or 1, L). Where there is
    none, the distance is negative and the key is any."""
    i, j = (x.flatten() for x in mask.positions(query_length, key_length, device))
    far = 2 * (mask.query_offset + query_length + key_length)  # from any row, farther than any key
    j = j.unsqueeze(0)
    absent = torch.zeros_like(j, dtype=torch.bool) if mask.padding is None else mask.padding
    before = torch.where(absent, -far, j).cummax(-1).values
    after = torch.where(absent, far, j).flip(-1).cummin(-1).values.flip(-1)
    own = i.clamp(max=key_length - 1)
    before, after = before[:, own], after[:, own]
    nearest = before if mask.causal else torch.where(i - before <= after - i, before, after)
    distance = torch.where((nearest < 0) | (nearest >= key_length), -1, (i - nearest).abs())
    return nearest.clamp(0, key_length - 1), distance


def _is_bounded(score: Score) -> bool:
    """Whether constants bound what a key can weigh. Of Manhattan distances they do, too, but what the nearest
    key weighs is computed below for Euclidean ones alone."""
    if isinstance(score, DotProduct):
        return True
    learned = isinstance(score.softening, Tensor) or isinstance(score.distance_power, Tensor)
    return not learned and score.distance != "manhattan"


@torch.no_grad()
def reach_of_rows(q: Tensor, k: Tensor, score: Score, mask: Mask) -> Tensor | None:
    """For each problem the largest |i - j| to look at, (N, T, H) int32, computed on the device; None where
    distance does not make far keys light, or no constants bound what one can weigh.

    A row's sum is at least the weight of its nearest key, at distance d: `exp(s_near) gamma^d`. All keys
    beyond W weigh at most `2 exp(s_max) gamma^(W + 1) / (1 - gamma)`. W is where that is the tolerance's part
    of the former: `W = d + (s_max - s_near + log(2 / (1 - gamma)) - log tolerance) / -log gamma`.
    """
    log_decay, (query_length, key_length) = score.log_decay, (q.shape[-2], k.shape[-2])
    if log_decay is None or score.clock is not None or mask.pairs is not None or not _is_bounded(score):
        return None
    nearest, distance = nearest_keys(mask, query_length, key_length, q.device)
    nearest = nearest[:, None, None].expand(len(q), 1, q.shape[2], -1)  # (N, 1, H, L)
    index = nearest.unsqueeze(-1).expand(-1, q.shape[1], -1, -1, q.shape[-1])
    near = k.gather(-2, index)  # (N, T', H, S, D) -> (N, T', H, L, D)
    if isinstance(score, DotProduct):
        dtype = torch.promote_types(k.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(k, dim=-1, dtype=dtype)
        if mask.padding is not None:
            lengths = lengths.masked_fill(mask.padding[:, None, None, :], 0.0)
        highest = torch.linalg.vector_norm(q, dim=-1, dtype=dtype) * lengths.amax(-1, keepdim=True)
        own = (q.float() * near.float()).sum(-1) * score.scale
        spread = highest * abs(score.scale) - own
    else:
        log_softened = ((q - near).float().square().mean(-1) + score.softening).log()
        power, log_softening = score.distance_power / 2, math.log(score.softening)
        key_mass = score.key_mass.float()
        if mask.padding is not None:
            key_mass = key_mass.masked_fill(mask.padding[:, None, None, :], 1.0)
        near_mass = key_mass.gather(-1, nearest.expand(-1, key_mass.shape[1], -1, -1))
        top_mass, strength = key_mass.amax(-1, keepdim=True), score.strength()
        if strength is None:
            spread = top_mass.log() - near_mass.log() + power * (log_softened - log_softening)
        else:
            pull = near_mass * (-power * log_softened).exp()
            spread = strength * (top_mass * math.exp(-power * log_softening) - pull)
    tolerance = TOLERANCE_LEARNED_DECAY if log_decay.requires_grad else TOLERANCE
    log_decay = log_decay.float().unsqueeze(-1)  # (T, H, 1)
    beyond = (2 / -log_decay.expm1()).log() - math.log(tolerance)
    steps = (spread + beyond) / -log_decay + distance[:, None, None]  # (N, T, H, L)
    everything = max(mask.query_offset + query_length, key_length)
    steps = steps.ceil().nan_to_num(nan=everything).clamp(0, everything)
    return steps.masked_fill(distance[:, None, None] < 0, 0).amax(-1).int()
