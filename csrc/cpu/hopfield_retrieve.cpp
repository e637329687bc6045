// ait::hopfield_retrieve and its backward on CPU: checks, packing, distribution over threads.
#include <common/checks.h>
#include <common/huge_pages.h>
#include <common/parallel.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "hopfield_retrieve_kernel.h"

namespace ait::cpu {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

constexpr const char* kName = "hopfield_retrieve";

// Sums of the gradients of the patterns are kept for this many chunks of tokens, in at most this
// many bytes. Both must depend on the shape alone, since they decide the order of the sums.
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kMaxPartialBytes = int64_t{1} << 28;
// Bytes of one thread's tiles, and of the weights of all steps of one tile, that stay in cache.
constexpr int64_t kTileBytes = int64_t{3} << 18;
constexpr int64_t kSegmentBytes = int64_t{1} << 20;
// The backward holds two tensors' tiles, and those that are fetched behind them.
constexpr int64_t kMaxForwardTile = 48, kMaxBackwardTile = 24;

const HopfieldRetrieveKernels& kernels() { AIT_RETURN_KERNELS(hopfield_retrieve_kernels); }

// Calls run(kernels, C{}) with the kernels and the compute type for the dtype of the state.
template <typename Run>
auto dispatch(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Double:
      return run(kernels().float64, double{});
    case ScalarType::BFloat16:
      return run(kernels().bfloat16, float{});
    case ScalarType::Half:
      return run(kernels().float16, float{});
    default:
      return run(kernels().float32, float{});
  }
}

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// The patterns, packed for every product that they take part in.
template <typename C>
class PackedPatterns {
 public:
  PackedPatterns(const HopfieldKernels<C>& kernel, const Tensor& patterns, bool several_steps)
      : num_patterns(patterns.size(0)),
        width(patterns.size(1)),
        pattern_stride(stride_of(kernel, num_patterns)),
        width_stride(stride_of(kernel, width)),
        transposed_(checked_product(width, pattern_stride)),
        packed_(checked_product(num_patterns, width_stride)),
        // With many patterns of small width, two products with the patterns cost less.
        has_gram(several_steps && num_patterns / 2 <= width),
        gram_(has_gram ? checked_product(num_patterns, pattern_stride) : 0) {
    const C* data = patterns.const_data_ptr<C>();
    const int64_t m = num_patterns, e = width, panel = kernel.panel;
    const int64_t grain = std::max(kMinWorkPerThread / (std::max(m, e) * panel), int64_t{1});
    parallel_for(0, divide_up(m, panel), grain, [&](int64_t begin, int64_t end) {
      kernel.pack_transposed(data, e, e, m, transposed_.get(), begin, end);
    });
    parallel_for(0, divide_up(e, panel), grain, [&](int64_t begin, int64_t end) {
      kernel.pack(data, e, m, e, packed_.get(), begin, end);
    });
    if (!has_gram) return;
    const Scratch<C> rows(checked_product(m, pattern_stride));
    const int64_t blocks = divide_up(m, 48);
    const int64_t slots = num_slots(blocks, 48.0 * double(m) * double(e));
    for_each_task(blocks, slots, [&](int64_t, int64_t block) {
      const int64_t first = block * 48;
      kernel.multiply(data + first * e, e, std::min(m - first, int64_t{48}), transposed_.get(), e,
                      m, rows.get() + first * pattern_stride, pattern_stride);
    });
    parallel_for(0, divide_up(m, panel), grain, [&](int64_t begin, int64_t end) {
      kernel.pack(rows.get(), pattern_stride, m, m, gram_.get(), begin, end);
    });
  }

  HopfieldPatterns<C> get() const {
    return {num_patterns,
            width,
            transposed_.get(),
            packed_.get(),
            has_gram ? gram_.get() : nullptr,
            pattern_stride,
            width_stride};
  }

  const int64_t num_patterns, width;
  // Rows of tiles: whole panels and one vector more, so that rows do not fall onto the same lines
  // of the cache.
  const int64_t pattern_stride, width_stride;

 private:
  static int64_t stride_of(const HopfieldKernels<C>& kernel, int64_t columns) {
    return (divide_up(columns, kernel.panel) * 2 + 1) * (kernel.panel / 2);
  }

