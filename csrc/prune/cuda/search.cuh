// Ranks on a GPU: the bracket, the threshold, the ties (steps 1, 3 and 4 of prune.cu).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "prune/cuda/block.cuh"
#include "prune/cuda/step.cuh"
#include "prune/cuda/work.cuh"
#include "prune/key.h"
#include "prune/sampling.h"

namespace drive::gpu {

// ---- (Step 1) ----

// Keys of the sample, one of each of so many parts of equal cost, and the histogram of their first digit.
template <class Key>
__global__ void __launch_bounds__(kThreads) sample(const __grid_constant__ Step<Key> step) {
  __shared__ Histogram<> histogram;
  histogram.clear();
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < step.samples; i += gridDim.x * kThreads) {
    const int64_t unit = sampled_entry(i, step.samples, step.work.cost);
    const Item& item = step.work.items[find<&Item::first_cost>(step.work, unit)];
    const int64_t cost = unit - item.first_cost;
    const Key key = key_at<Key>(step.work, item, step.work.priced ? cost / item.cost : cost);
    step.sample[i] = key;
    histogram.add(bucket(key, 0));
  }
  histogram.add_to(step.bracket.histogram(0, 0));
}

// The search for the bracket's upper (side 0) or lower edge (side 1) after `digit` digits. Both share the
// histogram of the first digit.
template <class Key>
__device__ Search<Key> bracket_search(const Step<Key>& step, int side, int digit) {
  const int64_t rank = side == 0 ? step.ranks.high : step.ranks.low;
  if (rank == 0) return {side == 0 ? step.told.high : step.told.low, 0, 0};
  if (digit == 1) return pick(step.bracket.histogram(0, 0), Search<Key>{kDead<Key>, rank, step.samples}, 0);
  return pick(step.bracket.histogram(side, digit - 1), step.bracket.search(side, digit - 1), digit - 1);
}

template <class Key>
__global__ void __launch_bounds__(kThreads) narrow(const __grid_constant__ Step<Key> step, int digit) {
  __shared__ Histogram<> histogram;
  for (int side = 0; side < 2; ++side) {
    const Search<Key> search = bracket_search(step, side, digit);
    if (threadIdx.x == 0 && blockIdx.x == 0) step.bracket.search(side, digit) = search;
    if (search.k == 0) continue;
    histogram.clear();
    for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < step.samples; i += gridDim.x * kThreads) {
      const Key key = step.sample[i];
      histogram.add(has_prefix(key, search.prefix, digit) ? bucket(key, digit) : -1);
    }
    histogram.add_to(step.bracket.histogram(side, digit));
  }
}

// ---- (Step 3) ----

template <class Key, Stage kStage>
__device__ Where where(const Step<Key>& step) {
  if constexpr (kStage == Stage::all) return plan(step).where;
  return *step.guarded ? Where::entries : Where::refused;
}

// The search of a segment before `digit`. All threads of the block call it together.
template <class Key, Stage kStage>
__device__ Search<Key> search_before(const Step<Key>& step, int segment, int digit) {
  const Selection<Key>& s = step.template selection<kStage>();
  Search<Key> search;
  if (digit > 0) {
    search = s.search(segment, digit - 1);
    if (search.k > 0) search = pick(s.histogram(segment, digit - 1), search, digit - 1);
  } else if constexpr (kStage == Stage::all) {
    search = plan(step).search;
  } else {
    return s.search(segment, 0);
  }
  if (threadIdx.x == 0) s.search(segment, digit) = search;  // every block writes the same
  return search;
}

// Where a chunk's entries are counted; -1: not by many blocks.
template <Stage kStage>
__device__ int segment_of(const Item& item) {
  return kStage == Stage::guards ? item.segment : 0;
}

// The key of an entry of a tensor as a stage sees it: what a guard keeps is not chosen from again.
template <class Key, Stage kStage>
__device__ Key key_for(const Step<Key>& step, int tensor, int64_t position) {
  const Item& item = step.work.items[tensor];
  const Key key = key_at<Key>(step.work, item, position);
  if constexpr (kStage == Stage::rest) {
    const Cut<Key>& guard = step.guards.cuts[tensor];
    if (key > guard.key) return kDead<Key>;
    if (key == guard.key && global_index(step.work, item, position) <= guard.last) return kDead<Key>;
  }
  return key;
}

