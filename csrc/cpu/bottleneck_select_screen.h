// One task of bottleneck_select in float32, screened: products of BFloat16, many times as fast as
// those of float32, say of almost all logits that they are too small to be selected; the others are
// computed in float32. Included by bottleneck_select_bf16_kernel.cpp alone.
//
// With q = a + b and x = c + d, where a and c are rounded to BFloat16, q.x and a.c differ by b.x +
// a.d, so by at most |b| |x| + |a| |d|; to that come the roundings of both sums. So no logit is
// left out that could be selected: the selection is that of the logits in float32. Each of these is
// one sum a lane, in ascending order, and then the sum of the lanes: the same bits wherever and
// with whatever others it is computed.
#pragma once

#include <cpu/bottleneck_select_scan.h>

namespace ait::cpu {
namespace {

// Logits that are computed at once, of one token: enough sums to hide the latency of fmadd.
constexpr int kExactRows = 8;
// How much of the width is multiplied at a time.
constexpr int64_t kScreenDepth = 256;
// So many times k tokens are looked at first, for a threshold to begin with.
constexpr int64_t kSample = 8;

// Of a token, and of what rounding it to BFloat16 leaves.
struct Lengths {
  float whole;
  float rest;
};

// Added to lengths that may be smaller: numbers below this, the smallest normal one, have few
// digits, or are zero where the user has them flushed.
constexpr double kSmallestLength = 0x1p-126;

template <typename S>
struct ScreenBuffers : ScanBuffers<float, BFloat16> {
  ScreenBuffers(const SelectProblem& problem, int64_t num_rows, Arena& arena)
      : ScanBuffers<float, BFloat16>(problem, num_rows, arena),
        padded_tokens(round_up(problem.tile_tokens, kStepTokens)),
        words((padded_rows + 31) / 32),
        sources(arena.take<const S*>(padded_tokens)),
        lengths(arena.take<Lengths>(padded_tokens)),
        query_reach(arena.take<float>(padded_rows)),
        query_rounded(arena.take<float>(padded_rows)),
        query_rest(arena.take<float>(padded_rows)),
        logits(arena.take<float>(padded_tokens * padded_rows)),
        passing(arena.take<uint32_t>(padded_tokens * words)),
        reached(arena.take<float>(num_rows)),
        rows(arena.take<int32_t>(padded_rows + kExactRows)) {}

  int64_t padded_tokens, words;
  const S** sources;     // where the tokens of the tile are
  Lengths* lengths;      // and how long
  float* query_reach;    // four times the length of each row's q
  float* query_rounded;  // that of q rounded to BFloat16
  float* query_rest;     // and that of what rounding leaves
  float* logits;         // (panels, tokens, rows of the panel), from products of BFloat16
  uint32_t* passing;     // (tokens, words): one bit a row
  float* reached;        // by k logits of the first few tokens, for each row; -inf if by fewer
  int32_t* rows;         // those of one token that pass
};

template <typename S>
class Screen {
 public:
  static constexpr int kLanes = Vec<float>::size;
  static constexpr int kPanelRows = kPanelVectors * kLanes;
  static_assert(kPanelRows == 32);

  Screen(const SelectProblem& problem, const SelectTask& task,
         const SelectCandidates<float>& candidates, Arena arena)
      : problem_(problem),
        task_(task),
        buffers_(problem, task.num_rows, arena),
        lists_(problem, task, candidates, arena),
        prefetcher_(problem, task),
        query_(static_cast<const float*>(problem.query) +
               (task.group * problem.num_rows + task.first_row) * problem.width),
        rounding_(float((3.1 * double(problem.width) + 16) * 0x1p-26)),
        slack_(float(problem.width) * 0x1p-124f) {}

  SelectStatistics run() {
    take_tile_registers();
    pack_query(problem_, task_, buffers_);
    measure_rows();
    lists_.open();
    find_first_thresholds();
    for (int64_t token = task_.first_token; token < task_.last_token && lists_.any_open();) {
      token = load_tile(token);
      const int64_t passing =
          for_each_product(token, [&]<int kVectors>(const float* logits, int64_t t, int64_t row) {
            return mark_passing<kVectors>(logits, t, row);
          });
      lists_.statistics().logits_let_through += passing;
      // Where many pass, a row is taken from the cache for several tokens.
      if (passing > tile_size_ * task_.num_rows / 3) {
        ++lists_.statistics().crowded_tiles;
        select_row_by_row();
      } else if (passing > 0) {
        select_token_by_token();
      }
    }
    lists_.close();
    release_tile_registers();
    return lists_.statistics();
  }

