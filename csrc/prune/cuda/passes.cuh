// The two passes over all entries on a GPU: survey and apply (steps 2 and 5 of prune.cu).
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "prune/cuda/block.cuh"
#include "prune/cuda/search.cuh"
#include "prune/cuda/step.cuh"
#include "prune/cuda/vectors.cuh"
#include "prune/cuda/work.cuh"
#include "prune/key.h"

namespace drive::gpu {

// ---- (Step 2) ----

// Of one chunk, in shared memory.
struct ChunkSums {
  uint32_t top, at_hi, at_lo, alive, nonfinite, inside;
  int64_t begin;  // of its part of the list
};

template <class Key>
__global__ void __launch_bounds__(kThreads, kTuning<Key>.survey)
survey(const __grid_constant__ Step<Key> step) {
  using Bits = typename KeyTraits<Key>::Bits;
  constexpr uint32_t kHeld = (16 << 10) / sizeof(Key);
  __shared__ Key list[kHeld];  // the others are read once more
  __shared__ uint16_t positions[kMaxChunk];
  __shared__ ChunkSums sums;
  __shared__ Totals totals;  // of the block; thread 0's
  const Work& work = step.work;
  const Key hi = max(bracket_search(step, 0, kDigits<Key>).prefix, kDead<Key> + 1);  // above what is dead
  const Key lo = min(bracket_search(step, 1, kDigits<Key>).prefix, hi - 1);
  const Bits width = static_cast<Bits>(hi - lo);
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    step.bracket.search(0, kDigits<Key>).prefix = hi;
    step.bracket.search(1, kDigits<Key>).prefix = lo;
  }
  if (threadIdx.x == 0) totals = {};
  double sum = 0;
  for (int64_t c = blockIdx.x; c < work.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(work, c);
    const Item& item = work.items[chunk.item];
    uint32_t* const words = words_of(step.bits, item, chunk);
    if (threadIdx.x == 0) sums = {};
    __syncthreads();

    uint32_t top = 0, at_hi = 0, at_lo = 0, alive = 0;
    Bits largest = 0;
    const auto see = [&](Key key) {
      const double score = score_of(key);
      sum = work.squared ? fma(score, score, sum) : sum + score;
      largest = max(largest, static_cast<Bits>(key));
    };
    const auto is_near = [&](Key key) { return static_cast<Bits>(key) - static_cast<Bits>(lo) <= width; };
    const auto take = [&](Key key, int i) {  // of a key that is near
      at_hi += key == hi;
      at_lo += key == lo;
      if (key == hi || key == lo) return;
      const uint32_t place = atomicAdd(&sums.inside, 1u);
      if (place < kHeld) list[place] = key;
      positions[place] = static_cast<uint16_t>(i);
    };
    if (in_vectors(item, chunk)) {
      with_scaled_vectors<Key>(item, [&](auto type, auto aligned, auto scale, const Item& item) {
        using T = decltype(type);
        constexpr bool kAligned = decltype(aligned)::value;
        uint32_t above = 0, near = 0;
        for_each_vector<T, kAligned>(
            [&](int i) { return load<Key, T, kAligned>(work, item, chunk.begin + i); },
            [&](int u, int, const Entries<T>& e) {
              const uint32_t alive_here = e.alive();
              uint32_t above_here = 0, near_here = 0;
#pragma unroll
              for (int j = 0; j < kLanes<T>; ++j) {
                const Key key = key_of<Key>(work, e, alive_here, j, scale);
                see(key);
                above_here |= static_cast<uint32_t>(key >= hi) << j;
                near_here |= static_cast<uint32_t>(is_near(key)) << j;
              }
              above |= above_here << u * kLanes<T>;
              near |= (near_here & alive_here) << u * kLanes<T>;
              alive += __popc(alive_here);
            });
        own_bits<T>(words) = static_cast<OwnBits<T>>(above);
        top = __popc(above);
        // Few are near: loaded again rather than picked from 32 registers by an index that is not a constant.
#pragma unroll 1
        for (; near; near &= near - 1) {
          const int i = chunk_index(__ffs(near) - 1, kLanes<T>);
          take(key_at<Key>(work, item, chunk.begin + i), i);
        }
      });
    } else {
      for_each_entry(chunk, [&](int i, bool exists) {
        const Key key = exists ? key_at<Key>(work, item, chunk.begin + i) : kDead<Key>;
        see(key);
        const uint32_t word = __ballot_sync(kFull, key >= hi);
        if (lane() == 0 && i < chunk.to) words[i / 32] = word;
        top += key >= hi;
        alive += key != kDead<Key>;
        if (key != kDead<Key> && is_near(key)) take(key, i);
      });
    }
    if (largest >= static_cast<Bits>(kTop<Key>)) {  // the rare case gets a look of its own
#pragma unroll 1
      for (int own = 0; own * kThreads < 1 << item.chunk_bits; ++own) {
        const int i = chunk_index(own, lanes_of(item, chunk));
        if (!chunk.has(i) || is_finite(key_at<Key>(work, item, chunk.begin + i))) continue;
        atomicAdd(&sums.nonfinite, 1u);
      }
    }
    top = __reduce_add_sync(kFull, top);
    at_hi = __reduce_add_sync(kFull, at_hi);
    at_lo = __reduce_add_sync(kFull, at_lo);
    alive = __reduce_add_sync(kFull, alive);
    if (lane() == 0) {
      atomicAdd(&sums.top, top);
      atomicAdd(&sums.at_hi, at_hi);
      atomicAdd(&sums.at_lo, at_lo);
      atomicAdd(&sums.alive, alive);
    }
    __syncthreads();

    const uint32_t inside = sums.inside;
    if (threadIdx.x == 0) {
      if (inside) {
        sums.begin = static_cast<int64_t>(atomicAdd(&step.totals->listed, static_cast<Counter>(inside)));
      }
      step.chunks[c] = {sums.begin, static_cast<int32_t>(inside), static_cast<int32_t>(sums.at_hi),
                        static_cast<int32_t>(sums.at_lo), static_cast<int32_t>(sums.top)};
      const Counter cost = item.cost;
      totals.above += cost * (sums.top - sums.at_hi);
      totals.at_hi += cost * sums.at_hi;
      totals.inside += cost * inside;
      totals.at_lo += cost * sums.at_lo;
      totals.alive += cost * sums.alive;
      totals.nonfinite += sums.nonfinite;
      atomicAdd(&step.alive[chunk.item], static_cast<Counter>(sums.alive));
      if (sums.nonfinite) atomicAdd(&step.nonfinite[chunk.item], static_cast<Counter>(sums.nonfinite));
    }
    __syncthreads();
    if (sums.begin + inside <= step.places) {
      for (uint32_t i = threadIdx.x; i < inside; i += kThreads) {
        const int at = positions[i];
        step.list[sums.begin + i] = i < kHeld ? list[i] : key_at<Key>(work, item, chunk.begin + at);
        step.positions[sums.begin + i] = static_cast<uint16_t>(at);
      }
    }
    __syncthreads();
  }
  sum = sum_in_order(sum);
  if (threadIdx.x == 0) {
    step.sums[blockIdx.x] = sum;
    atomicAdd(&step.totals->above, totals.above);
    atomicAdd(&step.totals->at_hi, totals.at_hi);
    atomicAdd(&step.totals->inside, totals.inside);
    atomicAdd(&step.totals->at_lo, totals.at_lo);
    atomicAdd(&step.totals->alive, totals.alive);
    atomicAdd(&step.totals->nonfinite, totals.nonfinite);
  }
}

