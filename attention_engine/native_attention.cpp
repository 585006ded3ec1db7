// Attention on a CPU, forward and backward, in O(L + S) memory; built by native_build.py at its first use and
// called by native_attention.py. C++17 with the vector extensions of GCC and Clang; no headers but the standard.
//
// The formulas, their symbols and the order of steps are those of triton_kernels.py, and so are the names: who
// knows one can read the other. What a CPU does otherwise:
// - FORCE needs no exponential: its weights are the forces m_j x_ij^(-p/2) themselves, divided by their sum.
// - Exponentials are of base 2: logits are in units of log 2 (A_i, scale and log gamma are taken times log2 e).
// - Backward is one pass, keys outside, rows inside, that makes dq, dk and dv together.
// - Timescales that share q, k and v share the tile of distances and the products with q and k.
// - Keys that are padding are left out before anything is done: `place` says where those that stay were.
// - Sums are cut into parts by the shapes alone: the bits of a result do not depend on the number of threads.
//
// A tile is TILE_ROWS queries by TILE_KEYS keys. It is made by panels of ROWS rows, small enough to stay in the
// nearest cache while several short passes go over them: one long pass would wait for its own results.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#ifndef HEAD_DIM
#define HEAD_DIM 32  // the most numbers that a head's vectors may have
#endif
#ifndef DISTANCE_POWER
#define DISTANCE_POWER 2  // p: 1, 2 or 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 32")

// --- vectors ------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
enum { W = 16 };  // numbers of a vector
#elif defined(__AVX__)
enum { W = 8 };
#else
enum { W = 4 };
#endif
typedef float Vector __attribute__((vector_size(4 * W), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * W), may_alias));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));

enum {
  PAIR = 2 * W,  // columns of a product that are made at once: two vectors
  ROWS = 4,      // rows of a panel
  WIDTH = (HEAD_DIM + PAIR - 1) / PAIR * PAIR,
  TILE_ROWS = 48,
  TILE_KEYS = 128,
  STRIDE = TILE_KEYS + 16  // of a tile's rows: a power of two would put them all into one place of the cache
};
static_assert(TILE_ROWS % ROWS == 0 && TILE_KEYS % PAIR == 0);

INLINE Vector broadcast(float x) { return x - Vector{}; }
INLINE Vector load(const float* from) { return *(const Vector*)from; }
INLINE void store(float* to, Vector x) { *(Vector*)to = x; }
INLINE Vector maximum(Vector a, Vector b) { return a < b ? b : a; }  // a, where one is not a number
INLINE Vector absolute(Vector x) { return (Vector)((Bits)x & 0x7fffffffu); }

INLINE float sum_of(Vector x) {
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; i++) x[i] += x[i + n];
  return x[0];
}

INLINE float largest_of(Vector x) {
  float found = x[0];
  for (int i = 1; i < W; i++) found = std::max(found, x[i]);
  return found;
}

INLINE bool any_of(Bits x) {
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; i++) x[i] |= x[i + n];
  return x[0];
}

// x^(-p/2) of inverse = 1 / x
INLINE Vector to_the_power(Vector inverse) {
#if DISTANCE_POWER == 1
  for (int i = 0; i < W; i++) inverse[i] = std::sqrt(inverse[i]);
  return inverse;
#elif DISTANCE_POWER == 2
  return inverse;
#elif DISTANCE_POWER == 4
  return inverse * inverse;
#else
#error "DISTANCE_POWER must be 1, 2 or 4"
#endif
}

static const float LOG2E = 1.44269504f, LN2 = 0.693147181f;
static const float NEAR = 0.02f;  // a distance beside |q|^2 + |k|^2, below which float32 errs by more than 1e-5 of it
static const float BLOCKED = -1e30f, NOTHING = -1e29f;  // a logit that is masked; the maximum of no logits
static float lowest_exponent = -100.0f;  // no constant: GCC 12 would make a comparison and a blend of `maximum`

// 2^x for x <= 127, with a relative error of 1e-7; below 2^-100, which no sum sees, it stays 2^-100. The integer
// part goes into the exponent; a polynomial of degree 6, evaluated by halves, is for the rest, in [-1/2, 1/2].
INLINE Vector exp2_of(Vector x, Vector lowest) {
  x = maximum(x, lowest);
  const Vector rounded = x + 12582912.0f;  // 1.5 * 2^23: the last bits are the nearest integer
  const Vector f = x - (rounded - 12582912.0f), square = f * f;
  const Vector high = broadcast(1.53533620e-4f) * f + 1.33988750e-3f;
  const Vector middle = broadcast(9.61843692e-3f) * f + 5.55033237e-2f;
  const Vector low = broadcast(2.40226477e-1f) * f + 6.93147182e-1f;
  const Vector mantissa = ((high * square + middle) * square + low) * f + 1.0f;
  return (Vector)((Bits)mantissa + ((Bits)rounded << 23));
}

// --- matrix products ----------------------------------------------------------------------------------------

// X (ROWS, columns) = A (ROWS, WIDTH) B^T + of_row + of_column. B is packed: panels (WIDTH, PAIR) of PAIR rows
// each. Sums are begun at 0, and run over d in order, as in `deltas`: where those two are to cancel, they do.
template <bool OF_ROW, bool OF_COLUMN>
NOINLINE void product(const float* __restrict A, const float* __restrict B, float* __restrict X, int columns,
                      const float* of_row, const float* of_column) {
  for (int j = 0; j < columns; j += PAIR, B += PAIR * WIDTH) {
    Vector sums[ROWS][2] = {};
#pragma GCC unroll 4
    for (int d = 0; d < WIDTH; d++) {
      const Vector left = load(B + d * PAIR), right = load(B + d * PAIR + W);
      UNROLL for (int r = 0; r < ROWS; r++) {
        const Vector a = broadcast(A[r * WIDTH + d]);
        sums[r][0] += a * left;
        sums[r][1] += a * right;
      }
    }
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int half = 0; half < 2; half++) {
      Vector x = sums[r][half];
      if (OF_ROW && OF_COLUMN) x += load(of_column + j + half * W) + of_row[r];
      else if (OF_ROW) x += of_row[r];
      store(X + r * STRIDE + j + half * W, x);
    }
  }
}

// C (ROWS, WIDTH) += sum over k < count of P[r, k] B[k], where P has the given strides and B is (count, WIDTH).
template <int ROW_STRIDE, int K_STRIDE>
NOINLINE void add_product(const float* __restrict P, const float* __restrict B, float* __restrict C, int count) {
  for (int d = 0; d < WIDTH; d += PAIR) {
    Vector sums[ROWS][2] = {};  // added to C at the end: shorter sums, less rounding
#pragma GCC unroll 4
    for (int k = 0; k < count; k++) {
      const Vector left = load(B + k * WIDTH + d), right = load(B + k * WIDTH + d + W);
      UNROLL for (int r = 0; r < ROWS; r++) {
        const Vector p = broadcast(P[r * ROW_STRIDE + k * K_STRIDE]);
        sums[r][0] += p * left;
        sums[r][1] += p * right;
      }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
      float* to = C + r * WIDTH + d;
      store(to, load(to) + sums[r][0]);
      store(to + W, load(to + W) + sums[r][1]);
    }
  }
}

