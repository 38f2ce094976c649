// What the threads of a block do together: sums, histograms and the choice of a bucket.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "prune/cuda/work.cuh"
#include "prune/key.h"

namespace drive::gpu {

using Counter = unsigned long long;  // CUDA's own name for what atomicAdd adds 64 bits to

__device__ inline int lane() { return threadIdx.x % kWarp; }
__device__ inline int warp() { return threadIdx.x / kWarp; }

// The sum of the values of all threads before this one; *total: of all threads.
__device__ inline int64_t scan(int64_t value, int64_t* total) {
  __shared__ int64_t sums[kWarps];
  int64_t sum = value;
  for (int d = 1; d < kWarp; d *= 2) {
    const int64_t before = __shfl_up_sync(kFull, sum, d);
    if (lane() >= d) sum += before;
  }
  __syncthreads();  // the previous scan has been read
  if (lane() == kWarp - 1) sums[warp()] = sum;
  __syncthreads();
  int64_t before = 0;
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp()) before = *total;
    *total += sums[w];
  }
  return before + sum - value;
}

// The sum over all threads, in a fixed order; thread 0 has it.
__device__ inline double sum_in_order(double value) {
  __shared__ double sums[kWarps];
  for (int d = kWarp / 2; d > 0; d /= 2) value += __shfl_down_sync(kFull, value, d);
  __syncthreads();
  if (lane() == 0) sums[warp()] = value;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += sums[w];
  return total;
}

// Adds `each` to counters[i] for every lane with i >= 0: one addition for all lanes of a warp with the same i,
// as scores that crowd into few buckets would queue up otherwise. All lanes of the warp must call it.
template <class T>
__device__ void count_up(T* counters, int i, T each = 1) {
  const unsigned same = __match_any_sync(kFull, static_cast<unsigned>(i));
  if (i >= 0 && lane() == __ffs(same) - 1) atomicAdd(&counters[i], __popc(same) * each);
}

// A block's own histogram of one digit, in shared memory: of entries, or of their costs in 64 bits.
template <class T = uint32_t>
struct Histogram {
  T counts[kBuckets];

  __device__ void clear() {
    __syncthreads();
    for (int b = threadIdx.x; b < kBuckets; b += kThreads) counts[b] = 0;
    __syncthreads();
  }
  __device__ void add(int bucket, T each = 1) { count_up(counts, bucket, each); }  // -1: nothing
  __device__ void add_to(Counter* all) {
    __syncthreads();
    for (int b = threadIdx.x; b < kBuckets; b += kThreads) {
      if (counts[b]) atomicAdd(&all[b], static_cast<Counter>(counts[b]));
    }
  }
};

// What is known of the k-th largest key after some of its digits: those digits, its rank among the keys
// that share them, and how many these are. k = 0: nothing is wanted. Where entries have costs, as many as an entry
// costs have its key.
template <class Key>
struct Search {
  Key prefix;
  int64_t k, equal;
};

// One digit more, from the histogram of that digit among the keys that share the prefix. All threads of
// the block return the same.
template <class Key, class T>
__device__ Search<Key> pick(const T* histogram, const Search<Key>& search, int digit) {
  using Bits = typename KeyTraits<Key>::Bits;
  constexpr int kEach = kBuckets / kThreads;
  __shared__ Search<Key> found;
  const int top = kBuckets - 1 - static_cast<int>(threadIdx.x) * kEach;  // threads go from the largest down
  int64_t own = 0, all;
  for (int j = 0; j < kEach; ++j) own += static_cast<int64_t>(histogram[top - j]);
  int64_t k = search.k - scan(own, &all);
  if (k >= 1 && k <= own) {
    int b = top;
    for (; k > static_cast<int64_t>(histogram[b]); --b) k -= static_cast<int64_t>(histogram[b]);
    const Bits prefix = static_cast<Bits>(search.prefix) | static_cast<Bits>(b) << digit_shift<Key>(digit);
    found = {static_cast<Key>(prefix), k, static_cast<int64_t>(histogram[b])};
  }
  __syncthreads();
  return found;
}

}  // namespace drive::gpu
