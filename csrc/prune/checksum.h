// drive::checksum, as every device computes it: the sum of bits * multiplier(position), scrambled (sampling.h),
// modulo 2^64. Bits are those of an entry; of one of 8 bytes, two of 4, so that none is pushed out of the sum.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "common/common.h"
#include "prune/key.h"

namespace drive {

inline void check_checksum(const at::Tensor& input) {
  const int64_t size = input.element_size();
  TORCH_CHECK_TYPE(size == 1 || size == 2 || size == 4 || size == 8,
                   "drive::checksum: inputs must have entries of 1, 2, 4 or 8 bytes, got ", input.dtype());
}

// By which drive::checksum multiplies the bits of an entry: every position has one of its own, scattered over
// 64 bits, so that differences do not add up to 0.
DRIVE_HOST_DEVICE constexpr uint64_t multiplier(int64_t position) {
  const uint64_t x = (static_cast<uint64_t>(position) + 1) * 0x9e3779b97f4a7c15u;
  return x ^ (x >> 32);
}

}  // namespace drive
