// Building blocks of hopfield_retrieve's loops: packing, products of a tile of tokens with a packed
// matrix, and the softmax of a row. Compiled once for each instruction set, like common/simd.h.
#pragma once

#include <common/simd.h>

#include "hopfield_retrieve_kernel.h"

namespace ait::cpu {
namespace {

// A tile of kRows x 2 vectors of sums fills the registers.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif

template <typename C>
constexpr int64_t kPanel = 2 * Vec<C>::size;

constexpr int64_t kLine = 64;  // bytes of a line of the cache

// Columns that the panel from `column` on takes in memory: half a panel where that is enough.
template <typename C>
AIT_INLINE int64_t packed_columns(int64_t column, int64_t columns) {
  return columns - column <= Vec<C>::size ? Vec<C>::size : kPanel<C>;
}

template <bool transposed, typename C>
AIT_INLINE void pack_panels(const C* source, int64_t stride, int64_t depth, int64_t columns,
                            C* packed, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t column = panel * kPanel<C>;
    const int64_t width = packed_columns<C>(column, columns);
    const int64_t rest = columns - column < width ? columns - column : width;
    C* target = packed + column * depth;
    for (int64_t row = 0; row < depth; ++row, target += width) {
      for (int64_t i = 0; i < rest; ++i) {
        target[i] =
            transposed ? source[(column + i) * stride + row] : source[row * stride + column + i];
      }
      for (int64_t i = rest; i < width; ++i) target[i] = 0;
    }
  }
}

template <typename C>
void pack(const C* source, int64_t stride, int64_t depth, int64_t columns, C* packed, int64_t begin,
          int64_t end) {
  pack_panels<false>(source, stride, depth, columns, packed, begin, end);
}

template <typename C>
void pack_transposed(const C* source, int64_t stride, int64_t depth, int64_t columns, C* packed,
                     int64_t begin, int64_t end) {
  pack_panels<true>(source, stride, depth, columns, packed, begin, end);
}

// target (rows, stride) = the rows from `first` on of source (T, width), with zeros up to the
// stride.
template <typename C, typename S>
void load_tile(const void* source, int64_t first, int64_t rows, int64_t width, C* target,
               int64_t stride) {
  using V = Vec<C>;
  const S* from = static_cast<const S*>(source) + first * width;
  for (int64_t row = 0; row < rows; ++row, from += width, target += stride) {
    int64_t e = 0;
    for (; e + V::size <= width; e += V::size) V::load(from + e).store(target + e);
    if (e < width) {
      V::load(from + e, width - e).store(target + e);
      e += V::size;
    }
    for (; e < stride; e += V::size) V::zero().store(target + e);
  }
}

// Rows of a tile in the compute type.
template <typename C>
struct Rows {
  const C* data;
  int64_t stride;
};

// The rows from `first` on of source (T, width): as they lie there, or a copy in the tile (rows,
// stride) where they must be converted. Rows that are `padded` can be read in whole panels.
template <typename C, typename S>
AIT_INLINE Rows<C> tile_rows(const void* source, int64_t first, int64_t rows, int64_t width,
                             bool padded, C* tile, int64_t stride) {
  if constexpr (__is_same(C, S)) {
    if (!padded || width % kPanel<C> == 0) {
      return {static_cast<const C*>(source) + first * width, width};
    }
  }
  load_tile<C, S>(source, first, rows, width, tile, stride);
  return {tile, stride};
}

// Memory that is read or written after a product, or after a part of one: its lines are fetched
// into the cache while that is computed, one at each step of the depth. Only a hint: lines may be
// missed.
struct Upcoming {
  const char* read = nullptr;
  int64_t read_lines = 0;
  const char* write = nullptr;
  int64_t write_lines = 0;

  AIT_INLINE void fetch(int64_t step) const {
    if (step < read_lines) __builtin_prefetch(read + step * kLine, 0, 2);
    if (step < write_lines) __builtin_prefetch(write + step * kLine, 1, 2);
  }
};

struct NothingUpcoming {
  AIT_INLINE NothingUpcoming operator()(int64_t, int64_t) const { return {}; }
  AIT_INLINE void fetch(int64_t) const {}
};

// Rows one after another in memory, to be fetched during a product of as many rows.
struct Stretch {
  const char* data = nullptr;
  int64_t rows = 0;
  int64_t row_bytes = 0;

  // The first or second half of it, as rows of half the bytes.
  Stretch half(int64_t which) const {
    return {data + which * rows * (row_bytes / 2), rows, row_bytes / 2};
  }
};

// Calls visit(sum, r, v) for a tile of registers. Unrolled: a loop would put the tile into memory.
template <int rows, int vectors, typename V, typename Visit>
AIT_INLINE void for_each_sum(V (&sums)[rows][vectors], Visit visit) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) visit(sums[r][v], r, v);
  }
}

