"""Fused attention in Triton: scores are made tile by tile, used and forgotten, so that memory is O(L + S).

One program has one block of rows (queries) of one problem, or one block of keys in `key_gradient_kernel`,
and walks over the other side. `score_tile` is the only place that knows a score; the forward and both
backward kernels call it. Scores, with x_ij = r2_ij + softening and p / 2 = `power`:

    DOT_PRODUCT  s_ij = q_i . k_j scale
    GRAVITY      s_ij = A_i m_j x_ij^(-p/2),  A_i = G m_i
    FORCE        s_ij = log m_j - (p/2) log x_ij, so that exp(s_ij) is the force itself

each plus `|i - j| log gamma`, a float mask, and -inf where a key is blocked. All three run through the same
softmax with a running maximum (Milakov and Gimelshein 2018; Dao et al. 2022): for FORCE it is a maximum of
log force, which costs a logarithm more than a plain sum of forces, and no mass or decay can overflow it.

Distances: `r2_ij = |q_i|^2 / D + |k_j|^2 / D - (2 / D) q_i . k_j`, norms in float32 of the rounded values,
held at 0 from below. Products are in the inputs' type with float32 sums; those of float32 inputs are true
float32 ("ieee", no TF32): accuracy first. Everything else is float32.

Gradients, with ds_ij the gradient by s_ij and c_ij the one by q_i . k_j:

    dq_i = sum_j c_ij k_j - (sum_j c_ij) q_i,   dk_j = sum_i c_ij q_i - (sum_i c_ij) k_j

without the second term for DOT_PRODUCT. Both terms are summed over the same rounded c_ij and subtracted in
float32: they nearly cancel. No atomics: the results are the same in every run.

Symbols: see attention_module.py; P = N T H problems, in this order. A mask blocks where it is not 0.
Imported by `triton_attention` only: nothing else needs Triton.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

DOT_PRODUCT = tl.constexpr(0)
GRAVITY = tl.constexpr(1)
FORCE = tl.constexpr(2)


class Inputs(NamedTuple):
    """What every kernel reads. What a call does not have is None; all is contiguous but `pairs`."""

    q: Any  # (P', L, D), where P' is P, or N H where the timescales share q, k and v
    k: Any  # (P', S, D)
    v: Any  # (P', S, D)
    query_norm: Any  # (P', L) float32, |q_i|^2 / D
    key_norm: Any  # (P', S) float32, |k_j|^2 / D
    strength: Any  # (P, L) float32, A_i
    key_mass: Any  # (P, S) float32, m_j, or log m_j for FORCE
    log_decay: Any  # (T, H) float32, log gamma
    reach: Any  # (P,) int32, the largest |i - j| to look at
    padding: Any  # (N, S) uint8
    pairs: Any  # (N, H, L, S) uint8 (blocked) or float (added), of any strides
    batch_stride: int  # of `pairs`, as the three below
    head_stride: int
    row_stride: int
    key_stride: int
    query_length: int
    key_length: int
    timescales: int
    heads: int
    head_dim: int
    scale: float  # of q . k: the score's own, or 2 / D for distances
    softening: float


@triton.jit
def place(length, block: tl.constexpr):
    """This program's problem, and the first place of its block."""
    blocks = tl.cdiv(length, block)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * block


@triton.jit
def projection(x, problem, shared: tl.constexpr):
    """Where in q, k and v a problem finds its own."""
    return problem // (x.timescales * x.heads) * x.heads + problem % x.heads if shared else problem


@triton.jit
def load_vectors(array, row, length, index, keep, head_dim, block_dim: tl.constexpr):
    """(block, block_dim) of an array (rows, length, D), 0 where not kept and beyond D."""
    d = tl.arange(0, block_dim)
    places = index[:, None] * head_dim + d[None, :]
    return tl.load(
        array + row * length * head_dim + places, mask=keep[:, None] & (d[None, :] < head_dim), other=0.0
    )


@triton.jit
def store_vectors(array, row, length, index, head_dim, vectors, block_dim: tl.constexpr):
    d = tl.arange(0, block_dim)
    places = index[:, None] * head_dim + d[None, :]
    kept = (index[:, None] < length) & (d[None, :] < head_dim)
    tl.store(array + row * length * head_dim + places, vectors.to(array.dtype.element_ty), mask=kept)


