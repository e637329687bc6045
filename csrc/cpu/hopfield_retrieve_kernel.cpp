#include "hopfield_retrieve_kernel.h"

#include <common/simd.h>

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

// ---- Packing ------------------------------------------------------------------------------------

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

// ---- Products -----------------------------------------------------------------------------------

// What is read after a product, fetched into the cache line by line while that is computed.
struct Upcoming {
  const char* rows;
  int64_t row_bytes;

  AIT_INLINE void fetch(int64_t row, int64_t line) const {
    __builtin_prefetch(rows + row * row_bytes + line * 64, 0, 2);
  }
};

struct NothingUpcoming {
  AIT_INLINE void fetch(int64_t, int64_t) const {}
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
template <int rows, int vectors, typename C, typename Next>
AIT_INLINE void multiply_add(const C* a, int64_t row_stride, int64_t depth_stride, const C* panel,
                             int64_t panel_stride, int64_t depth, Vec<C> (&sums)[rows][vectors],
                             int64_t first_row, Next next) {
  using V = Vec<C>;
  for (int64_t d = 0; d < depth; ++d) {
    next.fetch(first_row, d);
    V b[vectors];
    for (int v = 0; v < vectors; ++v) b[v] = V::load(panel + v * V::size);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const V factor = V::broadcast(a[r * row_stride]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[r][v] = fmadd(factor, b[v], sums[r][v]);
    }
    a += depth_stride;
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

// store(row, column, vector) for the product of a (rows, depth) and a packed matrix.
template <typename C, typename Next, typename Store>
AIT_INLINE void multiply_packed(const C* a, int64_t a_stride, int64_t rows, const C* packed,
                                int64_t depth, int64_t columns, Next next, Store store) {
  using V = Vec<C>;
  const auto panel = [&](int64_t column, auto vectors, auto upcoming) {
    for_each_block(rows, [&](int64_t row, auto block) {
      V sums[block.value][vectors.value];
      for_each_sum(sums, [](V& sum, int, int) { sum = V::zero(); });
      multiply_add(a + row * a_stride, a_stride, 1, packed + column * depth,
                   vectors.value * V::size, depth, sums, row, upcoming);
      for_each_sum(sums, [&](V& sum, int r, int v) __attribute__((always_inline)) {
        store(row + r, column + v * V::size, sum);
      });
    });
  };
  for (int64_t column = 0; column < columns; column += kPanel<C>) {
    if (packed_columns<C>(column, columns) < kPanel<C>) {
      panel(column, Constant<1>{}, next);
    } else if (column == 0) {
      panel(column, Constant<2>{}, next);
    } else {
      panel(column, Constant<2>{}, NothingUpcoming{});
    }
  }
}

template <typename C>
void multiply(const C* a, int64_t a_stride, int64_t rows, const C* packed, int64_t depth,
              int64_t columns, C* out, int64_t out_stride) {
  multiply_packed(a, a_stride, rows, packed, depth, columns, NothingUpcoming{},
                  [&](int64_t row, int64_t column, Vec<C> sum) __attribute__((always_inline)) {
                    sum.store(out + row * out_stride + column);
                  });
}

// The logits of a tile of states: the same, while the states of the next tile are fetched.
template <typename C>
void multiply_states(const HopfieldPatterns<C>& p, const C* states, int64_t rows, Upcoming next,
                     C* logits) {
  multiply_packed(states, p.width_stride, rows, p.transposed, p.width, p.num_patterns, next,
                  [&](int64_t row, int64_t column, Vec<C> sum) __attribute__((always_inline)) {
                    sum.store(logits + row * p.pattern_stride + column);
                  });
}

// A product rounded to storage type S; touches no element beyond the columns. A few rows at a time
// are written from end to end: writes that jump from row to row cost more than reading the packed
// matrix again.
template <typename C, typename S>
void multiply_to_storage(const C* a, int64_t a_stride, int64_t rows, const C* packed, int64_t depth,
                         int64_t columns, S* out) {
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t block = rows - first < kRows ? rows - first : kRows;
    S* block_out = out + first * columns;
    multiply_packed(a + first * a_stride, a_stride, block, packed, depth, columns,
                    NothingUpcoming{},
                    [&](int64_t row, int64_t column, Vec<C> sum) __attribute__((always_inline)) {
                      const int64_t rest = columns - column;
                      S* target = block_out + row * columns + column;
                      if (rest >= Vec<C>::size) {
                        sum.store(target);
                      } else if (rest > 0) {
                        sum.store(target, rest);
                      }
                    });
  }
}

// target (rows, columns) += a^T b for a (depth, rows) and b (depth, columns); the rows of b and
// target are padded to whole panels.
template <typename C>
void add_outer(const C* a, int64_t a_stride, const C* b, int64_t b_stride, int64_t depth,
               int64_t rows, int64_t columns, C* target, int64_t target_stride) {
  using V = Vec<C>;
  for (int64_t column = 0; column < columns; column += kPanel<C>) {
    for_each_block(rows, [&](int64_t row, auto block) {
      V sums[block.value][2];
      C* at = target + row * target_stride + column;
      for_each_sum(
          sums, [&](V& sum, int r, int v) { sum = V::load(at + r * target_stride + v * V::size); });
      multiply_add(a + row, 1, a_stride, b + column, b_stride, depth, sums, row, NothingUpcoming{});
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

// ---- Rows of M weights --------------------------------------------------------------------------

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

// ---- Forward ------------------------------------------------------------------------------------

// The steps after the first, in M dimensions.
template <typename C>
void take_further_steps(const HopfieldForward<C>& a, const HopfieldForwardScratch<C>& s,
                        int64_t rows, int64_t* steps_taken) {
  const HopfieldPatterns<C>& p = a.patterns;
  const int64_t patterns = p.num_patterns, stride = p.pattern_stride;
  int64_t moving = rows;
  for (int64_t t = 0; t < rows; ++t) s.stopped[t] = false;
  if (a.tol > 0) {
    // The input need not lie among the patterns: its distance is measured in E dimensions.
    multiply(s.weights, stride, rows, p.packed, patterns, p.width, s.moved, p.width_stride);
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t at = t * p.width_stride;
      s.stopped[t] = root(squared_distance(s.moved + at, s.state + at, p.width)) < a.tol;
      moving -= s.stopped[t];
    }
  }
  for (int64_t step = 2; step <= a.steps && moving > 0; ++step) {
    multiply_gram(p, s.weights, rows, s.moved, s.logits);
    if (!(a.tol > 0)) {
      for (int64_t t = 0; t < rows; ++t) {
        softmax(s.logits + t * stride, a.beta, patterns, s.weights + t * stride);
        steps_taken[t] = step;
      }
      continue;
    }
    for (int64_t t = 0; t < rows; ++t) {
      const C* old = s.weights + t * stride;
      C* updated = s.logits + t * stride;
      softmax(updated, a.beta, patterns, updated);
      for (int64_t m = 0; m < patterns; ++m) s.change[t * stride + m] = updated[m] - old[m];
    }
    // |change P|^2 = change (P P^T) change^T.
    multiply_gram(p, s.change, rows, s.moved, s.product);
    for (int64_t t = 0; t < rows; ++t) {
      if (s.stopped[t]) continue;
      const int64_t at = t * stride;
      copy(s.logits + at, patterns, s.weights + at);
      steps_taken[t] = step;
      s.stopped[t] = root(dot(s.change + at, s.product + at, patterns)) < a.tol;
      moving -= s.stopped[t];
    }
  }
}

// The rows of a (T, width) tensor behind the tile [first, last), to be fetched; of the last tile
// itself, which costs nothing.
template <typename S>
AIT_INLINE Upcoming rows_behind(const void* source, int64_t first, int64_t last, int64_t end,
                                int64_t width) {
  const S* rows = static_cast<const S*>(source) + (last < end ? last : first) * width;
  return {reinterpret_cast<const char*>(rows), width * int64_t(sizeof(S))};
}

template <typename C, typename S>
void forward(const HopfieldForward<C>& a, const HopfieldForwardScratch<C>& s, int64_t begin,
             int64_t end) {
  const HopfieldPatterns<C>& p = a.patterns;
  const int64_t patterns = p.num_patterns, stride = p.pattern_stride;
  for (int64_t first = begin; first < end; first += a.tile) {
    const int64_t rows = end - first < a.tile ? end - first : a.tile;
    load_tile<C, S>(a.state, first, rows, p.width, s.state, p.width_stride);
    multiply_states(p, s.state, rows, rows_behind<S>(a.state, first, first + rows, end, p.width),
                    s.logits);
    for (int64_t t = 0; t < rows; ++t) {
      s.sums[t] = softmax(s.logits + t * stride, a.beta, patterns, s.weights + t * stride);
    }
    for (int64_t t = 0; t < rows; ++t) {
      a.lse[first + t] = log_sum_exp(s.sums[t], s.logits + t * stride, a.beta, patterns);
      a.steps_taken[first + t] = 1;
    }
    if (a.steps > 1) take_further_steps(a, s, rows, a.steps_taken + first);
    multiply_to_storage(s.weights, stride, rows, p.packed, patterns, p.width,
                        static_cast<S*>(a.out) + first * p.width);
  }
}

// ---- Backward -----------------------------------------------------------------------------------

// The weights of the next step of a tile.
template <typename C>
void take_step(const HopfieldBackward<C>& a, const HopfieldBackwardScratch<C>& s, int64_t rows,
               const C* weights, C* next) {
  const int64_t stride = a.patterns.pattern_stride;
  multiply_gram(a.patterns, weights, rows, s.moved, s.product);
  for (int64_t t = 0; t < rows; ++t) {
    softmax(s.product + t * stride, a.beta, a.patterns.num_patterns, next + t * stride);
  }
}

// grad_logits = beta weights (grad_weights - weights . grad_weights): through the softmax and beta.
template <typename C>
AIT_INLINE void softmax_backward(const C* weights, const C* grad_weights, C beta, int64_t patterns,
                                 C* grad_logits) {
  using V = Vec<C>;
  const V mean = V::broadcast(dot(weights, grad_weights, patterns)), betas = V::broadcast(beta);
  for (int64_t m = 0; m < patterns; m += V::size) {
    const V difference = V::load(grad_weights + m) - mean;
    (betas * (V::load(weights + m) * difference)).store(grad_logits + m);
  }
}

// From step `step` of the tokens that took it to the one before.
template <typename C>
void step_back(const HopfieldBackward<C>& a, const HopfieldBackwardScratch<C>& s, int64_t rows,
               const int64_t* steps_taken, int64_t step, const C* weights, const C* before,
               C* grad_patterns, C* grad_gram) {
  const HopfieldPatterns<C>& p = a.patterns;
  const int64_t patterns = p.num_patterns, stride = p.pattern_stride;
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t at = t * stride;
    if (steps_taken[t] == step) copy(weights + at, patterns, s.last + at);
    if (steps_taken[t] < step) {
      std::memset(s.grad_logits + at, 0, size_t(stride) * sizeof(C));
    } else {
      softmax_backward(weights + at, s.grad_weights + at, a.beta, patterns, s.grad_logits + at);
    }
  }
  multiply_gram(p, s.grad_logits, rows, s.moved, s.product);
  if (p.gram != nullptr) {
    add_outer(before, stride, s.grad_logits, stride, rows, patterns, patterns, grad_gram, stride);
  } else {
    // logits = (before P) P^T: `moved` holds grad_logits P, then before P.
    add_outer(before, stride, s.moved, p.width_stride, rows, patterns, p.width, grad_patterns,
              p.width_stride);
    multiply(before, stride, rows, p.packed, patterns, p.width, s.moved, p.width_stride);
    add_outer(s.grad_logits, stride, s.moved, p.width_stride, rows, patterns, p.width,
              grad_patterns, p.width_stride);
  }
  for (int64_t t = 0; t < rows; ++t) {
    if (steps_taken[t] >= step) copy(s.product + t * stride, patterns, s.grad_weights + t * stride);
  }
}

template <typename C, typename S>
void backward_tile(const HopfieldBackward<C>& a, const HopfieldBackwardScratch<C>& s, int64_t first,
                   int64_t rows, int64_t end, C* grad_patterns, C* grad_gram) {
  const HopfieldPatterns<C>& p = a.patterns;
  const int64_t patterns = p.num_patterns, width = p.width;
  const int64_t stride = p.pattern_stride, width_stride = p.width_stride;
  const int64_t tile = a.tile * stride;  // from one step's weights to the next's
  const int64_t* steps_taken = a.steps_taken + first;
  int64_t steps = 1;
  for (int64_t t = 0; t < rows; ++t) steps = steps_taken[t] > steps ? steps_taken[t] : steps;

  load_tile<C, S>(a.state, first, rows, width, s.state, width_stride);
  load_tile<C, S>(a.grad_out, first, rows, width, s.grad_out, width_stride);
  multiply_states(p, s.state, rows, rows_behind<S>(a.state, first, first + rows, end, width),
                  s.product);
  for (int64_t t = 0; t < rows; ++t) {
    softmax(s.product + t * stride, a.beta, patterns, s.checkpoints + t * stride);
  }
  multiply_states(p, s.grad_out, rows, rows_behind<S>(a.grad_out, first, first + rows, end, width),
                  s.grad_weights);

  // Forward to the first step of the last segment; then segment by segment back. The segments meet:
  // each holds its first step and the a.segment steps after it.
  const int64_t last_segment = (steps - 2) / a.segment;
  for (int64_t segment = 0; segment < last_segment; ++segment) {
    const C* weights = s.checkpoints + segment * tile;
    for (int64_t i = 1; i <= a.segment; ++i) {
      C* next = i == a.segment ? s.checkpoints + (segment + 1) * tile : s.segment + i % 2 * tile;
      take_step(a, s, rows, weights, next);
      weights = next;
    }
  }
  for (int64_t segment = steps > 1 ? last_segment : -1; segment >= 0; --segment) {
    const int64_t first_step = segment * a.segment + 1;
    const int64_t count = steps - first_step < a.segment ? steps - first_step : a.segment;
    copy(s.checkpoints + segment * tile, rows * stride, s.segment);
    for (int64_t i = 1; i <= count; ++i) {
      take_step(a, s, rows, s.segment + (i - 1) * tile, s.segment + i * tile);
    }
    for (int64_t i = count; i >= 1; --i) {
      step_back(a, s, rows, steps_taken, first_step + i, s.segment + i * tile,
                s.segment + (i - 1) * tile, grad_patterns, grad_gram);
    }
  }

  for (int64_t t = 0; t < rows; ++t) {
    const int64_t at = t * stride;
    const C* weights = s.checkpoints + at;
    if (steps_taken[t] == 1) copy(weights, patterns, s.last + at);
    softmax_backward(weights, s.grad_weights + at, a.beta, patterns, s.grad_logits + at);
  }
  multiply_to_storage(s.grad_logits, stride, rows, p.packed, patterns, width,
                      static_cast<S*>(a.grad_state) + first * width);
  add_outer(s.last, stride, s.grad_out, width_stride, rows, patterns, width, grad_patterns,
            width_stride);
  add_outer(s.grad_logits, stride, s.state, width_stride, rows, patterns, width, grad_patterns,
            width_stride);
}

template <typename C, typename S>
void backward(const HopfieldBackward<C>& a, const HopfieldBackwardScratch<C>& s, int64_t begin,
              int64_t end, C* grad_patterns, C* grad_gram) {
  for (int64_t first = begin; first < end; first += a.tile) {
    const int64_t rows = end - first < a.tile ? end - first : a.tile;
    backward_tile<C, S>(a, s, first, rows, end, grad_patterns, grad_gram);
  }
}

template <typename C, typename S>
constexpr HopfieldKernels<C> kernels_for() {
  return {kPanel<C>, pack<C>, pack_transposed<C>, multiply<C>, forward<C, S>, backward<C, S>};
}

}  // namespace

namespace AIT_CAPABILITY {
const HopfieldRetrieveKernels hopfield_retrieve_kernels = {
    kernels_for<float, float>(), kernels_for<double, double>(), kernels_for<float, BFloat16>(),
    kernels_for<float, Float16>()};
}  // namespace AIT_CAPABILITY

}  // namespace ait::cpu