// --- a call -------------------------------------------------------------------------------------------------

enum Kind { DOT_PRODUCT, GRAVITY, FORCE };
enum Decay { NONE, RATE, CLOCK };  // of weights: by log gamma of |i - j|, or by the time that passes by the clocks

struct View {  // of floats (N, T or 1, H, L or S, D), of which D is contiguous; the strides of the others
  float* data;
  int64_t of_example, of_timescale, of_head, of_token;
};

struct Call {
  int32_t kind, shared, causal, offset, batch, timescales, heads, queries, keys, head_dim, threads;
  float scale, softening;                     // the factor of q . k for DOT_PRODUCT; for the others, x = r2 + softening
  View q, k, v;
  const float *strength, *key_mass, *log_decay;  // A_i (N, T, H, L), m_j (N, T, H, S), log gamma (T, H), or null
  const float *query_clock, *key_clock;       // the time at each token (N, T, H, L) and (N, T, H, S), or null
  const uint8_t *padding, *pairs;             // (N, S) and (N, H, L, S), of which true is blocked, or null
  int64_t pair_strides[4];
  const int32_t* reach;                       // (N, T, H), the largest |i - j| to look at, or null
  View output;
  float* log_sum;                             // (N, T, H, L): log2 of a row's sum; for FORCE one over it
  View upstream, dq, dk, dv;
  float *dstrength, *dmass, *drate;           // (N, T, H, L), (N, T, H, S), (N, T, H)
  float *dquery_clock, *dkey_clock;
  char* workspace;
};

// What is worked on together: a head of an example, with one timescale or, where they share q, k and v, with all.
struct Problem {
  int example, head, first, timescales;
  Problem(const Call& c, int number)
      : example(number / (c.heads * (c.shared ? 1 : c.timescales))), head(number % c.heads),
        first(c.shared ? 0 : number / c.heads % c.timescales), timescales(c.shared ? c.timescales : 1) {}
  float* of(const View& x, int t = 0) const {
    return x.data + example * x.of_example + (first + t) * x.of_timescale + head * x.of_head;
  }
  int64_t row(const Call& c, int t) const {  // of arrays (N, T, H, ...)
    return ((int64_t)example * c.timescales + first + t) * c.heads + head;
  }
  float strength(const Call& c, int t, int64_t i) const {
    const float found = c.strength[row(c, t) * c.queries + i];
    return (found < 1e-18f ? 1e-18f : found) * LOG2E;  // what is divided by it stays a number
  }
  float decay(const Call& c, int t) const {
    if (c.query_clock) return -LOG2E;
    return c.log_decay ? c.log_decay[(first + t) * c.heads + head] * LOG2E : 0;
  }
};

// A thread's memory, of which each array begins at a cache line.
struct Arena {
  char *at, *end;
  float* get(int64_t count) {
    float* found = (float*)at;
    at += (count * 4 + 63) / 64 * 64;
    if (at > end) __builtin_trap();
    return found;
  }
};

INLINE int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// --- packing ------------------------------------------------------------------------------------------------

alignas(64) static const float ZERO[WIDTH] = {};

// A vector of a row of numbers, of which `count` are left; zeros behind them.
INLINE Vector load_of_row(const float* from, int count) {
  if (count >= W) return *(const Unaligned*)from;
  Vector found = {};
  for (int i = 0; i < count; i++) found[i] = from[i];
  return found;
}

// A row of `count` numbers, by vectors: those that `numbers(d)` gives.
template <class Numbers>
INLINE void store_row(float* to, int count, Numbers numbers) {
  UNROLL for (int d = 0; d < WIDTH; d += W) {
    const Vector x = numbers(d);
    if (d + W <= count) *(Unaligned*)(to + d) = x;
    else for (int i = d; i < count; i++) to[i] = x[i - d];
  }
}

// Rows `place[0]`, `place[1]` ... of a matrix, or where there are no places its first, each less a centre and times a
// factor, as a matrix (padded, WIDTH) with zeros beyond D and after the last.
static void pack(const float* x, int64_t stride, int head_dim, const float* place, int count, int padded,
                 const float* centre, float factor, float* to) {
  for (int j = 0; j < count; j++, to += WIDTH) {
    const float* from = x + (place ? (int64_t)place[j] : j) * stride;
    UNROLL for (int d = 0; d < WIDTH; d += 16) __builtin_prefetch(from + 8 * stride + d);  // rows are far apart
    UNROLL for (int d = 0; d < WIDTH; d += W)
      store(to + d, (load_of_row(from + d, head_dim - d) - load(centre + d)) * factor);
  }
  memset(to, 0, sizeof(float) * WIDTH * (padded - count));
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bits{__VA_ARGS__})
#endif

template <size_t SIZE, size_t... K>
INLINE void swap_blocks(Vector& a, Vector& b, std::index_sequence<K...>) {
  const Vector low = SHUFFLE(a, b, (K & SIZE ? W + K - SIZE : K)...);
  b = SHUFFLE(a, b, (K & SIZE ? W + K : K + SIZE)...);
  a = low;
}

// Of W vectors: swaps the blocks off the diagonal, of half the size each time.
template <size_t SIZE>
INLINE void transpose(Vector (&x)[W]) {
  UNROLL for (size_t i = 0; i < W; i++)
    if (!(i & SIZE)) swap_blocks<SIZE>(x[i], x[i + SIZE], std::make_index_sequence<W>());
  if constexpr (SIZE > 1) transpose<SIZE / 2>(x);
}

// A matrix (count, WIDTH), of a multiple of PAIR rows, times a factor, in the form that `product` takes.
static void pack_transposed(const float* rows, int count, float factor, float* to) {
  for (int j0 = 0; j0 < count; j0 += PAIR, to += PAIR * WIDTH)
    for (int j = 0; j < PAIR; j += W)
      for (int d = 0; d < WIDTH; d += W) {
        Vector block[W];
        UNROLL for (int i = 0; i < W; i++) block[i] = load(rows + (j0 + j + i) * WIDTH + d) * factor;
        transpose<W / 2>(block);
        UNROLL for (int i = 0; i < W; i++) store(to + (d + i) * PAIR + j, block[i]);
      }
}