// ---- (Step 5) ----

// The weights that stay, +0 for the others (never a product: -0.0 and inf * 0), and the mask. Weights are
// written only where one changes: in a model pruned before, most vectors stay as they are.
template <class T, bool kAligned>
__device__ void write_vector(const Item& item, int64_t position, Vector weight, uint32_t keep) {
  uint32_t lost = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t stays = weight.word[w] & bits_kept<T>(keep, w);
    lost |= weight.word[w] ^ stays;
    weight.word[w] = stays;
  }
  if (lost) write<sizeof(T), kAligned>(item, kWeight, position, weight);
  write<1, kAligned>(item, kMask, position, bytes_of_bits<kLanes<T>>(keep));
}

// Adds a block's survivors in one chunk up.
__device__ inline void add_kept(uint32_t own, uint32_t* shared, Counter* kept) {
  own = __reduce_add_sync(kFull, own);
  if (lane() == 0 && own) atomicAdd(shared, own);
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(kept, static_cast<Counter>(*shared));
    *shared = 0;
  }
  __syncthreads();
}

// By the bits and the list.
template <class Key>
__global__ void __launch_bounds__(kThreads, kTuning<Key>.list)
apply_list(const __grid_constant__ Step<Key> step) {
  __shared__ uint32_t words[kMaxWords];
  __shared__ uint32_t kept;
  if (plan(step).where != Where::list || *step.guarded) return;
  const Work& work = step.work;
  const Cut<Key> cut = step.all.cuts[0];
  if (threadIdx.x == 0) kept = 0;
  for (int64_t c = blockIdx.x; c < work.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(work, c);
    const Item& item = work.items[chunk.item];
    const ChunkCounts counts = step.chunks[c];
    const bool has_word = static_cast<int>(threadIdx.x) < count_words(chunk);
    if (has_word) words[threadIdx.x] = words_of(step.bits, item, chunk)[threadIdx.x];
    __syncthreads();
    const int lanes = lanes_of(item, chunk);
#pragma unroll 1
    for (int i = threadIdx.x; i < counts.inside; i += kThreads) {
      const Key key = step.list[counts.list + i];
      const int at = step.positions[counts.list + i];
      if (key < cut.key || (key == cut.key && global_index(work, item, chunk.begin + at) > cut.last)) continue;
      const int bit = bit_of(at, lanes);
      atomicOr(&words[bit / 32], 1u << bit % 32);
    }
    __syncthreads();
    if (in_vectors(item, chunk)) {
      with_vectors<Key>(item, [&](auto type, auto aligned, const Item& item) {
        using T = decltype(type);
        constexpr bool kAligned = decltype(aligned)::value;
        const uint32_t keep = own_bits<T>(words);
        for_each_vector<T, kAligned>(
            [&](int i) { return read<kVectorBytes, sizeof(T), kAligned>(item, kWeight, chunk.begin + i); },
            [&](int u, int i, const Vector& weight) {
              write_vector<T, kAligned>(item, chunk.begin + i, weight, keep >> u * kLanes<T>);
            });
      });
    } else {
      for_each_entry(chunk, [&](int i, bool exists) {
        if (exists) write_at(work, item, chunk.begin + i, words[i / 32] >> i % 32 & 1);
      });
    }
    add_kept(has_word ? __popc(words[threadIdx.x]) : 0, &kept, &step.kept[chunk.item]);
  }
}

