// Loops of hopfield_retrieve and its backward, for each instruction set.
//
// Shapes: T tokens, M patterns, E width. C is the compute type: double for a double state, float
// for all others. Tiles of tokens are copied to scratch memory in the compute type; every product
// is a tile times a packed matrix, each of its elements one chain of multiply-adds over the depth
// in ascending order: so the result of a token depends neither on the tile nor on its place in it.
//
// A packed matrix (depth, columns) is cut into panels of `panel` columns; a panel holds, row after
// row, its columns side by side, filled up with zeros (to half a panel where that is enough).
#pragma once

#include <common/cpu_capability.h>

#include <cstdint>

namespace ait::cpu {

template <typename C>
struct HopfieldPatterns {
  int64_t num_patterns;    // M
  int64_t width;           // E
  const C* transposed;     // packed P^T (E, M): states to logits
  const C* packed;         // packed P (M, E): weights to states
  const C* gram;           // packed P P^T (M, M): weights to logits; null: by way of the states
  int64_t pattern_stride;  // of the rows of tiles that are M wide
  int64_t width_stride;    // of the rows of tiles that are E wide
};

template <typename C>
struct HopfieldForward {
  HopfieldPatterns<C> patterns;
  const void* state;  // (T, E), in the storage type of the kernel
  C beta;
  int64_t steps;
  C tol;
  int64_t tile;          // tokens of a tile
  void* out;             // (T, E), in the storage type of the kernel
  int64_t* steps_taken;  // (T)
  C* lse;                // (T)
};

// The largest of a token's logits times beta, and the sum of exp(beta logits - maximum).
template <typename C>
struct SoftmaxSum {
  C maximum;
  C sum;
};

// Tiles of the tokens that are worked on, for each thread.
template <typename C>
struct HopfieldForwardScratch {
  C* state;             // (tile, E)
  C* moved;             // (tile, E): where a step leads to; used if steps > 1
  C* weights;           // (tile, M)
  C* logits;            // (tile, M)
  C* change;            // (tile, M); used if steps > 1 and tol > 0
  C* product;           // (tile, M); used if steps > 1 and tol > 0
  SoftmaxSum<C>* sums;  // (tile)
  bool* stopped;        // (tile)
};

template <typename C>
struct HopfieldBackward {
  HopfieldPatterns<C> patterns;
  const void* grad_out;        // (T, E), in the storage type of the kernel
  const void* state;           // (T, E), in the storage type of the kernel
  const int64_t* steps_taken;  // (T), in [1, steps]
  C beta;
  int64_t tile;      // tokens of a tile
  int64_t segment;   // steps whose weights are held at once; others are computed again from the
                     // weights of each segment's first step
  void* grad_state;  // (T, E), in the storage type of the kernel
};

template <typename C>
struct HopfieldBackwardScratch {
  C* state;         // (tile, E)
  C* grad_out;      // (tile, E)
  C* moved;         // (tile, E); used without a Gram matrix
  C* last;          // (tile, M): the weights of each token's last step
  C* grad_weights;  // (tile, M)
  C* grad_logits;   // (tile, M), times beta
  C* product;       // (tile, M)
  C* segment;       // (segment, tile, M): weights of the steps of the present segment
  C* checkpoints;   // (segments, tile, M): weights of the first step of each segment
};

template <typename C>
struct HopfieldKernels {
  int64_t panel;  // columns of a whole panel: twice the vector's
  // Packs the panels [begin, end) of source (depth, columns), or of the transpose of source
  // (columns, depth).
  void (*pack)(const C* source, int64_t stride, int64_t depth, int64_t columns, C* packed,
               int64_t begin, int64_t end);
  void (*pack_transposed)(const C* source, int64_t stride, int64_t depth, int64_t columns,
                          C* packed, int64_t begin, int64_t end);
  // out (rows, columns) = a (rows, depth) times a packed matrix. The rows of `out` are written in
  // whole vectors.
  void (*multiply)(const C* a, int64_t a_stride, int64_t rows, const C* packed, int64_t depth,
                   int64_t columns, C* out, int64_t out_stride);
  // The tokens [begin, end).
  void (*forward)(const HopfieldForward<C>&, const HopfieldForwardScratch<C>&, int64_t begin,
                  int64_t end);
  // The tokens [begin, end); adds their part to grad_patterns (M, E) and, with a Gram matrix, to
  // grad_gram (M, M).
  void (*backward)(const HopfieldBackward<C>&, const HopfieldBackwardScratch<C>&, int64_t begin,
                   int64_t end, C* grad_patterns, C* grad_gram);
};

struct HopfieldRetrieveKernels {
  HopfieldKernels<float> float32;
  HopfieldKernels<double> float64;
  HopfieldKernels<float> bfloat16;
  HopfieldKernels<float> float16;
};

AIT_DECLARE_KERNELS(HopfieldRetrieveKernels, hopfield_retrieve_kernels)

}  // namespace ait::cpu
