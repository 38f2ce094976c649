// The sparse ops' inner loops, compiled for each instruction set.
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12: in its own AVX-512 headers

#include "sparse/isa.h"

#include <ATen/Version.h>

#include <algorithm>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DRIVE_INLINE DRIVE_TARGET __attribute__((always_inline)) static inline

#define DRIVE_ISA portable
#define DRIVE_WIDTH 16
#define DRIVE_REGISTERS 16
#define DRIVE_TARGET
#include "sparse/kernels/kernels.h"
#include "sparse/blocked/kernels.h"
#undef DRIVE_ISA
#undef DRIVE_WIDTH
#undef DRIVE_REGISTERS
#undef DRIVE_TARGET

#if defined(__x86_64__)
#define DRIVE_ISA avx2
#define DRIVE_WIDTH 32
#define DRIVE_REGISTERS 16
#define DRIVE_TARGET __attribute__((target("avx2,fma")))
#include "sparse/kernels/kernels.h"
#include "sparse/blocked/kernels.h"
#undef DRIVE_ISA
#undef DRIVE_WIDTH
#undef DRIVE_REGISTERS
#undef DRIVE_TARGET

#define DRIVE_ISA avx512
#define DRIVE_WIDTH 64
#define DRIVE_REGISTERS 32
#define DRIVE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#include "sparse/kernels/kernels.h"
#include "sparse/blocked/kernels.h"
#endif

namespace drive {
namespace {

enum class Capability { portable, avx2, avx512 };

Capability capability() {
#if defined(__x86_64__)
  const std::string name = at::get_cpu_capability();
  if (name == "AVX512") return Capability::avx512;
  if (name == "AVX2") return Capability::avx2;
#endif
  return Capability::portable;
}

}  // namespace

template <class T>
const SparseKernels<T>& sparse_kernels() {
  static const SparseKernels<T> chosen = [] {
    switch (capability()) {
#if defined(__x86_64__)
      case Capability::avx512: return avx512::sparse_kernels_of<T>();
      case Capability::avx2: return avx2::sparse_kernels_of<T>();
#endif
      default: return portable::sparse_kernels_of<T>();
    }
  }();
  return chosen;
}

template <class T>
const BlockedKernels<T>& blocked_kernels() {
  static const BlockedKernels<T> chosen = [] {
    switch (capability()) {
#if defined(__x86_64__)
      case Capability::avx512: return avx512::blocked_kernels_of<T>();
      case Capability::avx2: return avx2::blocked_kernels_of<T>();
#endif
      default: return portable::blocked_kernels_of<T>();
    }
  }();
  return chosen;
}

template const SparseKernels<float>& sparse_kernels<float>();
template const SparseKernels<double>& sparse_kernels<double>();
template const BlockedKernels<float>& blocked_kernels<float>();
template const BlockedKernels<double>& blocked_kernels<double>();

}  // namespace drive