// |x_i|^2 / D + add of a packed matrix, infinite from `count` on: far from everything. `largest` becomes the largest
// |x_i|^2 that is finite, if that is larger.
static void norms(const float* x, int count, int padded, int head_dim, float add, float* to, float* largest) {
  for (int i = 0; i < count; i++, x += WIDTH) {
    Vector sums = {};
    for (int d = 0; d < WIDTH; d += W) sums += load(x + d) * load(x + d);
    const float square = sum_of(sums);
    if (square > *largest && square < INFINITY) *largest = square;
    to[i] = square / head_dim + add;
  }
  std::fill_n(to + count, padded - count, INFINITY);
}

// The keys of a problem that are not padding, and their centre: no distance sees what is taken off both q and k, but
// rounding does. Keys that are not finite have none, as in the formula.
struct Keys {
  int count;
  float *place, *mass, *unit, *centre;  // (rounded), their positions in order; (T, rounded) in (T) units; (WIDTH)
  float* clock;                         // (T, rounded), or null

  Keys(const Call& c, const Problem& problem, Arena& arena) : count(0) {
    place = arena.get(c.keys + PAIR);
    centre = arena.get(WIDTH);
    mass = arena.get(problem.timescales * (c.keys + PAIR)), unit = arena.get(problem.timescales);
    clock = c.key_clock ? arena.get(problem.timescales * (c.keys + PAIR)) : nullptr;
    const uint8_t* absent = c.padding ? c.padding + (int64_t)problem.example * c.keys : nullptr;
    for (int j = 0; j < c.keys; j++)
      if (!absent || !absent[j]) place[count++] = j;
    for (int j = count; j < rounded(); j++) place[j] = 0;
    for (int t = 0; clock && t < problem.timescales; t++)
      for (int j = 0; j < rounded(); j++)
        clock[t * rounded() + j] = j < count ? c.key_clock[problem.row(c, t) * c.keys + (int64_t)place[j]] : 0;
    memset(centre, 0, sizeof(float) * WIDTH);
    if (c.kind == DOT_PRODUCT) return;
    Vector sums[WIDTH / W] = {};
    for (int j = 0; j < count; j++) {
      const float* from = problem.of(c.k) + (int64_t)place[j] * c.k.of_token;
      UNROLL for (int d = 0; d < WIDTH; d += W) sums[d / W] += load_of_row(from + d, c.head_dim - d);
    }
    bool finite = true;
    for (int d = 0; d < WIDTH; d++) finite &= std::isfinite(centre[d] = sums[d / W][d % W] / count);
    if (!finite) memset(centre, 0, sizeof(float) * WIDTH);
    for (int t = 0; t < problem.timescales; t++) {
      unit[t] = c.kind == FORCE ? top_mass(c, problem, t) : 1;  // which FORCE scales
      const float least = c.kind == FORCE ? 1e-25f : 1e-18f;
      const float* from = c.key_mass + problem.row(c, t) * c.keys;
      for (int j = 0; j < rounded(); j++) {
        const float m = j < count ? from[(int64_t)place[j]] / unit[t] : 0;
        mass[t * rounded() + j] = m < least ? least : m;  // what is divided by it stays a number
      }
    }
  }

  int64_t rounded() const { return rounded_up(count, PAIR); }

  const float* times(int t) const { return clock ? clock + t * rounded() : place; }

  int before(float position) const { return std::lower_bound(place, place + count, position) - place; }

  float top_mass(const Call& c, const Problem& problem, int t) const {
    float top = 1e-35f;
    for (int j = 0; j < count; j++)
      top = std::max(top, c.key_mass[problem.row(c, t) * c.keys + (int64_t)place[j]]);
    return top;
  }
};

INLINE bool pair_is_blocked(const Call& c, const Problem& problem, int64_t i, int64_t j) {
  const int64_t* stride = c.pair_strides;
  return c.pairs && c.pairs[problem.example * stride[0] + problem.head * stride[1] + i * stride[2] + j * stride[3]];
}

// Distance of a row from the nearest key that it may attend to; infinite, where there is none.
static float nearest_key(const Call& c, const Problem& problem, const Keys& keys, int i) {
  const int position = i + c.offset;
  int before = keys.before(position + 1), after = before;
  while (before > 0 && pair_is_blocked(c, problem, i, keys.place[before - 1])) before--;
  while (after < keys.count && pair_is_blocked(c, problem, i, keys.place[after])) after++;
  float nearest = before > 0 ? position - keys.place[before - 1] : INFINITY;
  if (!c.causal && after < keys.count) nearest = std::min(nearest, keys.place[after] - position);
  return nearest;
}

// Time from a row to the nearest key that it may attend to, by the clocks; infinite, where there is none.
static float nearest_time(const Call& c, const Problem& problem, const Keys& keys, int i, int t, float time) {
  const int end = c.causal ? keys.before(i + c.offset + 1) : keys.count;
  float nearest = INFINITY;
  for (int j = 0; j < end; j++)
    if (!pair_is_blocked(c, problem, i, keys.place[j])) nearest = std::min(nearest, std::fabs(time - keys.times(t)[j]));
  return nearest;
}

// Queries first .. first + count of a problem; those up to a multiple of PAIR are zeros.
struct Rows {
  int64_t rounded, of_timescale;
  float *q, *norm;       // (rounded, WIDTH), |q_i|^2 / D + softening
  float *time, *nearest; // position, or (T, rounded) by the clock; the time to the nearest key

  Rows(const Call& c, const Problem& problem, const Keys& keys, int first, int count, Arena& arena, float* largest)
      : rounded(rounded_up(count, PAIR)), of_timescale(c.query_clock ? rounded : 0) {
    const int T = c.query_clock ? problem.timescales : 1;
    q = arena.get(rounded * WIDTH), norm = arena.get(rounded);
    time = arena.get(T * rounded), nearest = arena.get(T * rounded);
    const float factor = c.kind == DOT_PRODUCT ? c.scale * LOG2E : 1;
    pack(problem.of(c.q) + first * c.q.of_token, c.q.of_token, c.head_dim, nullptr, count, rounded, keys.centre, factor,
         q);
    if (c.kind != DOT_PRODUCT) norms(q, count, rounded, c.head_dim, c.softening, norm, largest);
    for (int t = 0; t < T; t++)
      for (int i = 0; i < rounded; i++) {
        float &at = time[t * rounded + i], &near = nearest[t * rounded + i];
        if (!c.query_clock) at = first + i + c.offset;
        else at = i < count ? c.query_clock[problem.row(c, t) * c.queries + first + i] : 0;
        near = INFINITY;  // FORCE has no running maximum: its weights are made relative to this
        if (c.kind == FORCE && i < count && c.query_clock) near = nearest_time(c, problem, keys, first + i, t, at);
        else if (c.kind == FORCE && i < count && c.log_decay) near = nearest_key(c, problem, keys, first + i);
        if (near == INFINITY) near = 0;
      }
  }
};

// --- scores -------------------------------------------------------------------------------------------------

