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

// What the current fiber sees.
inline thread_local Index3 thread_index, block_index, block_size, grid_size;

// An error in the kernel: the message says where and what.
[[noreturn]] void fail(const std::string& what);

struct Settings {
  uint64_t seed = 1;
  int64_t shared_bytes = 227 * 1024;
  int64_t multiprocessors = 3;
};
Settings& settings();

// ---- Memory ---------------------------------------------------------------------------------------

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
  void touch(int64_t index, Access access);

 private:
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

// ---- Threads --------------------------------------------------------------------------------------

void sync_threads(const Site& site);

// One 8-byte value for each lane of `mask`, once all of them have come here with their own.
struct WarpValues {
  uint64_t values[32];
};
WarpValues exchange(unsigned mask, uint64_t value, const Site& site);
void sync_warp(unsigned mask, const Site& site);
int lane();

// Runs the kernel with every thread of every block; throws what a thread did wrong.
void run_grid(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

}  // namespace cuda_on_host
