// What drive::shard_* count on a GPU beside the survey: a sample, histograms, splits and ties, among all
// entries or among those that a survey has listed. Survey and apply are those of passes.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "prune/cuda/block.cuh"
#include "prune/cuda/search.cuh"
#include "prune/cuda/step.cuh"
#include "prune/cuda/work.cuh"
#include "prune/key.h"
#include "prune/sampling.h"

namespace drive::gpu {

// Scores of `count` entries, one of each of so many equal parts; 0 for what is pruned.
template <class Key>
__global__ void __launch_bounds__(kThreads)
sample_scores(const __grid_constant__ Work work, int64_t count, typename KeyTraits<Key>::Bits* scores) {
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    const int64_t entry = sampled_entry(i, count, work.entries);
    const Item& item = work.items[find<&Item::first_entry>(work, entry)];
    scores[i] = bits_of_key(key_at<Key>(work, item, entry - item.first_entry));
  }
}

// The survey's counts of chunks by tensor, [4, items] (the first rows of shard_survey's), and its blocks' sums
// of |S|, added up.
template <class Key>
__global__ void __launch_bounds__(kThreads)
collect(const __grid_constant__ Step<Key> step, int blocks, Counter* counts, double* sum) {
  const Work& work = step.work;
  const auto add = [&](int item, const uint32_t* found) {
    for (int row = 0; row < 4; ++row) {
      if (found[row]) atomicAdd(&counts[row * work.count + item], static_cast<Counter>(found[row]));
    }
  };
  for (int64_t first = blockIdx.x * kThreads; first < work.chunks; first += gridDim.x * kThreads) {
    const int64_t c = first + threadIdx.x;
    const int item = find<&Item::first_chunk>(work, min(c, work.chunks - 1));
    uint32_t found[4] = {};
    if (c < work.chunks) {
      const ChunkCounts& chunk = step.chunks[c];
      found[0] = chunk.top - chunk.at_hi, found[1] = chunk.at_hi;
      found[2] = chunk.inside, found[3] = chunk.at_lo;
    }
    if (__match_any_sync(kFull, static_cast<unsigned>(item)) == kFull) {  // as in most warps of large tensors
      for (int row = 0; row < 4; ++row) found[row] = __reduce_add_sync(kFull, found[row]);
      if (lane() == 0) add(item, found);
    } else {
      add(item, found);
    }
  }
  if (blockIdx.x > 0) return;
  double own = 0;
  for (int b = threadIdx.x; b < blocks; b += kThreads) own += step.sums[b];
  own = sum_in_order(own);
  if (threadIdx.x == 0) *sum = own;
}

// Of a tensor: where it counts, -1 if it does not, and its threshold.
template <class Key>
struct Asked {
  int32_t row;
  Key threshold;
};

template <class Key>
struct Query {
  Work work;
  const Asked<Key>* asked;    // [items]
  const ChunkCounts* chunks;  // as the survey left them, with list and positions; null: all entries count
  const Key* list;
  const uint16_t* positions;
  int64_t places;
};

// body(what is asked of its tensor, chunk, which of the chunk's entries, its key) for all that counts, and
// with kDead for what does not. Whole warps call it together, each for one tensor.
template <class Key, class Body>
__device__ void for_each_key(const Query<Key>& query, Body body) {
  const Work& work = query.work;
  if (query.chunks) {  // a warp for each chunk's part of the list
    for (int64_t c = blockIdx.x * kWarps + warp(); c < work.chunks; c += gridDim.x * kWarps) {
      const Chunk chunk = chunk_at(work, c);
      const Asked<Key> asked = query.asked[chunk.item];
      const ChunkCounts counts = query.chunks[c];
      if (asked.row < 0 || counts.list + counts.inside > query.places) continue;
#pragma unroll 1
      for (int first = 0; first < counts.inside; first += kWarp) {
        const int i = first + lane();
        const bool exists = i < counts.inside;
        body(asked, chunk, exists ? query.positions[counts.list + i] : 0,
             exists ? query.list[counts.list + i] : kDead<Key>);
      }
    }
    return;
  }
  for (int64_t c = blockIdx.x; c < work.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(work, c);
    const Asked<Key> asked = query.asked[chunk.item];
    if (asked.row < 0) continue;
    const Item item = work.items[chunk.item];
    for_each_entry(chunk, [&](int i, bool exists) {
      body(asked, chunk, i, exists ? key_at<Key>(work, item, chunk.begin + i) : kDead<Key>);
    });
  }
}

// counts[b] += keys in low + [b, b + 1) * 2^shift.
template <class Key>
__global__ void __launch_bounds__(kThreads)
bucket_counts(const __grid_constant__ Query<Key> query, Key low, int shift, int buckets, Counter* counts) {
  using Bits = typename KeyTraits<Key>::Bits;
  __shared__ Histogram<> histogram;
  histogram.clear();
  for_each_key(query, [&](const Asked<Key>&, const Chunk&, int, Key key) {
    const Bits bucket = (static_cast<Bits>(key) - static_cast<Bits>(low)) >> shift;
    histogram.add(key >= low && bucket < static_cast<Bits>(buckets) ? static_cast<int>(bucket) : -1);
  });
  histogram.add_to(counts);
}

// counts [rows, 2] += by tensor, keys above its threshold and on it.
template <class Key>
__global__ void __launch_bounds__(kThreads)
split_counts(const __grid_constant__ Query<Key> query, Counter* counts) {
  int32_t row = -1;
  uint32_t above = 0, equal = 0;  // of `row`, not added yet
  const auto flush = [&] {
    above = __reduce_add_sync(kFull, above);
    equal = __reduce_add_sync(kFull, equal);
    if (lane() == 0 && above) atomicAdd(&counts[2 * row], static_cast<Counter>(above));
    if (lane() == 0 && equal) atomicAdd(&counts[2 * row + 1], static_cast<Counter>(equal));
    above = equal = 0;
  };
  for_each_key(query, [&](const Asked<Key>& asked, const Chunk&, int, Key key) {
    if (asked.row != row) flush();
    row = asked.row;
    above += key > asked.threshold;
    equal += key == asked.threshold;
  });
  flush();
}

// counts[r] += keys on the threshold at the row-major positions in [ends[r], ends[r + 1]), of one tensor.
template <class Key>
__global__ void __launch_bounds__(kThreads)
tie_counts(const __grid_constant__ Query<Key> query, const int64_t* ends, int ranges, Counter* counts) {
  const Work& work = query.work;
  for_each_key(query, [&](const Asked<Key>& asked, const Chunk& chunk, int i, Key key) {
    int range = -1;
    if (key == asked.threshold) {
      const Item& item = work.items[chunk.item];
      const int64_t position = global_index(work, item, chunk.begin + i) - item.first_entry;
      for (int above = ranges + 1; above - range > 1;) {  // ends[range] <= position < ends[above]
        const int middle = (range + above) / 2;
        (ends[middle] <= position ? range : above) = middle;
      }
    }
    count_up(counts, range < ranges ? range : -1);
  });
}

}  // namespace drive::gpu
