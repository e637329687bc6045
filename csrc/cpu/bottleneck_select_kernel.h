// Loops of bottleneck_select, for each instruction set.
//
// Shapes: G groups, R rows a group, T tokens, d width, k capacity of a row. C is the compute type:
// double for double tokens, float for all others.
//
// A task scans a range of tokens for a block of rows of one group: tile by tile, products of all
// its rows with the tile, and a filter that appends what may still be among a row's k largest
// logits to the row's list of candidates. A full list is cut down to about its k largest, whose
// smallest becomes the threshold of the filter. Lists stay in ascending order of tokens, so among
// equal logits position decides, and nothing is ever sorted. Lists of several ranges of one row are
// joined in the end.
//
// Every logit is one chain of multiply-adds over d, in ascending order (of pairs or of 32, where
// bfloat16 is multiplied; of each lane, where a selection is screened), and selection is exact:
// neither depends on tiles, blocks, ranges or threads.
#pragma once

#include <common/cpu_capability.h>

#include <cstdint>

namespace ait::cpu {

// How numbers are stored, or what they are rounded to.
enum class Storage { float32, float64, bfloat16, float16 };

// Integers that are ordered as the logits are.
template <typename C>
struct SelectKeyOf;
template <>
struct SelectKeyOf<float> {
  using type = int32_t;
  using unsigned_type = uint32_t;
};
template <>
struct SelectKeyOf<double> {
  using type = int64_t;
  using unsigned_type = uint64_t;
};
template <typename C>
using SelectKey = typename SelectKeyOf<C>::type;

struct SelectProblem {
  const void* query;      // (G, R, d) of the compute type, contiguous
  const void* tokens;     // (T, G, d), d contiguous
  const uint8_t* mask;    // (T), not 0 = ignore; or null
  Storage token_storage;  // float64 if the compute type is double, else one of the others
  Storage rounding;       // what query and tokens are rounded to; the compute type rounds nothing
  int64_t token_stride;   // of `tokens`, in elements
  int64_t group_stride;
  int64_t num_groups;   // G
  int64_t num_rows;     // R
  int64_t num_tokens;   // T, below 2^31
  int64_t width;        // d
  int64_t k;            // 1 <= k <= T
  int64_t tile_tokens;  // unmasked tokens in a tile, at least 1
  // Row r asks for element r of a token alone (G = 1, d = 1; tokens are (T, R)).
  bool elementwise;
};

struct SelectTask {
  int64_t group;
  int64_t first_row, num_rows;
  int64_t first_token, last_token;  // the last one excluded
  int64_t range;                    // which range of tokens that is
};

// The candidates of a block of rows, for each range of tokens. Entries of a list are in ascending
// order of tokens; the lists of a row lie side by side.
template <typename C>
struct SelectCandidates {
  SelectKey<C>* keys;  // (rows, ranges, capacity)
  int32_t* tokens;     // (rows, ranges, capacity)
  int64_t* counts;     // (rows, ranges)
  int64_t ranges;
  int64_t capacity;  // more than k, or as many as a range has tokens
};

// Which paths a task took.
struct SelectStatistics {
  int64_t list_cuts;     // lists cut down to about their k largest
  int64_t cuts_in_ties;  // of them, those that had to leave out some of several equal ones
  int64_t closed_rows;   // rows that have k NaNs, so that nothing more can enter
  int64_t tiles_in_place;
  int64_t tiles_copied;
  int64_t logits_let_through;  // computed in float32 after products of bfloat16
  int64_t crowded_tiles;       // of which many logits were let through
};

template <typename C>
struct SelectKernels {
  int64_t rows_per_panel;   // rows of a block come in multiples of this without waste
  int64_t tokens_per_step;  // tokens of a tile likewise
  int64_t element_size;     // bytes of an element of a tile
  // What takes about as long as so many products of a token and a row: loading a token, and what an
  // entry of a list costs beside its product.
  int64_t load_cost, entry_cost;
  // A list has room for k / spare_share entries beyond k: with more it is cut more rarely, and lets
  // more pass until it is.
  int64_t spare_share;
  // Bytes of scratch memory, aligned to 64, that scan() needs for a block of num_rows rows.
  int64_t (*scratch_bytes)(const SelectProblem&, int64_t num_rows);
  // Fills the lists of the task's range, at most k entries each.
  SelectStatistics (*scan)(const SelectProblem&, const SelectTask&, const SelectCandidates<C>&,
                           void* scratch);
  // Joins the lists of each row into the rows of values (num_rows, k) and indices (num_rows, k).
  void (*collect)(const SelectProblem&, const SelectCandidates<C>&, int64_t num_rows, C* values,
                  int64_t* indices);
};

struct BottleneckSelectKernels {
  SelectKernels<float> float32;
  SelectKernels<double> float64;
};

AIT_DECLARE_KERNELS(BottleneckSelectKernels, bottleneck_select_kernels)

// For what is rounded to bfloat16. Subnormal operands, products and sums count as zero.
namespace avx512_bf16 {
// Products of pairs, the later one of each pair added first.
extern const SelectKernels<float> bottleneck_select_bf16_kernels;
}  // namespace avx512_bf16
namespace amx_bf16 {
// 32 products at a time: those of even and of odd i in two sums, which are then added.
extern const SelectKernels<float> bottleneck_select_bf16_kernels;
// Logits in float32, computed only where those in bfloat16 do not say that they are too small.
extern const SelectKernels<float> bottleneck_select_screened_kernels;
}  // namespace amx_bf16

}  // namespace ait::cpu