// X = r2 + softening of near pairs again, from the differences themselves: |q|^2 - 2 q . k + |k|^2 rounds away what is
// much smaller than its terms. Rows i .. i + ROWS, keys place[0] .. place[columns].
NOINLINE void mend_near_pairs(const Call& c, const Problem& problem, int i, const float* place, int columns, float* X,
                              const float* of_row, const float* of_column) {
  for (int j = 0; j < columns; j += W) {
    Bits any = {};
    UNROLL for (int r = 0; r < ROWS; r++)
      any |= (Bits)(load(X + r * STRIDE + j) < (load(of_column + j) + of_row[r]) * NEAR);
    if (!any_of(any)) continue;
    for (int r = 0; r < ROWS; r++)
      for (int n = j; n < j + W; n++) {
        if (!(X[r * STRIDE + n] < (of_column[n] + of_row[r]) * NEAR)) continue;
        const float* q = problem.of(c.q) + (i + r) * c.q.of_token;
        const float* k = problem.of(c.k) + (int64_t)place[n] * c.k.of_token;
        float square = 0;
        for (int d = 0; d < c.head_dim; d++) square += (q[d] - k[d]) * (q[d] - k[d]);
        X[r * STRIDE + n] = square / c.head_dim + c.softening;
      }
  }
}

// X = q . k of a panel, or r2 + softening.
template <Kind KIND>
static void distances(const Call& c, const Problem& problem, int i, const float* place, int columns, const float* q,
                      const float* K, float* X, const float* of_row, const float* of_column, float largest_column) {
  product<KIND != DOT_PRODUCT, KIND != DOT_PRODUCT>(q, K, X, columns, of_row, of_column);
  if (KIND == DOT_PRODUCT) return;
  float largest_row = 0;  // rows that are none have an infinite one
  for (int r = 0; r < ROWS; r++)
    if (of_row[r] < INFINITY) largest_row = std::max(largest_row, of_row[r]);
  if ((largest_row + largest_column) * NEAR > c.softening)
    mend_near_pairs(c, problem, i, place, columns, X, of_row, of_column);
}

struct Panel {  // ROWS rows of a tile, at one timescale
  int columns;  // a multiple of PAIR
  const float *row_time, *key_time;          // positions, or by the clock
  const float *strength, *mass, *nearest;    // A_i, or for FORCE one over the row's sum; m_j; see `Rows`
  float decay;                               // log2 gamma
};

// From X, which is q . k, or r2 + softening, or where it is not the FIRST timescale 1 / (r2 + softening), to logits,
// or for FORCE weights, in P. X becomes 1 / (r2 + softening). In FORWARD also the maximum, or sum, of each row, and
// `closest` becomes the largest 1 / (r2 + softening), if that is larger.
template <Kind KIND, bool DECAY, bool FIRST, bool FORWARD>
NOINLINE void score_panel(const Panel p, float* X, float* P, float* of_row, float* closest) {
  const Vector lowest = broadcast(lowest_exponent);
  Vector found[ROWS], nearest[ROWS] = {};
  UNROLL for (int r = 0; r < ROWS; r++) found[r] = broadcast(KIND == FORCE ? 0 : NOTHING);
  for (int j = 0; j < p.columns; j += W) {
    Vector mass = {}, time = {};
    if (KIND != DOT_PRODUCT) mass = load(p.mass + j);
    if (DECAY) time = load(p.key_time + j);
    UNROLL for (int r = 0; r < ROWS; r++) {
      Vector x = load(X + r * STRIDE + j);
      if (KIND != DOT_PRODUCT) {
        if (FIRST) store(X + r * STRIDE + j, x = 1.0f / x);
        if (FIRST && FORWARD) nearest[r] = maximum(nearest[r], x);
        x = to_the_power(x) * (KIND == FORCE && FORWARD ? mass : p.strength[r] * mass);
      }
      if (DECAY) {
        const Vector distance = absolute(time - p.row_time[r]);
        if (KIND == FORCE) x *= exp2_of((distance - p.nearest[r]) * p.decay, lowest);
        else x += distance * p.decay;
      }
      if (KIND != DOT_PRODUCT || DECAY) store(P + r * STRIDE + j, x);
      if (FORWARD) found[r] = KIND == FORCE ? found[r] + x : maximum(found[r], x);
    }
  }
  if (FORWARD) UNROLL for (int r = 0; r < ROWS; r++) {
    of_row[r] = KIND == FORCE ? sum_of(found[r]) : largest_of(found[r]);
    if (KIND != DOT_PRODUCT && FIRST) store(closest, maximum(load(closest), nearest[r]));
  }
}

// P = 2^(logits - shift); adds the sums of rows.
template <bool FORWARD>
NOINLINE void exp_panel(int columns, const float* logits, const float* shift, float* P, float* total) {
  const Vector lowest = broadcast(lowest_exponent);
  Vector sums[ROWS] = {};
  for (int j = 0; j < columns; j += W) {
    UNROLL for (int r = 0; r < ROWS; r++) {
      const Vector weights = exp2_of(load(logits + r * STRIDE + j) - shift[r], lowest);
      store(P + r * STRIDE + j, weights);
      if (FORWARD) sums[r] += weights;
    }
  }
  if (FORWARD) UNROLL for (int r = 0; r < ROWS; r++) total[r] += sum_of(sums[r]);
}

// Where the gradients of a panel are summed.
struct Sums {
  float *of_strength, *of_row;  // of each row: ds A_i's part of the logit, and c
  float *of_mass, *of_key;      // of each key: the same
  float* rate;                  // ds |i - j|
  float *row_clock, *key_clock; // ds by the time of each row, and less it by that of each key
};