@triton.jit
def load_numbers(array, row, length, index, keep):
    """(block,) of an array (rows, length), 0 where not kept and where there is no array."""
    if array is None:
        numbers = tl.zeros_like(index).to(tl.float32)
    else:
        numbers = tl.load(array + row * length + index, mask=keep, other=0.0)
    return numbers


@triton.jit
def load_queries(x, problem, i, shared: tl.constexpr, block_dim: tl.constexpr):
    """q (rows, block_dim), its norms (rows,) and A_i (rows,)."""
    row, keep = projection(x, problem, shared), i < x.query_length
    q = load_vectors(x.q, row, x.query_length, i, keep, x.head_dim, block_dim)
    norm = load_numbers(x.query_norm, row, x.query_length, i, keep)
    return q, norm, load_numbers(x.strength, problem, x.query_length, i, keep)


@triton.jit
def load_keys(x, problem, j, shared: tl.constexpr, block_dim: tl.constexpr):
    """k and v (keys, block_dim), norms and masses (keys,), and which keys there are. Padding is not read."""
    row, keep = projection(x, problem, shared), j < x.key_length
    if x.padding is not None:
        example = problem // (x.timescales * x.heads)
        keep = keep & (tl.load(x.padding + example * x.key_length + j, mask=keep, other=1) == 0)
    k = load_vectors(x.k, row, x.key_length, j, keep, x.head_dim, block_dim)
    v = load_vectors(x.v, row, x.key_length, j, keep, x.head_dim, block_dim)
    norm = load_numbers(x.key_norm, row, x.key_length, j, keep)
    return k, v, norm, load_numbers(x.key_mass, problem, x.key_length, j, keep), keep


@triton.jit
def within_reach(x, problem, first, block: tl.constexpr, length, step: tl.constexpr):
    """The range of keys that matters to a block of rows, or of rows to a block of keys."""
    start, stop = first * 0, length
    if x.reach is not None:
        reach = tl.load(x.reach + problem)
        start = tl.maximum(first - reach, 0) // step * step
        stop = tl.minimum(first + block + reach, length)
    return start, stop


@triton.jit
def add_masks(x, problem, logits, i, j, keep, causal: tl.constexpr):
    """i, j and keep are expanded to the form of the tile."""
    allowed = (i < x.query_length) & keep
    if x.pairs is not None:
        example, head = problem // (x.timescales * x.heads), problem % x.heads
        pairs = x.pairs + example * x.batch_stride + head * x.head_stride
        places = i.to(tl.int64) * x.row_stride + j.to(tl.int64) * x.key_stride
        pair = tl.load(pairs + places, mask=allowed, other=0)
        if x.pairs.dtype.element_ty == tl.uint8:
            allowed = allowed & (pair == 0)
        else:
            logits += pair.to(tl.float32)  # -inf stays -inf: blocked
    if causal:
        allowed = allowed & (j <= i)
    return tl.where(allowed, logits, float("-inf"))


@triton.jit
def score_tile(
    x,
    problem,
    i,
    j,
    queries,
    keys,
    kind: tl.constexpr,
    power: tl.constexpr,
    causal: tl.constexpr,
    rows: tl.constexpr,
):
    """Logits, their slope by q_i . k_j, x_ij^(-p/2) and |i - j|; what a kind has no use for is a stand-in.

    The tile is (rows, keys) with `rows` = 0 and (keys, rows) with `rows` = 1, the axis of the queries.
    """
    q, query_norm, strength = queries
    k, _, key_norm, key_mass, keep = keys
    if rows == 0:
        product = tl.dot(q, tl.trans(k), input_precision="ieee") * x.scale
    else:
        product = tl.dot(k, tl.trans(q), input_precision="ieee") * x.scale
    i, j, keep = tl.expand_dims(i, 1 - rows), tl.expand_dims(j, rows), tl.expand_dims(keep, rows)
    if kind == DOT_PRODUCT:
        logits, slope, unit = product, x.scale, product
    else:
        norms = tl.expand_dims(query_norm, 1 - rows) + tl.expand_dims(key_norm, rows)
        softened = tl.maximum(norms - product, 0.0) + x.softening
        inverse = 1.0 / softened
        mass = tl.expand_dims(key_mass, rows)
        if kind == FORCE:
            logits = mass - power * tl.log(softened)
            slope, unit = power * x.scale * inverse, inverse
        else:
            unit = inverse
            if power != 1.0:
                unit = tl.exp(-power * tl.log(softened))
            logits = tl.expand_dims(strength, 1 - rows) * mass * unit
            slope = power * x.scale * logits * inverse
    distance = tl.abs(i - j)
    if x.log_decay is not None:
        logits += tl.load(x.log_decay + problem % (x.timescales * x.heads)) * distance
    return add_masks(x, problem, logits, i, j, keep, causal), slope, unit, distance


