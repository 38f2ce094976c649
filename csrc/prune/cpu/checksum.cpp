// drive::checksum on CPU: a pass over each tensor, in pieces for the threads.
#include "prune/checksum.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "prune/ops.h"
#include "prune/sampling.h"

namespace drive {
namespace {

template <class Bits>
int64_t sum_bits(const Bits* bits, int64_t n) {
  constexpr int64_t kPiece = 1 << 16;
  std::atomic<uint64_t> sum{0};  // modulo 2^64: in any order
  at::parallel_for(0, (n + kPiece - 1) / kPiece, 1, [&](int64_t first, int64_t last) {
    uint64_t mine = 0;
    for (int64_t i = first * kPiece; i < std::min(n, last * kPiece); ++i) {
      mine += static_cast<uint64_t>(static_cast<int64_t>(bits[i])) * multiplier(i);
    }
    sum += mine;
  });
  return static_cast<int64_t>(scramble(sum));
}

int64_t checksum_of(const at::Tensor& input) {
  check_checksum(input);
  const at::Tensor dense = input.contiguous();
  const void* data = dense.data_ptr();
  const int64_t n = dense.numel();
  switch (dense.element_size()) {
    case 1: return sum_bits(static_cast<const uint8_t*>(data), n);
    case 2: return sum_bits(static_cast<const int16_t*>(data), n);
    case 4: return sum_bits(static_cast<const int32_t*>(data), n);
    default: return sum_bits(static_cast<const int32_t*>(data), 2 * n);
  }
}

}  // namespace

at::Tensor checksum_cpu(at::TensorList inputs) {
  std::vector<int64_t> sums;
  for (const at::Tensor& input : inputs) sums.push_back(checksum_of(input));
  return at::tensor(sums, at::kLong);
}

}  // namespace drive