// sums[r][v] += sum over d of a[r * row_stride + d * depth_stride] * panel[d * panel_stride + v].
// Three rows share a pointer, one, two and no strides away: so all addresses stay in registers.
template <int rows, int vectors, typename C, typename Next>
AIT_INLINE void multiply_add(const C* a, int64_t row_stride, int64_t depth_stride, const C* panel,
                             int64_t panel_stride, int64_t depth, Vec<C> (&sums)[rows][vectors],
                             Next next) {
  using V = Vec<C>;
  constexpr int groups = (rows + 2) / 3;
  const C* group[groups];
#pragma GCC unroll 4
  for (int i = 0; i < groups; ++i) group[i] = a + 3 * i * row_stride;
  for (int64_t d = 0; d < depth; ++d) {
    next.fetch(d);
    V b[vectors];
    for (int v = 0; v < vectors; ++v) b[v] = V::load(panel + v * V::size);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const V factor = V::broadcast(group[r / 3][r % 3 * row_stride]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[r][v] = fmadd(factor, b[v], sums[r][v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < groups; ++i) group[i] += depth_stride;
    panel += panel_stride;
  }
}

template <int n>
struct Constant {
  static constexpr int value = n;
};

// Calls run(first row, Constant<number of rows>) for blocks of rows, each a tile of registers.
template <typename Run>
AIT_INLINE void for_each_block(int64_t rows, Run run) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) run(row, Constant<kRows>{});
  if constexpr (kRows > 8) {
    for (; row + 8 <= rows; row += 8) run(row, Constant<8>{});
  }
  if constexpr (kRows > 4) {
    for (; row + 4 <= rows; row += 4) run(row, Constant<4>{});
  }
  for (; row < rows; ++row) run(row, Constant<1>{});
}

// The product of `rows` rows of a and one panel; only the first `columns` columns are written.
template <int rows, int vectors, typename C, typename S, typename Next>
AIT_INLINE void multiply_block(const C* a, int64_t a_stride, const C* panel, int64_t depth,
                               int64_t columns, Next next, S* out, int64_t out_stride) {
  using V = Vec<C>;
  V sums[rows][vectors];
  for_each_sum(sums, [](V& sum, int, int) { sum = V::zero(); });
  multiply_add(a, a_stride, 1, panel, vectors * V::size, depth, sums, next);
  if (columns >= vectors * V::size) {
    for_each_sum(sums, [&](V& sum, int r, int v) __attribute__((always_inline)) {
      sum.store(out + r * out_stride + v * V::size);
    });
    return;
  }
  for_each_sum(sums, [&](V& sum, int r, int v) __attribute__((always_inline)) {
    const int64_t rest = columns - v * V::size;
    S* target = out + r * out_stride + v * V::size;
    if (rest >= V::size) {
      sum.store(target);
    } else if (rest > 0) {
      sum.store(target, rest);
    }
  });
}

// out (rows, columns) = a (rows, depth) times a packed matrix, rounded to storage type S. Columns
// from `written` on are left alone; before it, what fills up the last panel becomes 0.
// upcoming(row, column) says what the block of rows and columns that begins there fetches.
template <typename C, typename S, typename Next>
AIT_INLINE void multiply_packed(const C* a, int64_t a_stride, int64_t rows, const C* packed,
                                int64_t depth, int64_t columns, int64_t written, Next upcoming,
                                S* out, int64_t out_stride) {
  const auto panel = [=](int64_t column, auto vectors) {
    for_each_block(rows, [=](int64_t row, auto block) {
      multiply_block<block.value, vectors.value>(
          a + row * a_stride, a_stride, packed + column * depth, depth, written - column,
          upcoming(row, column), out + row * out_stride + column, out_stride);
    });
  };
  for (int64_t column = 0; column < columns; column += kPanel<C>) {
    if (packed_columns<C>(column, columns) < kPanel<C>) {
      panel(column, Constant<1>{});
    } else {
      panel(column, Constant<2>{});
    }
  }
}

template <typename C>
void multiply(const C* a, int64_t a_stride, int64_t rows, const C* packed, int64_t depth,
              int64_t columns, C* out, int64_t out_stride) {
  multiply_packed(a, a_stride, rows, packed, depth, columns, out_stride, NothingUpcoming{}, out,
                  out_stride);
}

// The logits of a tile of states: the same, while `behind` is fetched.
template <typename C>
void multiply_states(const HopfieldPatterns<C>& p, Rows<C> states, int64_t rows, Stretch behind,
                     C* logits) {
  const auto upcoming = [=](int64_t row, int64_t column) {
    const int64_t lines = column == 0 ? kRows * behind.row_bytes / kLine : 0;
    return Upcoming{behind.data + row * behind.row_bytes, lines};
  };
  multiply_packed(states.data, states.stride, rows, p.transposed, p.width, p.num_patterns,
                  p.pattern_stride, upcoming, logits, p.pattern_stride);
}

