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

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention_engine.tile_plan import LARGEST_SUM, Block, Buffer, Plan, Problems, spans_of


class ForwardSums:
    """y of some problems, and what its gradient by log gamma will need."""

    def __init__(self, problems: Problems, tile: Buffer, want_moment: bool) -> None:
        self.problems, self.tile, self.want_moment = problems, tile, want_moment
        # Views are made once: making one costs a hundredth of a tile.
        self.a_columns = by_block(problems.a.mT.contiguous(), problems.rows)
        self.b = [problems.b[:, keys.slice] for keys in problems.keys]
        self.values = [by_block(part, problems.keys) for part in problems.side_values]
        self.left_out: dict[Block, Tensor] = {}  # (problems, U) log of what vanishing tiles add at most

    def rows(self, rows: Block) -> tuple[Tensor, Tensor | None]:
        """y (problems, rows, C) and its moment: the same sum over the tiles that are not explicit, each term
        times |i - j| less the steps from j to the near end of its block."""
        p = self.problems
        sums = [p.a.new_zeros(p.count, p.u.shape[2], rows.size) for _ in self.values]
        moments = [torch.zeros_like(part) for part in sums] if self.want_moment else []
        explicit = torch.zeros_like(sums[0])
        a, is_explicit = self.a_columns[rows.start // p.block], p.explicit(rows)
        for m, keys in enumerate(p.keys):
            if not p.visible(rows, keys):
                continue
            if is_explicit:
                self._add_explicit(explicit, rows, keys)
                continue
            if p.on_diagonal(rows, keys):
                self._add_diagonal(explicit, rows, keys)
                continue
            x = torch.bmm(self.b[m], a, out=self.tile(p.count, keys.size, rows.size))
            vanishing = p.vanishing(rows, keys)
            if any(vanishing):
                bound = p.log_bound(x, rows, keys)
                bound[:, [not vanishes for vanishes in vanishing]] = -math.inf
                self.left_out[rows] = torch.logaddexp(self.left_out.get(rows, bound), bound)
                if all(vanishing):
                    continue
            side = p.side(rows, keys)
            weights = p.plan.weight.weigh_(x)
            if p.rate is None:
                sums[side].baddbmm_(self.values[side][m], weights)
                continue
            part = torch.bmm(self.values[side][m], weights).mul_(p.gap_factor(rows, keys).mT)
            if self.want_moment:
                moments[side].add_(part, alpha=p.gap(rows, keys))
            sums[side].add_(part)
        if p.rate is None:
            return sums[0].add_(explicit).mT, None
        y, moment = explicit.mT, torch.zeros_like(explicit).mT
        for n, side_ in enumerate(p.sides):
            row_factor = side_.row_factor[:, rows.slice]
            y = torch.addcmul(y, row_factor, sums[n].mT)
            if self.want_moment:
                steps = side_.row_steps[rows.slice]
                moment = torch.addcmul(moment, row_factor, moments[n].addcmul_(steps, sums[n]).mT)
        return y, moment if self.want_moment else None

    def _add_diagonal(self, y: Tensor, rows: Block, keys: Block) -> None:
        p = self.problems
        x = torch.bmm(p.a[:, rows.slice], p.b[:, keys.slice].mT, out=self.tile(p.count, rows.size, keys.size))
        weights, factors = p.plan.weight.weigh_(x), p.diagonal_factor(rows, keys)
        for n, factor in enumerate(factors):
            of_weighting = weights.mul_(factor) if n == len(factors) - 1 else weights * factor
            y[:, p.columns(n)].baddbmm_(p.u[:, keys.slice, p.columns(n)].mT, of_weighting.mT)

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
    """The gradients of some problems, from that of y: fills `into`, those by a, b and u."""

    def __init__(
        self,
        problems: Problems,
        dy: Tensor,
        into: tuple[Tensor, Tensor, Tensor],
        tiles: tuple[Buffer, Buffer],
        want_rate: bool,
    ) -> None:
        self.problems, self.tiles, self.want_rate = problems, tiles, want_rate
        self.da, self.db, self.du = into
        self.du.zero_()
        p = problems
        self.dy = [dy[:, rows.slice] for rows in p.rows]
        self.row_factor = [[side.row_factor[:, rows.slice] for rows in p.rows] for side in p.sides]
        self.a = [p.a[:, rows.slice] for rows in p.rows]
        self.b = [p.b[:, keys.slice] for keys in p.keys]
        self.b_columns = by_block(p.b.mT.contiguous(), p.keys)
        self.values = [by_block(part, p.keys) for part in p.side_values]
        self.drate = None if p.rate is None else torch.zeros_like(p.rate)

    def run(self) -> None:
        """Fill da, db, du and drate, but for what drate has from the moments of the forward."""
        p = self.problems
        # Sums of their own for each block: a batched product cannot add to a part of a tensor at full speed.
        da = [p.a.new_zeros(p.count, rows.size, p.a.shape[2]) for rows in p.rows]
        for m, keys in enumerate(p.keys):
            db = p.b.new_zeros(p.count, p.b.shape[2], keys.size)
            du = [p.u.new_zeros(p.count, p.u.shape[2], keys.size) for _ in self.values]
            for n, rows in enumerate(p.rows):
                if not p.visible(rows, keys) or all(p.vanishing(rows, keys)):
                    continue
                if p.explicit(rows):
                    dx = self._explicit(rows, keys)
                elif p.on_diagonal(rows, keys):
                    dx = self._diagonal(n, m)
                else:
                    dx = self._plain(n, m, du[p.side(rows, keys)])
                da[n].baddbmm_(dx, self.b[m])
                db.baddbmm_(self.a[n].mT, dx)
            self.db[:, keys.slice] = db.mT
            for side, part in enumerate(du):
                self._add_side(keys, side, part.mT)
        self.db[:, max((keys.stop for keys in p.keys), default=0) :] = 0.0
        torch.cat(da, 1, out=self.da)
        self.da *= p.plan.weight.slope_factor
        self.db *= p.plan.weight.slope_factor

    def _plain(self, n: int, m: int, du: Tensor) -> Tensor:
        """The gradient of the x of a tile, rows n and keys m; adds to du (problems, C, keys), yet without the
        factor of the keys."""
        p = self.problems
        rows, keys = p.rows[n], p.keys[m]
        side = p.side(rows, keys)
        dy = self.dy[n]
        if p.rate is not None:
            dy = dy * (self.row_factor[side][n] * p.gap_factor(rows, keys))
        x, dx = self._tiles(n, m)
        torch.bmm(dy, self.values[side][m], out=dx)
        p.plan.weight.weigh_with_slope_(x, dx)
        du.baddbmm_(dy.mT, x)
        return dx

    def _tiles(self, n: int, m: int) -> tuple[Tensor, Tensor]:
        """x (problems, rows, keys), and room for its gradient."""
        p = self.problems
        x, dx = (tile(p.count, p.rows[n].size, p.keys[m].size) for tile in self.tiles)
        return torch.bmm(self.a[n], self.b_columns[m], out=x), dx

    def _add_side(self, keys: Block, n: int, du: Tensor) -> None:
        """Add what the values of a side contribute to the gradients by u and log gamma."""
        p = self.problems
        if p.rate is None:
            self.du[:, keys.slice] += du
            return
        side = p.sides[n]
        du = du * side.key_factor[:, keys.slice]
        self.du[:, keys.slice] += du
        if self.want_rate:
            self.add_rate(side.key_steps[keys.slice] @ du.mul_(p.u[:, keys.slice]))

    def add_rate(self, columns: Tensor) -> None:
        """Add (problems, C), summed over the columns of each weighting, to the gradient of log gamma."""
        p = self.problems
        assert self.drate is not None
        self.drate.add_(columns.unflatten(-1, (p.weightings, p.width)).sum(-1))

    def _diagonal(self, n: int, m: int) -> Tensor:
        p = self.problems
        rows, keys = p.rows[n], p.keys[m]
        x, dx = self._tiles(n, m)
        factors = p.diagonal_factor(rows, keys)
        parts = [
            (self.dy[n][:, :, p.columns(w)], p.u[:, keys.slice, p.columns(w)].mT) for w in range(len(factors))
        ]
        torch.bmm(*parts[0], out=dx).mul_(factors[0])
        for factor, (dy, u) in zip(factors[1:], parts[1:], strict=True):
            dx += torch.bmm(dy, u).mul_(factor)
        p.plan.weight.weigh_with_slope_(x, dx)
        for w, (factor, (dy, u)) in enumerate(zip(factors, parts, strict=True)):
            weights = x.mul_(factor) if w == len(factors) - 1 else x * factor
            self.du[:, keys.slice, p.columns(w)] += (dy.mT @ weights).mT
            if not self.want_rate or self.drate is None:
                continue
            if p.plan.weight.power is None:  # dx is the gradient of the logits
                self.drate[:, w] += dx.flatten(1) @ p.distance(rows, keys).flatten()
            else:
                weights *= p.distance(rows, keys)
                self.drate[:, w] += ((dy.mT @ weights) * u).sum((1, 2))
        return dx

    def _explicit(self, rows: Block, keys: Block) -> Tensor:
        p = self.problems
        kept = p.kept(rows, keys)
        x, all_weights = p.explicit_weights(rows, keys)
        dlogits = torch.zeros_like(x)
        for n, weights in enumerate(all_weights):
            columns = p.columns(n)
            dy, u = self.dy[rows.start // p.block][:, :, columns], p.u[:, keys.slice, columns]
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
            for rows in untrusted(plan, sums, y[span]):
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
            sums = BackwardSums(problems, dy[span], (da[span], db[span], du[span]), tiles, moment is not None)
            sums.run()
            if drate is not None and sums.drate is not None:
                sums.add_rate((dy[span] * moment[span]).sum(1))
                drate[span] = sums.drate
        return da, db, du, drate, None


def by_block(columns: Tensor, blocks: list[Block]) -> list[Tensor]:
    """The parts of (problems, X, L) that belong to blocks of L."""
    return [columns[:, :, block.slice] for block in blocks]


def untrusted(plan: Plan, sums: ForwardSums, y: Tensor) -> list[Block]:
    """The blocks of rows whose sums of weights leave the range in which plain sums can be trusted."""
    p = sums.problems
    totals = y[:, :, p.width - 1 :: p.width]  # (problems, L, U)
    flags = []
    for rows in p.rows:
        least = plan.least_sum[p.span]
        if rows in sums.left_out:
            least = torch.maximum(least, sums.left_out[rows].exp() / plan.tolerance)
        of_rows = totals[:, rows.slice]
        flags.append(((of_rows >= least.unsqueeze(1)) & (of_rows <= LARGEST_SUM)).all())
    trusted = torch.stack(flags).tolist()
    return [rows for rows, flag in zip(p.rows, trusted, strict=True) if not flag]