// From weights in P and dweights - delta in G to ds = P G, and to the gradient by -x_ij, or for DOT_PRODUCT by q . k,
// up to a factor, summed over timescales: E. X is 1 / (r2 + softening).
template <Kind KIND, Decay DECAY, bool FIRST, bool LAST>
NOINLINE void gradient_panel(const Panel p, const float* X, const float* P, const float* G, float* E, const Sums to) {
  Vector strength_sums[ROWS] = {}, row_sums[ROWS] = {}, clock_sums[ROWS] = {}, rate = {};
  for (int j = 0; j < p.columns; j += W) {
    Vector mass = {}, time = {}, mass_sums = {}, key_sums = {}, key_clock = {};
    if (KIND == GRAVITY) mass = load(p.mass + j);
    if (KIND != DOT_PRODUCT) mass_sums = load(to.of_mass + j);
    if (KIND != DOT_PRODUCT && LAST) key_sums = load(to.of_key + j);
    if (DECAY != NONE) time = load(p.key_time + j);
    if (DECAY == CLOCK) key_clock = load(to.key_clock + j);
    UNROLL for (int r = 0; r < ROWS; r++) {
      Vector c = load(P + r * STRIDE + j) * load(G + r * STRIDE + j);
      if (DECAY == RATE) rate += c * absolute(time - p.row_time[r]);
      if (DECAY == CLOCK) {
        const Vector later = time - p.row_time[r], none = {};
        const Vector by_time = later > 0 ? c : later < 0 ? -c : none;
        clock_sums[r] += by_time, key_clock += by_time;
      }
      if (KIND != DOT_PRODUCT) {
        const Vector inverse = load(X + r * STRIDE + j);
        if (KIND == GRAVITY) {
          c *= p.strength[r] * mass * to_the_power(inverse);
          strength_sums[r] += c;
        }
        mass_sums += c;
        c *= inverse;
      }
      if (!FIRST) c += load(E + r * STRIDE + j);
      store(E + r * STRIDE + j, c);
      if (KIND != DOT_PRODUCT && LAST) row_sums[r] += c, key_sums += c;
    }
    if (KIND != DOT_PRODUCT) store(to.of_mass + j, mass_sums);
    if (KIND != DOT_PRODUCT && LAST) store(to.of_key + j, key_sums);
    if (DECAY == CLOCK) store(to.key_clock + j, key_clock);
  }
  UNROLL for (int r = 0; r < ROWS; r++) {
    if (KIND == GRAVITY) to.of_strength[r] += sum_of(strength_sums[r]);
    if (KIND != DOT_PRODUCT && LAST) to.of_row[r] += sum_of(row_sums[r]);
    if (DECAY == CLOCK) to.row_clock[r] += sum_of(clock_sums[r]);
  }
  if (DECAY == RATE) *to.rate += sum_of(rate);
}

// Columns that row i of a tile of `count` keys from j0 on may not attend to become `value`; returns the maximum, or
// for FORCE the sum, of the others.
template <Kind KIND>
static float mask_row(const Call& c, const Problem& problem, const Keys& keys, int i, int j0, int count, int columns,
                      float value, float* row) {
  const int kept = c.causal ? std::min(count, keys.before(i + c.offset + 1) - j0) : count;
  float found = KIND == FORCE ? 0 : NOTHING;
  for (int j = 0; j < columns; j++) {
    if (j >= kept || pair_is_blocked(c, problem, i, keys.place[j0 + j])) row[j] = value;
    else found = KIND == FORCE ? found + row[j] : std::max(found, row[j]);
  }
  return found;
}

// Whether a timescale looks from rows [i0, i1) at any of the keys [j0, j1).
INLINE bool is_reached(const Call& c, const Problem& problem, const Keys& keys, int t, int i0, int i1, int j0, int j1) {
  if (!c.reach) return true;
  i0 += c.offset, i1 += c.offset;
  return std::max(keys.place[j0] - (i1 - 1), i0 - keys.place[j1 - 1]) <= c.reach[problem.row(c, t)];
}

static int widest_reach(const Call& c, const Problem& problem) {
  int widest = c.reach ? 0 : std::max(c.offset + c.queries, c.keys);
  for (int t = 0; c.reach && t < problem.timescales; t++) widest = std::max(widest, c.reach[problem.row(c, t)]);
  return widest;
}

// --- forward ------------------------------------------------------------------------------------------------

struct Extent {  // of the distances of a call, by which their rounding is judged
  float largest;  // |q_i|^2 + |k_j|^2, less the centre
  float closest;  // 1 / (r2 + softening)
};

// Rows [first, last) of a problem.
template <Kind KIND, bool DECAY>
static Extent forward(const Call& c, const Problem& problem, int first, int last, Arena arena) {
  const int T = problem.timescales, widest = widest_reach(c, problem);
  const Keys keys(c, problem, arena);
  const int64_t S = keys.rounded();
  float *K = arena.get(S * WIDTH), *V = arena.get(S * WIDTH), *key_norm = arena.get(S);
  float *X = arena.get(ROWS * STRIDE), *P = arena.get(ROWS * STRIDE), *strength = arena.get(T * TILE_ROWS);
  float *O = arena.get(T * TILE_ROWS * WIDTH), *top = arena.get(T * TILE_ROWS), *total = arena.get(T * TILE_ROWS);
  float largest_q = 0, largest_k = 0, *closest = arena.get(W);
  store(closest, Vector{});
  pack(problem.of(c.k), c.k.of_token, c.head_dim, keys.place, keys.count, S, keys.centre, 1, V);
  if (KIND != DOT_PRODUCT) norms(V, keys.count, S, c.head_dim, 0, key_norm, &largest_k);
  pack_transposed(V, S, KIND == DOT_PRODUCT ? 1 : -2.0f / c.head_dim, K);
  pack(problem.of(c.v), c.v.of_token, c.head_dim, keys.place, keys.count, S, ZERO, 1, V);
  for (int i0 = first; i0 < last; i0 += TILE_ROWS) {
    const int i1 = std::min(last, i0 + TILE_ROWS);
    Arena of_rows = arena;
    const Rows rows(c, problem, keys, i0, i1 - i0, of_rows, &largest_q);
    for (int t = 0; t < T; t++)
      for (int i = 0; KIND == GRAVITY && i < TILE_ROWS; i++)
        strength[t * TILE_ROWS + i] = i0 + i < i1 ? problem.strength(c, t, i0 + i) : 0;
    std::fill_n(top, T * TILE_ROWS, NOTHING);
    std::fill_n(total, T * TILE_ROWS, 0.0f);
    std::fill_n(O, T * TILE_ROWS * WIDTH, 0.0f);
    const int end = keys.before(c.offset + (c.causal ? i1 : i1 + widest));
    for (int j0 = keys.before(c.offset + i0 - widest) / PAIR * PAIR; j0 < end; j0 += TILE_KEYS) {
      const int count = std::min<int>(TILE_KEYS, end - j0), columns = rounded_up(count, PAIR);
      for (int r0 = 0; r0 < i1 - i0; r0 += ROWS) {
        const int i = i0 + r0;
        distances<KIND>(c, problem, i, keys.place + j0, columns, rows.q + r0 * WIDTH, K + j0 * WIDTH, X, rows.norm + r0,
                        key_norm + j0, largest_k / c.head_dim);
        const bool masked = columns > count || c.pairs || (c.causal && keys.place[j0 + count - 1] > i + c.offset);
        bool is_first = true;
        for (int t = 0; t < T; t++) {
          if (!is_reached(c, problem, keys, t, i0, i1, j0, j0 + count)) continue;
          const int at = t * TILE_ROWS + r0;
          const Panel panel{columns, rows.time + t * rows.of_timescale + r0, keys.times(t) + j0, strength + at,
                            keys.mass + t * S + j0, rows.nearest + t * rows.of_timescale + r0, problem.decay(c, t)};
          float of_row[ROWS], *logits = KIND == DOT_PRODUCT && !DECAY ? X : P;
          if (is_first) score_panel<KIND, DECAY, true, true>(panel, X, P, of_row, closest);
          else score_panel<KIND, DECAY, false, true>(panel, X, P, of_row, nullptr);
          is_first = false;
          for (int r = 0; masked && r < ROWS && i + r < i1; r++)
            of_row[r] = mask_row<KIND>(c, problem, keys, i + r, j0, count, columns, KIND == FORCE ? 0 : BLOCKED,
                                       logits + r * STRIDE);
          for (int r = 0; r < ROWS; r++) {
            if (KIND == FORCE) total[at + r] += of_row[r];
            else if (of_row[r] > top[at + r]) {
              const float shrunk = exp2f(top[at + r] - of_row[r]);
              top[at + r] = of_row[r];
              total[at + r] *= shrunk;
              for (int d = 0; d < WIDTH; d++) O[(at + r) * WIDTH + d] *= shrunk;
            }
          }
          if (KIND != FORCE) exp_panel<true>(columns, logits, top + at, P, total + at);
          add_product<STRIDE, 1>(P, V + j0 * WIDTH, O + at * WIDTH, count);
        }
      }
    }
    for (int t = 0; t < T; t++)
      for (int i = i0, at = t * TILE_ROWS; i < i1; i++, at++) {
        // What is no number, or too small for one, is not taken for nothing.
        const bool none = KIND == FORCE ? total[at] == 0 : top[at] == NOTHING;
        const bool no_key = none && nearest_key(c, problem, keys, i) == INFINITY;
        const float sum = none ? NAN : total[at];
        c.log_sum[problem.row(c, t) * c.queries + i] =
            KIND == FORCE ? (no_key ? 0 : 1 / sum) : no_key ? INFINITY : top[at] + log2f(sum);
        store_row(problem.of(c.output, t) + i * c.output.of_token, c.head_dim, [&](int d) {
          return no_key ? Vector{} : load(O + at * WIDTH + d) / sum;
        });
      }
  }
  return {largest_q + largest_k, largest_of(load(closest))};
}

