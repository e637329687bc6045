// Work for all threads: tasks that any thread may take, and scratch memory for each of them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>

namespace ait {

// Work below this many multiply-adds is not worth waking another thread.
inline constexpr int64_t kMinWorkPerThread = 1 << 18;

// How many threads, at least one, are worth using for `tasks` tasks of `work_per_task`
// multiply-adds each.
inline int64_t num_slots(int64_t tasks, double work_per_task) {
  const double useful = double(tasks) * work_per_task / double(kMinWorkPerThread);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = tasks < threads ? tasks : threads;
  if (useful < double(most)) return useful > 1 ? int64_t(useful) : 1;
  return most > 1 ? most : 1;
}

// Runs task(slot, index) once for each index in [0, tasks). Tasks of one slot never overlap in
// time, so a slot can own scratch memory. Which slot runs a task changes from call to call: a
// result must not depend on it. `task` must not throw and must not call the dispatcher.
template <typename Task>
void for_each_task(int64_t tasks, int64_t slots, const Task& task) {
  if (slots <= 1) {
    for (int64_t index = 0; index < tasks; ++index) task(int64_t{0}, index);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        task(slot, index);
      }
    }
  });
}

// The product of sizes, or an exception where it overflows.
template <typename... Sizes>
int64_t checked_product(Sizes... sizes) {
  int64_t product = 1;
  const auto multiply = [&](int64_t size) {
    if (__builtin_mul_overflow(product, size, &product)) throw std::bad_alloc();
  };
  (multiply(int64_t(sizes)), ...);
  return product;
}

// Uninitialised memory for `count` plain values, aligned to a cache line.
template <typename T>
class Scratch {
 public:
  static constexpr std::align_val_t kAlignment{64};

  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(
            ::operator new(size_t(checked_product(count, sizeof(T))), kAlignment))) {}

  T* get() const { return data_.get(); }
  T& operator[](int64_t index) const { return data_.get()[index]; }

 private:
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Delete> data_;
};

}  // namespace ait