  const Scratch<C> transposed_, packed_;

 public:
  const bool has_gram;

 private:
  const Scratch<C> gram_;
};

// Tokens of a tile, a multiple of 12: at most so many, and fewer where the patterns are many or
// wide.
int64_t tile_size(int64_t most, int64_t values_per_token, int64_t value_size) {
  const int64_t fitting = kTileBytes / (values_per_token * value_size);
  return std::clamp(fitting / 12 * 12, int64_t{12}, most);
}

std::tuple<Tensor, Tensor, Tensor> hopfield_retrieve(const Tensor& state_in,
                                                     const Tensor& patterns_in, double beta,
                                                     int64_t steps, double tol) {
  check_retrieval(check_dense_cpu, kName, state_in, patterns_in, beta, steps);
  check_tolerance(kName, tol);
  const ScalarType dtype = compute_dtype(state_in.scalar_type());
  const Tensor state = as_contiguous(state_in);
  const Tensor patterns = contiguous_as(patterns_in, dtype);
  const int64_t num_tokens = state.size(0), width = state.size(1);
  Tensor out = new_empty(state, {num_tokens, width});
  prefer_huge_pages(out.mutable_data_ptr(), out.numel() * int64_t(out.element_size()));
  Tensor steps_taken = new_empty(state, {num_tokens}, ScalarType::Long);
  Tensor lse = new_empty(state, {num_tokens}, dtype);

  dispatch(state.scalar_type(), [&](const auto& kernel, auto zero) {
    using C = decltype(zero);
    const PackedPatterns<C> packed(kernel, patterns, steps > 1);
    const int64_t states = steps > 1 ? 2 : 1, weights = steps > 1 ? 4 : 2;
    const int64_t values = states * packed.width_stride + weights * packed.pattern_stride;
    const int64_t tile = tile_size(kMaxForwardTile, values, sizeof(C));
    const HopfieldForward<C> args{packed.get(),
                                  state.const_data_ptr(),
                                  C(beta),
                                  steps,
                                  C(tol),
                                  tile,
                                  out.mutable_data_ptr(),
                                  steps_taken.mutable_data_ptr<int64_t>(),
                                  lse.mutable_data_ptr<C>()};
    const double work = double(packed.num_patterns) *
                        (2.0 * double(width) + double(steps) * double(packed.num_patterns));
    const int64_t slots = num_slots(divide_up(num_tokens, tile), double(tile) * work);
    // Some tiles in a row, so that one can be fetched while another is worked on.
    const int64_t range =
        std::max(divide_up(divide_up(num_tokens, 16 * slots), tile), int64_t{1}) * tile;
    const Scratch<C> scratch(checked_product(slots, tile, values));
    const Scratch<SoftmaxSum<C>> sums(slots * tile);
    const Scratch<bool> stopped(slots * tile);
    for_each_task(divide_up(num_tokens, range), slots, [&](int64_t slot, int64_t index) {
      C* state_tile = scratch.get() + slot * tile * values;
      C* weights_tile = state_tile + states * tile * packed.width_stride;
      const int64_t size = tile * packed.pattern_stride;
      const HopfieldForwardScratch<C> s{state_tile,
                                        state_tile + (states - 1) * tile * packed.width_stride,
                                        weights_tile,
                                        weights_tile + size,
                                        steps > 1 ? weights_tile + 2 * size : nullptr,
                                        steps > 1 ? weights_tile + 3 * size : nullptr,
                                        sums.get() + slot * tile,
                                        stopped.get() + slot * tile};
      kernel.forward(args, s, index * range, std::min((index + 1) * range, num_tokens));
    });
  });
  return {out, steps_taken, lse};
}

