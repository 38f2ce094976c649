// drive::checksum on a GPU: a pass over each tensor's memory, in loads of 16 bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "prune/checksum.h"
#include "prune/cuda/block.cuh"
#include "prune/cuda/vectors.cuh"
#include "prune/cuda/work.cuh"
#include "prune/sampling.h"

namespace drive::gpu {

template <class Bits>
struct alignas(16) Loaded {
  static constexpr int kEntries = 16 / sizeof(Bits);
  Bits at[kEntries];
};

// *sum += bits * multiplier(position), modulo 2^64, over n contiguous entries. One load in flight a thread: with
// 2048 threads 32 KB a multiprocessor, where HBM asks for 23 (work.cuh); four would take 205 registers.
template <class Bits>
__global__ void __launch_bounds__(kThreads) sum_bits(char* data, int64_t n, Counter* sum) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t thread = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  constexpr int kEntries = Loaded<Bits>::kEntries;
  const int64_t loads = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? n / kEntries : 0;
  uint64_t own = 0;
  const auto add = [&](int64_t i, Bits bits) {
    own += static_cast<uint64_t>(static_cast<int64_t>(bits)) * multiplier(i);
  };
#pragma unroll 1
  for (int64_t l = thread; l < loads; l += threads) {
    const auto loaded = global<Loaded<Bits>>(data + l * 16);
#pragma unroll
    for (int j = 0; j < kEntries; ++j) add(l * kEntries + j, loaded.at[j]);
  }
#pragma unroll 1
  for (int64_t i = loads * kEntries + thread; i < n; i += threads) {
    add(i, global<Bits>(data + i * sizeof(Bits)));
  }
  int64_t total;
  scan(static_cast<int64_t>(own), &total);
  if (threadIdx.x == 0) atomicAdd(sum, static_cast<Counter>(total));
}

template <class Sum>  // a template, as kernels of several files are
__global__ void scramble_sums(Sum* sums, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) sums[i] = scramble(sums[i]);
}

}  // namespace drive::gpu
