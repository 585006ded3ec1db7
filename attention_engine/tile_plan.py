"""What a call of `tile_sums` needs to know besides its tensors, and the geometry of its tiles.

A tile is a block of rows (queries) against a block of keys. Where keys lie beside the rows, gamma^|i-j|
factors: with i0 the first row and j1 the last key before it, gamma^(i - i0) gamma^(i0 - j1) gamma^(j1 - j).
Tiles on the diagonal of a decay, and tiles with masks or dropout, are explicit: weights are made in log
space. So is every tile of a "shifted" block of rows, with the largest logit of each row subtracted.

Symbols: B problems (a timescale of a head of an example), L rows, S keys, U weightings that share a tile, W
values of a key, C = U W.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # rows and keys of a tile, at most
TILE_PAIRS = 2**18  # pairs worked on at once: 1 MiB in float32, two such buffers stay in a core's cache
LARGEST_SUM = 1e30
LOG_VANISHED = math.log(1e-22)


@dataclass(frozen=True)
class PairWeight:
    """e(x). power: p / 2, or None for exp(x) itself. exponential: whether the exponential is taken.
    floor: an x below it is taken for it, or None where rounding cannot make x too small."""

    power: float | None
    exponential: bool
    floor: float | None = None

    def forces_and_reciprocal_(self, x: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """x^(-power) and 1 / x; in the places of the room and of x, or both in one where they are equal."""
        assert self.power is not None
        self._hold_(x)
        if self.power == 1.0:
            return x.reciprocal_(), x
        return _inverse_power_(room.copy_(x), self.power), x.reciprocal_()

    def forces_(self, x: Tensor) -> Tensor:
        """x -> x^(-power), in place."""
        assert self.power is not None
        self._hold_(x)
        return _inverse_power_(x, self.power)

    @property
    def slope_factor(self) -> float:
        """A constant factor of e'(x), left out below and multiplied in at the end."""
        return 1.0 if self.power is None else -self.power

    def weigh_(self, x: Tensor) -> Tensor:
        """x -> e(x), in place."""
        self._hold_(x)
        if self.power is not None:
            _inverse_power_(x, self.power)
        return x.exp_() if self.exponential else x

    def weigh_with_slope_(self, x: Tensor, upstream: Tensor) -> None:
        """x -> e(x) and upstream -> upstream e'(x), both in place."""
        self._hold_(x)
        if self.power == 1.0:
            x.reciprocal_()
            upstream.mul_(x).mul_(x)
        elif self.power is not None:
            upstream.div_(x)
            upstream.mul_(_inverse_power_(x, self.power))
        if self.exponential:
            x.exp_()
            upstream.mul_(x)

    def weights_and_slope_(self, x: Tensor, room: Tensor) -> tuple[Tensor, Tensor | None]:
        """e(x) and the derivative of log e(x), or None where it is 1; in the places of x and, if need be, of
        the room, or both in one where they are equal."""
        self._hold_(x)
        if self.power is None:
            return x.exp_(), None
        if self.power == 1.0 and not self.exponential:
            return x.reciprocal_(), x
        if self.power == 1.0:
            return torch.exp(x.reciprocal_(), out=room), x.square_()
        _inverse_power_(room.copy_(x), self.power)
        if not self.exponential:
            return room, x.reciprocal_()
        torch.div(room, x, out=x)
        return room.exp_(), x

    def _hold_(self, x: Tensor) -> None:
        if self.floor is not None:
            x.clamp_(min=self.floor)

    def log_weight(self, x: Tensor) -> Tensor:
        self._hold_(x)
        if self.power is None:
            return x
        return _inverse_power_(x.clone(), self.power) if self.exponential else x.log().mul_(-self.power)

    def log_slope(self, x: Tensor) -> Tensor | None:
        """The derivative of `log_weight`; None for 1."""
        self._hold_(x)
        if self.power is None:
            return None
        return _inverse_power_(x.clone(), self.power).div_(x) if self.exponential else x.reciprocal()


def _inverse_power_(x: Tensor, power: float) -> Tensor:
    """x -> x^(-power), in place."""
    if power == 1.0:
        return x.reciprocal_()
    if power == 0.5:
        return x.rsqrt_()
    if power == 2.0:
        return x.square_().reciprocal_()
    return x.pow_(-power)