// grad_patterns (M, E) = sum over the chunks, in order, plus (grad_gram + grad_gram^T) P, in the
// compute type.
template <typename C>
void combine_chunks(const HopfieldKernels<C>& kernel, const PackedPatterns<C>& packed,
                    int64_t chunks, const C* partial_patterns, const C* partial_gram,
                    C* grad_patterns) {
  const int64_t m = packed.num_patterns, e = packed.width, stride = packed.pattern_stride;
  const Scratch<C> gram(packed.has_gram ? checked_product(m, m) : 0);
  const int64_t grain = std::max(kMinWorkPerThread / ((chunks + 1) * (e + m)), int64_t{1});
  parallel_for(0, m, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      C* target = grad_patterns + row * e;
      std::fill(target, target + e, C(0));
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const C* source = partial_patterns + (chunk * m + row) * packed.width_stride;
        for (int64_t i = 0; i < e; ++i) target[i] += source[i];
      }
      if (!packed.has_gram) continue;
      C* gram_row = gram.get() + row * m;
      std::fill(gram_row, gram_row + m, C(0));
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const C* source = partial_gram + chunk * m * stride;
        for (int64_t i = 0; i < m; ++i) {
          gram_row[i] += source[row * stride + i] + source[i * stride + row];
        }
      }
    }
  });
  if (!packed.has_gram) return;
  const int64_t blocks = divide_up(m, 12);
  const int64_t slots = num_slots(blocks, 12.0 * double(m) * double(e));
  const Scratch<C> products(checked_product(slots, 12, packed.width_stride));
  for_each_task(blocks, slots, [&](int64_t slot, int64_t block) {
    const int64_t first = block * 12, rows = std::min(m - first, int64_t{12});
    C* product = products.get() + slot * 12 * packed.width_stride;
    kernel.multiply(gram.get() + first * m, m, rows, packed.get().packed, m, e, product,
                    packed.width_stride);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < e; ++i) {
        grad_patterns[(first + row) * e + i] += product[row * packed.width_stride + i];
      }
    }
  });
}

// Memory of one thread's tiles, and where each begins.
template <typename C>
struct BackwardTiles {
  BackwardTiles(const PackedPatterns<C>& packed, int64_t most_steps, int64_t slots)
      : wide(packed.width_stride),
        narrow(packed.pattern_stride),
        tile(tile_size(kMaxBackwardTile, 3 * wide + 4 * narrow, sizeof(C))),
        segment(segment_of(most_steps)),
        segments(std::max(divide_up(most_steps - 1, segment), int64_t{1})),
        size(checked_product(tile, 3 * wide + (4 + segment + 1 + segments) * narrow)),
        memory_(checked_product(slots, size)) {
    // Columns beyond the last are read with the others, and must be numbers.
    for (int64_t slot = 0; slot < slots; ++slot) {
      const HopfieldBackwardScratch<C> s = get(slot);
      std::fill(s.moved, s.moved + tile * wide, C(0));
      std::fill(s.grad_logits, s.grad_logits + tile * narrow, C(0));
    }
  }

  HopfieldBackwardScratch<C> get(int64_t slot) const {
    C* next = memory_.get() + slot * size;
    const auto take = [&](int64_t values) {
      C* taken = next;
      next += tile * values;
      return taken;
    };
    HopfieldBackwardScratch<C> s;
    s.state = take(wide);
    s.grad_out = take(wide);
    s.moved = take(wide);
    s.last = take(narrow);
    s.grad_weights = take(narrow);
    s.grad_logits = take(narrow);
    s.product = take(narrow);
    s.segment = take((segment + 1) * narrow);
    s.checkpoints = take(segments * narrow);
    return s;
  }

  const int64_t wide, narrow, tile, segment, segments, size;

 private:
  // All steps at once where they fit, else about as many as there are segments.
  int64_t segment_of(int64_t most_steps) const {
    const int64_t fitting = kSegmentBytes / (tile * narrow * int64_t(sizeof(C)));
    const int64_t balanced = int64_t(std::sqrt(double(most_steps))) + 1;
    return std::max(std::min(most_steps - 1, std::max(fitting, balanced)), int64_t{1});
  }

  const Scratch<C> memory_;
};

int64_t check_steps_taken(const Tensor& steps_taken, int64_t steps) {
  const int64_t* data = steps_taken.const_data_ptr<int64_t>();
  int64_t most = 1;
  for (int64_t t = 0; t < steps_taken.size(0); ++t) {
    STD_TORCH_CHECK(data[t] >= 1 && data[t] <= steps, kName, ": expected steps_taken from 1 to ",
                    steps, ", got ", data[t], " for token ", t);
    most = std::max(most, data[t]);
  }
  return most;
}

