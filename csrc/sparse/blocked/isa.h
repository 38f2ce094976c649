// The table through which the variant of the loops over blocked images that this processor can run is called.
#pragma once

#include <cstdint>

namespace drive {

// Loops over the planes of blocked images; what each computes stands beside it in kernels.h.
template <class T>
struct BlockedKernels {
  void (*add)(const T* x, int64_t count, T center, T* sums);
  void (*add_squares)(const T* x, int64_t count, T center, T* sums);
  void (*affine)(const T* x, const T* residual, int64_t count, const T* scale, const T* shift, T floor,
                 T* out);
  void (*add_products)(const T* grad, const T* out, const T* x, int64_t count, T center, T* sums,
                       T* products);
  void (*combine)(const T* grad, const T* out, const T* x, int64_t count, const T* scale, const T* slope,
                  const T* shift, T* to, T* masked);
};

// The variant for this processor (common/each_isa.h).
template <class T>
const BlockedKernels<T>& blocked_kernels();
extern template const BlockedKernels<float>& blocked_kernels<float>();
extern template const BlockedKernels<double>& blocked_kernels<double>();

}  // namespace drive