template <class Key, Stage kStage, class T>
__device__ void count_chunk(const Step<Key>& step, const Chunk& chunk, const Search<Key>& search, int digit, T each,
                            Histogram<T>& histogram) {
  for_each_entry(chunk, [&](int i, bool exists) {
    const Key key = exists ? key_for<Key, kStage>(step, chunk.item, chunk.begin + i) : kDead<Key>;
    const bool counts = key != kDead<Key> && has_prefix(key, search.prefix, digit);
    histogram.add(counts ? bucket(key, digit) : -1, each);
  });
}

// The list, whose entries cost 1 each.
template <class Key>
__device__ void count_list(const Step<Key>& step, const Search<Key>& search, int digit, Histogram<>& histogram) {
  const auto n = static_cast<int64_t>(step.totals->listed);
  for (int64_t first = blockIdx.x * kThreads; first < n; first += gridDim.x * kThreads) {
    const int64_t i = first + threadIdx.x;
    const bool counts = i < n && has_prefix(step.list[i], search.prefix, digit);
    histogram.add(counts ? bucket(step.list[i], digit) : -1);
  }
}

// The same with costs, which chunks tell: a warp for each chunk's part of the list.
template <class Key>
__device__ void count_list(const Step<Key>& step, const Search<Key>& search, int digit,
                           Histogram<Counter>& histogram) {
  const Work& work = step.work;
  for (int64_t c = blockIdx.x * kWarps + warp(); c < work.chunks; c += gridDim.x * kWarps) {
    const ChunkCounts counts = step.chunks[c];
    if (counts.inside == 0) continue;
    const Counter cost = work.items[find<&Item::first_chunk>(work, c)].cost;
#pragma unroll 1
    for (int first = 0; first < counts.inside; first += kWarp) {
      const int i = first + lane();
      const Key key = i < counts.inside ? step.list[counts.list + i] : kDead<Key>;
      const bool counted = i < counts.inside && has_prefix(key, search.prefix, digit);
      histogram.add(counted ? bucket(key, digit) : -1, cost);
    }
  }
}

// The histogram of one digit among the keys that share the digits before; kPriced: of what they cost.
template <class Key, Stage kStage, bool kPriced>
__global__ void __launch_bounds__(kThreads) count(const __grid_constant__ Step<Key> step, int digit) {
  using Count = std::conditional_t<kPriced, Counter, uint32_t>;
  __shared__ Histogram<Count> histogram;
  const Where source = where<Key, kStage>(step);
  if (source == Where::refused || source == Where::edge) return;
  const Selection<Key>& selection = step.template selection<kStage>();
  const Work& work = step.work;
  if (source == Where::list) {
    histogram.clear();
    count_list(step, search_before<Key, kStage>(step, 0, digit), digit, histogram);
    histogram.add_to(selection.histogram(0, digit));
    return;
  }
  int segment = -1;
  Search<Key> search{};
  for (int64_t c = blockIdx.x; c < work.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(work, c);
    const Item& item = work.items[chunk.item];
    const int own = segment_of<kStage>(item);
    if (own < 0) continue;
    if (segment != own) {
      if (segment >= 0) histogram.add_to(selection.histogram(segment, digit));
      histogram.clear();
      segment = own;
      search = search_before<Key, kStage>(step, segment, digit);
    }
    const Count each = kPriced ? item.cost : 1;
    if (search.k > 0) count_chunk<Key, kStage>(step, chunk, search, digit, each, histogram);
  }
  if (segment >= 0) histogram.add_to(selection.histogram(segment, digit));
}

// ---- (Step 4) ----

// The chunk, by row-major index, in which an entry is counted as a tie.
__device__ inline int tie_chunk(const Work& work, const Item& item, int64_t position) {
  const int64_t index = global_index(work, item, position) - item.first_entry;
  return static_cast<int>(item.first_chunk + ((index + item.missing) >> item.chunk_bits));
}

