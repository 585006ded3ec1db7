"""Sums over keys of pair weights times values, in O(L + S) memory: tiles of weights are made, used and
forgotten, and made again in the backward. Plain torch, any device, no compiler.

::

    y_i = sum_j e(x_ij) gamma^|i - j| u_j,   x_ij = a_i . b_j,   e(x) = exp(x), exp(x^(-p/2)) or x^(-p/2)

`tiled_attention` brings every score into this form. With u = [v, 1] the last row of y sums the weights, so
that attention is y[:D] / y[D]; the tiles know neither softmax nor its gradient.

- gamma^|i-j| factors over a tile beside the diagonal, with i0 the first row and j1 the last key:
  gamma^(i - i0) gamma^(i0 - j1) gamma^(j1 - j) for keys before the rows. The factors go into y and u, which
  are small, and the tile never sees the decay.
- No running maximum: plain sums serve while they stay within the range of the type and far above what was
  skipped. That is read off the sums themselves; a block of rows that fails is computed again in log space,
  over all keys and with its maximum subtracted ("shifted"). Tiles with masks or dropout are "explicit": in
  log space too, with no shift.

Symbols: B problems (a timescale of a head of an example), L queries, S keys, A width of a and b, U weightings
that share a tile, C = U W rows of u and y, W = C / U.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attention_engine.tile_plan import LARGEST_SUM, Block, Buffer, Plan, Problems, by_block, groups_of


class ForwardSums:
    """y (problems, C, L) of some problems."""

    def __init__(self, problems: Problems, y: Tensor, tile: Buffer) -> None:
        self.problems, self.y, self.tile = problems, y.zero_(), tile
        p = problems
        self.a = by_block(p.a.mT, p.rows)
        self.b = [p.b[:, keys.slice] for keys in p.keys]
        self.values = [by_block(p.u * side.key_factor, p.keys) for side in p.sides] or [p.values]
        self.of_rows = by_block(y, p.rows)
        self.sums = [torch.zeros_like(y) for _ in p.sides]
        self.sums_of_rows = [by_block(part, p.rows) for part in self.sums]
        self.left_out: dict[Block, Tensor] = {}  # (problems, U) log of what vanishing tiles add at most

    def run(self) -> None:
        """Fill y; rows whose sums cannot be trusted are computed again."""
        p = self.problems
        for n in range(len(p.rows)):
            self._add_rows(n)
        for side, sums in zip(p.sides, self.sums, strict=True):
            self.y.addcmul_(side.row_factor, sums)
        for n in self._untrusted():
            rows = p.rows[n]
            p.plan.shifts[p.span.start, rows.start] = self._shift(rows)
            self.of_rows[n].zero_()
            self._add_rows(n)

    def _add_rows(self, n: int) -> None:
        p = self.problems
        rows, explicit = p.rows[n], p.explicit(p.rows[n])
        undecayed: Tensor | None = None
        for m, keys in enumerate(p.keys):
            if not p.visible(rows, keys):
                continue
            if explicit:
                self._add_explicit(n, m)
                continue
            x = torch.bmm(self.b[m], self.a[n], out=self.tile(p.count, keys.size, rows.size))
            if p.on_diagonal(rows, keys):
                self._add_diagonal(n, m, x)
                continue
            if self._vanishes(x, rows, keys):
                continue
            weights, side = p.plan.weight.weigh_(x), p.side(rows, keys)
            if p.rate is not None:
                part = torch.bmm(self.values[side][m], weights).mul_(p.gap_factor(rows, keys))
                self.sums_of_rows[side][n].add_(part)
            # Sums of their own: a batched product cannot add to a part of a tensor at full speed.
            elif undecayed is None:
                undecayed = torch.bmm(self.values[side][m], weights)
            else:
                undecayed.baddbmm_(self.values[side][m], weights)
        if undecayed is not None:
            self.of_rows[n].add_(undecayed)

    def _vanishes(self, x: Tensor, rows: Block, keys: Block) -> bool:
        """Whether no weighting needs the tile x (problems, keys, rows); what it would add is bounded."""
        vanishing = self.problems.vanishing(rows, keys)
        if not any(vanishing):
            return False
        bound = self.problems.log_bound(x, rows, keys)
        bound[:, [not vanishes for vanishes in vanishing]] = -math.inf
        self.left_out[rows] = torch.logaddexp(self.left_out.get(rows, bound), bound)
        return all(vanishing)

    def _add_diagonal(self, n: int, m: int, x: Tensor) -> None:
        p = self.problems
        weights = p.plan.weight.weigh_(x)
        factors = p.diagonal_factor(p.rows[n], p.keys[m], rows_first=False)
        for w, factor in enumerate(factors):
            of_weighting = weights.mul_(factor) if w == len(factors) - 1 else weights * factor
            columns = p.columns_of(w)
            self.of_rows[n][:, columns].add_(torch.bmm(p.values[m][:, columns], of_weighting))

    def _add_explicit(self, n: int, m: int) -> None:
        p = self.problems
        kept = p.kept(p.rows[n], p.keys[m])
        for w, weights in enumerate(p.explicit_weights(p.rows[n], p.keys[m])[1]):
            columns = p.columns_of(w)
            y, values = self.of_rows[n][:, columns], p.values[m][:, columns]
            if kept is None:
                y += values @ weights.mT
            else:  # dropped weights still count in the sum of weights, the last row
                y[:, :-1] += values[:, :-1] @ (weights * kept).mT
                y[:, -1:] += values[:, -1:] @ weights.mT

    def _shift(self, rows: Block) -> Tensor:
        """The largest logit of each row (problems, U, rows), 0 where a row has no key."""
        p = self.problems
        largest = p.a.new_full((p.count, p.weightings, rows.size), -math.inf)
        for keys in p.keys:
            if not p.plan.causal or keys.start < rows.stop:
                for w, logits in enumerate(p.explicit_logits(rows, keys)[1]):
                    largest[:, w] = torch.maximum(largest[:, w], logits.amax(-1))
        return largest.masked_fill_(largest == -math.inf, 0.0)

    def _untrusted(self) -> list[int]:
        """The blocks of rows whose sums of weights leave the range in which plain sums can be trusted."""
        p = self.problems
        flags = []
        for n, rows in enumerate(p.rows):
            least = p.plan.least_sum[p.span]
            if rows in self.left_out:
                least = torch.maximum(least, self.left_out[rows].exp() / p.plan.tolerance)
            totals = self.of_rows[n][:, p.width - 1 :: p.width]  # (problems, U, rows)
            flags.append(((totals >= least.unsqueeze(2)) & (totals <= LARGEST_SUM)).all())
        trusted = torch.stack(flags).tolist()
        return [n for n, flag in enumerate(trusted) if not flag]


class BackwardSums:
    """The gradients of some problems, from that of y (problems, C, L): fills `into`, those by a, b and u."""

    def __init__(
        self,
        problems: Problems,
        dy: Tensor,
        into: tuple[Tensor, Tensor, Tensor],
        tiles: list[Buffer],
        want_rate: bool,
    ) -> None:
        self.problems, self.tiles, self.want_rate = problems, tiles, want_rate
        self.da, self.db, self.du = into
        self.du.zero_()
        p = problems
        self.dy = by_block(dy, p.rows)
        self.row_factor = [by_block(side.row_factor, p.rows) for side in p.sides]
        self.key_factor = [by_block(side.key_factor, p.keys) for side in p.sides]
        self.a = [p.a[:, rows.slice] for rows in p.rows]
        self.b = [p.b[:, keys.slice] for keys in p.keys]
        self.du_of_keys = by_block(self.du, p.keys)
        self.drate = None if p.rate is None else torch.zeros_like(p.rate)

    def run(self) -> None:
        """Fill da, db, du and drate."""
        p = self.problems
        # Sums of their own for each block: a batched product cannot add to a part of a tensor at full speed.
        da = [p.a.new_zeros(p.count, rows.size, p.a.shape[2]) for rows in p.rows]
        for m, keys in enumerate(p.keys):
            values = [p.values[m] * factor[m] for factor in self.key_factor]
            if p.rate is None:
                values = [p.values[m]]
            db = p.b.new_zeros(p.count, p.b.shape[2], keys.size)
            du = [torch.zeros_like(part) for part in values]
            for n, rows in enumerate(p.rows):
                if not p.visible(rows, keys) or all(p.vanishing(rows, keys)):
                    continue
                if p.explicit(rows):
                    dx = self._explicit(n, m)
                elif p.on_diagonal(rows, keys):
                    dx = self._diagonal(n, m)
                else:
                    side = p.side(rows, keys)
                    dx = self._beside(n, m, side, values[side], du[side])
                da[n].baddbmm_(dx, self.b[m])
                db.baddbmm_(self.a[n].mT, dx)
            self.db[:, keys.slice] = db.mT
            for side, part in enumerate(du):
                self._add_side(m, side, part)
        self.db[:, max((keys.stop for keys in p.keys), default=0) :] = 0.0
        torch.cat(da, 1, out=self.da)
        if p.plan.weight.slope_factor != 1.0:
            self.da *= p.plan.weight.slope_factor
            self.db *= p.plan.weight.slope_factor

    def _add_side(self, m: int, side: int, du: Tensor) -> None:
        """Add what the values of a side contribute to the gradients by u and log gamma."""
        p = self.problems
        if p.rate is not None:
            du.mul_(self.key_factor[side][m])
        self.du_of_keys[m].add_(du)
        if self.want_rate and self.drate is not None:
            of_columns = du.mul_(p.values[m]) @ p.sides[side].key_steps[p.keys[m].slice]  # (problems, C)
            self.drate.add_(of_columns.unflatten(-1, (p.weightings, p.width)).sum(-1))

    def _beside(self, n: int, m: int, side: int, values: Tensor, du: Tensor) -> Tensor:
        """The gradient of the x of a tile, rows n and keys m; adds to the du (problems, C, keys) of a side,
        yet without the factor of the keys, which its values have."""
        p, dy = self.problems, self.dy[n]
        if p.rate is None:
            return self._tile(n, m, dy, values, du)
        gap = p.gap_factor(p.rows[n], p.keys[m])
        steps = p.sides[side].row_steps[p.rows[n].slice] + p.gap(p.rows[n], p.keys[m])
        dy = dy * (self.row_factor[side][n] * gap)
        return self._tile(n, m, dy, values, du, add_rate=lambda dlogits: dlogits.sum(2) @ steps)

    def _diagonal(self, n: int, m: int) -> Tensor:
        p = self.problems
        factors = p.diagonal_factor(p.rows[n], p.keys[m], rows_first=True)
        of_tile = self.dy[n], p.values[m], self.du_of_keys[m], factors
        if p.rate is None:
            return self._tile(n, m, *of_tile)
        distance = p.distance(p.rows[n], p.keys[m]).flatten()
        return self._tile(n, m, *of_tile, add_rate=lambda dlogits: dlogits.flatten(1) @ distance)

    def _tile(
        self,
        n: int,
        m: int,
        dy: Tensor,
        values: Tensor,
        du: Tensor,
        factors: Sequence[Tensor] = (),
        add_rate: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The gradient of the x of a tile; adds to du (problems, C, keys), and to that of log gamma what
        `add_rate` makes of the gradient of the logits (problems, rows, keys) of a weighting.

        dy (problems, C, rows) and values (problems, C, keys), with the decay but for the factors."""
        p = self.problems
        x, dx, *rest = (tile(p.count, p.rows[n].size, p.keys[m].size) for tile in self.tiles)
        torch.bmm(self.a[n], self.b[m].mT, out=x)
        want_rate = self.want_rate and add_rate is not None
        if not factors and not want_rate:
            p.plan.weight.weigh_with_slope_(x, torch.bmm(dy.mT, values, out=dx))
            du.add_(torch.bmm(dy, x))
            return dx
        room, decayed, spare = rest
        weights, slope = p.plan.weight.weights_and_slope_(x, room)
        for w in range(p.weightings):
            columns = p.columns_of(w)
            own = torch.mul(weights, factors[w], out=decayed) if factors else weights
            du[:, columns].add_(torch.bmm(dy[:, columns], own))
            dlogits = torch.bmm(dy[:, columns].mT, values[:, columns], out=spare if w else dx).mul_(own)
            if want_rate and add_rate is not None and self.drate is not None:
                self.drate[:, w].add_(add_rate(dlogits))
            if w:
                dx.add_(dlogits)
        return dx if slope is None else dx.mul_(slope)

    def _explicit(self, n: int, m: int) -> Tensor:
        p = self.problems
        rows, keys = p.rows[n], p.keys[m]
        kept = p.kept(rows, keys)
        x, all_weights = p.explicit_weights(rows, keys)
        dlogits = torch.zeros_like(x)
        for w, weights in enumerate(all_weights):
            columns = p.columns_of(w)
            dy, u = self.dy[n][:, columns], p.values[m][:, columns]
            du = self.du_of_keys[m][:, columns]
            if kept is None:
                du += dy @ weights
                dweights = dy.mT @ u
            else:
                du[:, :-1] += dy[:, :-1] @ (weights * kept)
                du[:, -1:] += dy[:, -1:] @ weights
                dweights = dy[:, :-1].mT @ u[:, :-1] * kept + dy[:, -1:].mT @ u[:, -1:]
            dweights *= weights
            if self.want_rate and self.drate is not None:
                self.drate[:, w] += (dweights * p.distance(rows, keys)).sum((1, 2))
            dlogits += dweights
        slope = p.plan.weight.log_slope(x)
        return dlogits if slope is None else dlogits * slope


