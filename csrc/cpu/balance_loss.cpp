// ait::balance_loss on CPU: how unevenly tokens are listed, and the derivative by each gate.
#include <common/checks.h>
#include <common/parallel.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

namespace ait::cpu {
namespace {

constexpr const char* kName = "balance_loss";

// The sum of term(i) over [0, n): eight sums side by side, in an order that depends on n alone.
template <typename Term>
double sum_of(int64_t n, const Term& term) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += term(i + lane);
  }
  for (; i < n; ++i) sums[i % 8] += term(i);
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// var(v) / (mean(v)^2 + 1e-10) over the tokens that are seen; its derivative by one of them is
// 2 (v - center) / scale.
struct Variation {
  // `values` are 0 where `seen` is.
  Variation(const double* values, const double* seen, int64_t num_tokens, double num_seen) {
    const double count = std::max(num_seen, 1.0), freedom = std::max(num_seen - 1, 1.0);
    const double mean = sum_of(num_tokens, [&](int64_t t) { return values[t]; }) / count;
    const double squares = sum_of(num_tokens, [&](int64_t t) {
      const double deviation = (values[t] - mean) * seen[t];
      return deviation * deviation;
    });
    scale = (mean * mean + 1e-10) * freedom;
    variation = squares / scale;
    center = mean + mean * variation * (freedom / count);
  }

  double variation, scale, center;
};

template <typename C>
struct Gates {
  const C* gates;          // (S, M, k)
  const int64_t* indices;  // (S, M, k)
  const double* seen;      // (T): 0 where masked, else 1
  int64_t num_tokens, entries_per_head;
  double num_seen;  // their sum
  double unit;      // gates are rounded to what its addition leaves of them
  double weight;
};

// Both variations of one head; false if an index is out of range. Sums of gates are exact, hence
// the same in any order.
template <typename C>
bool run_head(const Gates<C>& a, int64_t head, double* importance, double* load, double* sum,
              C* slope) {
  std::fill(importance, importance + a.num_tokens, 0.0);
  std::fill(load, load + a.num_tokens, 0.0);
  const int64_t first = head * a.entries_per_head, last = first + a.entries_per_head;
  for (int64_t j = first; j < last; ++j) {
    const int64_t token = a.indices[j];
    if (token >= a.num_tokens) return false;
    if (token < 0) continue;
    importance[token] += (double(a.gates[j]) + a.unit) - a.unit;
    load[token] += a.gates[j] > 0;
  }
  const Variation of_importance(importance, a.seen, a.num_tokens, a.num_seen);
  const Variation of_load(load, a.seen, a.num_tokens, a.num_seen);
  *sum = of_importance.variation + of_load.variation;
  const double factor = a.weight * 2 / of_importance.scale;
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    slope[t] = C((importance[t] - of_importance.center) * factor);
  }
  return true;
}

// Runs with a zero of the dtype of the gates.
template <typename Run>
void dispatch(ScalarType dtype, const Run& run) {
  if (dtype == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
}

void check_gates(const Tensor& gates, const Tensor& indices, int64_t num_tokens,
                 int64_t num_heads) {
  check_dense_cpu(kName, "gates", gates);
  check_dense_cpu(kName, "indices", indices);
  check_shape(kName, "gates", gates, {-1, -1});
  check_shape(kName, "indices", indices, {gates.size(0), gates.size(1)});
  check_dtype(kName, "indices", indices, ScalarType::Long);
  const ScalarType dtype = gates.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kName,
                  ": expected gates of dtype float32 or float64, got ", dtype_name(dtype));
  STD_TORCH_CHECK(num_tokens >= 0 && num_heads >= 1 && gates.size(0) % num_heads == 0, kName,
                  ": expected num_tokens of at least 0, and num_heads of at least 1 that divides ",
                  gates.size(0), " rows, got ", num_tokens, " and ", num_heads);
}

void check_range(const Scratch<bool>& in_range, int64_t num_heads, int64_t num_tokens) {
  for (int64_t head = 0; head < num_heads; ++head) {
    STD_TORCH_CHECK(in_range[head], kName, ": expected indices below ", num_tokens,
                    ", got something else in head ", head);
  }
}

