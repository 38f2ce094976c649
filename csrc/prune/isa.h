// What the instruction-set variants of drive::prune_'s inner loops share: types, and the table
// through which the one that this processor can run is called.
#pragma once

#include <ATen/Version.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "prune/key.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

}  // namespace drive

#define DRIVE_ISA portable
#define DRIVE_WIDTH 16
#define DRIVE_TARGET
#include "prune/kernels.h"

#if defined(__x86_64__)
#define DRIVE_ISA avx2
#define DRIVE_WIDTH 32
#define DRIVE_TARGET __attribute__((target("avx2")))
#include "prune/kernels.h"

#define DRIVE_ISA avx512
#define DRIVE_WIDTH 64
#define DRIVE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#include "prune/kernels.h"
#endif

namespace drive {

// The variant for this processor, as PyTorch sees it (ATEN_CPU_CAPABILITY=default|avx2|avx512
// lowers it, for PyTorch's own kernels and for these).
template <class T, class Key>
const Kernels<Key>& kernels() {
  static const Kernels<Key> chosen = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return avx512::kernels_of<T, Key>();
    if (capability == "AVX2") return avx2::kernels_of<T, Key>();
#endif
    return portable::kernels_of<T, Key>();
  }();
  return chosen;
}

}  // namespace drive