@dataclass
class Plan:
    """What a call needs besides its tensors.

    causal: keys after a row's own position are blocked.
    lengths: for each problem the number of leading keys to look at.
    windows: for each problem the largest |i - j| to look at, for each weighting.
    blocks: for each problem the rows and keys of a tile; so few that gamma^(2 block), or gamma^(2 window) if
        that is less, is far from underflow, since arithmetic on denormal numbers is a hundred times slower.
    least_sum: (B, U), sums of weights below it are not trusted.
    tolerance: the share of a row's sum of weights that may be left out.
    padding: (B, S) bool, True = blocked (u is zero there), or None.
    pair_mask: from problems, rows and keys to what is added to the tile's logits, or None.
    dropout, seed: probability of dropping a weight, and what its mask is drawn from.
    shifts: filled by the forward: (first problem, first row) of a shifted block -> its (problems, U, rows).
    """

    weight: PairWeight
    causal: bool
    lengths: list[int]
    windows: list[list[int]]
    blocks: list[int]
    least_sum: Tensor
    tolerance: float
    padding: Tensor | None = None
    pair_mask: Callable[[slice, slice, slice], Tensor] | None = None
    dropout: float = 0.0
    seed: int = 0
    shifts: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class Block(NamedTuple):
    """A range of rows or of keys."""

    start: int
    stop: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def size(self) -> int:
        return self.stop - self.start


def blocks_of(length: int, block: int) -> list[Block]:
    return [Block(start, min(start + block, length)) for start in range(0, length, block)]


class Terms(NamedTuple):
    """What is summed, or the gradient by it: all of one floating type, of B problems."""

    a: Tensor  # (B, L, A)
    b: Tensor  # (B, S, A)
    u: Tensor  # (B, C, S), or (B, W, S) where key_scale is given: then all weightings weigh the same
    log_decay: Tensor | None  # (B, U), below 0
    row_scale: Tensor | None  # (B, U, L), above 0: with the key's, what multiplies the logarithm of a weight
    key_scale: Tensor | None  # (B, U, S), above 0: what multiplies the weight, where no row_scale is given

    def of(self, span: slice) -> "Terms":
        scalars = (None if x is None else x[span] for x in self[3:])
        return Terms(self.a[span], self.b[span], self.u[span], *scalars)


class Side(NamedTuple):
    """Decay towards the gap between rows and keys, where the keys lie before the rows, or after them."""

    row_steps: Tensor  # (L,) steps from a row to the end of its block that is nearer to the keys
    key_steps: Tensor  # (S,) the same for keys
    row_factor: Tensor  # (problems, U, L), gamma to that power
    key_factor: Tensor  # (problems, U, S)


def by_block(columns: Tensor, blocks: list[Block]) -> list[Tensor]:
    """The parts of (problems, X, L) that belong to blocks of L."""
    return [columns[:, :, block.slice] for block in blocks]


def each_column(columns: Tensor, of_weightings: Tensor) -> tuple[Tensor, Tensor]:
    """Views of (problems, C, n) and of (problems, U, n or 1) that broadcast together: (problems, U, W, n)."""
    return columns.unflatten(1, (of_weightings.shape[1], -1)), of_weightings.unsqueeze(2)


def by_weighting(scale: Tensor | None, blocks: list[Block]) -> dict[Block, list[Tensor]]:
    """The parts of (problems, U, L) that belong to a block of L and a weighting, (problems, block)."""
    if scale is None:
        return {}
    return {block: list(scale[:, :, block.slice].unbind(1)) for block in blocks}


