#include "hopfield_retrieve_kernel.h"

#include "hopfield_retrieve_tile.h"

namespace ait::cpu {
namespace {

// The steps after the first, in M dimensions.
template <typename C>
void take_further_steps(const HopfieldForward<C>& a, const HopfieldForwardScratch<C>& s,
                        Rows<C> state, int64_t rows, int64_t* steps_taken) {
  const HopfieldPatterns<C>& p = a.patterns;
  const int64_t patterns = p.num_patterns, stride = p.pattern_stride;
  int64_t moving = rows;
  for (int64_t t = 0; t < rows; ++t) s.stopped[t] = false;
  if (a.tol > 0) {
    // The input need not lie among the patterns: its distance is measured in E dimensions.
    multiply(s.weights, stride, rows, p.packed, patterns, p.width, s.moved, p.width_stride);
    for (int64_t t = 0; t < rows; ++t) {
      const C* moved = s.moved + t * p.width_stride;
      s.stopped[t] = root(squared_distance(moved, state.data + t * state.stride, p.width)) < a.tol;
      moving -= s.stopped[t];
    }
  }
  for (int64_t step = 2; step <= a.steps && moving > 0; ++step) {
    multiply_gram(p, s.weights, rows, s.moved, s.logits);
    if (!(a.tol > 0)) {
      softmax_rows<C>(s.logits, stride, rows, a.beta, patterns, s.weights, nullptr);
      for (int64_t t = 0; t < rows; ++t) steps_taken[t] = step;
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

// The `rows` rows of a (T, width) tensor behind the tile that ends at `last`, to be fetched; none
// behind the last tile.
template <typename S>
AIT_INLINE Stretch rows_behind(const void* source, int64_t rows, int64_t last, int64_t end,
                               int64_t width) {
  if (last >= end) return {};
  const S* first = static_cast<const S*>(source) + last * width;
  return {reinterpret_cast<const char*>(first), rows, width * int64_t(sizeof(S))};
}

template <typename C, typename S>
void forward(const HopfieldForward<C>& a, const HopfieldForwardScratch<C>& s, int64_t begin,
             int64_t end) {
  const HopfieldPatterns<C>& p = a.patterns;
  const int64_t patterns = p.num_patterns, stride = p.pattern_stride;
  for (int64_t first = begin; first < end; first += a.tile) {
    const int64_t rows = end - first < a.tile ? end - first : a.tile;
    const Rows<C> state =
        tile_rows<C, S>(a.state, first, rows, p.width, false, s.state, p.width_stride);
    const int64_t last = first + rows;
    const Stretch behind = rows_behind<S>(a.state, rows, last, end, p.width);
    multiply_states(p, state, rows, behind.half(0), s.logits);
    softmax_rows(s.logits, stride, rows, a.beta, patterns, s.weights, s.sums);
    for (int64_t t = 0; t < rows; ++t) {
      a.lse[first + t] = log_sum_exp(s.sums[t], s.logits + t * stride, a.beta, patterns);
      a.steps_taken[first + t] = 1;
    }
    if (a.steps > 1) take_further_steps(a, s, state, rows, a.steps_taken + first);
    multiply_to_storage(s.weights, stride, rows, p.packed, patterns, p.width, behind.half(1),
                        last < end, static_cast<S*>(a.out) + first * p.width);
  }
}

// The weights of the next step of a tile.
template <typename C>
void take_step(const HopfieldBackward<C>& a, const HopfieldBackwardScratch<C>& s, int64_t rows,
               const C* weights, C* next) {
  const int64_t stride = a.patterns.pattern_stride;
  multiply_gram(a.patterns, weights, rows, s.moved, s.product);
  softmax_rows<C>(s.product, stride, rows, a.beta, a.patterns.num_patterns, next, nullptr);
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

  const Rows<C> state = tile_rows<C, S>(a.state, first, rows, width, true, s.state, width_stride);
  const Rows<C> grad_out =
      tile_rows<C, S>(a.grad_out, first, rows, width, true, s.grad_out, width_stride);
  const int64_t last = first + rows;
  // The next tile of both is fetched evenly: memory has no more to give at a time.
  const Stretch state_behind = rows_behind<S>(a.state, rows, last, end, width);
  const Stretch grad_behind = rows_behind<S>(a.grad_out, rows, last, end, width);
  multiply_states(p, state, rows, state_behind.half(0), s.product);
  softmax_rows<C>(s.product, stride, rows, a.beta, patterns, s.checkpoints, nullptr);
  multiply_states(p, grad_out, rows, state_behind.half(1), s.grad_weights);

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
  multiply_to_storage(s.grad_logits, stride, rows, p.packed, patterns, width, Stretch{}, last < end,
                      static_cast<S*>(a.grad_state) + first * width);
  add_outer(s.last, stride, grad_out.data, grad_out.stride, rows, patterns, width, grad_patterns,
            width_stride, grad_behind.half(0));
  add_outer(s.grad_logits, stride, state.data, state.stride, rows, patterns, width, grad_patterns,
            width_stride, grad_behind.half(1));
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