// By the keys: where the threshold is on the bracket's edge or came from all entries, and where guards count.
template <class Key>
__global__ void __launch_bounds__(kThreads, kTuning<Key>.keys)
apply_keys(const __grid_constant__ Step<Key> step) {
  __shared__ uint32_t kept;
  const Work& work = step.work;
  const Where source = plan(step).where;
  const bool guarded = *step.guarded;
  if (source == Where::refused ? !work.fresh : source == Where::list && !guarded) return;
  const Cut<Key> cut = guarded ? step.rest.cuts[0] : step.all.cuts[0];
  if (threadIdx.x == 0) kept = 0;
  for (int64_t c = blockIdx.x; c < work.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(work, c);
    const Item& item = work.items[chunk.item];
    if (source == Where::refused) {  // new masks, of a step that does nothing
      for_each_entry(chunk, [&](int i, bool exists) {
        if (exists) write_at(work, item, chunk.begin + i, true);
      });
      continue;
    }
    const Cut<Key> guard = guarded ? step.guards.cuts[chunk.item] : Cut<Key>{kTop<Key>, -1};
    // Survivors, one bit each from entry `first` on, among the ties at the cut and those at the guard.
    const auto settle = [&](int first, uint32_t at_cut, uint32_t at_guard) {
      uint32_t keep = 0;
#pragma unroll 1
      for (uint32_t left = at_cut | at_guard; left; left &= left - 1) {
        const int j = __ffs(left) - 1;
        const int64_t index = global_index(work, item, chunk.begin + first + j);
        const bool by_cut = at_cut >> j & 1 && index <= cut.last;
        const bool by_guard = at_guard >> j & 1 && index <= guard.last;
        keep |= static_cast<uint32_t>(by_cut || by_guard) << j;
      }
      return keep;
    };
    __syncthreads();
    uint32_t own = 0;
    if (in_vectors(item, chunk)) {
      with_scaled_vectors<Key>(item, [&](auto type, auto aligned, auto scale, const Item& item) {
        using T = decltype(type);
        constexpr bool kAligned = decltype(aligned)::value;
        for_each_vector<T, kAligned>(
            [&](int i) { return load<Key, T, kAligned>(work, item, chunk.begin + i); },
            [&](int, int i, const Entries<T>& e) {
              const uint32_t alive = e.alive();
              uint32_t keep = 0, at_cut = 0, at_guard = 0;
#pragma unroll
              for (int j = 0; j < kLanes<T>; ++j) {
                const Key key = key_of<Key>(work, e, alive, j, scale);
                keep |= static_cast<uint32_t>(key > cut.key || key > guard.key) << j;
                at_cut |= static_cast<uint32_t>(key == cut.key) << j;
                at_guard |= static_cast<uint32_t>(key == guard.key) << j;
              }
              keep |= settle(i, at_cut, at_guard);
              own += __popc(keep);
              write_vector<T, kAligned>(item, chunk.begin + i, e.weight, keep);
            });
      });
    } else {
      for_each_entry(chunk, [&](int i, bool exists) {
        if (!exists) return;
        const Key key = key_at<Key>(work, item, chunk.begin + i);
        const bool keep = key > cut.key || key > guard.key || settle(i, key == cut.key, key == guard.key);
        own += keep;
        write_at(work, item, chunk.begin + i, keep);
      });
    }
    add_kept(own, &kept, &step.kept[chunk.item]);
  }
}

