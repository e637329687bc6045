// Loops of bottleneck_select; compiled once for each instruction set (see csrc/README.md for what
// this file must not include).
#include <common/simd.h>
#include <cpu/bottleneck_select_kernel.h>

namespace ait::cpu {
namespace {

// A panel is two vectors of rows (one where the last panel has no more rows), and a step multiplies
// it with a few tokens: as many sums as fit the registers beside two of query and one of a token.
constexpr int kPanelVectors = 2;
#if defined(__AVX512F__)
constexpr int kStepTokens = 14;
#else
constexpr int kStepTokens = 6;
#endif

AIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

AIT_INLINE int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// ---- Loading ------------------------------------------------------------------------------------

template <typename C, typename S>
void convert_row(const S* source, int64_t n, C* row) {
  using V = Vec<C>;
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) V::load(source + i).store(row + i);
  if (i < n) V::load(source + i, n - i).store(row + i, n - i);
}

// Rounds to float, and on to the half type H unless that is float too, as torch does from double.
template <typename H, typename C>
void round_row(int64_t n, C* row) {
  using V = Vec<float>;
  for (int64_t i = 0; i < n; i += V::size) {
    const int64_t m = smaller(V::size, n - i);
    float rounded[V::size] = {};
    H half[V::size];
    for (int64_t j = 0; j < m; ++j) rounded[j] = float(row[i + j]);
    V::load(rounded).store(half);
    V::load(half).store(rounded);
    for (int64_t j = 0; j < m; ++j) row[i + j] = C(rounded[j]);
  }
}

template <typename C>
constexpr Storage kStorageOf = sizeof(C) == sizeof(double) ? Storage::float64 : Storage::float32;

// Writes the n elements of `source` that begin at `offset`, as C, rounded to `rounding`.
template <typename C>
void load_row(const void* source, Storage storage, int64_t offset, Storage rounding, int64_t n,
              C* row) {
  if constexpr (sizeof(C) == sizeof(float)) {
    if (storage == Storage::bfloat16) {
      convert_row(static_cast<const BFloat16*>(source) + offset, n, row);
    } else if (storage == Storage::float16) {
      convert_row(static_cast<const Float16*>(source) + offset, n, row);
    } else {
      convert_row(static_cast<const float*>(source) + offset, n, row);
    }
  } else {
    convert_row(static_cast<const C*>(source) + offset, n, row);
    if (rounding == Storage::float32) round_row<float>(n, row);
  }
  if (rounding == Storage::bfloat16) round_row<BFloat16>(n, row);
  if (rounding == Storage::float16) round_row<Float16>(n, row);
}

// ---- Keys ---------------------------------------------------------------------------------------

template <typename C>
constexpr SelectKey<C> kLargestKey = SelectKey<C>(~(uint64_t{1} << 63) >> (64 - 8 * sizeof(C)));
template <typename C>
constexpr SelectKey<C> kBelowAllKeys = -kLargestKey<C> - 1;

// All NaNs have the largest key, and -0 that of +0.
template <typename C>
AIT_INLINE SelectKey<C> to_key(C logit) {
  using Key = SelectKey<C>;
  if (logit != logit) return kLargestKey<C>;
  const C without_negative_zero = logit + C(0);
  Key bits;
  std::memcpy(&bits, &without_negative_zero, sizeof bits);
  return bits ^ ((bits >> (8 * sizeof(Key) - 1)) & kLargestKey<C>);
}

template <typename C>
AIT_INLINE C to_logit(SelectKey<C> key) {
  using Key = SelectKey<C>;
  if (key == kLargestKey<C>) return C(__builtin_nanf(""));
  const Key bits = key ^ ((key >> (8 * sizeof(Key) - 1)) & kLargestKey<C>);
  C logit;
  std::memcpy(&logit, &bits, sizeof logit);
  return logit;
}

// ---- Lists of candidates ------------------------------------------------------------------------

template <typename Key>
int64_t count_at_least(const Key* keys, int64_t n, Key bound) {
  Key count = 0;  // n < 2^31, and a counter as wide as the keys vectorises best
  for (int64_t i = 0; i < n; ++i) count += Key(keys[i] >= bound);
  return count;
}

template <typename Key>
int64_t count_equal(const Key* keys, int64_t n, Key value) {
  Key count = 0;
  for (int64_t i = 0; i < n; ++i) count += Key(keys[i] == value);
  return count;
}

// Keeps the k largest of n > k entries, in their order; of equal ones the first. Returns the
// smallest key that is kept. Bisection on the keys: at most one counting pass for each bit of a
// key, whatever the keys are.
template <typename C>
SelectKey<C> keep_largest(SelectKey<C>* keys, int32_t* tokens, int64_t n, int64_t k) {
  using Key = SelectKey<C>;
  using Unsigned = typename SelectKeyOf<C>::unsigned_type;
  Key low = keys[0], high = keys[0];
  for (int64_t i = 1; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  // Throughout, at least k keys are >= low and fewer than k are > high.
  int64_t at_least_low = n;
  while (low < high && at_least_low > k) {
    const Key middle = Key(Unsigned(low) + (Unsigned(high) - Unsigned(low)) / 2 + 1);
    const int64_t at_least_middle = count_at_least(keys, n, middle);
    if (at_least_middle >= k) {
      low = middle;
      at_least_low = at_least_middle;
    } else {
      high = middle - 1;
    }
  }
  // All that are >= low stay, except the last of those equal to it, if they are too many.
  for (int64_t i = n - 1, surplus = at_least_low - k; surplus > 0; --i) {
    if (keys[i] != low) continue;
    keys[i] = kBelowAllKeys<C>;
    --surplus;
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Key key = keys[i];
    keys[kept] = key;
    tokens[kept] = tokens[i];
    kept += key >= low;
  }
  Key smallest = keys[0];
  for (int64_t i = 1; i < k; ++i) smallest = keys[i] < smallest ? keys[i] : smallest;
  return smallest;
}

// ---- Scanning -----------------------------------------------------------------------------------

// Hands out parts of a block of memory; without one it measures how much is needed.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* part = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(count * int64_t(sizeof(T)), 64);
    return part;
  }
};

