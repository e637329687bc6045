// ait::hopfield_retrieve and its backward on CUDA: checks, allocation, launches.
#include <cuda/dispatch.h>
#include <cuda/launch.h>

#include <tuple>

#include "hopfield_retrieve_kernel.h"

namespace ait::cuda {
namespace {

using torch::stable::new_empty;

constexpr const char* kName = "hopfield_retrieve";

HopfieldShape shape_of(const Tensor& state, const Tensor& patterns, int64_t steps) {
  const int64_t value_size = state.scalar_type() == ScalarType::Double ? 8 : 4;
  return {state.size(0), patterns.size(0), state.size(1), steps, value_size};
}

// Enough blocks for so many threads, but no more than keep a device busy.
int64_t blocks_for(int64_t threads) {
  return std::min(divide_up(threads, kHopfieldThreads), int64_t{4096});
}

// The patterns as the kernels want them, and their Gram matrix where there are several steps.
template <typename C>
struct PackedPatterns {
  PackedPatterns(const Launcher& launch, const Tensor& patterns, const HopfieldShape& shape,
                 const HopfieldPlan& plan)
      : packed_(new_empty(patterns, {plan.pattern_rows, plan.pattern_stride})),
        gram_(new_empty(patterns, {shape.steps > 1 ? plan.pattern_rows : 0, plan.tile_stride})),
        packed(output<C>(packed_)),
        gram(output<C>(gram_)) {
    launch(&hopfield_pack<C>, blocks_for(packed_.numel()), kHopfieldThreads, 0, input<C>(patterns),
           shape.num_patterns, shape.width, plan, packed);
    if (shape.steps > 1) {
      launch(&hopfield_gram<C>, blocks_for(gram_.numel() * kWarpSize), kHopfieldThreads, 0, packed,
             plan, gram);
    }
  }

 private:
  Tensor packed_, gram_;