// --- backward -----------------------------------------------------------------------------------------------

// What a part of the keys adds to the gradients of rows, one behind the other so that parts can be added as one.
struct OfRows {
  float *dq, *strength, *row, *clock, *rate;  // (L, WIDTH), (T, L), (L), (T, L), (T)
  OfRows(float* at, int64_t L, int T)
      : dq(at), strength(dq + L * WIDTH), row(strength + T * L), clock(row + L), rate(clock + T * L) {}
  static int64_t size(int64_t L, int T) { return rounded_up(L * (WIDTH + 2 * T + 1) + T, 16); }
};

// - upstream_i . output_i, of packed rows: the same sums as in `product`, in the same order. Of a row of which one key
// has all weight the output is the value of this key, and `dweights - delta` then is 0 and not what rounding leaves.
static void deltas(const float* upstream, const float* output, int count, float* to, Arena arena) {
  float *left = arena.get(PAIR * WIDTH), *right = arena.get(PAIR * WIDTH);
  for (int i = 0; i < count; i += PAIR) {
    pack_transposed(upstream + i * WIDTH, PAIR, -1, left);
    pack_transposed(output + i * WIDTH, PAIR, 1, right);
    Vector sums[2] = {};
    for (int d = 0; d < WIDTH; d++)
      for (int half = 0; half < 2; half++)
        sums[half] += load(left + d * PAIR + half * W) * load(right + d * PAIR + half * W);
    store(to + i, sums[0]), store(to + i + W, sums[1]);
  }
}

// What d logit by q . k, or by -x_ij, is to be multiplied by to be a gradient by q, and for gravity by k too.
template <Kind KIND>
static float gradient_factor(const Call& c) {
  return KIND == DOT_PRODUCT ? c.scale : (float)DISTANCE_POWER / c.head_dim * (KIND == GRAVITY ? LN2 : 1);
}

// The sums of all parts to dq, dstrength, drate and dquery_clock.
template <Kind KIND, Decay DECAY>
static void finish_rows(const Call& c, const Problem& problem, const Rows& rows, const float* strength, int parts,
                        float* slabs) {
  const int T = problem.timescales;
  const int64_t L = rows.rounded, size = OfRows::size(L, T);
  for (int part = 1; part < parts; part++)
    for (int64_t x = 0; x < size; x++) slabs[x] += slabs[part * size + x];
  const OfRows sums(slabs, L, T);
  const float factor = gradient_factor<KIND>(c);
  for (int64_t i = 0; i < c.queries; i++)
    store_row(problem.of(c.dq) + i * c.dq.of_token, c.head_dim, [&](int d) {
      const Vector sum = load(sums.dq + i * WIDTH + d);
      return (KIND == DOT_PRODUCT ? sum : sum - load(rows.q + i * WIDTH + d) * sums.row[i]) * factor;
    });
  for (int t = 0; t < T; t++) {
    for (int64_t i = 0; KIND == GRAVITY && i < c.queries; i++)
      c.dstrength[problem.row(c, t) * c.queries + i] = sums.strength[t * L + i] / strength[t * L + i];
    for (int64_t i = 0; DECAY == CLOCK && i < c.queries; i++)
      c.dquery_clock[problem.row(c, t) * c.queries + i] = sums.clock[t * L + i];
    if (DECAY == RATE) c.drate[problem.row(c, t)] = sums.rate[t];
  }
}