@triton.jit
def forward_kernel(
    x,
    output,  # (P, L, D)
    log_sum,  # (P, L) float32, log of the sum of exp(s_ij); +inf for a row without keys
    kind: tl.constexpr,
    power: tl.constexpr,
    causal: tl.constexpr,
    shared: tl.constexpr,
    block_rows: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
):
    problem, first = place(x.query_length, block_rows)
    i = first + tl.arange(0, block_rows)
    queries = load_queries(x, problem, i, shared, block_dim)
    largest = tl.full((block_rows,), float("-inf"), tl.float32)
    total = tl.zeros((block_rows,), tl.float32)
    sums = tl.zeros((block_rows, block_dim), tl.float32)
    start, stop = within_reach(x, problem, first, block_rows, x.key_length, block_keys)
    if causal:
        stop = tl.minimum(stop, first + block_rows)
    for begin in range(start, stop, block_keys):
        j = begin + tl.arange(0, block_keys)
        keys = load_keys(x, problem, j, shared, block_dim)
        logits = score_tile(x, problem, i, j, queries, keys, kind, power, causal, 0)[0]
        highest = tl.maximum(largest, tl.max(logits, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)  # -inf - -inf would be NaN
        weights = tl.exp(logits - shift[:, None])
        shrunk = tl.exp(largest - shift)
        total = total * shrunk + tl.sum(weights, 1)
        v = keys[1]
        sums = sums * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = highest
    no_key = largest == float("-inf")
    total = tl.where(no_key, 1.0, total)
    store_vectors(output, problem, x.query_length, i, x.head_dim, sums / total[:, None], block_dim)
    # With +inf there, every weight that the backward makes is exp(-inf) = 0.
    log_total = tl.where(no_key, float("inf"), largest + tl.log(total))
    tl.store(log_sum + problem * x.query_length + i, log_total, mask=i < x.query_length)


@triton.jit
def load_upstream(x, problem, i, upstream, log_sum, delta, block_dim: tl.constexpr):
    """The output's gradient (rows, block_dim), the log-sum-exp and delta (rows,)."""
    keep, length = i < x.query_length, x.query_length
    gradient = load_vectors(upstream, problem, length, i, keep, x.head_dim, block_dim)
    log_total = tl.load(log_sum + problem * length + i, mask=keep, other=float("inf"))
    return gradient, log_total, load_numbers(delta, problem, length, i, keep)


@triton.jit
def query_gradient_kernel(
    x,
    upstream,  # (P, L, D), the gradient of the output
    log_sum,  # (P, L)
    delta,  # (P, L) float32, upstream_i . output_i
    dq,  # (P, L, D)
    dstrength,  # (P, L) float32, for GRAVITY
    drate,  # (P, blocks of rows) float32, parts of the gradient of log gamma
    kind: tl.constexpr,
    power: tl.constexpr,
    causal: tl.constexpr,
    shared: tl.constexpr,
    block_rows: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
):
    problem, first = place(x.query_length, block_rows)
    i = first + tl.arange(0, block_rows)
    queries = load_queries(x, problem, i, shared, block_dim)
    gradient, log_total, fall = load_upstream(x, problem, i, upstream, log_sum, delta, block_dim)
    sums = tl.zeros((block_rows, block_dim), tl.float32)
    of_row = tl.zeros((block_rows,), tl.float32)  # sum_j c_ij
    of_strength = tl.zeros((block_rows,), tl.float32)
    of_rate = tl.zeros((block_rows,), tl.float32)
    start, stop = within_reach(x, problem, first, block_rows, x.key_length, block_keys)
    if causal:
        stop = tl.minimum(stop, first + block_rows)
    for begin in range(start, stop, block_keys):
        j = begin + tl.arange(0, block_keys)
        keys = load_keys(x, problem, j, shared, block_dim)
        k, v, key_mass = keys[0], keys[1], keys[3]
        tile = score_tile(x, problem, i, j, queries, keys, kind, power, causal, 0)
        logits, slope, unit, distance = tile
        dweights = tl.dot(gradient, tl.trans(v), input_precision="ieee")
        ds = tl.exp(logits - log_total[:, None]) * (dweights - fall[:, None])
        c = (ds * slope).to(k.dtype)
        sums += tl.dot(c, k, input_precision="ieee")
        of_row += tl.sum(c.to(tl.float32), 1)
        if kind == GRAVITY:
            of_strength += tl.sum(ds * key_mass[None, :] * unit, 1)
        if x.log_decay is not None:
            of_rate += tl.sum(ds * distance, 1)
    if kind != DOT_PRODUCT:
        sums -= of_row[:, None] * queries[0].to(tl.float32)
    store_vectors(dq, problem, x.query_length, i, x.head_dim, sums, block_dim)
    if kind == GRAVITY:
        tl.store(dstrength + problem * x.query_length + i, of_strength, mask=i < x.query_length)
    if x.log_decay is not None:
        tl.store(drate + tl.program_id(0), tl.sum(of_rate, 0))


@triton.jit
def key_gradient_kernel(
    x,
    upstream,  # (P, L, D), the gradient of the output
    log_sum,  # (P, L)
    delta,  # (P, L) float32
    dk,  # (P, S, D)
    dv,  # (P, S, D)
    dmass,  # (P, S) float32, the gradient of `key_mass`
    kind: tl.constexpr,
    power: tl.constexpr,
    causal: tl.constexpr,
    shared: tl.constexpr,
    block_rows: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
):
    problem, first = place(x.key_length, block_keys)
    j = first + tl.arange(0, block_keys)
    keys = load_keys(x, problem, j, shared, block_dim)
    k, v = keys[0], keys[1]
    of_k = tl.zeros((block_keys, block_dim), tl.float32)
    of_v = tl.zeros((block_keys, block_dim), tl.float32)
    of_key = tl.zeros((block_keys,), tl.float32)  # sum_i c_ij
    of_mass = tl.zeros((block_keys,), tl.float32)
    start, stop = within_reach(x, problem, first, block_keys, x.query_length, block_rows)
    if causal:
        start = tl.maximum(start, first // block_rows * block_rows)
    for begin in range(start, stop, block_rows):
        i = begin + tl.arange(0, block_rows)
        queries = load_queries(x, problem, i, shared, block_dim)
        q, strength = queries[0], queries[2]
        gradient, log_total, fall = load_upstream(x, problem, i, upstream, log_sum, delta, block_dim)
        tile = score_tile(x, problem, i, j, queries, keys, kind, power, causal, 1)  # (keys, rows)
        logits, slope, unit = tile[0], tile[1], tile[2]
        weights = tl.exp(logits - log_total[None, :])
        of_v += tl.dot(weights.to(v.dtype), gradient, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(gradient), input_precision="ieee")
        ds = weights * (dweights - fall[None, :])
        c = (ds * slope).to(k.dtype)
        of_k += tl.dot(c, q, input_precision="ieee")
        of_key += tl.sum(c.to(tl.float32), 1)
        if kind == GRAVITY:
            of_mass += tl.sum(ds * strength[None, :] * unit, 1)
        elif kind == FORCE:
            of_mass += tl.sum(ds, 1)
    if kind != DOT_PRODUCT:
        of_k -= of_key[:, None] * k.to(tl.float32)
        tl.store(dmass + problem * x.key_length + j, of_mass, mask=j < x.key_length)
    store_vectors(dk, problem, x.key_length, j, x.head_dim, of_k, block_dim)
    store_vectors(dv, problem, x.key_length, j, x.head_dim, of_v, block_dim)


@triton.jit
def row_product_kernel(
    a, b, products, rows, head_dim, scale, block_rows: tl.constexpr, block_dim: tl.constexpr
):
    """`products[i] = a_i . b_i scale` (rows,) float32 of a and b (rows, D): norms, and delta."""
    i = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    left = load_vectors(a, 0, rows, i, i < rows, head_dim, block_dim).to(tl.float32)
    right = load_vectors(b, 0, rows, i, i < rows, head_dim, block_dim).to(tl.float32)
    tl.store(products + i, tl.sum(left * right, 1) * scale, mask=i < rows)