std::tuple<Tensor, Tensor> hopfield_retrieve_backward(const Tensor& grad_out_in,
                                                      const Tensor& state_in,
                                                      const Tensor& patterns_in,
                                                      const Tensor& steps_taken_in, double beta,
                                                      int64_t steps) {
  check_retrieval(check_dense_cpu, kName, state_in, patterns_in, beta, steps);
  const int64_t num_tokens = state_in.size(0), width = state_in.size(1);
  check_retrieval_results(check_dense_cpu, kName, state_in, grad_out_in, steps_taken_in);
  const ScalarType dtype = compute_dtype(state_in.scalar_type());
  const Tensor state = as_contiguous(state_in);
  const Tensor patterns = contiguous_as(patterns_in, dtype);
  const Tensor grad_out = as_contiguous(grad_out_in);
  const Tensor steps_taken = as_contiguous(steps_taken_in);
  const int64_t most_steps = check_steps_taken(steps_taken, steps);
  Tensor grad_state = new_empty(state, {num_tokens, width});
  prefer_huge_pages(grad_state.mutable_data_ptr(),
                    grad_state.numel() * int64_t(grad_state.element_size()));
  Tensor grad_patterns = new_empty(patterns, {patterns.size(0), width});

  dispatch(state.scalar_type(), [&](const auto& kernel, auto zero) {
    using C = decltype(zero);
    const PackedPatterns<C> packed(kernel, patterns, most_steps > 1);
    const int64_t m = packed.num_patterns;
    const int64_t patterns_size = checked_product(m, packed.width_stride);
    const int64_t gram_size = packed.has_gram ? checked_product(m, packed.pattern_stride) : 0;
    const int64_t partial_bytes = checked_product(patterns_size + gram_size, sizeof(C));
    const int64_t fitting = std::clamp(kMaxPartialBytes / partial_bytes, int64_t{1}, kMaxChunks);
    const int64_t chunk = std::max(divide_up(divide_up(num_tokens, fitting), 48), int64_t{1}) * 48;
    const int64_t chunks = divide_up(num_tokens, chunk);
    const double work =
        double(chunk) * double(m) * (5.0 * double(width) + 3.0 * double(most_steps) * double(m));
    const int64_t slots = num_slots(chunks, work);
    const BackwardTiles<C> tiles(packed, most_steps, slots);
    const Scratch<C> partial_patterns(checked_product(chunks, patterns_size));
    const Scratch<C> partial_gram(checked_product(chunks, gram_size));
    const HopfieldBackward<C> args{packed.get(),
                                   grad_out.const_data_ptr(),
                                   state.const_data_ptr(),
                                   steps_taken.const_data_ptr<int64_t>(),
                                   C(beta),
                                   tiles.tile,
                                   tiles.segment,
                                   grad_state.mutable_data_ptr()};
    for_each_task(chunks, slots, [&](int64_t slot, int64_t index) {
      C* chunk_patterns = partial_patterns.get() + index * patterns_size;
      C* chunk_gram = partial_gram.get() + index * gram_size;
      std::fill(chunk_patterns, chunk_patterns + patterns_size, C(0));
      std::fill(chunk_gram, chunk_gram + gram_size, C(0));
      kernel.backward(args, tiles.get(slot), index * chunk,
                      std::min((index + 1) * chunk, num_tokens), chunk_patterns, chunk_gram);
    });
    combine_chunks(kernel, packed, chunks, partial_patterns.get(), partial_gram.get(),
                   grad_patterns.mutable_data_ptr<C>());
  });
  return {grad_state, contiguous_as(grad_patterns, patterns_in.scalar_type())};
}

}  // namespace
}  // namespace ait::cpu

STABLE_TORCH_LIBRARY_IMPL(ait, CPU, m) {
  m.impl("hopfield_retrieve", TORCH_BOX(&ait::cpu::hopfield_retrieve));
  m.impl("hopfield_retrieve_backward", TORCH_BOX(&ait::cpu::hopfield_retrieve_backward));
}
