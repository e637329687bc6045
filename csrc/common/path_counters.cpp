#include <common/path_counters.h>

#include <atomic>
#include <cstddef>

namespace ait {
namespace {

constexpr const char* kNames[] = {
    "select_calls",
    "select_tasks",
    "select_split_rows",
    "select_list_cuts",
    "select_cuts_in_ties",
    "select_closed_rows",
    "select_tiles_in_place",
    "select_tiles_copied",
    "select_masked_calls",
    "select_bfloat16_calls",
    "select_elementwise_calls",
    "select_screened_calls",
    "select_logits_let_through",
    "select_crowded_tiles",
};
static_assert(std::size(kNames) == size_t(Path::count));

std::atomic<int64_t> counters[size_t(Path::count)];

}  // namespace

void count_path(Path path, int64_t times) {
  counters[size_t(path)].fetch_add(times, std::memory_order_relaxed);
}

std::map<std::string, int64_t> path_counters() {
  std::map<std::string, int64_t> result;
  for (size_t i = 0; i < size_t(Path::count); ++i) {
    result[kNames[i]] = counters[i].load(std::memory_order_relaxed);
  }
  return result;
}

void reset_path_counters() {
  for (auto& counter : counters) counter.store(0, std::memory_order_relaxed);
}

}  // namespace ait