template <class Key, Stage kStage>
__device__ void count_ties(const Step<Key>& step, const Chunk& chunk, Key threshold) {
  const Item& item = step.work.items[chunk.item];
  for_each_entry(chunk, [&](int i, bool exists) {
    const bool tie = exists && key_for<Key, kStage>(step, chunk.item, chunk.begin + i) == threshold;
    count_up(step.template selection<kStage>().ties,
             tie ? tie_chunk(step.work, item, chunk.begin + i) : -1);
  });
}

template <class Key, Stage kStage>
__global__ void __launch_bounds__(kThreads) ties(const __grid_constant__ Step<Key> step) {
  const Where source = where<Key, kStage>(step);
  if (source == Where::refused) return;
  const Selection<Key>& selection = step.template selection<kStage>();
  const Work& work = step.work;
  const int last = source == Where::edge ? 0 : kDigits<Key>;
  int segment = kStage == Stage::guards ? -1 : 0;
  Search<Key> search{};
  if (segment == 0) search = search_before<Key, kStage>(step, 0, last);

  if (source == Where::list) {  // a warp for each chunk's part of the list
    if (search.k == search.equal) return;
    for (int64_t c = blockIdx.x * kWarps + warp(); c < work.chunks; c += gridDim.x * kWarps) {
      const ChunkCounts counts = step.chunks[c];
#pragma unroll 1
      for (int i = lane(); i < counts.inside; i += kWarp) {
        if (step.list[counts.list + i] != search.prefix) continue;
        const Chunk chunk = chunk_at(work, c);
        const Item& item = work.items[chunk.item];
        atomicAdd(&selection.ties[tie_chunk(work, item, chunk.begin + step.positions[counts.list + i])], 1u);
      }
    }
    return;
  }
  for (int64_t c = blockIdx.x; c < work.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(work, c);
    const Item& item = work.items[chunk.item];
    const int own = segment_of<kStage>(item);
    if (own < 0) continue;
    if (segment != own) {
      segment = own;
      search = search_before<Key, kStage>(step, segment, last);
    }
    if (search.k == search.equal) continue;  // all of them survive (or, of no entries, none)
    if (source == Where::edge && item.logical) {
      const ChunkCounts& counts = step.chunks[c];
      if (threadIdx.x == 0) {
        selection.ties[c] = search.prefix == bracket_edge(step, 0) ? counts.at_hi : counts.at_lo;
      }
      continue;
    }
    count_ties<Key, kStage>(step, chunk, search.prefix);
  }
}

// What a chunk's entries on the threshold cost each. A guard counts entries.
template <Stage kStage>
__device__ int64_t tie_cost(const Work& work, int64_t chunk) {
  if (kStage == Stage::guards || !work.priced) return 1;
  return work.items[find<&Item::first_chunk>(work, chunk)].cost;
}

