// Loops of bottleneck_attend and its backward, for each instruction set.
//
// Shapes: R rows, k entries a row, T tokens, E width. C is the compute type: double for double
// tokens, float for all others. Rows whose list is long are cut into parts of fixed length, so that
// few rows can keep many threads busy, and threads can share the tokens among them; parts are
// combined in order. All rows' first parts come first, then all second parts, and so on: parts that
// stand together read about the same tokens.
#pragma once

#include <common/cpu_capability.h>

#include <cstdint>

namespace ait::cpu {

// Most tokens of a row that are taken together.
constexpr int kAttendBlock = 10;

// Which tokens each row asks.
struct AttendLists {
  const void* tokens;      // (T, E), in the storage type of the kernel
  const int64_t* indices;  // (R, k)
  const int64_t* counts;   // (R): entries of a row before its first -1
  int64_t num_rows;        // R
  int64_t num_entries;     // k
  int64_t width;           // E
  int64_t parts;           // parts of a row
  int64_t part_length;     // entries of a part
  int64_t window;          // tokens that are worth keeping in cache for the next row
  int64_t* cursors;        // (parts, R), scratch
};

template <typename C>
struct AttendForward {
  AttendLists lists;
  const C* query;  // (R, E)
  C* part_max;     // (parts, R), scratch
  C* part_sum;     // (parts, R), scratch
  C* part_pooled;  // (parts, R, E), scratch; pooled itself where parts = 1
  C* pooled;       // (R, E)
  C* gates;        // (R, k)
  C* lse;          // (R)
};

template <typename C>
struct AttendBackward {
  AttendLists lists;
  const C* query;        // (R, E)
  const C* pooled;       // (R, E)
  const C* gates;        // (R, k)
  const C* grad_pooled;  // (R, E), or null: zero
  const C* grad_gates;   // (R, k), or null: zero
  const C* grad_lse;     // (R), or null: zero
  C* offsets;            // (R), scratch: dlse - sum_i gates_i u_i
  bool* takes_part;      // (R), scratch: rows with a gate that is not 0
  C* grad_logits;        // (R, k), scratch
  C* part_grad_query;    // (parts, R, E), scratch; grad_query itself where parts = 1
  C* grad_query;         // (R, E)
  void* grad_tokens;     // (T, E), in the storage type of the kernel
  int64_t slab;          // columns whose part of query and grad_pooled stays in cache
  bool streams;          // grad_tokens is written past the caches: its rows are whole lines
};

// One listed token of one row, as the token sees it.
template <typename C>
struct AttendEntry {
  int64_t row;
  C gate;
  C grad_logit;
};

// What a thread needs to turn the rows' lists into those of a range of tokens.
template <typename C>
struct AttendTokenScratch {
  int64_t* cursors;         // (R)
  int64_t* ends;            // (tokens in the range)
  AttendEntry<C>* entries;  // (capacity)
  int64_t capacity;         // at least R
};

template <typename C>
struct AttendKernels {
  // Logits and weighted sums of the parts [begin, end).
  void (*forward_parts)(const AttendForward<C>&, int64_t begin, int64_t end);
  // pooled, gates and lse of the rows [begin, end), from their parts.
  void (*forward_rows)(const AttendForward<C>&, int64_t begin, int64_t end);
  // offsets and takes_part of the rows [begin, end).
  void (*backward_offsets)(const AttendBackward<C>&, int64_t begin, int64_t end);
  // grad_logits and part_grad_query of the parts [begin, end).
  void (*backward_parts)(const AttendBackward<C>&, int64_t begin, int64_t end);
  // grad_query of the rows [begin, end), from their parts.
  void (*backward_rows)(const AttendBackward<C>&, int64_t begin, int64_t end);
  // grad_tokens of the tokens [begin, end).
  void (*backward_tokens)(const AttendBackward<C>&, const AttendTokenScratch<C>&, int64_t begin,
                          int64_t end);
};

struct BottleneckAttendKernels {
  AttendKernels<float> float32;
  AttendKernels<double> float64;
  AttendKernels<float> bfloat16;
  AttendKernels<float> float16;
};

AIT_DECLARE_KERNELS(BottleneckAttendKernels, bottleneck_attend_kernels)

}  // namespace ait::cpu