 private:
  // A thousandth is added for the roundings of the lengths, those of tokens included.
  void measure_rows() {
    const auto at_least = [](double square) {
      return float(1.001 * std::sqrt(square) + kSmallestLength);
    };
    for (int64_t row = 0; row < buffers_.padded_rows; ++row) {
      double whole = 0, rounded = 0, rest = 0;
      for (int64_t i = 0; row < task_.num_rows && i < problem_.width; ++i) {
        const float q = query_[row * problem_.width + i], a = product_operand(to_bfloat16(q));
        whole += double(q) * q;
        rounded += double(a) * a;
        rest += (double(q) - a) * (double(q) - a);
      }
      buffers_.query_reach[row] = 4 * at_least(whole);
      buffers_.query_rounded[row] = at_least(rounded);
      buffers_.query_rest[row] = at_least(rest);
    }
  }

  // How far the approximate logits of a vector of rows may be off for a token of these lengths.
  // The roundings of both sums come to at most 2^-24 of the lengths' product for each of d
  // multiply-adds in float32 and 2 d in BFloat16, and for a few more. NaN where sums of
  // products might overflow on the way: then they say nothing.
  AIT_INLINE Vec<float> most_off(int64_t row, Lengths token) const {
    using V = Vec<float>;
    const V whole = V::broadcast(token.whole), rest = V::broadcast(token.rest);
    const V reach = V::load(buffers_.query_reach + row) * whole;
    V off = fmadd(V::load(buffers_.query_rest + row), whole, V::broadcast(slack_));
    off = fmadd(V::load(buffers_.query_rounded + row), rest, off);
    off = fmadd(reach, V::broadcast(rounding_), off);
    return fmadd(reach, V::zero(), off);
  }

  // Products of BFloat16 take subnormal numbers for 0.
  static AIT_INLINE float product_operand(BFloat16 x) {
    const float value = to_float(x);
    return value < 0x1p-126f && value > -0x1p-126f ? 0 : value;
  }

  // Makes a tile of the unmasked tokens from `token` on; returns the token after the last of them.
  int64_t load_tile(int64_t token) {
    const S* tokens = static_cast<const S*>(problem_.tokens) + first_element(problem_, task_);
    const int64_t stride = buffers_.copy_stride, width = buffers_.padded_width;
    int64_t n = 0;
    for (; token < task_.last_token && n < problem_.tile_tokens; ++token) {
      if (problem_.mask != nullptr && problem_.mask[token]) continue;
      const S* source = tokens + token * problem_.token_stride;
      buffers_.sources[n] = source;
      buffers_.lengths[n] = round_token(source, buffers_.copied_tokens + n * stride);
      buffers_.tile_tokens[n++] = int32_t(token);
    }
    tile_size_ = n;
    for (; n < round_up(tile_size_, kStepTokens); ++n) {
      std::memset(buffers_.copied_tokens + n * stride, 0, size_t(width) * sizeof(BFloat16));
    }
    ++lists_.statistics().tiles_copied;
    return token;
  }

  Lengths round_token(const S* source, BFloat16* rounded) const {
    using V = Vec<float>;
    V whole = V::zero(), rest = V::zero();
    for (int64_t i = 0; i < buffers_.padded_width; i += kLanes) {
      const int64_t left = problem_.width - i;
      const V x = left >= kLanes ? V::load(source + i)
                  : left > 0     ? V::load(source + i, left)
                                 : V::zero();
      const V difference = x - store_as_operand(x, rounded + i);
      whole = fmadd(x, x, whole);
      rest = fmadd(difference, difference, rest);
    }
    const float square = reduce_add(whole);
    if (square < 1e-24f) return lengths_of_small(source, rounded);
    return {std::sqrt(square), std::sqrt(reduce_add(rest))};
  }

  // Of a token whose squares may be lost in float.
  __attribute__((noinline)) Lengths lengths_of_small(const S* source,
                                                     const BFloat16* rounded) const {
    double whole = 0, rest = 0;
    for (int64_t i = 0; i < problem_.width; ++i) {
      const double x = convert<float>(source[i]), difference = x - product_operand(rounded[i]);
      whole += x * x;
      rest += difference * difference;
    }
    return {float(std::sqrt(whole) + kSmallestLength), float(std::sqrt(rest) + kSmallestLength)};
  }