// Where a finished search's ties end, which are counted by chunk in [begin, begin + size): before the first of them
// that would cost too much.
template <class Key, Stage kStage>
__device__ Cut<Key> cut_in(const Step<Key>& step, const Search<Key>& search, int64_t begin, int64_t size) {
  __shared__ struct { int64_t chunk, survive; bool none; } end;  // survive: of the chunk; none: of all ties
  __shared__ uint32_t flags[kMaxWords];
  __shared__ int64_t last;
  if (search.k == 0) return {kTop<Key>, INT64_MAX};
  if (search.k == search.equal) return {search.prefix, INT64_MAX};
  const Selection<Key>& selection = step.template selection<kStage>();
  const Work& work = step.work;
  const auto spent = [&](int64_t c) {
    const int64_t found = selection.ties[c];
    return found ? found * tie_cost<kStage>(work, c) : 0;
  };
  // Its chunk: every thread adds up a run of chunks, one of them looks closer.
  const int64_t run = (size + kThreads - 1) / kThreads;
  const int64_t from = begin + min(size, threadIdx.x * run), to = begin + min(size, (threadIdx.x + 1) * run);
  int64_t own = 0, total;
  for (int64_t c = from; c < to; ++c) own += spent(c);
  int64_t left = search.k - scan(own, &total);
  if (left >= 0 && left < own) {
    int64_t c = from;
    for (; left >= spent(c); ++c) left -= spent(c);
    const int64_t survive = left / tie_cost<kStage>(work, c);
    end = {c, survive, left == search.k && survive == 0};
  }
  __syncthreads();

  // Its entries in row-major order: a flag for each tie, then a scan of the flags.
  const Chunk chunk = chunk_at(work, end.chunk);
  const Item& item = work.items[chunk.item];
  for_each_entry(chunk, [&](int i, bool exists) {
    const bool tie = exists &&
        key_for<Key, kStage>(step, chunk.item, position_of(work, item, chunk.begin + i)) == search.prefix;
    const uint32_t word = __ballot_sync(kFull, tie);
    if (lane() == 0 && i < chunk.to) flags[i / kWarp] = word;
  });
  __syncthreads();
  uint32_t word = static_cast<int>(threadIdx.x) < count_words(chunk) ? flags[threadIdx.x] : 0;
  int64_t before = end.survive - scan(__popc(word), &total);
  if (before >= 0 && before < __popc(word)) {
    for (; before > 0; --before) word &= word - 1;
    const int64_t first = item.first_entry + chunk.begin + threadIdx.x * kWarp + __ffs(word) - 1;
    last = end.none ? -1 : first - 1;
  }
  __syncthreads();
  return {search.prefix, last};
}

// One block, or one for each tensor.
template <class Key, Stage kStage>
__global__ void __launch_bounds__(kThreads) cut(const __grid_constant__ Step<Key> step) {
  const Where source = where<Key, kStage>(step);
  if (source == Where::refused) return;
  const Selection<Key>& selection = step.template selection<kStage>();
  const int tensor = static_cast<int>(blockIdx.x);
  const Item& item = step.work.items[tensor];
  const int segment = segment_of<kStage>(item);
  if (segment < 0) return;
  const bool none = selection.search(segment, 0).k == 0;
  const Search<Key> search = selection.search(segment, source == Where::edge || none ? 0 : kDigits<Key>);
  const bool one = kStage == Stage::guards;
  const int64_t begin = one ? item.first_chunk : 0, size = one ? chunks_of(item) : step.work.chunks;
  const Cut<Key> found = cut_in<Key, kStage>(step, search, begin, size);
  if (threadIdx.x == 0) selection.cuts[tensor] = found;
  if (threadIdx.x == 0 && kStage != Stage::guards) *step.next = kTop<Key>;
}

// The weakest survivor's key where none on the threshold survives: with costs the rule, as what is left for them
// seldom pays for one.
template <class Key, Stage kStage>
__global__ void __launch_bounds__(kThreads) next_above(const __grid_constant__ Step<Key> step) {
  const Where source = where<Key, kStage>(step);
  if (source == Where::refused) return;
  const Cut<Key> cut = step.template selection<kStage>().cuts[0];
  if (cut.last >= 0) return;
  const Work& work = step.work;
  Key next = kTop<Key>;
  const auto see = [&](Key key) {
    if (key > cut.key) next = min(next, key);
  };
  const Key hi = bracket_edge(step, 0);
  if (source != Where::entries && cut.key < hi) {
    const auto n = static_cast<int64_t>(step.totals->listed);
    for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) see(step.list[i]);
    if (step.totals->at_hi) see(hi);
  } else {
    for (int64_t c = blockIdx.x; c < work.chunks; c += gridDim.x) {
      const Chunk chunk = chunk_at(work, c);
      for_each_entry(chunk, [&](int i, bool exists) {
        if (exists) see(key_for<Key, kStage>(step, chunk.item, chunk.begin + i));
      });
    }
  }
  for (int d = kWarp / 2; d > 0; d /= 2) next = min(next, __shfl_down_sync(kFull, next, d));
  if (lane() == 0) atomicMin(step.next, static_cast<Counter>(next));
}

}  // namespace drive::gpu
