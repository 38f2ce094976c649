// What the instruction-set variants of drive::prune_'s inner loops share: types, and the table
// through which the one that this processor can run is called.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace drive {

// N entries of a type in one register, in GCC's and Clang's vector types.
template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

// Entries per block, 64 bytes of keys, the widest vector.
template <class Key>
constexpr int kBlock = 64 / sizeof(Key);

// Entries with a bit each in one word: chunks are padded to multiples of it.
constexpr int kWord = 64;

// Does this processor like each line that a loop reads to be asked for (kernels.h)?
extern const bool kPrefetchLines;

// Contiguous operands of one chunk; grad, mask_grad and mask may be null.
struct Entries {
  const void* weight;
  const void* grad;
  const void* mask_grad;
  const uint8_t* mask;
  float grad_scale, product_scale;  // of the gradient of two operands, of the product of others; else 1
};

// Between which keys a threshold is looked for.
template <class Key>
struct Bracket {
  Key lo, hi;
  bool edges;  // are the entries on both to be counted, too?
};

// What one pass tells of one chunk, for a bracket.
struct Counts {
  int32_t top, inside;   // entries at or above hi; strictly inside
  int32_t above, at_lo;  // if its edges count
  int32_t alive, nonfinite;  // the latter are counted by work.h
  int64_t inside_begin;  // where the chunk's keys inside the bracket lie in the scratch buffer
  double sum;            // of |S| (Eq. 7)
};

// The same of one word's entries, a bit each.
struct Placed {
  uint64_t top, inside;
};

template <class Key>
struct Kernels {
  Counts (*survey)(const Entries&, int64_t n, const Bracket<Key>&, Placed* placed, Key* inside);
  void (*compute_keys)(const Entries&, int64_t n, Key* keys);
  void (*reaching)(const Entries&, int64_t n, Key cut, uint64_t* keep);
  void (*resolve)(const Placed* placed, int64_t n, const Key* inside, Key cut, uint64_t* keep);
  void (*apply)(const uint64_t* keep, int64_t n, void* weight, uint8_t* mask);
};

// Of operands of a dtype, the variant for this processor (common/each_isa.h).
template <class Key>
const Kernels<Key>& kernels(at::ScalarType dtype);
extern template const Kernels<int32_t>& kernels<int32_t>(at::ScalarType dtype);
extern template const Kernels<int64_t>& kernels<int64_t>(at::ScalarType dtype);

}  // namespace drive
