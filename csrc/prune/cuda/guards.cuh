// min_keep on a GPU: does any tensor fall below its guard, and what does each guard keep?
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "prune/cuda/block.cuh"
#include "prune/cuda/search.cuh"
#include "prune/cuda/step.cuh"
#include "prune/cuda/work.cuh"
#include "prune/key.h"

namespace drive::gpu {

// Survivors of each tensor, were the cut that of Stage::all. A warp for each chunk.
template <class Key>
__global__ void __launch_bounds__(kThreads) tally(const __grid_constant__ Step<Key> step) {
  const Where source = plan(step).where;
  if (source == Where::refused) return;
  const Work& work = step.work;
  const Cut<Key> cut = step.all.cuts[0];
  for (int64_t c = blockIdx.x * kWarps + warp(); c < work.chunks; c += gridDim.x * kWarps) {
    const Chunk chunk = chunk_at(work, c);
    const Item& item = work.items[chunk.item];
    const auto keeps = [&](Key key, int i) {
      return cut.keeps(key, global_index(work, item, chunk.begin + i));
    };
    uint32_t kept = 0;
    if (source == Where::list) {
      const ChunkCounts counts = step.chunks[c];
      const uint32_t* words = words_of(step.bits, item, chunk);
      for (int w = lane(); w < count_words(chunk); w += kWarp) kept += __popc(words[w]);
      for (int i = lane(); i < counts.inside; i += kWarp) {
        kept += keeps(step.list[counts.list + i], step.positions[counts.list + i]);
      }
    } else {
      for (int i = chunk.from + lane(); i < chunk.to; i += kWarp) {
        const Key key = key_at<Key>(work, item, chunk.begin + i);
        kept += key != kDead<Key> && keeps(key, i);
      }
    }
    kept = __reduce_add_sync(kFull, kept);
    if (lane() == 0) atomicAdd(&step.kept[chunk.item], static_cast<Counter>(kept));
  }
}

// The search for what a tensor keeps in any case.
template <class Key>
__device__ Search<Key> guard_of(const Step<Key>& step, int tensor) {
  const auto alive = static_cast<int64_t>(step.alive[tensor]);
  return {kDead<Key>, min(step.min_keep, alive), alive};
}

// How many each guard keeps, and what is left of the budget for others. One block.
template <class Key>
__global__ void __launch_bounds__(kThreads) judge(const __grid_constant__ Step<Key> step) {
  const Totals& t = *step.totals;
  if (t.nonfinite) return;
  bool below = false;
  int64_t cost = 0, total;
  for (int i = threadIdx.x; i < step.work.count; i += kThreads) {
    const Search<Key> guard = guard_of(step, i);
    const Item& item = step.work.items[i];
    if (item.segment >= 0) step.guards.search(item.segment, 0) = guard;
    below |= static_cast<int64_t>(step.kept[i]) < guard.k;
    step.kept[i] = 0;
    cost += guard.k * item.cost;
  }
  below = __syncthreads_or(below);
  scan(cost, &total);
  if (threadIdx.x == 0) {
    const auto alive = static_cast<int64_t>(t.alive);
    *step.guarded = below;
    step.rest.search(0, 0) = {kDead<Key>, max(int64_t{0}, min(step.budget, alive) - total), alive - total};
  }
}

// Clears the histograms of guards, which lie where bits and list were: nobody reads those any more.
template <class Key>
__global__ void __launch_bounds__(kThreads) clear(const __grid_constant__ Step<Key> step) {
  if (!*step.guarded) return;
  const int64_t size = step.segments * kDigits<Key> * kBuckets;
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < size; i += gridDim.x * kThreads) {
    step.guards.histograms[i] = 0;
  }
}

// Steps 3 and 4 for the guards of tensors without a segment: a block each, which counts them in shared memory.
template <class Key>
__global__ void __launch_bounds__(kThreads) guard(const __grid_constant__ Step<Key> step) {
  __shared__ Histogram<> histogram;
  if (!*step.guarded) return;
  for (int tensor = blockIdx.x; tensor < step.work.count; tensor += gridDim.x) {
    const Item& item = step.work.items[tensor];
    if (item.segment >= 0) continue;
    const int64_t begin = item.first_chunk, size = chunks_of(item);
    Search<Key> search = guard_of(step, tensor);
    for (int digit = 0; search.k > 0 && digit < kDigits<Key>; ++digit) {
      histogram.clear();
      for (int64_t c = begin; c < begin + size; ++c) {
        count_chunk<Key, Stage::guards>(step, chunk_at(step.work, c), search, digit, 1u, histogram);
      }
      __syncthreads();
      search = pick(histogram.counts, search, digit);
    }
    for (int64_t c = begin; search.k != search.equal && c < begin + size; ++c) {
      count_ties<Key, Stage::guards>(step, chunk_at(step.work, c), search.prefix);
    }
    __syncthreads();
    const Cut<Key> found = cut_in<Key, Stage::guards>(step, search, begin, size);
    if (threadIdx.x == 0) step.guards.cuts[tensor] = found;
  }
}

}  // namespace drive::gpu