def forward_sums(plan: Plan, a: Tensor, b: Tensor, u: Tensor, log_decay: Tensor | None) -> Tensor:
    """y (B, C, L); see the top of the file.

    a (B, L, A), b (B, S, A), u (B, C, S), all of one floating type; log_decay (B, U), below 0, or None."""
    y = a.new_empty(len(a), u.shape[1], a.shape[1])
    tile = Buffer(a)
    for problems in groups_of(plan, a, b, u, log_decay):
        ForwardSums(problems, y[problems.span], tile).run()
    return y


class Gradients(NamedTuple):
    """By a (B, L, A), b (B, S, A), u (B, C, S) and log gamma (B, U)."""

    a: Tensor
    b: Tensor
    u: Tensor
    log_decay: Tensor | None


def backward_sums(
    plan: Plan, a: Tensor, b: Tensor, u: Tensor, log_decay: Tensor | None, dy: Tensor, want_rate: bool
) -> Gradients:
    """The gradients from that of y (B, C, L); by log gamma if wanted."""
    da, db, du = torch.empty_like(a), torch.empty_like(b), torch.empty_like(u)
    drate = torch.empty_like(log_decay) if want_rate and log_decay is not None else None
    tiles = [Buffer(a) for _ in range(5)]
    for problems in groups_of(plan, a, b, u, log_decay):
        span = problems.span
        sums = BackwardSums(problems, dy[span], (da[span], db[span], du[span]), tiles, want_rate)
        sums.run()
        if drate is not None and sums.drate is not None:
            drate[span] = sums.drate
    return Gradients(da, db, du, drate)
