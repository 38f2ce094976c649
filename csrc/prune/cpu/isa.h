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

// Entries per block, 64 bytes of keys, the widest vector: chunks are padded to multiples of it.
template <class Key>
constexpr int kBlock = 64 / sizeof(Key);

// Contiguous operands of one chunk; grad, mask_grad and mask may be null.
struct Entries {
  const void* weight;
  const void* grad;
  const void* mask_grad;
  const uint8_t* mask;
};

// What one pass tells of one chunk, for a bracket [lo, hi].
struct Counts {
  int32_t above, at_hi, inside, at_lo;
  int32_t alive, nonfinite;
  int64_t inside_begin;  // where the chunk's keys inside the bracket lie in the scratch buffer
  double sum;            // of |S| (Eq. 7)
};

template <class Key>
struct Kernels {
  Counts (*survey)(const Entries&, int64_t n, Key lo, Key hi, Key* inside);
  void (*compute_keys)(const Entries&, int64_t n, Key* keys);
  void (*apply)(const Entries&, int64_t n, Key cut, void* weight, uint8_t* mask);
};

// Of operands of a dtype, the variant for this processor (common/each_isa.h).
template <class Key>
const Kernels<Key>& kernels(at::ScalarType dtype);
extern template const Kernels<int32_t>& kernels<int32_t>(at::ScalarType dtype);
extern template const Kernels<int64_t>& kernels<int64_t>(at::ScalarType dtype);

}  // namespace drive
