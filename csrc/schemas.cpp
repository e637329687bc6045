// The operators' schemas, for every device. `ait/ops/_library.py` repeats them for builds without
// kernels.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ait, m) {
  m.def(
      "bottleneck_select(Tensor query, Tensor tokens, SymInt k, Tensor? mask=None, "
      "ScalarType? selection_dtype=None) -> (Tensor values, Tensor indices)");
  m.def(
      "bottleneck_attend(Tensor query, Tensor tokens, Tensor indices) "
      "-> (Tensor pooled, Tensor gates, Tensor lse)");
  m.def(
      "bottleneck_attend_backward(Tensor? grad_pooled, Tensor? grad_gates, Tensor? grad_lse, "
      "Tensor query, Tensor tokens, Tensor indices, Tensor pooled, Tensor gates) "
      "-> (Tensor grad_query, Tensor grad_tokens)");
  m.def(
      "hopfield_retrieve(Tensor state, Tensor patterns, float beta, int steps, float tol) "
      "-> (Tensor out, Tensor steps_taken, Tensor lse)");
  m.def(
      "hopfield_retrieve_backward(Tensor grad_out, Tensor state, Tensor patterns, "
      "Tensor steps_taken, float beta, int steps) -> (Tensor grad_state, Tensor grad_patterns)");
  m.def(
      "balance_loss(Tensor gates, Tensor indices, Tensor? mask, SymInt num_tokens, int num_heads, "
      "float weight) -> (Tensor loss, Tensor slope)");
  m.def(
      "balance_loss_backward(Tensor grad_loss, Tensor gates, Tensor indices, Tensor slope) "
      "-> Tensor");
  m.def("memory_snapshot(Tensor memory) -> Tensor");
}
