"""Sums over keys of pair weights times values, in O(L + S) memory: tiles of weights are made, used and
forgotten, and made again in the backward. Plain torch, any device, no compiler.

::

    y_i = sum_j e(x_ij) gamma^|i - j| u_j,   x_ij = a_i . b_j,   e(x) = exp(x), exp(x^(-p/2)) or x^(-p/2)

`tiled_attention` brings every score into this form. With u = [v, 1] the last column of y sums the weights,
so that attention is y[:D] / y[D]; the tiles know neither softmax nor its gradient.

- gamma^|i-j| factors over a tile beside the diagonal, with i0 the first row and j1 the last key:
  gamma^(i - i0) gamma^(i0 - j1) gamma^(j1 - j) for keys before the rows. The factors go into y and u, which
  are small, and the tile never sees the decay.
- No running maximum: plain sums serve while they stay within the range of the type and far above what was
  skipped. That is read off the sums themselves; a block of rows that fails is computed again in log space,
  over all keys and with its maximum subtracted ("shifted"). Tiles on the diagonal of a decay, and tiles with
  masks or dropout, are "explicit": in log space too, with no shift.

Symbols: B problems (a timescale of a head of an example), L queries, S keys, A width of a and b, U weightings
that share a tile, C = U W columns of u, W = C / U.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 256  # rows and keys of a tile, at most
TILE_PAIRS = 2**18  # pairs worked on at once: 1 MiB in float32, two such buffers stay in a core's cache
LARGEST_SUM = 1e30


@dataclass(frozen=True)
class PairWeight:
    """e(x). power: p / 2, or None for exp(x) itself. exponential: whether the exponential is taken."""

    power: float | None
    exponential: bool

    @property
    def slope_factor(self) -> float:
        """A constant factor of e'(x), left out below and multiplied in at the end."""
        return 1.0 if self.power is None else -self.power

    def weigh_(self, x: Tensor) -> Tensor:
        """x -> e(x), in place."""
        if self.power is not None:
            _inverse_power_(x, self.power)
        return x.exp_() if self.exponential else x

    def weigh_with_slope_(self, x: Tensor, upstream: Tensor) -> None:
        """x -> e(x) and upstream -> upstream e'(x), both in place."""
        if self.power == 1.0:
            x.reciprocal_()
            upstream.mul_(x).mul_(x)
        elif self.power is not None:
            upstream.div_(x)
            upstream.mul_(_inverse_power_(x, self.power))
        if self.exponential:
            x.exp_()
            upstream.mul_(x)

    def log_weight(self, x: Tensor) -> Tensor:
        if self.power is None:
            return x
        return _inverse_power_(x.clone(), self.power) if self.exponential else x.log().mul_(-self.power)

    def log_slope(self, x: Tensor) -> Tensor | None:
        """The derivative of `log_weight`; None for 1."""
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
    lengths, windows: for each problem the number of leading keys to look at, and the largest |i - j|.
    blocks: for each problem the rows and keys of a tile; so few that gamma^(2 block) is far from underflow,
        since arithmetic on denormal numbers is a hundred times slower.
    least_sum: (B, U), sums of weights below it are not trusted.
    padding: (B, S) bool, True = blocked (u is zero there), or None.
    pair_mask: from problems, rows and keys to what is added to the tile's logits, or None.
    dropout, seed: probability of dropping a weight, and what its mask is drawn from.
    shifts: filled by the forward: (first problem, first row) of a shifted block -> its (problems, U, rows).
    """

    weight: PairWeight
    causal: bool
    lengths: list[int]
    windows: list[int]
    blocks: list[int]
    least_sum: Tensor
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


class Side(NamedTuple):
    """Decay towards the gap between rows and keys, where the keys lie before the rows, or after them."""

    row_steps: Tensor  # (L,) steps from a row to the end of its block that is nearer to the keys
    key_steps: Tensor  # (S,) the same for keys
    row_factor: Tensor  # (problems, L, C), gamma to that power
    key_factor: Tensor  # (problems, S, C)


class Problems:
    """Some problems, worked on together: their tensors, their decay and the two reused tile buffers."""

    def __init__(
        self, plan: Plan, span: slice, a: Tensor, b: Tensor, u: Tensor, log_decay: Tensor | None
    ) -> None:
        self.plan, self.span = plan, span
        self.a, self.b, self.u = a[span], b[span], u[span]
        self.rate = None if log_decay is None else log_decay[span]
        self.count, self.length, _ = self.a.shape
        self.weightings = plan.least_sum.shape[1]
        self.width = u.shape[2] // self.weightings
        self.window = max(plan.windows[span])
        self.block = plan.blocks[span.start]
        self.keys = blocks_of(max(plan.lengths[span]), self.block)
        self.rows = blocks_of(self.length, self.block)
        self.sides = () if self.rate is None else (self._side(before=True), self._side(before=False))
        self.side_values = [self.u * side.key_factor for side in self.sides] or [self.u]
        self.gap_factors: dict[int, Tensor] = {}

    def _side(self, before: bool) -> Side:
        def steps(length: int, to_start: bool) -> Tensor:
            position = torch.arange(length, device=self.a.device)
            within = position % self.block
            last = torch.clamp(position - within + self.block, max=length) - position - 1
            return (within if to_start else last).to(self.a.dtype)

        rows, keys = steps(self.length, before), steps(self.u.shape[1], not before)
        return Side(rows, keys, self.factor(rows), self.factor(keys))

    def factor(self, distance: Tensor) -> Tensor:
        """gamma^distance: distance (n,) -> (problems, n, C)."""
        assert self.rate is not None
        powers = (self.rate[:, None, :] * distance[:, None]).exp()
        return powers.repeat_interleave(self.width, dim=2)

    def side_of(self, rows: Block, keys: Block) -> int | None:
        """Which side of the rows the keys lie on, 0 before and 1 after; None where the tile is explicit."""
        if (self.span.start, rows.start) in self.plan.shifts or self.plan.pair_mask or self.plan.dropout:
            return None
        on_diagonal = rows.start == keys.start
        if on_diagonal and (self.plan.causal or self.rate is not None):
            return None
        return 0 if self.rate is None or keys.start < rows.start else 1

    def gap(self, rows: Block, keys: Block) -> int:
        """Steps between the near ends of rows and keys."""
        return rows.start - keys.stop + 1 if keys.start < rows.start else keys.start - rows.stop + 1

    def gap_factor(self, rows: Block, keys: Block) -> Tensor:
        """gamma^gap (problems, 1, C)."""
        gap = self.gap(rows, keys)
        if gap not in self.gap_factors:
            self.gap_factors[gap] = self.factor(self.a.new_tensor([gap]))
        return self.gap_factors[gap]

    def visible(self, rows: Block, keys: Block) -> bool:
        """Whether any of these rows attends to any of these keys."""
        if self.plan.causal and keys.start >= rows.stop:
            return False
        shifted = (self.span.start, rows.start) in self.plan.shifts
        return shifted or rows.start == keys.start or self.gap(rows, keys) <= self.window

    def distance(self, rows: Block, keys: Block) -> Tensor:
        """|i - j| (rows, keys)."""
        i = torch.arange(*rows, device=self.a.device, dtype=self.a.dtype)
        j = torch.arange(*keys, device=self.a.device, dtype=self.a.dtype)
        return (i[:, None] - j).abs_()

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

    def explicit_logits(self, rows: Block, keys: Block) -> tuple[Tensor, list[Tensor]]:
        """x (problems, rows, keys) and, for each of the U weightings, its logits with decay and masks."""
        x = self.a[:, rows.slice] @ self.b[:, keys.slice].mT
        logits, mask = self.plan.weight.log_weight(x), self.mask(rows, keys)
        if mask is not None:
            logits = logits + mask
        if self.rate is None:
            return x, [logits] * self.weightings
        distance = self.distance(rows, keys)
        return x, [torch.addcmul(logits, rate[:, None, None], distance) for rate in self.rate.unbind(1)]

    def explicit_weights(self, rows: Block, keys: Block) -> tuple[Tensor, list[Tensor]]:
        x, logits = self.explicit_logits(rows, keys)
        shift = self.plan.shifts.get((self.span.start, rows.start))
        if shift is None:
            return x, [logit.exp() for logit in logits]
        return x, [(logit - shift[:, n, :, None]).exp_() for n, logit in enumerate(logits)]

    def columns(self, weighting: int) -> slice:
        return slice(weighting * self.width, (weighting + 1) * self.width)

    def kept(self, rows: Block, keys: Block) -> Tensor | None:
        """The factor (problems, rows, keys) of dropout, the same whenever it is asked for, or None."""
        if not self.plan.dropout:
            return None
        generator = torch.Generator(self.a.device)
        generator.manual_seed(hash((self.plan.seed, self.span.start, rows.start, keys.start)) % 2**63)
        shape = (self.count, rows.size, keys.size)
        kept = torch.empty(shape, device=self.a.device, dtype=self.a.dtype)
        return kept.bernoulli_(1 - self.plan.dropout, generator=generator).div_(1 - self.plan.dropout)


def spans_of(plan: Plan, rows: int, keys: int) -> Iterator[slice]:
    """Problems of one block size, in groups that fill a tile."""
    start = 0
    for block, group in itertools.groupby(plan.blocks):
        stop = start + len(list(group))
        count = max(1, TILE_PAIRS // max(1, min(block, rows) * min(block, keys)))
        yield from (slice(first, min(first + count, stop)) for first in range(start, stop, count))
        start = stop


class Buffer:
    """Room for one tile, reused: fresh temporaries of this size cost more than the arithmetic on them."""

    def __init__(self, like: Tensor) -> None:
        self.flat = like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        if self.flat.numel() < size:
            self.flat = self.flat.new_empty(size)
        return self.flat[:size].view(shape)


class ForwardSums:
    """y of some problems, and what its gradient by log gamma will need."""

    def __init__(self, problems: Problems, tile: Buffer, want_moment: bool) -> None:
        self.problems, self.tile, self.want_moment = problems, tile, want_moment
        self.a_columns = problems.a.mT.contiguous()
        self.values = [values.mT.contiguous() for values in problems.side_values]

    def rows(self, rows: Block) -> tuple[Tensor, Tensor | None]:
        """y (problems, rows, C) and its moment: the same sum over the tiles that are not explicit, each term
        times |i - j| less the steps from j to the near end of its block."""
        p = self.problems
        sums = [p.a.new_zeros(p.count, p.u.shape[2], rows.size) for _ in self.values]
        moments = [torch.zeros_like(part) for part in sums] if self.want_moment else []
        explicit = torch.zeros_like(sums[0])
        for keys in p.keys:
            if not p.visible(rows, keys):
                continue
            side = p.side_of(rows, keys)
            if side is None:
                self._add_explicit(explicit, rows, keys)
                continue
            tile = self.tile(p.count, keys.size, rows.size)
            x = torch.bmm(p.b[:, keys.slice], self.a_columns[:, :, rows.slice], out=tile)
            part = torch.bmm(self.values[side][:, :, keys.slice], p.plan.weight.weigh_(x))
            if p.rate is not None:
                part.mul_(p.gap_factor(rows, keys).mT)
                if self.want_moment:
                    moments[side].add_(part, alpha=p.gap(rows, keys))
            sums[side].add_(part)
        if p.rate is None:
            return (sums[0] + explicit).mT, None
        y, moment = explicit.mT, torch.zeros_like(explicit).mT
        for n, side_ in enumerate(p.sides):
            row_factor = side_.row_factor[:, rows.slice]
            y = y + row_factor * sums[n].mT
            if self.want_moment:
                steps = side_.row_steps[rows.slice, None]
                moment = moment + row_factor * (moments[n].mT + steps * sums[n].mT)
        return y, moment if self.want_moment else None

    def _add_explicit(self, y: Tensor, rows: Block, keys: Block) -> None:
        p = self.problems
        kept = p.kept(rows, keys)
        for n, weights in enumerate(p.explicit_weights(rows, keys)[1]):
            columns = p.columns(n)
            values = p.u[:, keys.slice, columns].mT
            if kept is None:
                y[:, columns] += values @ weights.mT
            else:  # dropped weights still count in the sum of weights, the last column
                y[:, columns][:, :-1] += values[:, :-1] @ (weights * kept).mT
                y[:, columns][:, -1:] += values[:, -1:] @ weights.mT

    def shift(self, rows: Block) -> Tensor:
        """The largest logit of each row (problems, U, rows), 0 where a row has no key."""
        p = self.problems
        largest = p.a.new_full((p.count, p.weightings, rows.size), -math.inf)
        for keys in p.keys:
            if not p.plan.causal or keys.start < rows.stop:
                for n, logits in enumerate(p.explicit_logits(rows, keys)[1]):
                    largest[:, n] = torch.maximum(largest[:, n], logits.amax(-1))
        return largest.masked_fill_(largest == -math.inf, 0.0)


class BackwardSums:
    """The gradients of some problems, from that of y."""

    def __init__(self, problems: Problems, dy: Tensor, tiles: tuple[Buffer, Buffer], want_rate: bool) -> None:
        self.problems, self.tiles, self.want_rate = problems, tiles, want_rate
        p = problems
        self.dy = dy
        self.side_dy = [dy * side.row_factor for side in p.sides] or [dy]
        self.b_columns = p.b.mT.contiguous()
        self.values = [values.mT.contiguous() for values in p.side_values]
        self.da, self.db, self.du = torch.zeros_like(p.a), torch.zeros_like(p.b), torch.zeros_like(p.u)
        self.drate = None if p.rate is None else torch.zeros_like(p.rate)

    def run(self) -> None:
        """Fill da, db, du and drate, but for what drate has from the moments of the forward."""
        p = self.problems
        for keys in p.keys:
            du = [p.u.new_zeros(p.count, p.u.shape[2], keys.size) for _ in self.values]
            for rows in p.rows:
                if not p.visible(rows, keys):
                    continue
                side = p.side_of(rows, keys)
                dx = self._explicit(rows, keys) if side is None else self._plain(rows, keys, side, du[side])
                self.da[:, rows.slice] += dx @ p.b[:, keys.slice]
                self.db[:, keys.slice] += (p.a[:, rows.slice].mT @ dx).mT
            for n, part in enumerate(du):
                self._add_side(keys, n, part.mT)
        self.da *= p.plan.weight.slope_factor
        self.db *= p.plan.weight.slope_factor

    def _plain(self, rows: Block, keys: Block, side: int, du: Tensor) -> Tensor:
        """The gradient of a tile's x; adds to du (problems, C, keys), yet without the factor of the keys."""
        p = self.problems
        dy = self.side_dy[side][:, rows.slice]
        if p.rate is not None:
            dy = dy * p.gap_factor(rows, keys)
        shape = (p.count, rows.size, keys.size)
        x = torch.bmm(p.a[:, rows.slice], self.b_columns[:, :, keys.slice], out=self.tiles[0](*shape))
        dx = torch.bmm(dy, self.values[side][:, :, keys.slice], out=self.tiles[1](*shape))
        p.plan.weight.weigh_with_slope_(x, dx)
        du.baddbmm_(dy.mT, x)
        return dx

    def _add_side(self, keys: Block, n: int, du: Tensor) -> None:
        p = self.problems
        if p.rate is None:
            self.du[:, keys.slice] += du
            return
        side = p.sides[n]
        du = du * side.key_factor[:, keys.slice]
        self.du[:, keys.slice] += du
        if self.want_rate:
            self.add_rate((du * p.u[:, keys.slice] * side.key_steps[keys.slice, None]).sum(1))

    def add_rate(self, columns: Tensor) -> None:
        """Add (problems, C), summed over the columns of each weighting, to the gradient of log gamma."""
        p = self.problems
        assert self.drate is not None
        self.drate.add_(columns.unflatten(-1, (p.weightings, p.width)).sum(-1))

    def _explicit(self, rows: Block, keys: Block) -> Tensor:
        p = self.problems
        kept = p.kept(rows, keys)
        x, all_weights = p.explicit_weights(rows, keys)
        dlogits = torch.zeros_like(x)
        for n, weights in enumerate(all_weights):
            columns = p.columns(n)
            dy, u = self.dy[:, rows.slice, columns], p.u[:, keys.slice, columns]
            if kept is None:
                self.du[:, keys.slice, columns] += weights.mT @ dy
                dweights = dy @ u.mT
            else:
                du = self.du[:, keys.slice, columns]
                du[..., :-1] += (weights * kept).mT @ dy[..., :-1]
                du[..., -1:] += weights.mT @ dy[..., -1:]
                dweights = dy[..., :-1] @ u[..., :-1].mT * kept + dy[..., -1:] @ u[..., -1:].mT
            dweights *= weights
            if self.want_rate and self.drate is not None:
                self.drate[:, n] += (dweights * p.distance(rows, keys)).sum((1, 2))
            dlogits += dweights
        slope = p.plan.weight.log_slope(x)
        return dlogits if slope is None else dlogits * slope