// Keys of the parts [first_part, last_part) of a problem: dk, dv and dmass, and each part's share of what rows get, in
// its slab. The last piece of work that ends adds those of all `parts` up, in order.
template <Kind KIND, Decay DECAY>
static void backward(const Call& c, const Problem& problem, int first_part, int last_part, int parts, float* slabs,
                     std::atomic<int>& left, Arena arena) {
  const int T = problem.timescales, widest = widest_reach(c, problem);
  const Keys keys(c, problem, arena);
  float largest_q = 0;
  const Rows rows(c, problem, keys, 0, c.queries, arena, &largest_q);
  const int64_t L = rows.rounded, S = keys.rounded(), size = OfRows::size(L, T);
  float* output = slabs + first_part * size;  // at first
  float *upstream = arena.get(T * L * WIDTH), *log_sum = arena.get(T * L), *delta = arena.get(T * L);
  float *strength = arena.get(T * L), *X = arena.get(ROWS * STRIDE), *G = arena.get(ROWS * STRIDE);
  float *P = arena.get(T * TILE_ROWS * STRIDE), *E = arena.get(TILE_ROWS * STRIDE);
  float *k = arena.get(TILE_KEYS * WIDTH), *K = arena.get(TILE_KEYS * WIDTH), *V = arena.get(TILE_KEYS * WIDTH);
  float *dk = arena.get(TILE_KEYS * WIDTH), *dv = arena.get(TILE_KEYS * WIDTH), *key_norm = arena.get(TILE_KEYS);
  float *of_mass = arena.get(T * TILE_KEYS), *of_key = arena.get(TILE_KEYS), *of_clock = arena.get(T * TILE_KEYS);
  for (int t = 0; t < T; t++) {
    const int64_t row = problem.row(c, t) * c.queries;
    pack(problem.of(c.upstream, t), c.upstream.of_token, c.head_dim, nullptr, c.queries, L, ZERO, 1,
         upstream + t * L * WIDTH);
    pack(problem.of(c.output, t), c.output.of_token, c.head_dim, nullptr, c.queries, L, ZERO, 1, output);
    deltas(upstream + t * L * WIDTH, output, L, delta + t * L, arena);
    for (int i = 0; i < L; i++) {
      log_sum[t * L + i] = i < c.queries ? c.log_sum[row + i] : 0;
      strength[t * L + i] = KIND == FORCE ? log_sum[t * L + i] : 0;
      if (KIND == GRAVITY && i < c.queries) strength[t * L + i] = problem.strength(c, t, i);
    }
  }
  std::fill_n(slabs + first_part * size, (last_part - first_part) * size, 0.0f);
  const int share = rounded_up((keys.count + parts - 1) / parts, TILE_KEYS);
  for (int j0 = first_part * share; j0 < std::min(keys.count, last_part * share); j0 += TILE_KEYS) {
    const OfRows of_rows(slabs + j0 / share * size, L, T);
    const int count = std::min<int>(TILE_KEYS, keys.count - j0), columns = rounded_up(count, PAIR);
    const float *place = keys.place + j0, first = place[0], last = place[count - 1];
    pack(problem.of(c.v), c.v.of_token, c.head_dim, place, count, columns, ZERO, 1, k);
    pack_transposed(k, columns, 1, V);
    pack(problem.of(c.k), c.k.of_token, c.head_dim, place, count, columns, keys.centre, 1, k);
    pack_transposed(k, columns, KIND == DOT_PRODUCT ? 1 : -2.0f / c.head_dim, K);
    float largest = largest_q;
    if (KIND != DOT_PRODUCT) norms(k, count, columns, c.head_dim, 0, key_norm, &largest);
    std::fill_n(dk, columns * WIDTH, 0.0f), std::fill_n(dv, columns * WIDTH, 0.0f);
    std::fill_n(of_mass, T * TILE_KEYS, 0.0f), std::fill_n(of_key, TILE_KEYS, 0.0f);
    std::fill_n(of_clock, T * TILE_KEYS, 0.0f);
    const int begin = std::max<int>(0, (c.causal ? first : first - widest) - c.offset) / ROWS * ROWS;
    const int end = std::min<int>(c.queries, last + widest + 1 - c.offset);
    for (int i0 = begin; i0 < end; i0 += TILE_ROWS) {
      const int i1 = std::min<int>(end, i0 + TILE_ROWS), tile_rows = rounded_up(i1 - i0, ROWS);
      int first_t = T, last_t = -1;
      for (int t = 0; t < T; t++)
        if (is_reached(c, problem, keys, t, i0, i1, j0, j0 + count)) first_t = std::min(first_t, t), last_t = t;
      if (last_t < 0) continue;
      for (int r0 = 0; r0 < tile_rows; r0 += ROWS) {
        const int i = i0 + r0;
        distances<KIND>(c, problem, i, place, columns, rows.q + i * WIDTH, K, X, rows.norm + i, key_norm,
                        largest / c.head_dim);
        const bool masked = columns > count || c.pairs || (c.causal && last > i + c.offset);
        for (int t = first_t; t <= last_t; t++) {
          if (!is_reached(c, problem, keys, t, i0, i1, j0, j0 + count)) continue;
          const int64_t row = t * L + i;
          product<true, false>(upstream + row * WIDTH, V, G, columns, delta + row, nullptr);
          const int64_t of_row = t * rows.of_timescale + i;
          const Panel panel{columns, rows.time + of_row, keys.times(t) + j0, strength + row, keys.mass + t * S + j0,
                            rows.nearest + of_row, problem.decay(c, t)};
          float *weights = P + (t * TILE_ROWS + r0) * STRIDE, *c_panel = E + r0 * STRIDE;
          const bool raw = KIND == DOT_PRODUCT && DECAY == NONE;
          if (!raw && t == first_t) score_panel<KIND, DECAY != NONE, true, false>(panel, X, weights, nullptr, nullptr);
          else if (!raw) score_panel<KIND, DECAY != NONE, false, false>(panel, X, weights, nullptr, nullptr);
          if (KIND != FORCE) exp_panel<false>(columns, raw ? X : weights, log_sum + row, weights, nullptr);
          for (int r = 0; masked && r < ROWS && i + r < c.queries; r++)
            mask_row<KIND>(c, problem, keys, i + r, j0, count, columns, 0, weights + r * STRIDE);
          const Sums to{of_rows.strength + row, of_rows.row + i, of_mass + t * TILE_KEYS, of_key, of_rows.rate + t,
                        of_rows.clock + row, of_clock + t * TILE_KEYS};
          if (t == first_t && t == last_t) gradient_panel<KIND, DECAY, true, true>(panel, X, weights, G, c_panel, to);
          else if (t == first_t) gradient_panel<KIND, DECAY, true, false>(panel, X, weights, G, c_panel, to);
          else if (t == last_t) gradient_panel<KIND, DECAY, false, true>(panel, X, weights, G, c_panel, to);
          else gradient_panel<KIND, DECAY, false, false>(panel, X, weights, G, c_panel, to);
        }
        add_product<STRIDE, 1>(E + r0 * STRIDE, k, of_rows.dq + i * WIDTH, count);
      }
      for (int j = 0; j < columns; j += ROWS) {
        for (int t = first_t; t <= last_t; t++)
          if (is_reached(c, problem, keys, t, i0, i1, j0, j0 + count))
            add_product<1, STRIDE>(P + t * TILE_ROWS * STRIDE + j, upstream + (t * L + i0) * WIDTH, dv + j * WIDTH,
                                   tile_rows);
        add_product<1, STRIDE>(E + j, rows.q + i0 * WIDTH, dk + j * WIDTH, tile_rows);
      }
    }
    const float factor = gradient_factor<KIND>(c);
    for (int j = 0; j < count; j++) {
      const int64_t at = place[j];
      store_row(problem.of(c.dk) + at * c.dk.of_token, c.head_dim, [&](int d) {
        const Vector sums = load(dk + j * WIDTH + d);
        return KIND == DOT_PRODUCT ? sums * LN2 : (sums - load(k + j * WIDTH + d) * of_key[j]) * factor;
      });
      store_row(problem.of(c.dv) + at * c.dv.of_token, c.head_dim, [&](int d) { return load(dv + j * WIDTH + d); });
      for (int t = 0; KIND != DOT_PRODUCT && t < T; t++)
        c.dmass[problem.row(c, t) * c.keys + at] = of_mass[t * TILE_KEYS + j] * (KIND == GRAVITY ? LN2 : 1) /
                                                   (keys.mass[t * S + j0 + j] * keys.unit[t]);
      for (int t = 0; DECAY == CLOCK && t < T; t++)
        c.dkey_clock[problem.row(c, t) * c.keys + at] = -of_clock[t * TILE_KEYS + j];
    }
  }
  if (!--left) finish_rows<KIND, DECAY>(c, problem, rows, strength, parts, slabs);
}

