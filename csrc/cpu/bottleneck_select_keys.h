// Keys of logits for bottleneck_select, and the k largest of many. Included by
// bottleneck_select_list.h alone.
#pragma once

#include <common/simd_keys.h>
#include <cpu/bottleneck_select_kernel.h>

namespace ait::cpu {
namespace {

template <typename C>
constexpr SelectKey<C> kLargestKey = SelectKey<C>(~(uint64_t{1} << 63) >> (64 - 8 * sizeof(C)));
template <typename C>
constexpr SelectKey<C> kBelowAllKeys = -kLargestKey<C> - 1;

// All NaNs have the largest key, and -0 that of +0.
template <typename C>
AIT_INLINE SelectKey<C> to_key(C logit) {
  using Key = SelectKey<C>;
  if (logit != logit) return kLargestKey<C>;
  const C without_negative_zero = logit + C(0);
  Key bits;
  std::memcpy(&bits, &without_negative_zero, sizeof bits);
  return bits ^ ((bits >> (8 * sizeof(Key) - 1)) & kLargestKey<C>);
}

template <typename C>
AIT_INLINE C to_logit(SelectKey<C> key) {
  using Key = SelectKey<C>;
  if (key == kLargestKey<C>) return C(__builtin_nanf(""));
  const Key bits = key ^ ((key >> (8 * sizeof(Key) - 1)) & kLargestKey<C>);
  C logit;
  std::memcpy(&logit, &bits, sizeof logit);
  return logit;
}

template <typename Key>
int64_t count_at_least(const Key* keys, int64_t n, Key bound) {
  Key count = 0;  // n < 2^31, and a counter as wide as the keys vectorises best
  for (int64_t i = 0; i < n; ++i) count += Key(keys[i] >= bound);
  return count;
}

template <typename Key>
Key smallest_of(const Key* keys, int64_t n) {
  Key smallest = keys[0];
  for (int64_t i = 1; i < n; ++i) smallest = keys[i] < smallest ? keys[i] : smallest;
  return smallest;
}

// `mask` with all but its lowest `n` bits set to 0.
AIT_INLINE uint32_t lowest_bits(uint32_t mask, int64_t n) {
  uint32_t rest = mask;
  for (; n > 0 && rest != 0; --n) rest &= rest - 1;
  return mask ^ rest;
}

template <typename C>
struct Kept {
  int64_t count;
  SelectKey<C> smallest;
  bool in_ties;  // entries equal to the smallest were left out
};

// A key about half way from `low` to `high` > `low`, above the former. Half way in bits is far from
// half way in logits where those span many powers of two, zero among them: half of the bits are
// below 1. But halvings of bits come to an end whatever the keys are.
template <typename C>
AIT_INLINE SelectKey<C> between(SelectKey<C> low, SelectKey<C> high, bool may_take_logits) {
  using Unsigned = typename SelectKeyOf<C>::unsigned_type;
  constexpr int kMantissaBits = sizeof(C) == 4 ? 23 : 52;
  const Unsigned span = Unsigned(high) - Unsigned(low);
  if (may_take_logits && span >> kMantissaBits > 4) {
    const SelectKey<C> middle = to_key(to_logit<C>(low) / 2 + to_logit<C>(high) / 2);
    if (low < middle && middle <= high) return middle;  // high if not finite
  }
  return SelectKey<C>(Unsigned(low) + span / 2 + 1);
}

// Keeps the largest of n > k entries, in their order; of equal ones the first: k of them, or up to
// `most` if that is quicker. Bisection: at most kLogitPasses counting passes and one for each bit
// of a key, whatever the keys are. There must be room for whole vectors of entries.
template <typename C>
Kept<C> keep_largest(SelectKey<C>* keys, int32_t* tokens, int64_t n, int64_t k, int64_t most) {
  using Key = SelectKey<C>;
  constexpr int kLanes = Vec<C>::size, kLogitPasses = 12;
  Key low = keys[0], high = keys[0];
  for (int64_t i = 1; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  int64_t at_least_low = n, above_high = 0;  // throughout, the first is >= k, the second < k
  for (int pass = 0; low < high && at_least_low > most; ++pass) {
    // First, since ties are frequent: whether all but the smallest are fewer than k.
    const Key middle =
        at_least_low == n ? Key(low + 1) : between<C>(low, high, pass < kLogitPasses);
    const int64_t at_least_middle = count_at_least(keys, n, middle);
    if (at_least_middle >= k) {
      low = middle;
      at_least_low = at_least_middle;
    } else {
      high = middle - 1;
      above_high = at_least_middle;
    }
  }
  // All that are > low stay, and of those equal to it the first, as many as there is room for.
  const bool in_ties = at_least_low > most;
  int64_t equal_ones = in_ties ? k - above_high : n;
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    uint32_t greater = greater_mask<kLanes>(keys + i, low);
    uint32_t equal = equal_mask<kLanes>(keys + i, low);
    if (n - i < kLanes) {
      greater &= (1u << (n - i)) - 1;
      equal &= (1u << (n - i)) - 1;
    }
    const int count = __builtin_popcount(equal);
    if (count > equal_ones) equal = lowest_bits(equal, equal_ones);
    equal_ones -= count < equal_ones ? count : equal_ones;
    const uint32_t mask = greater | equal;
    compact<kLanes>(keys + kept, keys + i, mask);
    compact<kLanes>(tokens + kept, tokens + i, mask);
    kept += __builtin_popcount(mask);
  }
  return {kept, smallest_of(keys, kept), in_ties};
}

}  // namespace
}  // namespace ait::cpu