// A product rounded to storage type S; touches no element beyond the columns. A few rows at a time
// are written from end to end: writes that jump from row to row cost more than reading the packed
// matrix again. Meanwhile `behind` is fetched, and the rows of `out` that are written next; behind
// the last of these rows, too, if more follow.
template <typename C, typename S>
void multiply_to_storage(const C* a, int64_t a_stride, int64_t rows, const C* packed, int64_t depth,
                         int64_t columns, Stretch behind, bool more_rows, S* out) {
  if (columns == 0) return;
  const int64_t panels = (columns + kPanel<C> - 1) / kPanel<C>;
  const int64_t read_lines = kRows * behind.row_bytes / (panels * kLine);
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t block = rows - first < kRows ? rows - first : kRows;
    const char* read = behind.data + first * behind.row_bytes;
    const bool more = more_rows || first + block < rows;
    const int64_t write_lines = more ? kRows * kPanel<C> * int64_t(sizeof(S)) / kLine : 0;
    const char* write = reinterpret_cast<const char*>(out + (first + block) * columns);
    const auto upcoming = [=](int64_t, int64_t column) {
      const int64_t panel = column / kPanel<C>;
      return Upcoming{read + panel * read_lines * kLine, read_lines,
                      write + panel * write_lines * kLine, write_lines};
    };
    multiply_packed(a + first * a_stride, a_stride, block, packed, depth, columns, columns,
                    upcoming, out + first * columns, columns);
  }
}

// target (rows, columns) += a^T b for a (depth, rows) and b (depth, columns), while `behind` is
// fetched; the rows of b and target are padded to whole panels.
template <typename C>
void add_outer(const C* a, int64_t a_stride, const C* b, int64_t b_stride, int64_t depth,
               int64_t rows, int64_t columns, C* target, int64_t target_stride,
               Stretch behind = {}) {
  using V = Vec<C>;
  const int64_t panels = (columns + kPanel<C> - 1) / kPanel<C>;
  const int64_t lines = panels > 0 ? behind.rows * behind.row_bytes / (panels * kLine) : 0;
  for (int64_t column = 0; column < columns; column += kPanel<C>) {
    const char* read = behind.data + column / kPanel<C> * lines * kLine;
    for_each_block(rows, [&](int64_t row, auto block) {
      const int64_t line = lines * row / rows, next_line = lines * (row + block.value) / rows;
      V sums[block.value][2];
      C* at = target + row * target_stride + column;
      for_each_sum(
          sums, [&](V& sum, int r, int v) { sum = V::load(at + r * target_stride + v * V::size); });
      multiply_add(a + row, 1, a_stride, b + column, b_stride, depth, sums,
                   Upcoming{read + line * kLine, next_line - line});
      for_each_sum(sums,
                   [&](V& sum, int r, int v) { sum.store(at + r * target_stride + v * V::size); });
    });
  }
}

// product = in P P^T for weights `in` (rows, M), through the Gram matrix or through states.
template <typename C>
void multiply_gram(const HopfieldPatterns<C>& p, const C* in, int64_t rows, C* moved, C* product) {
  const int64_t stride = p.pattern_stride, patterns = p.num_patterns;
  if (p.gram != nullptr) {
    multiply(in, stride, rows, p.gram, patterns, patterns, product, stride);
    return;
  }
  multiply(in, stride, rows, p.packed, patterns, p.width, moved, p.width_stride);
  multiply(moved, p.width_stride, rows, p.transposed, p.width, patterns, product, stride);
}

// weights = softmax(beta logits) of one token. Both have room for whole vectors; the weights there
// become 0.
template <typename C>
AIT_INLINE SoftmaxSum<C> softmax(const C* logits, C beta, int64_t patterns, C* weights) {
  using V = Vec<C>;
  const V betas = V::broadcast(beta);
  const int64_t whole = patterns / V::size * V::size, rest = patterns - whole;
  V largest = V::broadcast(-INFINITY);
  for (int64_t m = 0; m < whole; m += V::size) {
    const V scaled = V::load(logits + m) * betas;
    scaled.store(weights + m);
    largest = max(scaled, largest);
  }
  if (rest > 0) {
    (V::load(logits + whole) * betas).store(weights + whole);
    for (int64_t m = patterns; m < whole + V::size; ++m) weights[m] = -INFINITY;
    largest = max(V::load(weights + whole), largest);
  }
  const C maximum = reduce_max(largest);
  const V shift = V::broadcast(maximum);
  V total = V::zero();
  for (int64_t m = 0; m < patterns; m += V::size) {
    const V power = exp(V::load(weights + m) - shift);
    power.store(weights + m);
    total += power;
  }
  const C sum = reduce_add(total);
  const V inverse = V::broadcast(C(1) / sum);
  for (int64_t m = 0; m < patterns; m += V::size) {
    (V::load(weights + m) * inverse).store(weights + m);
  }
  return {maximum, sum};
}