// --- threads ------------------------------------------------------------------------------------------------

// GOMP_parallel of the OpenMP runtime that PyTorch has loaded: its threads are there already, and wait spinning.
typedef void (*Parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);

struct Job {
  const Call& c;
  const bool is_backward;
  int problems, parts, pieces, threads;  // a problem is worked on in pieces of some parts each
  int64_t slab, room;                    // floats of what a part adds to rows, bytes of a thread
  std::atomic<int> next{0}, started{0};
  std::atomic<float> largest{0}, closest{0};

  Job(const Call& c, bool is_backward) : c(c), is_backward(is_backward) {
    const int64_t L = c.queries + PAIR, S = c.keys + PAIR, T = c.shared ? c.timescales : 1;
    problems = c.batch * c.heads * (c.shared ? 1 : c.timescales);
    const int length = is_backward ? c.keys : c.queries;
    parts = 1;  // by the shapes alone, so that sums are the same for any number of threads
    if (0 < problems && problems < 16) parts = std::clamp(length / 256, 1, (15 + problems) / problems);
    // What is packed is packed for each piece: no more of them than keep threads busy, also beside other work.
    const int wanted = std::max((2 * c.threads + problems - 1) / std::max(1, problems), length / 1024);
    pieces = c.threads > 1 ? std::clamp(wanted, 1, parts) : 1;
    threads = std::clamp(problems * pieces, 1, std::max(1, c.threads));
    slab = is_backward ? OfRows::size(rounded_up(c.queries, PAIR), T) : 0;
    int64_t floats = S * (2 + 2 * T) + T + 3 * T * TILE_ROWS + 2 * ROWS * STRIDE + WIDTH + W;
    if (is_backward)
      floats += L * (WIDTH + 1) + T * L * (WIDTH + 5) + (T + 1) * TILE_ROWS * STRIDE + TILE_KEYS * (5 * WIDTH + 2 + 2 * T) +
                2 * PAIR * WIDTH;
    else floats += 2 * S * WIDTH + TILE_ROWS * WIDTH * T + rounded_up(TILE_ROWS, PAIR) * (WIDTH + 1 + 2 * T);
    room = rounded_up(4 * floats + 64 * 32, 4096);
  }
  int64_t bytes() const { return room * threads + problems * (4 * slab * parts + 64) + 64; }
  float* slabs() const { return (float*)(c.workspace + room * threads); }
  std::atomic<int>* left() const { return (std::atomic<int>*)(slabs() + slab * parts * problems); }
};

static void raise(std::atomic<float>& x, float least) {
  for (float before = x; before < least && !x.compare_exchange_weak(before, least);) {}
}

template <Kind KIND, Decay DECAY>
static void work_on(Job& job, int number, Arena arena) {
  const Call& c = job.c;
  const int b = number / job.pieces, piece = number % job.pieces;
  const int first = piece * job.parts / job.pieces, last = (piece + 1) * job.parts / job.pieces;
  const Problem problem(c, b);
  if (job.is_backward) {
    float* slabs = job.slabs() + b * job.parts * job.slab;
    backward<KIND, DECAY>(c, problem, first, last, job.parts, slabs, job.left()[b], arena);
    return;
  }
  const int share = rounded_up((c.queries + job.parts - 1) / job.parts, TILE_ROWS);
  if (first * share >= c.queries) return;
  const Extent extent =
      forward<KIND, DECAY != NONE>(c, problem, first * share, std::min(c.queries, last * share), arena);
  raise(job.largest, extent.largest), raise(job.closest, extent.closest);
}

// Denormal numbers are taken for 0 while this lives: arithmetic on them is a hundred times slower.
struct WithoutDenormals {
#if defined(__x86_64__)
  unsigned before = __builtin_ia32_stmxcsr();
  WithoutDenormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }
  ~WithoutDenormals() { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;
  WithoutDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" ::"r"(before | 1u << 24));
  }
  ~WithoutDenormals() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#endif
};

static void work(void* pointer) {
  Job& job = *(Job*)pointer;
  const WithoutDenormals held;
  char* at = job.c.workspace + job.room * job.started++;
  for (int number; (number = job.next++) < job.problems * job.pieces;) {
    const Arena arena{at, at + job.room};
    switch (job.c.kind * 3 + (job.c.query_clock ? CLOCK : job.c.log_decay ? RATE : NONE)) {
      case 0: work_on<DOT_PRODUCT, NONE>(job, number, arena); break;
      case 1: work_on<DOT_PRODUCT, RATE>(job, number, arena); break;
      case 2: work_on<DOT_PRODUCT, CLOCK>(job, number, arena); break;
      case 3: work_on<GRAVITY, NONE>(job, number, arena); break;
      case 4: work_on<GRAVITY, RATE>(job, number, arena); break;
      case 5: work_on<GRAVITY, CLOCK>(job, number, arena); break;
      case 6: work_on<FORCE, NONE>(job, number, arena); break;
      case 7: work_on<FORCE, RATE>(job, number, arena); break;
      case 8: work_on<FORCE, CLOCK>(job, number, arena); break;
    }
  }
}

static void run(void (*function)(void*), void* argument, int threads, Parallel parallel) {
  if (parallel && threads > 1) parallel(function, argument, threads, 0);
  else function(argument);
}

extern "C" int64_t workspace_bytes(const Call* c, int is_backward) { return Job(*c, is_backward).bytes(); }

extern "C" void attention(const Call* c, int is_backward, Parallel parallel, Extent* extent) {
  Job job(*c, is_backward);
  for (int b = 0; is_backward && b < job.problems; b++) new (job.left() + b) std::atomic<int>(job.pieces);
  run(work, &job, job.threads, parallel);
  *extent = {job.largest, job.closest};
}

// As many multiply-adds as the processor can do, on each of some threads; returns how many operations of floats.
extern "C" int64_t multiply_adds(int64_t rounds, int threads, Parallel parallel) {
  run([](void* argument) {
    Vector sums[12];
    UNROLL for (int i = 0; i < 12; i++) sums[i] = broadcast(i);
    Vector factor = broadcast(0.999f);
    for (int64_t round = *(int64_t*)argument; round; round--)
      UNROLL for (int i = 0; i < 12; i++) sums[i] = sums[i] * factor + factor;
    UNROLL for (int i = 0; i < 12; i++) asm volatile("" ::"r"(sum_of(sums[i]) > 0));  // or nothing would be done
  }, &rounds, threads, parallel);
  return rounds * 12 * W * 2 * std::max(threads, 1);
}