  // Calls visit<vectors>(logits, first token of the tile, first row) for the approximate logits of
  // all steps and panels, and adds up what it returns. Asks for the tokens from `next` on.
  template <typename Visit>
  int64_t for_each_product(int64_t next, Visit visit) {
    if (tile_size_ == 0) return 0;
    const int64_t steps = round_up(tile_size_, kStepTokens) / kStepTokens;
    const int64_t panels = (task_.num_rows + kPanelRows - 1) / kPanelRows;
    prefetcher_.start(next, smaller(problem_.tile_tokens, task_.last_token - next),
                      panels * steps * (buffers_.padded_width / kFetchWidth<BFloat16>)*2);
    // A part of the depth at a time, so that the tokens' stays in the first-level cache.
    int64_t sum = 0, end = 0;
    for (int64_t begin = 0; begin < buffers_.padded_width; begin = end) {
      end = smaller(begin + kScreenDepth, buffers_.padded_width);
      float* logits = buffers_.logits;
      for (int64_t row = 0; row < task_.num_rows; row += kPanelRows) {
        const auto product = [&]<int kVectors>() {
          for (int64_t t = 0; t < tile_size_; t += kStepTokens) {
            multiply_tiles<kVectors>(buffers_.panels + row * buffers_.padded_width,
                                     buffers_.copied_tokens + t * buffers_.copy_stride,
                                     buffers_.copy_stride, begin, end, prefetcher_, logits);
            if (end == buffers_.padded_width) {
              sum += visit.template operator()<kVectors>(logits, t, row);
            }
            logits += kStepTokens * kVectors * kLanes;
          }
        };
        if (task_.num_rows - row > kLanes) {
          product.template operator()<kPanelVectors>();
        } else {
          product.template operator()<1>();
        }
      }
    }
    return sum;
  }

  // Selects among the approximate logits of the first few tokens. Less what these may be off, the
  // smallest selected is what k logits reach.
  void find_first_thresholds() {
    const int64_t sample = kSample * problem_.k;
    if (task_.last_token - task_.first_token < 2 * sample) return;
    Lengths longest{0, 0};
    int64_t seen = 0;
    for (int64_t token = task_.first_token; token < task_.last_token && seen < sample;) {
      token = load_tile(token);
      seen += tile_size_;
      for (int64_t t = 0; t < tile_size_; ++t) {
        const Lengths& lengths = buffers_.lengths[t];
        if (!(lengths.whole < INFINITY && lengths.rest < INFINITY)) return lists_.open();
        longest = {larger(longest.whole, lengths.whole), larger(longest.rest, lengths.rest)};
      }
      for_each_product(token, [&]<int kVectors>(const float* logits, int64_t t, int64_t row) {
        const int64_t n = smaller(kStepTokens, tile_size_ - t);
        if (lists_.fit_uncut(row)) {
          lists_.template fill<kVectors>(logits, kVectors * kLanes, buffers_.tile_tokens + t, n,
                                         row);
        } else {
          lists_.template filter<kVectors>(logits, buffers_.tile_tokens + t, n, row);
        }
        return int64_t{0};
      });
    }
    for (int64_t row = 0; row < task_.num_rows; ++row) {
      buffers_.reached[row] = -INFINITY;
      if (lists_[row].count < problem_.k) continue;
      float off[kLanes];
      most_off(row / kLanes * kLanes, longest).store(off);
      const float smallest = to_logit<float>(lists_.cut(row, problem_.k));
      buffers_.reached[row] = float(double(smallest) - off[row % kLanes]);
    }
    lists_.open();
    for (int64_t row = 0; row < task_.num_rows; ++row) {
      // Just below it, since its equals are selected, too.
      const float threshold = __builtin_nextafterf(buffers_.reached[row], -INFINITY);
      if (threshold > -INFINITY) lists_.raise_threshold(row, to_key(threshold));
    }
  }

  static AIT_INLINE float larger(float a, float b) { return a > b ? a : b; }

  // Marks the rows for which a token may pass, and returns how many there are.
  template <int kVectors>
  int64_t mark_passing(const float* logits, int64_t t, int64_t row) {
    using V = Vec<float>;
    V thresholds[kVectors];
    for (int v = 0; v < kVectors; ++v)
      thresholds[v] = V::load(lists_.thresholds() + row + v * kLanes);
    const uint32_t open = uint32_t(lists_.template open_rows<kVectors * kLanes>(row));
    uint32_t* passing = buffers_.passing + t * buffers_.words + row / kPanelRows;
    int64_t count = 0;
    for (int64_t i = 0; i < smaller(kStepTokens, tile_size_ - t); ++i) {
      uint32_t bits = 0;
      for (int v = 0; v < kVectors; ++v) {
        const V approximate = V::load(logits + (i * kVectors + v) * kLanes);
        const V most = approximate + most_off(row + v * kLanes, buffers_.lengths[t + i]);
        bits |= not_less_equal_mask(most, thresholds[v]) << v * kLanes;
      }
      passing[i * buffers_.words] = bits &= open;
      count += __builtin_popcount(bits);
    }
    return count;
  }