// The same for the rows of a tile, and with the same bits: where the patterns fill whole vectors,
// as many tokens at a time as a vector has lanes, so that none needs a reduction of its own. `sums`
// may be null.
template <typename C>
void softmax_rows(const C* logits, int64_t stride, int64_t rows, C beta, int64_t patterns,
                  C* weights, SoftmaxSum<C>* sums) {
  using V = Vec<C>;
  constexpr int size = V::size;
  const V betas = V::broadcast(beta);
  int64_t first = 0;
  for (; patterns % size == 0 && first + size <= rows; first += size) {
    const C* in = logits + first * stride;
    C* out = weights + first * stride;
    V parts[size];
    C maxima[size], totals[size], inverses[size];
#pragma GCC unroll 16
    for (int r = 0; r < size; ++r) {
      parts[r] = V::broadcast(-INFINITY);
      for (int64_t m = 0; m < patterns; m += size) {
        parts[r] = max(V::load(in + r * stride + m) * betas, parts[r]);
      }
    }
    reduce_each(parts, [](V a, V b) __attribute__((always_inline)) {
      return max(a, b);
    }).store(maxima);
#pragma GCC unroll 16
    for (int r = 0; r < size; ++r) {
      const V shift = V::broadcast(maxima[r]);
      parts[r] = V::zero();
      for (int64_t m = 0; m < patterns; m += size) {
        const V power = exp(V::load(in + r * stride + m) * betas - shift);
        power.store(out + r * stride + m);
        parts[r] += power;
      }
    }
    const V total =
        reduce_each(parts, [](V a, V b) __attribute__((always_inline)) { return a + b; });
    total.store(totals);
    (V::broadcast(C(1)) / total).store(inverses);
    for (int r = 0; r < size; ++r) {
      const V inverse = V::broadcast(inverses[r]);
      for (int64_t m = 0; m < patterns; m += size) {
        (V::load(out + r * stride + m) * inverse).store(out + r * stride + m);
      }
    }
    for (int r = 0; sums != nullptr && r < size; ++r) sums[first + r] = {maxima[r], totals[r]};
  }
  for (; first < rows; ++first) {
    const SoftmaxSum<C> sum =
        softmax(logits + first * stride, beta, patterns, weights + first * stride);
    if (sums != nullptr) sums[first] = sum;
  }
}

// logsumexp(beta logits) of one token: infinite where the largest is, unless one is NaN.
template <typename C>
C log_sum_exp(SoftmaxSum<C> softmax, const C* logits, C beta, int64_t patterns) {
  const bool infinite = softmax.maximum == INFINITY || softmax.maximum == -INFINITY;
  bool any_nan = false;
  for (int64_t m = 0; infinite && m < patterns; ++m) any_nan |= std::isnan(beta * logits[m]);
  return infinite && !any_nan ? softmax.maximum : softmax.maximum + C(std::log(softmax.sum));
}

// Sum of a[i] b[i].
template <typename C>
AIT_INLINE C dot(const C* a, const C* b, int64_t n) {
  using V = Vec<C>;
  V sum = V::zero();
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) sum = fmadd(V::load(a + i), V::load(b + i), sum);
  if (i < n) sum = fmadd(V::load(a + i, n - i), V::load(b + i, n - i), sum);
  return reduce_add(sum);
}

// Sum of (a[i] - b[i])^2.
template <typename C>
AIT_INLINE C squared_distance(const C* a, const C* b, int64_t n) {
  using V = Vec<C>;
  V sum = V::zero();
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) {
    const V difference = V::load(a + i) - V::load(b + i);
    sum = fmadd(difference, difference, sum);
  }
  if (i < n) {
    const V difference = V::load(a + i, n - i) - V::load(b + i, n - i);
    sum = fmadd(difference, difference, sum);
  }
  return reduce_add(sum);
}

template <typename C>
AIT_INLINE void copy(const C* from, int64_t n, C* to) {
  std::memcpy(to, from, size_t(n) * sizeof(C));
}

// A square that rounding may have made a little negative; NaN stays NaN.
template <typename C>
AIT_INLINE C root(C square) {
  return square < 0 ? C(0) : C(std::sqrt(square));
}

}  // namespace
}  // namespace ait::cpu
