// The sparse ops' inner loops, compiled for each instruction set.
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12: in its own AVX-512 headers

#include "sparse_isa.h"

#include <ATen/Version.h>

#include <algorithm>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DRIVE_ISA portable
#define DRIVE_WIDTH 16
#define DRIVE_REGISTERS 16
#define DRIVE_TARGET
#include "sparse_kernels.h"

#if defined(__x86_64__)
#define DRIVE_ISA avx2
#define DRIVE_WIDTH 32
#define DRIVE_REGISTERS 16
#define DRIVE_TARGET __attribute__((target("avx2,fma")))
#include "sparse_kernels.h"

#define DRIVE_ISA avx512
#define DRIVE_WIDTH 64
#define DRIVE_REGISTERS 32
#define DRIVE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#include "sparse_kernels.h"
#endif

namespace drive {

template <class T>
const SparseKernels<T>& sparse_kernels() {
  static const SparseKernels<T> chosen = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return avx512::sparse_kernels_of<T>();
    if (capability == "AVX2") return avx2::sparse_kernels_of<T>();
#endif
    return portable::sparse_kernels_of<T>();
  }();
  return chosen;
}

template const SparseKernels<float>& sparse_kernels<float>();
template const SparseKernels<double>& sparse_kernels<double>();

}  // namespace drive
