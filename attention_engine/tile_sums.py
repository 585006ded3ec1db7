"""Sums over keys of pair weights times values, in O(L + S) memory: tiles of weights are made, used and
forgotten, and made again in the backward. Plain torch, any device, no compiler.

::

    y_i = sum_j e_ij(a_i . b_j) gamma^|i - j| u_j
    e_ij(x) = exp(x), exp(r_i s_j x^(-p/2)) or s_j x^(-p/2)

with scales r and s of rows and keys, or 1. Several weightings may share x: they differ by scales and decay.
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
that share a tile, W values of a key, C = U W rows of y.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from attention_engine.tile_plan import (
    LARGEST_SUM,
    Block,
    Buffer,
    Plan,
    Problems,
    Terms,
    by_block,
    by_weighting,
    each_column,
    groups_of,
)


def times(columns: Tensor, factor: Tensor) -> Tensor:
    """(problems, C, n) times a factor of each weighting, (problems, U, n or 1)."""
    x, y = each_column(columns, factor)
    return (x * y).flatten(1, 2)


def times_(columns: Tensor, factor: Tensor) -> None:
    """The same, in place."""
    x, y = each_column(columns, factor)
    x.mul_(y)


class ForwardSums:
    """y (problems, C, L) of some problems."""

    def __init__(self, problems: Problems, y: Tensor, tiles: list[Buffer]) -> None:
        self.problems, self.y, self.tiles = problems, y.zero_(), tiles
        p = problems
        self.a = by_block(p.a.mT, p.rows)
        self.b = [p.b[:, keys.slice] for keys in p.keys]
        self.key_factor = [by_block(side.key_factor, p.keys) for side in p.sides]
        self.of_rows = by_block(y, p.rows)
        self.sums = [torch.zeros_like(y) for _ in p.sides]
        self.sums_of_rows = [by_block(part, p.rows) for part in self.sums]
        self.left_out: dict[Block, Tensor] = {}  # (problems, U) log of what vanishing tiles add at most

    def run(self) -> None:
        """Fill y; rows whose sums cannot be trusted are computed again."""
        p = self.problems
        for m in range(len(p.keys)):
            self._add_keys(m)
        for side, sums in zip(p.sides, self.sums, strict=True):
            sums, row_factor = each_column(sums, side.row_factor)
            self.y.unflatten(1, sums.shape[1:3]).addcmul_(sums, row_factor)
        for n, rows in enumerate(p.rows):
            if p.explicit(rows):
                self._add_explicit_rows(n)
        for n in self._untrusted():
            rows = p.rows[n]
            p.plan.shifts[p.span.start, rows.start] = self._shift(rows)
            self.of_rows[n].zero_()
            self._add_explicit_rows(n)

    def _add_keys(self, m: int) -> None:
        p, keys = self.problems, self.problems.keys[m]
        plain = p.values(m)
        values = [times(plain, factor[m]) for factor in self.key_factor] or [plain]
        for n, rows in enumerate(p.rows):
            if p.explicit(rows) or not p.visible(rows, keys):
                continue
            x = torch.bmm(self.b[m], self.a[n], out=self.tiles[0](p.count, keys.size, rows.size))
            if p.on_diagonal(rows, keys):
                for which, weights in self._weights(x, n, m, p.diagonal_factor(rows, keys, False)):
                    columns = p.columns_of(which)
                    self.of_rows[n][:, columns].add_(torch.bmm(plain[:, columns], weights))
                continue
            if self._vanishes(x, rows, keys):
                continue
            side = p.side(rows, keys)
            into = self.sums_of_rows[side][n] if p.sides else self.of_rows[n]
            for which, weights in self._weights(x, n, m):
                columns = p.columns_of(which)
                part = torch.bmm(values[side][:, columns], weights)
                if p.rate is not None:
                    times_(part, p.gap_factor(rows, keys)[:, which])
                into[:, columns].add_(part)

    def _weights(
        self, x: Tensor, n: int, m: int, factors: Sequence[Tensor] = ()
    ) -> Iterator[tuple[slice, Tensor]]:
        """The weights (problems, keys, rows) that x becomes, times the factors of each weighting, and which
        weightings they are of. Those of the last take the place of x."""
        p, rows, keys = self.problems, self.problems.rows[n], self.problems.keys[m]
        if p.row_scale is None:
            weights = p.plan.weight.weigh_(x)
            if not factors:
                yield slice(0, p.weightings), weights
            for w, factor in enumerate(factors):
                last = w == len(factors) - 1
                yield slice(w, w + 1), weights.mul_(factor) if last else weights * factor
            return
        forces, room = p.plan.weight.forces_(x), self.tiles[1](*x.shape)
        vanishing = p.vanishing(rows, keys)
        for w in range(p.weightings):
            if vanishing[w]:
                continue
            weights = p.scaled(forces.mT, w, rows, keys, out=room.mT).mT.exp_()
            yield slice(w, w + 1), weights.mul_(factors[w]) if factors else weights

    def _vanishes(self, x: Tensor, rows: Block, keys: Block) -> bool:
        """Whether no weighting needs the tile x (problems, keys, rows). What decayed is bounded."""
        p = self.problems
        decayed = p.decayed(rows, keys)
        if any(decayed):
            bound = p.log_bound(x, rows, keys)
            bound[:, [not of_weighting for of_weighting in decayed]] = -math.inf
            self.left_out[rows] = torch.logaddexp(self.left_out.get(rows, bound), bound)
        return all(p.vanishing(rows, keys))

    def _add_explicit_rows(self, n: int) -> None:
        p = self.problems
        for m, keys in enumerate(p.keys):
            if p.visible(p.rows[n], keys):
                self._add_explicit(n, m)

    def _add_explicit(self, n: int, m: int) -> None:
        p = self.problems
        kept, plain = p.kept(p.rows[n], p.keys[m]), p.values(m)
        for w, weights in enumerate(p.explicit_weights(p.rows[n], p.keys[m])[2]):
            columns = p.columns_of(slice(w, w + 1))
            y, values = self.of_rows[n][:, columns], plain[:, columns]
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
                for w, logits in enumerate(p.explicit_logits(rows, keys)[2]):
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
    """The gradients of some problems, from that of y (problems, C, L): fills `into`, of the shapes of the
    problems' terms; that by log gamma where it is there. That by u takes the place of u."""

    def __init__(self, problems: Problems, dy: Tensor, into: Terms, tiles: list[Buffer]) -> None:
        self.problems, self.into, self.tiles = problems, into, tiles
        p = problems
        for sums in into[3:]:
            if sums is not None:
                sums.zero_()
        self.dy = by_block(dy, p.rows)
        self.row_factor = [by_block(side.row_factor, p.rows) for side in p.sides]
        self.key_factor = [by_block(side.key_factor, p.keys) for side in p.sides]
        self.a = [p.a[:, rows.slice] for rows in p.rows]
        self.b = [p.b[:, keys.slice] for keys in p.keys]
        self.of_row_scales = by_weighting(into.row_scale, p.rows)
        self.of_key_scales = by_weighting(into.key_scale, p.keys)

    def run(self) -> None:
        """Fill the gradients."""
        p, into = self.problems, self.into
        # Sums of their own for each block: a batched product cannot add to a part of a tensor at full speed.
        da = [p.a.new_zeros(p.count, rows.size, p.a.shape[2]) for rows in p.rows]
        for m, keys in enumerate(p.keys):
            self.values = p.values(m)
            values = [times(self.values, factor[m]) for factor in self.key_factor]
            if p.rate is None:
                values = [self.values]
            self.du = torch.zeros_like(self.values)
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
            into.b[:, keys.slice] = db.mT
            for side, part in enumerate(du):
                self._add_side(m, side, part)
            self._finish_du(m)
        beyond = max((keys.stop for keys in p.keys), default=0)
        into.b[:, beyond:] = 0.0
        into.u[:, :, beyond:] = 0.0
        torch.cat(da, 1, out=into.a)
        if p.plan.weight.slope_factor != 1.0:
            into.a.mul_(p.plan.weight.slope_factor)
            into.b.mul_(p.plan.weight.slope_factor)
        if p.row_scale is not None:  # so far those by scales are by their logarithms
            for gradient, scale in ((into.row_scale, p.row_scale), (into.key_scale, p.key_scale)):
                if gradient is not None and scale is not None:
                    gradient.div_(scale)

    def _finish_du(self, m: int) -> None:
        """The gradient by u in the place of u, and that by the scale of its keys."""
        p, u = self.problems, self.problems.u_of_keys[m]
        if p.key_scale is None:
            u.copy_(self.du)
            return
        du = self.du.unflatten(1, (p.weightings, p.width))
        if p.row_scale is None and self.into.key_scale is not None:
            self.into.key_scale[:, :, p.keys[m].slice] = (du * u.unsqueeze(1)).sum(2)
            du.mul_(p.key_scale_of(m))
        torch.sum(du, 1, out=u)

    def _add_side(self, m: int, side: int, du: Tensor) -> None:
        """Add what the values of a side contribute to the gradients by u and log gamma."""
        p = self.problems
        if p.rate is not None:
            times_(du, self.key_factor[side][m])
        self.du.add_(du)
        if self.into.log_decay is not None and p.sides:
            of_columns = du.mul_(self.values) @ p.sides[side].key_steps[p.keys[m].slice]  # (problems, C)
            self.into.log_decay.add_(of_columns.unflatten(-1, (p.weightings, p.width)).sum(-1))

    def _beside(self, n: int, m: int, side: int, values: Tensor, du: Tensor) -> Tensor:
        """The gradient of the x of a tile, rows n and keys m; adds to the du (problems, C, keys) of a side,
        yet without the factor of the keys, which its values have."""
        p, dy = self.problems, self.dy[n]
        if p.rate is None:
            return self._tile(n, m, dy, values, du)
        gap = p.gap_factor(p.rows[n], p.keys[m])
        steps = p.sides[side].row_steps[p.rows[n].slice] + p.gap(p.rows[n], p.keys[m])
        dy = times(dy, self.row_factor[side][n] * gap)
        return self._tile(n, m, dy, values, du, add_rate=lambda dlogits: dlogits.sum(2) @ steps)

    def _diagonal(self, n: int, m: int) -> Tensor:
        p = self.problems
        factors = p.diagonal_factor(p.rows[n], p.keys[m], rows_first=True)
        of_tile = self.dy[n], self.values, self.du, factors
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
        shape = p.count, p.rows[n].size, p.keys[m].size
        x, dx = (tile(*shape) for tile in self.tiles[:2])
        torch.bmm(self.a[n], self.b[m].mT, out=x)
        drate = None if add_rate is None else self.into.log_decay
        if p.row_scale is not None:
            return self._scaled_tile(n, m, x, dy, values, du, factors, add_rate)
        if not factors and drate is None:
            p.plan.weight.weigh_with_slope_(x, torch.bmm(dy.mT, values, out=dx))
            du.add_(torch.bmm(dy, x))
            return dx
        room, decayed, spare = (tile(*shape) for tile in self.tiles[2:5])
        weights, slope = p.plan.weight.weights_and_slope_(x, room)
        for w in range(p.weightings):
            columns = p.columns_of(slice(w, w + 1))
            own = torch.mul(weights, factors[w], out=decayed) if factors else weights
            du[:, columns].add_(torch.bmm(dy[:, columns], own))
            dlogits = torch.bmm(dy[:, columns].mT, values[:, columns], out=spare if w else dx).mul_(own)
            if drate is not None and add_rate is not None:
                drate[:, w].add_(add_rate(dlogits))
            if w:
                dx.add_(dlogits)
        return dx if slope is None else dx.mul_(slope)

    def _scaled_tile(
        self,
        n: int,
        m: int,
        x: Tensor,
        dy: Tensor,
        values: Tensor,
        du: Tensor,
        factors: Sequence[Tensor],
        add_rate: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """The same where weightings have scales, from the x (problems, rows, keys) that they share. A
        logit is proportional to both its scales and to x^(-p/2): the gradient by the logarithm of any is
        that of the logit times the logit."""
        p, rows, keys = self.problems, self.problems.rows[n], self.problems.keys[m]
        dx, room, own, spare, space = (tile(*x.shape) for tile in self.tiles[1:])
        forces, reciprocal = p.plan.weight.forces_and_reciprocal_(x, space)
        vanishing, begun = p.vanishing(rows, keys), False
        for w in range(p.weightings):
            if vanishing[w]:
                continue
            columns = p.columns_of(slice(w, w + 1))
            logits = p.scaled(forces, w, rows, keys, out=room)
            weights = torch.exp(logits, out=own)
            if factors:
                weights.mul_(factors[w])
            du[:, columns].add_(torch.bmm(dy[:, columns], weights))
            dlogits = torch.bmm(dy[:, columns].mT, values[:, columns], out=spare if begun else dx)
            dlogits.mul_(weights)
            if self.into.log_decay is not None and add_rate is not None:
                self.into.log_decay[:, w].add_(add_rate(dlogits))
            self._add_scales(w, rows, keys, dlogits.mul_(logits))
            if begun:
                dx.add_(dlogits)
            begun = True
        return dx.mul_(reciprocal)

    def _add_scales(self, w: int, rows: Block, keys: Block, dlogs: Tensor) -> None:
        """Add the gradient by the logarithms of the scales of a weighting, from (problems, rows, keys)."""
        self.of_row_scales[rows][w].add_(dlogs.sum(2))
        self.of_key_scales[keys][w].add_(dlogs.sum(1))

    def _explicit(self, n: int, m: int) -> Tensor:
        p = self.problems
        rows, keys = p.rows[n], p.keys[m]
        kept = p.kept(rows, keys)
        x, plain, all_weights = p.explicit_weights(rows, keys)
        dx = torch.zeros_like(x)
        for w, weights in enumerate(all_weights):
            columns = p.columns_of(slice(w, w + 1))
            dy, u = self.dy[n][:, columns], self.values[:, columns]
            du = self.du[:, columns]
            if kept is None:
                du += dy @ weights
                dlogits = dy.mT @ u
            else:
                du[:, :-1] += dy[:, :-1] @ (weights * kept)
                du[:, -1:] += dy[:, -1:] @ weights
                dlogits = dy[:, :-1].mT @ u[:, :-1] * kept + dy[:, -1:].mT @ u[:, -1:]
            dlogits *= weights
            if self.into.log_decay is not None:
                self.into.log_decay[:, w] += (dlogits * p.distance(rows, keys)).sum((1, 2))
            if p.row_scale is not None:
                dlogits *= plain[w]
                self._add_scales(w, rows, keys, dlogits)
            dx += dlogits
        slope = x.reciprocal_() if p.row_scale is not None else p.plan.weight.log_slope(x)
        return dx if slope is None else dx * slope


def forward_sums(plan: Plan, terms: Terms) -> Tensor:
    """y (B, C, L); see the top of the file."""
    columns = terms.u.shape[1] * (1 if terms.key_scale is None else terms.key_scale.shape[1])
    y = terms.a.new_empty(len(terms.a), columns, terms.a.shape[1])
    tiles = [Buffer(terms.a) for _ in range(2)]
    for problems in groups_of(plan, terms):
        ForwardSums(problems, y[problems.span], tiles).run()
    return y


def backward_sums(plan: Plan, terms: Terms, dy: Tensor, want_rate: bool) -> Terms:
    """The gradients from that of y (B, C, L); by log gamma if wanted. u is used up: its gradient takes its
    place, since the two are the larger part of the memory."""
    scalars = [None if x is None else torch.empty_like(x) for x in terms[3:]]
    into = Terms(torch.empty_like(terms.a), torch.empty_like(terms.b), terms.u, *scalars)
    if not want_rate:
        into = into._replace(log_decay=None)
    tiles = [Buffer(terms.a) for _ in range(6)]
    for problems in groups_of(plan, terms):
        BackwardSums(problems, dy[problems.span], into.of(problems.span), tiles).run()
    return into