  void select_token_by_token() {
    for (int64_t t = 0; t < tile_size_; ++t) {
      const uint32_t* passing = buffers_.passing + t * buffers_.words;
      int64_t n = 0;
      for (int64_t word = 0; word < buffers_.words; ++word) {
        for (uint32_t bits = passing[word]; bits != 0; bits &= bits - 1) {
          buffers_.rows[n++] = int32_t(word * 32 + __builtin_ctz(bits));
        }
      }
      for (int64_t i = 0; i < n; i += kExactRows) {
        select(t, buffers_.rows + i, smaller(kExactRows, n - i));
      }
    }
  }

  void select_row_by_row() {
    static_assert(32 % kExactRows == 0);
    for (int64_t row = 0; row < task_.num_rows; row += kExactRows) {
      for (int64_t t = 0; t < tile_size_; ++t) {
        const uint32_t word = buffers_.passing[t * buffers_.words + row / 32];
        int32_t rows[kExactRows];
        int64_t n = 0;
        for (uint32_t bits = word >> row % 32 & ((1u << kExactRows) - 1); bits; bits &= bits - 1) {
          rows[n++] = int32_t(row + __builtin_ctz(bits));
        }
        if (n > 0) select(t, rows, n);
      }
    }
  }

  // Appends the logits of a token for `n` rows, one to kExactRows.
  AIT_INLINE void select(int64_t t, const int32_t* rows, int64_t n) {
    prefetcher_.step();
    const float* queries[kExactRows];
    for (int64_t i = 0; i < kExactRows; ++i) {
      queries[i] = query_ + rows[i < n ? i : n - 1] * problem_.width;
    }
    float logits[kExactRows];
    multiply_exactly(queries, buffers_.sources[t], problem_.width, logits);
    for (int64_t i = 0; i < n; ++i) {
      lists_.append(rows[i], logits[i], buffers_.tile_tokens[t]);
    }
  }

  __attribute__((noinline)) static void multiply_exactly(const float* const* queries,
                                                         const S* token, int64_t width,
                                                         float* logits) {
    using V = Vec<float>;
    V sums[kExactRows];
#pragma GCC unroll 8
    for (int i = 0; i < kExactRows; ++i) sums[i] = V::zero();
    int64_t e = 0;
    for (; e + kLanes <= width; e += kLanes) {
      const V x = V::load(token + e);
#pragma GCC unroll 8
      for (int i = 0; i < kExactRows; ++i) sums[i] = fmadd(V::load(queries[i] + e), x, sums[i]);
    }
    if (e < width) {
      const V x = V::load(token + e, width - e);
#pragma GCC unroll 8
      for (int i = 0; i < kExactRows; ++i) {
        sums[i] = fmadd(V::load(queries[i] + e, width - e), x, sums[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kExactRows; ++i) logits[i] = reduce_add(sums[i]);
  }

  const SelectProblem& problem_;
  const SelectTask& task_;
  const ScreenBuffers<S> buffers_;
  RowLists<float> lists_;
  Prefetcher prefetcher_;
  const float* const query_;  // (rows of the block, d)
  const float rounding_;      // see most_off()
  const float slack_;         // for products and sums below the normal range
  int64_t tile_size_ = 0;
};

inline int64_t screen_scratch_bytes(const SelectProblem& problem, int64_t num_rows) {
  Arena arena{nullptr};
  const SelectTask task{0, 0, num_rows, 0, 0, 0};
  const SelectCandidates<float> candidates{};
  ScreenBuffers<float>(problem, num_rows, arena);
  RowLists<float>(problem, task, candidates, arena);
  return arena.used;
}

inline SelectStatistics screen(const SelectProblem& problem, const SelectTask& task,
                               const SelectCandidates<float>& candidates, void* scratch) {
  const Arena arena{static_cast<char*>(scratch)};
  switch (problem.token_storage) {
    case Storage::bfloat16:
      return Screen<BFloat16>(problem, task, candidates, arena).run();
    case Storage::float16:
      return Screen<Float16>(problem, task, candidates, arena).run();
    default:
      return Screen<float>(problem, task, candidates, arena).run();
  }
}

// A tile is held twice, as it is and rounded.
constexpr SelectKernels<float> kScreenKernels = {
    .rows_per_panel = Screen<float>::kPanelRows,
    .tokens_per_step = kStepTokens,
    .element_size = sizeof(float) + sizeof(BFloat16),
    .load_cost = 48,
    .entry_cost = 8,
    .spare_share = 2,
    .scratch_bytes = screen_scratch_bytes,
    .scan = screen,
    .collect = collect<float>,
};

}  // namespace
}  // namespace ait::cpu