// The op's outputs: survivors, non-finite scores, and [normalised score of the weakest survivor (inf if none
// survives), sum of |S|] (Eq. 7). In a step that does nothing these are NaN, and all that were alive survive.
// One block.
template <class Key>
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ Step<Key> step, int blocks) {
  const bool refused = step.totals->nonfinite;
  for (int i = threadIdx.x; i < step.work.count; i += kThreads) {
    step.kept_out[i] = static_cast<int64_t>(refused ? step.alive[i] : step.kept[i]);
    step.nonfinite_out[i] = static_cast<int64_t>(step.nonfinite[i]);
  }
  double sum = 0;
  for (int b = threadIdx.x; b < blocks; b += kThreads) sum += step.sums[b];
  sum = sum_in_order(sum);
  if (threadIdx.x > 0) return;
  const Cut<Key>& cut = *step.guarded ? step.rest.cuts[0] : step.all.cuts[0];
  Key weakest = cut.last < 0 ? static_cast<Key>(*step.next) : cut.key;
  for (int i = 0; *step.guarded && i < step.work.count; ++i) weakest = min(weakest, step.guards.cuts[i].key);
  const double score = score_of(weakest);
  const double size = step.work.squared ? score * score : score;
  const double z = weakest == kTop<Key> ? INFINITY : sum == 0 ? size : size / sum;
  step.scores_out[0] = refused ? NAN : z;
  step.scores_out[1] = refused ? NAN : sum;
}

}  // namespace drive::gpu