std::tuple<Tensor, Tensor> balance_loss(const Tensor& gates_in, const Tensor& indices_in,
                                        const std::optional<Tensor>& mask_in, int64_t num_tokens,
                                        int64_t num_heads, double weight) {
  check_gates(gates_in, indices_in, num_tokens, num_heads);
  const Tensor gates = as_contiguous(gates_in), indices = as_contiguous(indices_in);
  const Scratch<double> seen(num_tokens);
  std::fill(seen.get(), seen.get() + num_tokens, 1.0);
  if (mask_in.has_value()) {
    check_dense_cpu(kName, "mask", *mask_in);
    check_shape(kName, "mask", *mask_in, {num_tokens});
    check_dtype(kName, "mask", *mask_in, ScalarType::Bool);
    const Tensor mask = as_contiguous(*mask_in);
    const auto* masked = static_cast<const uint8_t*>(mask.const_data_ptr());
    for (int64_t t = 0; t < num_tokens; ++t) seen[t] = masked[t] == 0;
  }
  Tensor loss = torch::stable::new_empty(gates, {});
  Tensor slope = torch::stable::new_empty(gates, {num_heads, num_tokens});

  dispatch(gates.scalar_type(), [&]<typename C>(C) {
    const int64_t slots = gates.size(0) / num_heads, entries = slots * gates.size(1);
    double unit = 1;
    while (unit < double(slots)) unit *= 2;
    const double num_seen = sum_of(num_tokens, [&](int64_t t) { return seen[t]; });
    const Gates<C> args{gates.const_data_ptr<C>(),
                        indices.const_data_ptr<int64_t>(),
                        seen.get(),
                        num_tokens,
                        entries,
                        num_seen,
                        unit,
                        weight};
    const int64_t threads = num_slots(num_heads, 4 * (double(entries) + 6 * double(num_tokens)));
    const Scratch<double> sums(num_heads);
    const Scratch<double> scratch(checked_product(2, threads, num_tokens));
    const Scratch<bool> in_range(num_heads);
    C* slopes = slope.mutable_data_ptr<C>();
    for_each_task(num_heads, threads, [&](int64_t thread, int64_t head) {
      double* own = scratch.get() + 2 * thread * num_tokens;
      in_range[head] =
          run_head(args, head, own, own + num_tokens, &sums[head], slopes + head * num_tokens);
    });
    check_range(in_range, num_heads, num_tokens);
    double sum = 0;
    for (int64_t head = 0; head < num_heads; ++head) sum += sums[head];
    *loss.mutable_data_ptr<C>() = C(sum * weight);
  });
  return {loss, slope};
}

Tensor balance_loss_backward(const Tensor& grad_loss, const Tensor& gates, const Tensor& indices_in,
                             const Tensor& slope_in) {
  check_dense_cpu(kName, "slope", slope_in);
  check_shape(kName, "slope", slope_in, {-1, -1});
  const int64_t num_heads = slope_in.size(0), num_tokens = slope_in.size(1);
  check_gates(gates, indices_in, num_tokens, num_heads);
  check_dtype(kName, "slope", slope_in, gates.scalar_type());
  check_dense_cpu(kName, "grad_loss", grad_loss);
  check_shape(kName, "grad_loss", grad_loss, {});
  check_dtype(kName, "grad_loss", grad_loss, gates.scalar_type());
  const Tensor indices = as_contiguous(indices_in), slope = as_contiguous(slope_in);
  Tensor grad_gates = torch::stable::new_empty(gates, {gates.size(0), gates.size(1)});
  dispatch(gates.scalar_type(), [&]<typename C>(C) {
    const C factor = *grad_loss.const_data_ptr<C>();
    const int64_t entries = gates.size(0) / num_heads * gates.size(1);
    const Scratch<bool> in_range(num_heads);
    const C* slopes = slope.const_data_ptr<C>();
    const int64_t* tokens = indices.const_data_ptr<int64_t>();
    C* grads = grad_gates.mutable_data_ptr<C>();
    for_each_task(
        num_heads, num_slots(num_heads, 4.0 * double(entries)), [&](int64_t, int64_t head) {
          in_range[head] = true;
          for (int64_t j = head * entries; j < (head + 1) * entries; ++j) {
            const bool listed = tokens[j] >= 0, known = tokens[j] < num_tokens;
            in_range[head] &= known;
            grads[j] = listed && known ? factor * slopes[head * num_tokens + tokens[j]] : C(0);
          }
        });
    check_range(in_range, num_heads, num_tokens);
  });
  return grad_gates;
}

}  // namespace
}  // namespace ait::cpu

STABLE_TORCH_LIBRARY_IMPL(ait, CPU, m) {
  m.impl("balance_loss", TORCH_BOX(&ait::cpu::balance_loss));
  m.impl("balance_loss_backward", TORCH_BOX(&ait::cpu::balance_loss_backward));
}