class TileSums(torch.autograd.Function):
    """`TileSums.apply(a, b, u, log_decay, plan)` -> y (B, L, C); see the top of the file.

    a (B, L, A), b (B, S, A), u (B, S, C), all of one floating type; log_decay (B, U), below 0, or None.
    Saves its inputs and, for a learned decay, one more tensor of the size of y.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, u: Tensor, log_decay: Tensor | None, plan: Plan) -> Tensor:
        want_moment = log_decay is not None and ctx.needs_input_grad[3]
        y = a.new_empty(len(a), a.shape[1], u.shape[2])
        moment = torch.zeros_like(y) if want_moment else None
        tile = Buffer(a)
        for span in spans_of(plan, a.shape[1], b.shape[1]):
            problems = Problems(plan, span, a, b, u, log_decay)
            sums = ForwardSums(problems, tile, want_moment)

            def fill(rows: Block, sums: ForwardSums = sums, span: slice = span) -> None:
                y[span, rows.slice], part = sums.rows(rows)
                if moment is not None and part is not None:
                    moment[span, rows.slice] = part

            for rows in problems.rows:
                fill(rows)
            for rows in untrusted(plan, problems, y[span]):
                plan.shifts[span.start, rows.start] = sums.shift(rows)
                fill(rows)
        ctx.plan = plan
        ctx.save_for_backward(a, b, u, log_decay, moment)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b, u, log_decay, moment = ctx.saved_tensors
        da, db, du = torch.empty_like(a), torch.empty_like(b), torch.empty_like(u)
        drate = None if moment is None else torch.empty_like(log_decay)
        tiles = (Buffer(a), Buffer(a))
        dy = dy.contiguous()
        for span in spans_of(ctx.plan, a.shape[1], b.shape[1]):
            problems = Problems(ctx.plan, span, a, b, u, log_decay)
            sums = BackwardSums(problems, dy[span], tiles, moment is not None)
            sums.run()
            da[span], db[span], du[span] = sums.da, sums.db, sums.du
            if drate is not None and sums.drate is not None:
                sums.add_rate((dy[span] * moment[span]).sum(1))
                drate[span] = sums.drate
        return da, db, du, drate, None


def untrusted(plan: Plan, problems: Problems, y: Tensor) -> list[Block]:
    """The blocks of rows whose sums of weights leave the range in which plain sums can be trusted."""
    totals = y[:, :, problems.width - 1 :: problems.width]  # (problems, L, U)
    trusted = (totals >= plan.least_sum[problems.span, None]) & (totals <= LARGEST_SUM)
    trusted_rows = trusted.all(2).all(0)
    flags = torch.stack([trusted_rows[rows.slice].all() for rows in problems.rows]).tolist()
    return [rows for rows, flag in zip(problems.rows, flags, strict=True) if not flag]