class Problems:
    """Some problems, worked on together: their tensors and their decay."""

    def __init__(self, plan: Plan, span: slice, terms: Terms, before: "Problems | None") -> None:
        self.plan, self.span = plan, span
        self.a, self.b, self.u, self.rate, self.row_scale, self.key_scale = terms.of(span)
        self.count, self.length, _ = self.a.shape
        self.weightings = plan.least_sum.shape[1]
        self.width = self.u.shape[1] // (self.weightings if self.key_scale is None else 1)
        windows = plan.windows[span]
        self.windows = [max(of_weighting) for of_weighting in zip(*windows, strict=True)]
        self.shortest_window = min(min(of_problem) for of_problem in windows)
        self.reach = self.a.new_tensor(windows).unsqueeze(2)
        self.block = plan.blocks[span.start]
        self.keys = blocks_of(max(plan.lengths[span]), self.block)
        self.rows = blocks_of(self.length, self.block)
        beside = self.rate is not None and len(self.rows) + len(self.keys) > 2
        self.sides = (self._side(before=True), self._side(before=False)) if beside else ()
        # Views are made once: making one costs a hundredth of a tile.
        self.u_of_keys = by_block(self.u, self.keys)
        self.row_scales = by_weighting(self.row_scale, self.rows)
        self.key_scales = by_weighting(self.key_scale, self.keys)
        rates = [[0.0] * self.weightings] if self.rate is None else self.rate.tolist()
        self.slowest = [max(of_weighting) for of_weighting in zip(*rates, strict=True)]
        self.none_vanish = [False] * self.weightings
        self.distances: dict[tuple[int, int, int], Tensor] = {}
        self.gap_factors: dict[int, Tensor] = {}
        # Heads have the same decay in every example, so that the problems before often have these factors.
        self.decay = rates, windows
        self.diagonal_factors: dict[tuple[int, int], list[Tensor]] = {}
        if before is not None and before.decay == self.decay:
            self.diagonal_factors = before.diagonal_factors

    def _side(self, before: bool) -> Side:
        def steps(length: int, to_start: bool) -> Tensor:
            position = torch.arange(length, device=self.a.device)
            within = position % self.block
            last = torch.clamp(position - within + self.block, max=length) - position - 1
            return (within if to_start else last).to(self.a.dtype)

        rows, keys = steps(self.length, before), steps(self.u.shape[2], not before)
        return Side(rows, keys, self.powers(rows, self.block), self.powers(keys, self.block))

    def powers(self, distance: Tensor, largest: int) -> Tensor:
        """gamma^distance, 0 beyond a window: distance (n,), none above `largest` -> (problems, U, n)."""
        assert self.rate is not None
        powers = (self.rate[:, :, None] * distance).exp_()
        return powers if largest <= self.shortest_window else powers.masked_fill_(distance > self.reach, 0.0)

    def values(self, m: int) -> Tensor:
        """The u of a block of keys for every weighting (problems, C, keys)."""
        if self.key_scale is None:
            return self.u_of_keys[m]
        if self.row_scale is None:
            return (self.u_of_keys[m].unsqueeze(1) * self.key_scale_of(m)).flatten(1, 2)
        return self.u_of_keys[m].repeat(1, self.weightings, 1)

    def key_scale_of(self, m: int) -> Tensor:
        """(problems, U, 1, keys)."""
        assert self.key_scale is not None
        return self.key_scale[:, :, None, self.keys[m].slice]

    def shifted(self, rows: Block) -> bool:
        return (self.span.start, rows.start) in self.plan.shifts

    def explicit(self, rows: Block) -> bool:
        """Whether weights of these rows are made in log space, with decay and masks."""
        return self.shifted(rows) or self.plan.pair_mask is not None or bool(self.plan.dropout)

    def on_diagonal(self, rows: Block, keys: Block) -> bool:
        """Whether the tile's weights have a factor of their own, `diagonal_factor`."""
        return rows.start == keys.start and (self.plan.causal or self.rate is not None)

    def diagonal_factor(self, rows: Block, keys: Block, rows_first: bool) -> list[Tensor]:
        """gamma^|i-j|, and 0 where j > i is blocked: for each weighting (problems or 1, rows, keys), or
        (problems or 1, keys, rows). A caller asks for one of the two only."""
        shape = (rows.size, keys.size) if rows_first else (keys.size, rows.size)
        if shape not in self.diagonal_factors:
            if self.rate is None:
                factors = [self.a.new_ones(1, *shape)] * self.weightings
            else:
                factors = self._toeplitz(*shape)
            if self.plan.causal:
                factors = [part.tril_() if rows_first else part.triu_() for part in factors]
            self.diagonal_factors[shape] = factors
        return self.diagonal_factors[shape]

    def _toeplitz(self, height: int, width: int) -> list[Tensor]:
        """gamma^|i-j| for each weighting: (problems, height, width), from the powers of each distance."""
        steps = torch.arange(1 - height, width, device=self.a.device, dtype=self.a.dtype).abs_()
        powers = self.powers(steps, max(height, width))
        return [part.unfold(1, width, 1).flip(1) for part in powers.unbind(1)]

    def vanishing(self, rows: Block, keys: Block) -> list[bool]:
        """For each weighting whether the tile is left out: beyond the window, or `decayed`."""
        if self.explicit(rows):
            return self.none_vanish
        gap = self.gap(rows, keys)
        each = zip(self.windows, self.decayed(rows, keys), strict=True)
        return [gap > window or decayed for window, decayed in each]

    def decayed(self, rows: Block, keys: Block) -> list[bool]:
        """For each weighting whether decay alone makes a tile within the window so light that it is bounded,
        not summed."""
        gap = self.gap(rows, keys)
        each = zip(self.windows, self.slowest, strict=True)
        return [gap <= window and gap * slowest < LOG_VANISHED for window, slowest in each]

    def side(self, rows: Block, keys: Block) -> int:
        """Which side of the rows the keys lie on: 0 before, 1 after; 0 for all without decay."""
        return int(self.rate is not None and keys.start > rows.start)

    def log_bound(self, x: Tensor, rows: Block, keys: Block) -> Tensor:
        """(problems, U): the logarithm of a bound on what a tile, x (problems, keys, rows), adds to a sum."""
        assert self.rate is not None
        extreme = x.amax((1, 2)) if self.plan.weight.power is None else x.amin((1, 2))
        log_weight = self.plan.weight.log_weight(extreme).unsqueeze(1)
        if self.row_scale is not None and self.key_scale is not None:
            log_weight = log_weight * self.row_scale[:, :, rows.slice].amax(2)
            log_weight = log_weight * self.key_scale[:, :, keys.slice].amax(2)
        largest = self.u[:, self.width - 1 :: self.width, keys.slice]  # (problems, U or 1, keys)
        if self.key_scale is not None and self.row_scale is None:
            largest = largest * self.key_scale[:, :, keys.slice]
        largest = largest.amax(2)
        return log_weight + largest.log() + self.gap(rows, keys) * self.rate + math.log(keys.size)

    def gap(self, rows: Block, keys: Block) -> int:
        """Steps between the near ends of rows and keys."""
        return rows.start - keys.stop + 1 if keys.start < rows.start else keys.start - rows.stop + 1

    def gap_factor(self, rows: Block, keys: Block) -> Tensor:
        """gamma^gap (problems, U, 1), 0 for weightings that vanish where others do not."""
        gap = self.gap(rows, keys)
        if gap not in self.gap_factors:
            factor = self.powers(self.a.new_tensor([gap]), gap)
            for weighting, vanishes in enumerate(self.vanishing(rows, keys)):
                if vanishes:
                    factor[:, weighting] = 0.0
            self.gap_factors[gap] = factor
        return self.gap_factors[gap]

    def visible(self, rows: Block, keys: Block) -> bool:
        """Whether any of these rows attends to any of these keys."""
        if self.plan.causal and keys.start >= rows.stop:
            return False
        near = rows.start == keys.start or self.gap(rows, keys) <= max(self.windows)
        return near or self.shifted(rows)

    def scaled(self, forces: Tensor, w: int, rows: Block, keys: Block, out: Tensor) -> Tensor:
        """The logits of a weighting: forces (problems, rows, keys) times the scales of rows and keys."""
        torch.mul(forces, self.row_scales[rows][w].unsqueeze(2), out=out)
        return out.mul_(self.key_scales[keys][w].unsqueeze(1))

    def distance(self, rows: Block, keys: Block) -> Tensor:
        """|i - j| (rows, keys)."""
        shape = rows.size, keys.size, rows.start - keys.start
        if shape not in self.distances:
            i = torch.arange(*rows, device=self.a.device, dtype=self.a.dtype)
            j = torch.arange(*keys, device=self.a.device, dtype=self.a.dtype)
            self.distances = {shape: (i[:, None] - j).abs_()}  # the last one only: it is as large as a tile
        return self.distances[shape]

    def mask(self, rows: Block, keys: Block) -> Tensor | None:
        """What masks add to the logits of a tile, broadcastable to (problems, rows, keys), or None."""
        added = None
        if self.plan.pair_mask is not None:
            added = self.plan.pair_mask(self.span, rows.slice, keys.slice).to(self.a.dtype)
        if self.plan.causal and keys.stop > rows.start + 1:
            order = torch.full((rows.size, keys.size), -math.inf, device=self.a.device, dtype=self.a.dtype)
            order = order.triu_(rows.start - keys.start + 1)
            added = order if added is None else added + order
        if self.plan.padding is not None:
            blocked = self.plan.padding[self.span, None, keys.slice]
            padding = torch.zeros_like(blocked, dtype=self.a.dtype).masked_fill_(blocked, -math.inf)
            added = padding if added is None else added + padding
        return added

    def explicit_logits(self, rows: Block, keys: Block) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """x (problems, rows, keys) and, for each of the U weightings, its logits without and with decay and
        masks."""
        x = self.a[:, rows.slice] @ self.b[:, keys.slice].mT
        plain, mask = [self.plan.weight.log_weight(x)] * self.weightings, self.mask(rows, keys)
        if self.row_scale is not None:
            plain = [
                self.scaled(forces, w, rows, keys, torch.empty_like(x)) for w, forces in enumerate(plain)
            ]
        logits = plain if mask is None else [own + mask for own in plain]
        if self.rate is not None:
            distance = self.distance(rows, keys)
            logits = [
                torch.addcmul(own, rate[:, None, None], distance)
                for own, rate in zip(logits, self.rate.unbind(1), strict=True)
            ]
        return x, plain, logits

    def explicit_weights(self, rows: Block, keys: Block) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The same, with the weights instead of the logits."""
        x, plain, logits = self.explicit_logits(rows, keys)
        shift = self.plan.shifts.get((self.span.start, rows.start))
        if shift is None:
            return x, plain, [logit.exp() for logit in logits]
        return x, plain, [(logit - shift[:, n, :, None]).exp_() for n, logit in enumerate(logits)]

    def columns_of(self, weightings: slice) -> slice:
        return slice(weightings.start * self.width, weightings.stop * self.width)

    def kept(self, rows: Block, keys: Block) -> Tensor | None:
        """The factor (problems, rows, keys) of dropout, the same whenever it is asked for, or None."""
        if not self.plan.dropout:
            return None
        generator = torch.Generator(self.a.device)
        generator.manual_seed(hash((self.plan.seed, self.span.start, rows.start, keys.start)) % 2**63)
        shape = (self.count, rows.size, keys.size)
        kept = torch.empty(shape, device=self.a.device, dtype=self.a.dtype)
        return kept.bernoulli_(1 - self.plan.dropout, generator=generator).div_(1 - self.plan.dropout)


def groups_of(plan: Plan, terms: Terms) -> Iterator[Problems]:
    """Problems of one block size, in groups that fill a tile."""
    start, problems = 0, None
    for block, group in itertools.groupby(plan.blocks):
        stop = start + len(list(group))
        count = max(1, TILE_PAIRS // max(1, min(block, terms.a.shape[1]) * min(block, terms.b.shape[1])))
        for first in range(start, stop, count):
            problems = Problems(plan, slice(first, min(first + count, stop)), terms, problems)
            yield problems
        start = stop


class Buffer:
    """Room for one tile, reused: fresh temporaries of this size cost more than the arithmetic on them."""

    def __init__(self, like: Tensor) -> None:
        self.flat = like.new_empty(0)
        self.views: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, *shape: int) -> Tensor:
        if shape not in self.views:
            size = math.prod(shape)
            if self.flat.numel() < size:
                self.flat, self.views = self.flat.new_empty(size), {}
            self.views[shape] = self.flat[:size].view(shape)
        return self.views[shape]