 public:
  const Array<C> packed, gram;
};

std::tuple<Tensor, Tensor, Tensor> hopfield_retrieve(const Tensor& state_in,
                                                     const Tensor& patterns_in, double beta,
                                                     int64_t steps, double tol) {
  check_retrieval(check_dense, kName, state_in, patterns_in, beta, steps);
  check_tolerance(kName, tol);
  const Launcher launch(state_in);
  const ScalarType dtype = compute_dtype(state_in.scalar_type());
  const Tensor state = as_contiguous(state_in);
  const Tensor patterns = contiguous_as(patterns_in, dtype);
  const HopfieldShape shape = shape_of(state, patterns, steps);
  Tensor out = new_empty(state, {shape.num_tokens, shape.width});
  Tensor steps_taken = new_empty(state, {shape.num_tokens}, ScalarType::Long);
  Tensor lse = new_empty(state, {shape.num_tokens}, dtype);
  const HopfieldPlan plan = plan_hopfield(shape, steps > 1 ? 3 : 1, 1, launch.limits());
  const bool aligned = has_aligned_rows(state, shape.width) && has_aligned_rows(out, shape.width);

  dispatch(state.scalar_type(), [&]<typename S>() {
    using C = ComputeOf<S>;
    const PackedPatterns<C> packed(launch, patterns, shape, plan);
    Tensor tiles = new_empty(patterns, {plan.in_shared ? 0 : plan.blocks * plan.tile_values});
    const HopfieldForward<S> args{plan,
                                  input<S>(state),
                                  packed.packed,
                                  packed.gram,
                                  shape.num_tokens,
                                  shape.num_patterns,
                                  shape.width,
                                  C(beta),
                                  steps,
                                  C(tol),
                                  aligned,
                                  output<C>(tiles),
                                  output<S>(out),
                                  output<int64_t>(steps_taken),
                                  output<C>(lse)};
    launch(plan.in_shared ? &hopfield_forward<S, true> : &hopfield_forward<S, false>, plan.blocks,
           kHopfieldThreads, plan.shared_bytes, args);
  });
  return {out, steps_taken, lse};
}

std::tuple<Tensor, Tensor> hopfield_retrieve_backward(const Tensor& grad_out_in,
                                                      const Tensor& state_in,
                                                      const Tensor& patterns_in,
                                                      const Tensor& steps_taken_in, double beta,
                                                      int64_t steps) {
  check_retrieval(check_dense, kName, state_in, patterns_in, beta, steps);
  check_retrieval_results(check_dense, kName, state_in, grad_out_in, steps_taken_in);
  const Launcher launch(state_in);
  const ScalarType dtype = compute_dtype(state_in.scalar_type());
  const Tensor state = as_contiguous(state_in);
  const Tensor patterns = contiguous_as(patterns_in, dtype);
  const Tensor grad_out = as_contiguous(grad_out_in);
  const Tensor steps_taken = as_contiguous(steps_taken_in);
  const HopfieldShape shape = shape_of(state, patterns, steps);
  const bool several = steps > 1;
  const HopfieldPlan plan = plan_hopfield(shape, 3, 1, launch.limits());
  const HopfieldGradPlan grad_plan = plan_hopfield_grad_patterns(shape);
  Tensor grad_state = new_empty(state, {shape.num_tokens, shape.width});
  Tensor grad_patterns = new_empty(patterns, {shape.num_patterns, shape.width});
  Tensor last_weights = new_empty(patterns, {shape.num_tokens, plan.tile_stride});
  Tensor grad_logits = new_empty(patterns, {shape.num_tokens, plan.tile_stride});
  Tensor tiles = new_empty(patterns, {plan.in_shared ? 0 : plan.blocks * plan.tile_values});
  Tensor history = new_empty(patterns, {several ? plan.blocks * plan.history_values : 0});
  Tensor partial_gram =
      new_empty(patterns, {several ? plan.chunks : 0, plan.pattern_rows, plan.tile_stride});
  Tensor gram_sum = new_empty(patterns, {several ? shape.num_patterns : 0, plan.tile_stride});
  Tensor partial = new_empty(patterns, {grad_plan.chunks, shape.num_patterns, shape.width});
  const bool aligned = has_aligned_rows(state, shape.width) &&
                       has_aligned_rows(grad_out, shape.width) &&
                       has_aligned_rows(grad_state, shape.width);

  dispatch(state.scalar_type(), [&]<typename S>() {
    using C = ComputeOf<S>;
    const PackedPatterns<C> packed(launch, patterns, shape, plan);
    const HopfieldBackward<S> args{plan,
                                   input<S>(grad_out),
                                   input<S>(state),
                                   input<int64_t>(steps_taken),
                                   packed.packed,
                                   packed.gram,
                                   shape.num_tokens,
                                   shape.num_patterns,
                                   shape.width,
                                   C(beta),
                                   steps,
                                   aligned,
                                   output<C>(tiles),
                                   output<C>(history),
                                   output<C>(partial_gram),
                                   output<C>(last_weights),
                                   output<C>(grad_logits),
                                   output<S>(grad_state)};
    launch(plan.in_shared ? &hopfield_backward<S, true> : &hopfield_backward<S, false>, plan.blocks,
           kHopfieldThreads, plan.shared_bytes, args);
    const HopfieldGradPatterns<S> grad_args{
        grad_plan,        args.grad_out,    args.state,         args.last_weights,
        args.grad_logits, shape.num_tokens, shape.num_patterns, shape.width,
        plan.tile_stride, aligned,          output<C>(partial)};
    launch(&hopfield_grad_patterns<S>,
           grad_plan.chunks * grad_plan.column_blocks * grad_plan.pattern_blocks, kHopfieldThreads,
           0, grad_args);
    const Array<C> sum = output<C>(gram_sum);
    if (several) {
      launch(&hopfield_reduce_gram<C>, blocks_for(shape.num_patterns * shape.num_patterns),
             kHopfieldThreads, 0, args.partial_gram, shape.num_patterns, plan, sum);
    }
    launch(&hopfield_reduce_patterns<C>, blocks_for(shape.num_patterns * shape.width),
           kHopfieldThreads, 0, grad_args.partial, grad_plan.chunks, sum, packed.packed,
           shape.num_patterns, shape.width, plan, several, output<C>(grad_patterns));
  });
  return {grad_state, contiguous_as(grad_patterns, patterns_in.scalar_type())};
}

}  // namespace
}  // namespace ait::cuda

STABLE_TORCH_LIBRARY_IMPL(ait, AIT_KERNEL_DEVICE, m) {
  m.impl("hopfield_retrieve", TORCH_BOX(&ait::cuda::hopfield_retrieve));
  m.impl("hopfield_retrieve_backward", TORCH_BOX(&ait::cuda::hopfield_retrieve_backward));
}
