// Runs the threads of a block as fibers, one after another in a random order, and watches what they
// do to memory. Blocks run one after another, in a random order too.
//
// A fiber runs until it waits for others (barrier, warp operation) or ends. Every element of an
// Array has a record of who wrote and read it last; an access that no barrier separates from a
// conflicting one is an error, whichever of the two happened to run first.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace cuda_on_host {

using Site = std::source_location;

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// What the current fiber sees. All of this is for one operating-system thread at a time.
inline Index3 thread_index, block_index, block_size, grid_size;
inline int32_t warp_epoch;  // of the current fiber: how often its warp came together

// Times between barriers, counted over all blocks and launches: what lies before `block_begin`
// happened in another block, what lies before `launch_begin` in an earlier launch.
inline int64_t epoch = 0, block_begin = 0, launch_begin = 0;

// An error in the kernel: the message says where and what.
[[noreturn]] void fail(const std::string& what);

struct Settings {
  uint64_t seed = 1;
  int64_t shared_bytes = 227 * 1024;
  int64_t multiprocessors = 3;
  bool dry = false;  // launches are recorded, and nothing runs: for shapes too large for fibers
  // 0, 1: whether dense paths are taken, in the smallest chunks; else as the cost model says.
  int dense = -1;
};
Settings& settings();

// A launch of a kernel, or (no threads) a product of the library: its rows and columns.
struct Launch {
  int64_t blocks, threads, shared_bytes;
};
std::vector<Launch>& launches();

// ---- Memory
// ---------------------------------------------------------------------------------------

enum class Access { read, write, atomic };

// Who touched an element last.
struct Cell {
  int64_t write_epoch = -1, read_epoch = -1, foreign_read_epoch = -1;
  int32_t write_warp_epoch = 0, read_warp_epoch = 0;
  int16_t writer = 0, reader = 0;  // reader: -1 where there were several
  int16_t read_warp = 0;           // -1 where there were several
  bool initialised = false, atomic = false;
};

// The records of an array.
class Shadow {
 public:
  Shadow(int64_t count, bool initialised) : cells_(size_t(count)) {
    for (Cell& cell : cells_) cell.initialised = initialised;
  }
  int64_t size() const { return int64_t(cells_.size()); }
  void touch(int64_t index, Access access) {
    // Most accesses: a value from before this time is read, and no other thread read it.
    Cell& cell = cells_[size_t(index)];
    const bool is_settled = cell.write_epoch < epoch &&
                            (cell.write_epoch >= block_begin || cell.write_epoch < launch_begin);
    if (access == Access::read && cell.initialised && is_settled && cell.read_epoch == epoch &&
        (cell.read_warp < 0 ||
         (cell.reader == int16_t(thread_index.x) && cell.read_warp_epoch == warp_epoch))) {
      return;
    }
    touch_slowly(cell, index, access);
  }

 private:
  void touch_slowly(Cell& cell, int64_t index, Access access);
  std::vector<Cell> cells_;
};

// The record of an array in global memory; kept until many others have been asked for.
Shadow* new_global_shadow(int64_t count, bool initialised);

// The bytes and the record of the array that the current thread takes next from shared memory.
struct SharedPiece {
  void* data;
  Shadow* shadow;
};
SharedPiece take_shared(int64_t offset, int64_t count, int64_t element_size);

// ---- Threads
// --------------------------------------------------------------------------------------

void sync_threads(const Site& site);

// One 8-byte value for each lane of `mask`, once all of them have come here with their own.
struct WarpValues {
  uint64_t values[32];
};
WarpValues exchange(unsigned mask, uint64_t value, const Site& site);
void sync_warp(unsigned mask, const Site& site);
int lane();

// Runs the kernel with every thread of every block; throws what a thread did wrong.
void run_grid(int64_t blocks, int threads, int64_t shared_bytes,
              const std::function<void()>& kernel);

}  // namespace cuda_on_host