// logits[t][r] = sum over i of panel[i][r] * tile[t][i], for a step of tokens and a panel of rows.
template <typename C, int kVectors>
void multiply(const C* panel, const C* tile, int64_t tile_stride, int64_t width, C* logits) {
  using V = Vec<C>;
  V sums[kStepTokens][kVectors];
#pragma GCC unroll 16
  for (int t = 0; t < kStepTokens; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[t][v] = V::zero();
  }
  for (int64_t i = 0; i < width; ++i) {
    V query[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) query[v] = V::load(panel + (i * kVectors + v) * V::size);
#pragma GCC unroll 16
    for (int t = 0; t < kStepTokens; ++t) {
      const V token = V::broadcast(tile[t * tile_stride + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[t][v] = fmadd(query[v], token, sums[t][v]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kStepTokens; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[t][v].store(logits + (t * kVectors + v) * V::size);
  }
}

AIT_INLINE int64_t size_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

// Asks for the tokens of the next tile, a few cache lines at a time while this one is multiplied.
class Prefetcher {
 public:
  Prefetcher(const SelectProblem& problem, const SelectTask& task)
      : size_(size_of(problem.token_storage)),
        row_bytes_(problem.width * size_),
        row_stride_(problem.token_stride * size_),
        group_(static_cast<const char*>(problem.tokens) +
               task.group * problem.group_stride * size_) {}

  // The next `num_tokens` tokens, from `token` on, in `steps` steps.
  void start(int64_t token, int64_t num_tokens, int64_t steps) {
    row_ = group_ + token * row_stride_;
    byte_ = 0;
    rows_left_ = num_tokens;
    lines_per_step_ = (num_tokens * ((row_bytes_ + 63) / 64) + steps - 1) / steps;
  }

  AIT_INLINE void step() {
    for (int64_t i = 0; i < lines_per_step_ && rows_left_ > 0; ++i) {
      __builtin_prefetch(row_ + byte_, 0, 2);
      byte_ += 64;
      if (byte_ >= row_bytes_) {
        byte_ = 0;
        row_ += row_stride_;
        --rows_left_;
      }
    }
  }

 private:
  const int64_t size_, row_bytes_, row_stride_;
  const char* const group_;
  const char* row_ = nullptr;
  int64_t byte_ = 0, rows_left_ = 0, lines_per_step_ = 0;
};

// What a task keeps beside its lists.
template <typename C>
struct ScanBuffers {
  ScanBuffers(const SelectProblem& problem, int64_t num_rows, Arena& arena)
      : padded_rows(round_up(num_rows, Vec<C>::size)),
        copy_stride(problem.width + (problem.width % 256 == 0 ? 16 : 0)),
        panels(arena.take<C>(padded_rows * problem.width)),
        copied_tokens(arena.take<C>(round_up(problem.tile_tokens, kStepTokens) * copy_stride)),
        tile_tokens(arena.take<int32_t>(problem.tile_tokens)),
        unpacked(arena.take<C>(problem.width)),
        thresholds(arena.take<C>(padded_rows)),
        threshold_keys(arena.take<SelectKey<C>>(padded_rows)) {}

  int64_t padded_rows;
  int64_t copy_stride;  // no multiple of 1 KiB: rows would compete for the same cache sets
  C* panels;
  C* copied_tokens;
  int32_t* tile_tokens;
  C* unpacked;
  C* thresholds;
  SelectKey<C>* threshold_keys;
};

template <typename C>
class Scan {
 public:
  static constexpr int kLanes = Vec<C>::size;
  static constexpr int kPanelRows = kPanelVectors * kLanes;

  Scan(const SelectProblem& problem, const SelectTask& task, const SelectCandidates<C>& candidates,
       Arena arena)
      : problem_(problem),
        task_(task),
        candidates_(candidates),
        buffers_(problem, task.num_rows, arena),
        prefetcher_(problem, task),
        can_read_in_place_(problem.token_storage == kStorageOf<C> &&
                           problem.rounding == kStorageOf<C> &&
                           problem.token_stride * int64_t(sizeof(C)) % 2048 != 0),
        worth_prefetching_(task.num_rows > kPanelRows || problem.token_stride != problem.width) {}

  SelectStatistics run() {
    pack_query();
    for (int64_t row = 0; row < buffers_.padded_rows; ++row) {
      // Nothing compares as less than or equal to NaN: until a list has been cut, all may enter.
      // Rows that fill up a vector have no list.
      const bool real = row < task_.num_rows;
      buffers_.thresholds[row] = C(real ? __builtin_nanf("") : __builtin_inff());
      buffers_.threshold_keys[row] = real ? kBelowAllKeys<C> : kLargestKey<C>;
      if (real) count_of(row) = 0;
    }
    for (int64_t token = task_.first_token; token < task_.last_token;) {
      token = load_tile(token);
      start_prefetch(token);
      for (int64_t row = 0; row < task_.num_rows; row += kPanelRows) {
        if (task_.num_rows - row > kLanes) {
          scan_tile<kPanelVectors>(row);
        } else {
          scan_tile<1>(row);
        }
      }
    }
    for (int64_t row = 0; row < task_.num_rows; ++row) {
      if (count_of(row) > problem_.k) cut(row);
    }
    return statistics_;
  }

 private:
  // Panels of the block's rows: for each of d elements, that of all rows of a panel side by side.
  // The rows that fill up the last vector are zero.
  void pack_query() {
    const int64_t width = problem_.width;
    for (int64_t row = 0; row < buffers_.padded_rows; ++row) {
      const int64_t panel = row / kPanelRows * kPanelRows;
      const int64_t stride = task_.num_rows - panel > kLanes ? kPanelRows : kLanes;
      C* packed = buffers_.panels + panel * width + (row - panel);
      if (row >= task_.num_rows) {
        for (int64_t i = 0; i < width; ++i) packed[i * stride] = C(0);
        continue;
      }
      const int64_t source = task_.group * problem_.num_rows + task_.first_row + row;
      load_row(problem_.query, kStorageOf<C>, source * width, problem_.rounding, width,
               buffers_.unpacked);
      for (int64_t i = 0; i < width; ++i) packed[i * stride] = buffers_.unpacked[i];
    }
  }

  // Makes a tile of the unmasked tokens from `token` on; returns the token after the last of them.
  int64_t load_tile(int64_t token) {
    const int64_t most = smaller(problem_.tile_tokens, task_.last_token - token);
    const int64_t whole_steps = most / kStepTokens * kStepTokens;
    const bool in_place = can_read_in_place_ && whole_steps > 0 && !any_masked(token, whole_steps);
    return in_place ? point_to_tile(token, whole_steps) : copy_tile(token);
  }

  bool any_masked(int64_t token, int64_t num_tokens) const {
    if (problem_.mask == nullptr) return false;
    uint8_t any = 0;
    for (int64_t i = 0; i < num_tokens; ++i) any |= problem_.mask[token + i];
    return any != 0;
  }

  int64_t offset_of(int64_t token) const {
    return token * problem_.token_stride + task_.group * problem_.group_stride;
  }

  int64_t point_to_tile(int64_t token, int64_t num_tokens) {
    tile_ = static_cast<const C*>(problem_.tokens) + offset_of(token);
    tile_stride_ = problem_.token_stride;
    tile_size_ = num_tokens;
    for (int64_t i = 0; i < num_tokens; ++i) buffers_.tile_tokens[i] = int32_t(token + i);
    ++statistics_.tiles_in_place;
    return token + num_tokens;
  }

  // Skips masked tokens, converts and rounds, and fills up the last step with zeros.
  int64_t copy_tile(int64_t token) {
    const int64_t stride = buffers_.copy_stride;
    int64_t n = 0;
    for (; token < task_.last_token && n < problem_.tile_tokens; ++token) {
      if (problem_.mask != nullptr && problem_.mask[token]) continue;
      load_row(problem_.tokens, problem_.token_storage, offset_of(token), problem_.rounding,
               problem_.width, buffers_.copied_tokens + n * stride);
      buffers_.tile_tokens[n++] = int32_t(token);
    }
    const int64_t missing = round_up(n, kStepTokens) - n;
    std::memset(buffers_.copied_tokens + n * stride, 0, size_t(missing * stride) * sizeof(C));
    tile_ = buffers_.copied_tokens;
    tile_stride_ = stride;
    tile_size_ = n;
    ++statistics_.tiles_copied;
    return token;
  }

  // Where one panel reads tokens that lie side by side, the processor foresees that by itself.
  void start_prefetch(int64_t token) {
    if (!worth_prefetching_ || tile_size_ == 0) return;
    const int64_t panels = (task_.num_rows + kPanelRows - 1) / kPanelRows;
    prefetcher_.start(token, smaller(problem_.tile_tokens, task_.last_token - token),
                      panels * round_up(tile_size_, kStepTokens) / kStepTokens);
  }

  template <int kVectors>
  void scan_tile(int64_t row) {
    alignas(64) C logits[kStepTokens * kVectors * kLanes];
    const C* panel = buffers_.panels + row * problem_.width;
    for (int64_t t = 0; t < tile_size_; t += kStepTokens) {
      prefetcher_.step();
      multiply<C, kVectors>(panel, tile_ + t * tile_stride_, tile_stride_, problem_.width, logits);
      filter<kVectors>(logits, buffers_.tile_tokens + t, smaller(kStepTokens, tile_size_ - t), row);
    }
  }

  // Appends what passes the thresholds, token by token. A list that is cut on the way raises its
  // own threshold, which append() reads again.
  template <int kVectors>
  void filter(const C* logits, const int32_t* tokens, int64_t num_tokens, int64_t first_row) {
    constexpr int64_t kRows = kVectors * kLanes;
    constexpr int64_t kVectorsPerWord = 64 / kLanes;
    const int64_t num_vectors = num_tokens * kVectors;
    for (int64_t first = 0; first < num_vectors; first += kVectorsPerWord) {
      uint64_t passing = 0;  // one bit for each of 64 logits
      for (int64_t i = first; i < smaller(first + kVectorsPerWord, num_vectors); ++i) {
        const C* thresholds = buffers_.thresholds + first_row + i % kVectors * kLanes;
        const uint64_t mask =
            not_less_equal_mask(Vec<C>::load(logits + i * kLanes), Vec<C>::load(thresholds));
        passing |= mask << ((i - first) * kLanes);
      }
      for (; passing != 0; passing &= passing - 1) {
        const int64_t position = first * kLanes + __builtin_ctzll(passing);
        append(first_row + position % kRows, logits[position], tokens[position / kRows]);
      }
    }
  }

  AIT_INLINE void append(int64_t row, C logit, int32_t token) {
    const SelectKey<C> key = to_key(logit);
    if (key <= buffers_.threshold_keys[row]) return;
    int64_t& count = count_of(row);
    const int64_t entry = list_of(row) + count;
    candidates_.keys[entry] = key;
    candidates_.tokens[entry] = token;
    // A list that holds no more than k even when full holds all tokens of the range.
    if (++count == candidates_.capacity && count > problem_.k) cut(row);
  }

  __attribute__((noinline)) void cut(int64_t row) {
    const int64_t list = list_of(row);
    const SelectKey<C> key = keep_largest<C>(candidates_.keys + list, candidates_.tokens + list,
                                             count_of(row), problem_.k);
    count_of(row) = problem_.k;
    buffers_.threshold_keys[row] = key;
    buffers_.thresholds[row] = key == kLargestKey<C> ? C(__builtin_inff()) : to_logit<C>(key);
    ++statistics_.list_cuts;
  }

  int64_t& count_of(int64_t row) {
    return candidates_.counts[row * candidates_.ranges + task_.range];
  }
  int64_t list_of(int64_t row) const {
    return (row * candidates_.ranges + task_.range) * candidates_.capacity;
  }

  const SelectProblem& problem_;
  const SelectTask& task_;
  const SelectCandidates<C>& candidates_;
  const ScanBuffers<C> buffers_;
  Prefetcher prefetcher_;
  const bool can_read_in_place_;  // 2 KiB apart they would compete for the same cache sets
  const bool worth_prefetching_;
  const C* tile_ = nullptr;
  int64_t tile_stride_ = 0, tile_size_ = 0;
  SelectStatistics statistics_{};
};

template <typename C>
int64_t scratch_bytes(const SelectProblem& problem, int64_t num_rows) {
  Arena arena{nullptr};
  ScanBuffers<C>(problem, num_rows, arena);
  return arena.used;
}

template <typename C>
SelectStatistics scan(const SelectProblem& problem, const SelectTask& task,
                      const SelectCandidates<C>& candidates, void* scratch) {
  return Scan<C>(problem, task, candidates, Arena{static_cast<char*>(scratch)}).run();
}

template <typename C>
void collect(const SelectProblem& problem, const SelectCandidates<C>& candidates, int64_t num_rows,
             C* values, int64_t* indices) {
  const int64_t k = problem.k;
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t first_list = row * candidates.ranges;
    SelectKey<C>* keys = candidates.keys + first_list * candidates.capacity;
    int32_t* tokens = candidates.tokens + first_list * candidates.capacity;
    int64_t n = candidates.counts[first_list];
    for (int64_t range = 1; range < candidates.ranges; ++range) {
      const int64_t count = candidates.counts[first_list + range];
      const int64_t from = range * candidates.capacity;
      std::memmove(keys + n, keys + from, size_t(count) * sizeof *keys);
      std::memmove(tokens + n, tokens + from, size_t(count) * sizeof *tokens);
      n += count;
    }
    if (n > k) {
      keep_largest<C>(keys, tokens, n, k);
      n = k;
    }
    for (int64_t j = 0; j < n; ++j) {
      values[row * k + j] = to_logit<C>(keys[j]);
      indices[row * k + j] = tokens[j];
    }
    for (int64_t j = n; j < k; ++j) {
      values[row * k + j] = -C(__builtin_inff());
      indices[row * k + j] = -1;
    }
  }
}

template <typename C>
constexpr SelectKernels<C> kKernels = {Scan<C>::kPanelRows, kStepTokens, scratch_bytes<C>, scan<C>,
                                       collect<C>};

}  // namespace

namespace AIT_CAPABILITY {
const BottleneckSelectKernels bottleneck_select_kernels = {kKernels<float>, kKernels<double>};
}  // namespace AIT_CAPABILITY

}  // namespace ait::cpu
