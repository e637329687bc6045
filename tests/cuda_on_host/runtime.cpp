#include "runtime.h"

#include <sys/mman.h>
#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <deque>
#include <exception>
#include <map>

namespace cuda_on_host {
namespace {

constexpr size_t kStackBytes = 1 << 18;
constexpr size_t kGuardBytes = 1 << 12;
constexpr size_t kGlobalShadows = 512;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  size_t below(size_t bound) {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return size_t(state_ % bound);
  }

 private:
  uint64_t state_;
};

// ---- Switching of stacks
// --------------------------------------------------------------------------

#if defined(__x86_64__)

using Context = void*;

// Saves the registers that a callee must keep, and the stack pointer, and goes on with another
// stack.
asm(R"(
.text
.local cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void cuda_on_host_switch(Context* save, const Context* load);

void switch_context(Context* save, const Context* load) { cuda_on_host_switch(save, load); }

void make_context(Context* context, char* stack, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{15};
  auto* words = reinterpret_cast<void**>(top);
  *--words = nullptr;  // where the caller of entry would be, so that the stack is aligned
  *--words = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--words = nullptr;
  *context = words;
}

#else

using Context = ucontext_t;

void switch_context(Context* save, const Context* load) { swapcontext(save, load); }

void make_context(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

#endif

// A stack as AddressSanitizer knows it, where the harness is built with that.
struct KnownStack {
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;
};

#if defined(__SANITIZE_ADDRESS__)

// Told before and after every switch of stacks; `from` is null where a stack is left for good.
void leave(KnownStack* from, const KnownStack& to) {
  __sanitizer_start_switch_fiber(from == nullptr ? nullptr : &from->fake, to.bottom, to.bytes);
}
void arrive(const KnownStack& at, KnownStack& from) {
  __sanitizer_finish_switch_fiber(at.fake, &from.bottom, &from.bytes);
}
// Forgets the frames of a fiber that never came to its end.
void forget(char* stack) { __asan_unpoison_memory_region(stack, kStackBytes); }

#else

void leave(KnownStack*, const KnownStack&) {}
void arrive(const KnownStack&, KnownStack&) {}
void forget(char*) {}

#endif

// ---- State
// ----------------------------------------------------------------------------------------

enum class State { ready, at_barrier, at_warp_operation, ended };

struct Fiber {
  Context context;
  KnownStack stack;
  State state;
  Site site;
  unsigned mask;
  uint64_t value;
  WarpValues received;
  int32_t warp_epoch;
};

struct Stacks {
  ~Stacks() {
    for (char* stack : stacks) munmap(stack - kGuardBytes, kStackBytes + kGuardBytes);
  }
  char* get(size_t index) {
    while (stacks.size() <= index) {
      void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      mprotect(memory, kGuardBytes, PROT_NONE);
      stacks.push_back(static_cast<char*>(memory) + kGuardBytes);
    }
    return stacks[index];
  }
  std::vector<char*> stacks;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned> ready;
  std::vector<unsigned char> shared;
  std::map<int64_t, std::pair<int64_t, std::unique_ptr<Shadow>>> shared_arrays;
  Context scheduler;
  KnownStack scheduler_stack;
  unsigned current = 0;
  unsigned waiting = 0, ended = 0;
  std::exception_ptr error;
  const std::function<void()>* kernel = nullptr;
};

Block block;
Stacks stacks;

std::string where(unsigned thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(block_index.x);
}

std::string text(const Site& site) {
  const std::string path = site.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

void set_current(unsigned thread) {
  block.current = thread;
  thread_index = {thread, 0, 0};
  warp_epoch = block.fibers[thread].warp_epoch;
}

void enter() {
  arrive(block.fibers[block.current].stack, block.scheduler_stack);
  try {
    (*block.kernel)();
  } catch (...) {
    if (!block.error) block.error = std::current_exception();
  }
  Fiber& self = block.fibers[block.current];
  self.state = State::ended;
  ++block.ended;
  leave(nullptr, block.scheduler_stack);
  switch_context(&self.context, &block.scheduler);
}

// Gives the processor back; returns once the scheduler takes this fiber up again.
void wait() {
  const unsigned self = block.current;
  Fiber& fiber = block.fibers[self];
  leave(&fiber.stack, block.scheduler_stack);
  switch_context(&fiber.context, &block.scheduler);
  arrive(fiber.stack, block.scheduler_stack);
  set_current(self);
}

void make_ready(unsigned thread) {
  block.fibers[thread].state = State::ready;
  block.ready.push_back(thread);
}

// Nobody can go on: either all live threads stand at one barrier, or it is an error.
void release_barrier() {
  const size_t threads = block.fibers.size();
  const Fiber* first = nullptr;
  unsigned first_thread = 0;
  for (unsigned t = 0; t < threads; ++t) {
    const Fiber& fiber = block.fibers[t];
    if (fiber.state == State::at_warp_operation) {
      fail(where(t) + " waits at " + text(fiber.site) +
           " for lanes of its warp that never come there");
    }
    if (fiber.state == State::ended) continue;
    if (first == nullptr) {
      first = &fiber, first_thread = t;
    } else if (text(first->site) != text(fiber.site)) {
      fail("divergent barrier: " + where(first_thread) + " waits at " + text(first->site) + ", " +
           where(t) + " at " + text(fiber.site));
    }
  }
  if (block.ended > 0) {
    fail("divergent barrier: " + where(first_thread) + " waits at " + text(first->site) + ", but " +
         std::to_string(block.ended) + " threads of its block have ended");
  }
  ++epoch;
  block.waiting = 0;
  for (unsigned t = 0; t < threads; ++t) make_ready(t);
}

void run_block(int threads, int64_t shared_bytes, Random& random) {
  block.fibers.assign(size_t(threads), {});
  block.ready.clear();
  block.ended = block.waiting = 0;
  // Bytes that are no sensible number in any type.
  block.shared.assign(size_t(shared_bytes) + 16, 0xff);
  block.shared_arrays.clear();
  block.error = nullptr;
  block_begin = ++epoch;
  for (unsigned t = 0; t < unsigned(threads); ++t) {
    char* stack = stacks.get(t);
    forget(stack);
    block.fibers[t].stack = {stack, kStackBytes};
    make_context(&block.fibers[t].context, stack, &enter);
    make_ready(t);
  }
  while (block.ended < unsigned(threads)) {
    if (block.ready.empty()) release_barrier();
    const size_t pick = random.below(block.ready.size());
    const unsigned next = block.ready[pick];
    block.ready[pick] = block.ready.back();
    block.ready.pop_back();
    set_current(next);
    KnownStack left;
    leave(&block.scheduler_stack, block.fibers[next].stack);
    switch_context(&block.scheduler, &block.fibers[next].context);
    arrive(block.scheduler_stack, left);
    if (block.error) std::rethrow_exception(block.error);
  }
}

}  // namespace

void fail(const std::string& what) { throw std::runtime_error("cuda_on_host: " + what); }

Settings& settings() {
  static Settings instance;
  return instance;
}

std::vector<Launch>& launches() {
  static std::vector<Launch> instance;
  return instance;
}

Shadow* new_global_shadow(int64_t count, bool initialised) {
  if (settings().dry) return nullptr;
  static std::deque<std::unique_ptr<Shadow>> shadows;
  shadows.push_back(std::make_unique<Shadow>(count, initialised));
  if (shadows.size() > kGlobalShadows) shadows.pop_front();
  return shadows.back().get();
}

SharedPiece take_shared(int64_t offset, int64_t count, int64_t element_size) {
  const int64_t bytes = count * element_size;
  if (count < 0 || offset + bytes > int64_t(block.shared.size()) - 16) {
    fail(where(block.current) + " takes " + std::to_string(bytes) + " bytes of shared memory at " +
         std::to_string(offset) + ", but the launch gave " +
         std::to_string(block.shared.size() - 16));
  }
  auto& [size, shadow] = block.shared_arrays[offset];
  if (shadow == nullptr) {
    size = bytes;
    shadow = std::make_unique<Shadow>(count, false);
  } else if (size != bytes) {
    fail(where(block.current) + " takes another array of shared memory than the other threads");
  }
  auto base = reinterpret_cast<uintptr_t>(block.shared.data());
  return {reinterpret_cast<void*>((base + 15) / 16 * 16 + uintptr_t(offset)), shadow.get()};
}

void Shadow::touch_slowly(Cell& cell, int64_t index, Access access) {
  const auto self = int16_t(block.current);
  const auto warp = int16_t(self / 32);
  const auto conflict = [&](const char* what) {
    fail("conflict: " + where(block.current) + " " + (access == Access::read ? "reads" : "writes") +
         " element " + std::to_string(index) + " of an array, which " + what +
         " with no barrier between");
  };
  // Within the current block and epoch, __syncwarp orders what the threads of a warp do.
  const auto is_ordered = [&](int16_t other, int32_t other_warp_epoch) {
    return other == self || (other / 32 == warp && other_warp_epoch < warp_epoch);
  };
  if (cell.write_epoch >= launch_begin && !(cell.atomic && access == Access::atomic)) {
    if (cell.write_epoch < block_begin) conflict("another block wrote");
    if (cell.write_epoch == epoch && !is_ordered(cell.writer, cell.write_warp_epoch)) {
      conflict(("thread " + std::to_string(cell.writer) + " wrote").c_str());
    }
  }
  if (access != Access::write && !cell.initialised) {
    fail("uninitialised: " + where(block.current) + " reads element " + std::to_string(index) +
         " of an array, which nobody wrote");
  }
  if (access == Access::read) {
    const bool is_first = cell.read_epoch != epoch;
    if (is_first && cell.read_epoch >= launch_begin && cell.read_epoch < block_begin) {
      cell.foreign_read_epoch = cell.read_epoch;
    }
    // Earlier readers count no more once this thread is ordered behind them: so is a later write.
    const bool is_alone = is_first || cell.reader == self ||
                          (cell.read_warp == warp && cell.read_warp_epoch < warp_epoch);
    cell.read_warp = is_first || cell.read_warp == warp ? warp : int16_t{-1};
    cell.reader = is_alone ? self : int16_t{-1};
    cell.read_epoch = epoch;
    cell.read_warp_epoch = warp_epoch;
    return;
  }
  if (cell.foreign_read_epoch >= launch_begin ||
      (cell.read_epoch >= launch_begin && cell.read_epoch < block_begin)) {
    conflict("another block read");
  }
  if (cell.read_epoch == epoch && cell.reader != self &&
      !(cell.read_warp == warp && cell.read_warp_epoch < warp_epoch)) {
    conflict("another thread read");
  }
  cell.write_epoch = epoch;
  cell.write_warp_epoch = warp_epoch;
  cell.writer = self;
  cell.atomic = access == Access::atomic;
  cell.initialised = true;
}

void sync_threads(const Site& site) {
  Fiber& self = block.fibers[block.current];
  self.state = State::at_barrier;
  self.site = site;
  ++block.waiting;
  wait();
}

int lane() { return int(block.current % 32); }

WarpValues exchange(unsigned mask, uint64_t value, const Site& site) {
  const unsigned self = block.current, first = self / 32 * 32;
  const unsigned lanes = std::min(unsigned(block.fibers.size()) - first, 32u);
  if (lanes < 32) mask &= (1u << lanes) - 1;  // lanes that the block does not have
  if ((mask >> (self - first) & 1) == 0) {
    fail(where(self) + " is not in the mask of its warp operation at " + text(site));
  }
  Fiber& fiber = block.fibers[self];
  fiber.state = State::at_warp_operation;
  fiber.site = site;
  fiber.mask = mask;
  fiber.value = value;
  bool complete = true;
  for (unsigned l = 0; l < lanes; ++l) {
    const Fiber& other = block.fibers[first + l];
    if ((mask >> l & 1) == 0) continue;
    complete = complete && other.state == State::at_warp_operation;
    if (other.state == State::at_warp_operation &&
        (other.mask != mask || other.site.line() != site.line() ||
         other.site.column() != site.column())) {
      fail("divergent warp: " + where(self) + " is at " + text(site) + ", " + where(first + l) +
           " at " + text(other.site));
    }
  }
  if (!complete) {
    wait();
    return fiber.received;
  }
  WarpValues values{};
  for (unsigned l = 0; l < lanes; ++l) {
    if (mask >> l & 1) values.values[l] = block.fibers[first + l].value;
  }
  for (unsigned l = 0; l < lanes; ++l) {
    if ((mask >> l & 1) == 0 || first + l == self) continue;
    block.fibers[first + l].received = values;
    make_ready(first + l);
  }
  fiber.state = State::ready;
  return values;
}

void sync_warp(unsigned mask, const Site& site) {
  exchange(mask, 0, site);
  // A barrier of some lanes alone is not taken to order anything: too strict rather than too lax.
  if (mask == 0xffffffffu) warp_epoch = ++block.fibers[block.current].warp_epoch;
}

void run_grid(int64_t blocks, int threads, int64_t shared_bytes,
              const std::function<void()>& kernel) {
  if (threads < 1 || threads > 1024) fail("a block of " + std::to_string(threads) + " threads");
  if (blocks > 0x7fffffff) fail("a grid of " + std::to_string(blocks) + " blocks");
  if (shared_bytes > settings().shared_bytes) {
    fail("a launch with " + std::to_string(shared_bytes) + " bytes of shared memory");
  }
  launches().push_back({blocks, threads, shared_bytes});
  if (settings().dry) return;
  Random random(settings().seed++);
  std::vector<unsigned> order(static_cast<size_t>(blocks));
  for (size_t i = 0; i < order.size(); ++i) order[i] = unsigned(i);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  block_size = {unsigned(threads), 1, 1};
  grid_size = {unsigned(blocks), 1, 1};
  block.kernel = &kernel;
  launch_begin = ++epoch;
  for (const unsigned index : order) {
    block_index = {index, 0, 0};
    run_block(threads, shared_bytes, random);
  }
}

}  // namespace cuda_on_host
