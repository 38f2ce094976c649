// drive::prune_ on GPUs: the k best scores survive, exactly, in two passes over the entries and without the
// host knowing anything: every launch below reads what the ones before left in device memory.
//
//   1. Sample: up to 2^17 keys bracket the threshold, lo <= T <= hi, by a radix search for two ranks (sample,
//      narrow).
//   2. Survey (reads theta, G and an old mask): how many keys lie above, at and inside the bracket; one
//      bit an entry, "at or above hi"; a list of the keys inside, chunk by chunk. Also the sum of |S|, and
//      the count of non-finite scores, which makes the rest of the step a no-op.
//   3. Threshold T, the k-th largest key: a radix search through the list (count). The survey's counts
//      prove that the bracket held; if it did not, or the list is full, through all entries.
//   4. Ties: of the entries on the threshold the first ones in row-major order survive. They are counted by
//      chunk of that order (ties); a scan finds the chunk in which the last survivor lies, and a look at that
//      chunk finds it (cut).
//   5. Apply (reads theta and the bits, and the chunk's list; or theta, G and old mask again, where T lies on
//      the bracket's edge or outside; writes theta, mask).
//
// Where min_keep is given and a tensor would fall below it, steps 3 and 4 run twice more before step 5:
// for every tensor by itself (its guard), and for all entries that no guard keeps.
//
// A digit's bucket is chosen by every block of the next launch for itself (pick): a histogram is complete
// when its launch is, and an all-reduce can go between.
//
// Bytes an entry, float32: read 8, written 1/8; read 4 1/8, written 4 + 1: 17.3, where torch.mul moves 12.
// Scratch: 0.23 byte an entry (bits 0.125, list 0.094, counts 0.01) and less than 1 MB.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "block.cuh"
#include "key.h"
#include "launch.cuh"
#include "prune_arguments.h"
#include "prune_work.cuh"
#include "sampling.h"
#include "walk.h"

namespace drive {
namespace {

using namespace gpu;

// ---- Tuning: blocks of 256 threads a multiprocessor, on which the registers a thread may use depend ----

struct Tuning {
  int survey;  // 85 registers hold four vectors of both operands and the counts; a list of 4096 keys is 24 KB
  int list;    // one operand in flight; more blocks hide the wait for a chunk's part of the list
  int keys;    // as the survey, and the cuts
  int count;   // few, so that a block counts many keys before it adds its 2048 counters to the global ones
};
template <class Key>  // scores of 64 bits need twice the registers
constexpr Tuning kTuning = sizeof(Key) == 4 ? Tuning{3, 5, 3, 2} : Tuning{2, 5, 2, 2};

// 2^14 samples put 4 % of the entries into the bracket (k = n / 2), 2^17 1.4 %, less than the list holds from
// there on.
constexpr int64_t kMaxSample = 1 << 17;
constexpr int64_t kManyEntries = 1 << 20;
// The list has room for one entry of 64 (1.6 %), and for 2^16 at least.
constexpr int64_t kEntriesPerPlace = 64;
constexpr int64_t kMinPlaces = 1 << 16;

// ---- State on the device ----

// Sums of the survey over all entries.
struct Totals {
  Counter above, at_hi, inside, at_lo, alive, nonfinite;
};

// What the survey found in one chunk.
struct ChunkCounts {
  int64_t list;  // where its part of the list begins
  int32_t inside, at_hi, at_lo;
};

// An entry survives if its key is larger, or equal and its global row-major index not beyond `last`.
template <class Key>
struct Cut {
  Key key;
  int64_t last;

  __device__ bool keeps(Key k, int64_t index) const { return k > key || (k == key && index <= last); }
};

// A selection: over all entries (one segment), or over each tensor's (as many segments).
template <class Key>
struct Selection {
  Search<Key>* searches;  // [segments, kDigits + 1]: before each digit and after the last one
  Counter* histograms;    // [segments, kDigits, kBuckets]
  Cut<Key>* cuts;         // [segments]
  uint32_t* ties;         // [chunks]: entries on the threshold, by row-major chunk

  __device__ Search<Key>& search(int segment, int digit) const {
    return searches[segment * (kDigits<Key> + 1) + digit];
  }
  __device__ Counter* histogram(int segment, int digit) const {
    return histograms + (static_cast<int64_t>(segment) * kDigits<Key> + digit) * kBuckets;
  }
};

// all: the selection that counts in most steps. guards: of min_keep entries of each tensor. rest: of the
// entries that no guard keeps.
enum class Stage { all, guards, rest };

template <class Key>
struct Step {
  Work work;
  int64_t keep, min_keep;
  BracketRanks ranks;
  int64_t samples, places;  // places: of the list

  Key* sample;            // [samples], in the memory of bits and list, which come later
  Selection<Key> bracket;  // [2]: hi and lo
  Totals* totals;
  double* sums;           // [survey's blocks] of |S|
  Counter* alive;         // [items]
  Counter* nonfinite;     // [items]
  Counter* kept;          // [items]
  ChunkCounts* chunks;    // [chunks]
  uint32_t* bits;         // [chunks, kWords]: is the key at least hi?
  Key* list;              // [places]: keys strictly inside the bracket
  uint16_t* positions;    // [places]: where in their chunks
  Selection<Key> all, guards, rest;
  bool* guarded;          // does a guard count?

  int64_t* kept_out;       // [items]
  int64_t* nonfinite_out;  // [items]
  double* scores_out;      // [2]

  template <Stage kStage>
  __device__ const Selection<Key>& selection() const {
    if constexpr (kStage == Stage::all) return all;
    if constexpr (kStage == Stage::guards) return guards;
    return rest;
  }
};

// How the threshold of Stage::all is found, as the survey's totals tell.
enum class Where { refused, edge, list, entries };

template <class Key>
struct Plan {
  Where where;
  Search<Key> search;  // edge: the result; else how it begins
};

template <class Key>
__device__ Key bracket_edge(const Step<Key>& step, int side) {
  return step.bracket.search(side, kDigits<Key>).prefix;
}

template <class Key>
__device__ Plan<Key> plan(const Step<Key>& step) {
  const Totals& t = *step.totals;
  const auto above = static_cast<int64_t>(t.above), at_hi = static_cast<int64_t>(t.at_hi);
  const auto inside = static_cast<int64_t>(t.inside), at_lo = static_cast<int64_t>(t.at_lo);
  const int64_t k = min(step.keep, static_cast<int64_t>(t.alive));
  const int64_t n = step.work.entries;
  if (t.nonfinite) return {Where::refused, {kDead<Key>, 0, 0}};
  if (k == 0) return {Where::edge, {kTop<Key>, 0, 0}};
  const bool held = inside <= step.places && above < k && k <= above + at_hi + inside + at_lo;
  if (!held) return {Where::entries, {kDead<Key>, k, n}};
  if (k <= above + at_hi) return {Where::edge, {bracket_edge(step, 0), k - above, at_hi}};
  if (k <= above + at_hi + inside) return {Where::list, {kDead<Key>, k - above - at_hi, inside}};
  return {Where::edge, {bracket_edge(step, 1), k - above - at_hi - inside, at_lo}};
}

// ---- Bits: a word of 16 for each thread, one for each of its own entries ----

using OwnBits = uint16_t;
constexpr int kWords = kThreads / 2;  // of a chunk, as words of 32 bits

__device__ int lanes_of(const Item& item, const Chunk& chunk) {
  if (!in_vectors(item, chunk)) return 1;
  return item.type == Type::f32 ? 4 : item.type == Type::f64 ? 2 : 8;
}

__device__ void set_bit(uint32_t* words, int lanes, int i) {
  const int thread = owner(i, lanes);
  atomicOr(&words[thread / 2], 1u << (thread % 2 * kOwn + own_index(i, lanes)));
}

// ---- (Step 1) ----

struct Piece {
  char bytes[4000];  // arguments of a kernel: 4 KB at most
};

__global__ void upload(const __grid_constant__ Piece piece, char* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = piece.bytes[i];
}

// Keys of the sample, and the histogram of their first digit.
template <class Key>
__global__ void __launch_bounds__(kThreads) sample(const __grid_constant__ Step<Key> step) {
  __shared__ Histogram histogram;
  histogram.clear();
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < step.samples; i += gridDim.x * kThreads) {
    const int64_t entry = sampled_entry(i, step.samples, step.work.entries);
    const Item& item = step.work.items[find<&Item::first_entry>(step.work, entry)];
    const Key key = key_at<Key>(step.work, item, entry - item.first_entry);
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
  if (rank == 0) return {side == 0 ? kTop<Key> : kDead<Key>, 0, 0};
  if (digit == 1) return pick(step.bracket.histogram(0, 0), Search<Key>{kDead<Key>, rank, step.samples}, 0);
  return pick(step.bracket.histogram(side, digit - 1), step.bracket.search(side, digit - 1), digit - 1);
}

template <class Key>
__global__ void __launch_bounds__(kThreads) narrow(const __grid_constant__ Step<Key> step, int digit) {
  __shared__ Histogram histogram;
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
  __shared__ Key list[kChunk];
  __shared__ uint16_t positions[kChunk];
  __shared__ ChunkSums sums;
  const Work& work = step.work;
  const Key hi = max(bracket_search(step, 0, kDigits<Key>).prefix, kDead<Key> + 1);  // above what is dead
  const Key lo = min(bracket_search(step, 1, kDigits<Key>).prefix, hi - 1);
  const Bits width = static_cast<Bits>(hi - lo);
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    step.bracket.search(0, kDigits<Key>).prefix = hi;
    step.bracket.search(1, kDigits<Key>).prefix = lo;
  }
  Totals totals{};  // thread 0's are the block's
  double sum = 0;
  for (int64_t c = blockIdx.x; c < work.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(work, c);
    const Item item = work.items[chunk.item];
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
      list[place] = key;
      positions[place] = static_cast<uint16_t>(i);
    };
    if (in_vectors(item, chunk)) {
      with_type<Key>(item, [&](auto type) {
        using T = decltype(type);
        uint32_t near = 0;
        for_each_vector<T>(
            [&](int v) { return load<Key, T>(work, item, chunk.begin + v * kLanes<T>); },
            [&](int v, const Entries<T>& e) {
              uint32_t top_here = 0, near_here = 0;
#pragma unroll
              for (int j = 0; j < kLanes<T>; ++j) {
                const Key key = key_of<Key>(work, e, j);
                see(key);
                top_here |= static_cast<uint32_t>(key >= hi) << j;
                near_here |= static_cast<uint32_t>(is_near(key)) << j;
              }
              top |= top_here << v / kThreads * kLanes<T>;
              near |= (near_here & e.alive) << v / kThreads * kLanes<T>;
              alive += __popc(e.alive);
            });
        // Few are near: loaded again rather than picked from 16 registers by an index that is not a constant.
#pragma unroll 1
        for (; near; near &= near - 1) {
          const int i = chunk_index(__ffs(near) - 1, kLanes<T>);
          take(living_key_at<Key, T>(work, item, chunk.begin + i), i);
        }
      });
    } else {
      for_each_entry(chunk, [&](int i, bool exists) {
        const Key key = exists ? key_at<Key>(work, item, chunk.begin + i) : kDead<Key>;
        see(key);
        top |= static_cast<uint32_t>(key >= hi) << own_index(i, 1);
        alive += key != kDead<Key>;
        if (key != kDead<Key> && is_near(key)) take(key, i);
      });
    }
    reinterpret_cast<OwnBits*>(step.bits + c * kWords)[threadIdx.x] = static_cast<OwnBits>(top);
    if (largest >= static_cast<Bits>(kTop<Key>)) {  // the rare case gets a look of its own
#pragma unroll 1
      for (int own = 0; own < kOwn; ++own) {
        const int i = chunk_index(own, lanes_of(item, chunk));
        if (i >= chunk.count || is_finite(key_at<Key>(work, item, chunk.begin + i))) continue;
        atomicAdd(&sums.nonfinite, 1u);
      }
    }
    top = __reduce_add_sync(kFull, static_cast<unsigned>(__popc(top)));
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
        sums.begin = static_cast<int64_t>(atomicAdd(&step.totals->inside, static_cast<Counter>(inside)));
      }
      step.chunks[c] = {sums.begin, static_cast<int32_t>(inside), static_cast<int32_t>(sums.at_hi),
                        static_cast<int32_t>(sums.at_lo)};
      totals.above += sums.top - sums.at_hi;
      totals.at_hi += sums.at_hi;
      totals.at_lo += sums.at_lo;
      totals.alive += sums.alive;
      totals.nonfinite += sums.nonfinite;
      atomicAdd(&step.alive[chunk.item], static_cast<Counter>(sums.alive));
      if (sums.nonfinite) atomicAdd(&step.nonfinite[chunk.item], static_cast<Counter>(sums.nonfinite));
    }
    __syncthreads();
    if (sums.begin + inside <= step.places) {
      for (uint32_t i = threadIdx.x; i < inside; i += kThreads) {
        step.list[sums.begin + i] = list[i];
        step.positions[sums.begin + i] = positions[i];
      }
    }
    __syncthreads();
  }
  sum = sum_in_order(sum);
  if (threadIdx.x == 0) {
    step.sums[blockIdx.x] = sum;
    atomicAdd(&step.totals->above, totals.above);
    atomicAdd(&step.totals->at_hi, totals.at_hi);
    atomicAdd(&step.totals->at_lo, totals.at_lo);
    atomicAdd(&step.totals->alive, totals.alive);
    atomicAdd(&step.totals->nonfinite, totals.nonfinite);
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

template <Stage kStage>
__device__ int segment_of(const Chunk& chunk) {
  return kStage == Stage::guards ? chunk.item : 0;
}

// The key of a chunk's entry as a stage sees it: what a guard keeps is not chosen from again.
template <class Key, Stage kStage>
__device__ Key key_for(const Step<Key>& step, const Item& item, const Chunk& chunk, int i) {
  const Key key = key_at<Key>(step.work, item, chunk.begin + i);
  if constexpr (kStage == Stage::rest) {
    const Cut<Key>& guard = step.guards.cuts[chunk.item];
    if (key > guard.key) return kDead<Key>;
    if (key == guard.key && global_index(step.work, item, chunk.begin + i) <= guard.last) return kDead<Key>;
  }
  return key;
}

// The histogram of one digit among the keys that share the digits before.
template <class Key, Stage kStage>
__global__ void __launch_bounds__(kThreads) count(const __grid_constant__ Step<Key> step, int digit) {
  __shared__ Histogram histogram;
  const Where source = where<Key, kStage>(step);
  if (source == Where::refused || source == Where::edge) return;
  const Selection<Key>& selection = step.template selection<kStage>();
  const Work& work = step.work;
  if (source == Where::list) {
    histogram.clear();
    const Search<Key> search = search_before<Key, kStage>(step, 0, digit);
    const auto n = static_cast<int64_t>(step.totals->inside);
    for (int64_t first = blockIdx.x * kThreads; first < n; first += gridDim.x * kThreads) {
      const int64_t i = first + threadIdx.x;
      const bool counts = i < n && has_prefix(step.list[i], search.prefix, digit);
      histogram.add(counts ? bucket(step.list[i], digit) : -1);
    }
    histogram.add_to(selection.histogram(0, digit));
    return;
  }
  int segment = -1;
  Search<Key> search{};
  for (int64_t c = blockIdx.x; c < work.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(work, c);
    const Item item = work.items[chunk.item];
    if (segment != segment_of<kStage>(chunk)) {
      if (segment >= 0) histogram.add_to(selection.histogram(segment, digit));
      histogram.clear();
      segment = segment_of<kStage>(chunk);
      search = search_before<Key, kStage>(step, segment, digit);
    }
    if (search.k == 0) continue;
    for_each_entry(chunk, [&](int i, bool exists) {
      const Key key = exists ? key_for<Key, kStage>(step, item, chunk, i) : kDead<Key>;
      const bool counts = key != kDead<Key> && has_prefix(key, search.prefix, digit);
      histogram.add(counts ? bucket(key, digit) : -1);
    });
  }
  if (segment >= 0) histogram.add_to(selection.histogram(segment, digit));
}

// ---- (Step 4) ----

// The chunk, by row-major index, in which an entry is counted as a tie.
__device__ int tie_chunk(const Work& work, const Item& item, int64_t position) {
  const int64_t index = global_index(work, item, position) - item.first_entry;
  return static_cast<int>(item.first_chunk + index / kChunk);
}

template <class Key, Stage kStage>
__global__ void __launch_bounds__(kThreads) ties(const __grid_constant__ Step<Key> step) {
  const Where source = where<Key, kStage>(step);
  if (source == Where::refused) return;
  const Selection<Key>& selection = step.template selection<kStage>();
  const Work& work = step.work;
  const int last = source == Where::edge ? 0 : kDigits<Key>;
  Search<Key> search = search_before<Key, kStage>(step, 0, last);
  int segment = 0;

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
    const Item item = work.items[chunk.item];
    if (segment != segment_of<kStage>(chunk)) {
      segment = segment_of<kStage>(chunk);
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
    for_each_entry(chunk, [&](int i, bool exists) {
      const bool tie = exists && key_for<Key, kStage>(step, item, chunk, i) == search.prefix;
      count_up(selection.ties, tie ? tie_chunk(work, item, chunk.begin + i) : -1);
    });
  }
}

// One block a segment: the last of its ties that survives.
template <class Key, Stage kStage>
__global__ void __launch_bounds__(kThreads) cut(const __grid_constant__ Step<Key> step) {
  __shared__ struct { int64_t chunk, k; } end;
  __shared__ uint32_t flags[kChunk / kWarp];
  const Where source = where<Key, kStage>(step);
  if (source == Where::refused) return;
  const Selection<Key>& selection = step.template selection<kStage>();
  const Work& work = step.work;
  const int segment = static_cast<int>(blockIdx.x);
  const bool none = selection.search(segment, 0).k == 0;
  const Search<Key> search = selection.search(segment, source == Where::edge || none ? 0 : kDigits<Key>);
  if (none || search.k == search.equal) {
    if (threadIdx.x == 0) selection.cuts[segment] = {none ? kTop<Key> : search.prefix, INT64_MAX};
    return;
  }
  // The chunk of the last survivor: every thread adds up a run of chunks, one of them looks closer.
  const bool one = kStage == Stage::guards;
  const int64_t begin = one ? work.items[segment].first_chunk : 0;
  const int64_t size = one ? (work.items[segment].numel + kChunk - 1) / kChunk : work.chunks;
  const int64_t run = (size + kThreads - 1) / kThreads;
  const int64_t from = begin + min(size, threadIdx.x * run), to = begin + min(size, (threadIdx.x + 1) * run);
  int64_t own = 0, total;
  for (int64_t c = from; c < to; ++c) own += selection.ties[c];
  int64_t k = search.k - scan(own, &total);
  if (k >= 1 && k <= own) {
    int64_t c = from;
    for (; k > selection.ties[c]; ++c) k -= selection.ties[c];
    end = {c, k};
  }
  __syncthreads();

  // Its entries in row-major order: a flag for each tie, then a scan of the flags.
  const Chunk chunk = chunk_at(work, end.chunk);
  const Item item = work.items[chunk.item];
#pragma unroll 1
  for (int first = 0; first < kChunk; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    bool tie = false;
    if (i < chunk.count) {
      const auto in_walk = static_cast<int>(position_of(work, item, chunk.begin + i) - chunk.begin);
      tie = key_for<Key, kStage>(step, item, chunk, in_walk) == search.prefix;
    }
    const uint32_t word = __ballot_sync(kFull, tie);
    if (lane() == 0) flags[i / kWarp] = word;
  }
  __syncthreads();
  uint32_t word = threadIdx.x < kChunk / kWarp ? flags[threadIdx.x] : 0;
  k = end.k - scan(__popc(word), &total);
  if (k >= 1 && k <= __popc(word)) {
    for (; k > 1; --k) word &= word - 1;
    const int64_t index = chunk.begin + threadIdx.x * kWarp + __ffs(word) - 1;
    selection.cuts[segment] = {search.prefix, item.first_entry + index};
  }
}

// ---- min_keep: does any tensor fall below its guard? ----

// Survivors of each tensor, were the cut that of Stage::all. A warp for each chunk.
template <class Key>
__global__ void __launch_bounds__(kThreads) tally(const __grid_constant__ Step<Key> step) {
  const Where source = plan(step).where;
  if (source == Where::refused) return;
  const Work& work = step.work;
  const Cut<Key> cut = step.all.cuts[0];
  for (int64_t c = blockIdx.x * kWarps + warp(); c < work.chunks; c += gridDim.x * kWarps) {
    const Chunk chunk = chunk_at(work, c);
    const Item item = work.items[chunk.item];
    const auto keeps = [&](Key key, int i) {
      return cut.keeps(key, global_index(work, item, chunk.begin + i));
    };
    uint32_t kept = 0;
    if (source == Where::list) {
      const ChunkCounts counts = step.chunks[c];
      for (int w = lane(); w < kWords; w += kWarp) kept += __popc(step.bits[c * kWords + w]);
      for (int i = lane(); i < counts.inside; i += kWarp) {
        kept += keeps(step.list[counts.list + i], step.positions[counts.list + i]);
      }
    } else {
      for (int i = lane(); i < chunk.count; i += kWarp) {
        const Key key = key_at<Key>(work, item, chunk.begin + i);
        kept += key != kDead<Key> && keeps(key, i);
      }
    }
    kept = __reduce_add_sync(kFull, kept);
    if (lane() == 0) atomicAdd(&step.kept[chunk.item], static_cast<Counter>(kept));
  }
}

// How many each guard keeps, and how many are left to be chosen. One block.
template <class Key>
__global__ void __launch_bounds__(kThreads) judge(const __grid_constant__ Step<Key> step) {
  const Totals& t = *step.totals;
  if (t.nonfinite) return;
  bool below = false;
  int64_t kept = 0, total;
  for (int i = threadIdx.x; i < step.work.count; i += kThreads) {
    const auto alive = static_cast<int64_t>(step.alive[i]);
    const int64_t guard = min(step.min_keep, alive);
    step.guards.search(i, 0) = {kDead<Key>, guard, alive};
    below |= static_cast<int64_t>(step.kept[i]) < guard;
    step.kept[i] = 0;
    kept += guard;
  }
  below = __syncthreads_or(below);
  scan(kept, &total);
  if (threadIdx.x == 0) {
    const auto alive = static_cast<int64_t>(t.alive);
    *step.guarded = below;
    step.rest.search(0, 0) = {kDead<Key>, max(int64_t{0}, min(step.keep, alive) - total), alive - total};
  }
}

// ---- (Step 5) ----

// The weights that stay, +0 for the others (never a product: -0.0 and inf * 0), and the mask. Weights are
// written only where one changes: in a model pruned before, most vectors stay as they are.
template <class T>
__device__ void write(const Item& item, int64_t position, const Vec<T>& weight, uint32_t keep) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  Vec<Bits> bits;
  memcpy(&bits, &weight, sizeof(bits));
  Bits lost = 0;
#pragma unroll
  for (int j = 0; j < kLanes<T>; ++j) {
    if (keep >> j & 1) continue;
    lost |= bits.at[j];
    bits.at[j] = 0;
  }
  if (lost) vector_at<Bits>(item, kWeight, position) = bits;
  mask_at<T>(item, position) = MaskBytes<T>::of(keep);
}

// Adds a block's survivors in one chunk up.
__device__ void add_kept(uint32_t own, uint32_t* shared, Counter* kept) {
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
  __shared__ uint32_t words[kWords];
  __shared__ uint32_t kept;
  if (plan(step).where != Where::list || *step.guarded) return;
  const Work& work = step.work;
  const Cut<Key> cut = step.all.cuts[0];
  if (threadIdx.x == 0) kept = 0;
  for (int64_t c = blockIdx.x; c < work.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(work, c);
    const Item item = work.items[chunk.item];
    const ChunkCounts counts = step.chunks[c];
    if (threadIdx.x < kWords) words[threadIdx.x] = step.bits[c * kWords + threadIdx.x];
    __syncthreads();
    const int lanes = lanes_of(item, chunk);
#pragma unroll 1
    for (int i = threadIdx.x; i < counts.inside; i += kThreads) {
      const Key key = step.list[counts.list + i];
      if (key < cut.key) continue;
      const int at = step.positions[counts.list + i];
      if (key > cut.key || global_index(work, item, chunk.begin + at) <= cut.last) set_bit(words, lanes, at);
    }
    __syncthreads();
    const uint32_t keep = reinterpret_cast<const OwnBits*>(words)[threadIdx.x];
    if (in_vectors(item, chunk)) {
      with_type<Key>(item, [&](auto type) {
        using T = decltype(type);
        for_each_vector<T>(
            [&](int v) { return vector_at<T>(item, kWeight, chunk.begin + v * kLanes<T>); },
            [&](int v, const Vec<T>& weight) {
              write<T>(item, chunk.begin + v * kLanes<T>, weight, keep >> v / kThreads * kLanes<T>);
            });
      });
    } else {
      for_each_entry(chunk, [&](int i, bool exists) {
        if (exists) write_at(work, item, chunk.begin + i, keep >> own_index(i, 1) & 1);
      });
    }
    add_kept(__popc(keep), &kept, &step.kept[chunk.item]);
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
    const Item item = work.items[chunk.item];
    if (source == Where::refused) {  // new masks, of a step that does nothing
      for (int i = threadIdx.x; i < chunk.count; i += kThreads) write_at(work, item, chunk.begin + i, true);
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
      with_type<Key>(item, [&](auto type) {
        using T = decltype(type);
        for_each_vector<T>(
            [&](int v) { return load<Key, T>(work, item, chunk.begin + v * kLanes<T>); },
            [&](int v, const Entries<T>& e) {
              uint32_t keep = 0, at_cut = 0, at_guard = 0;
#pragma unroll
              for (int j = 0; j < kLanes<T>; ++j) {
                const Key key = key_of<Key>(work, e, j);
                keep |= static_cast<uint32_t>(key > cut.key || key > guard.key) << j;
                at_cut |= static_cast<uint32_t>(key == cut.key) << j;
                at_guard |= static_cast<uint32_t>(key == guard.key) << j;
              }
              keep |= settle(v * kLanes<T>, at_cut, at_guard);
              own += __popc(keep);
              write<T>(item, chunk.begin + v * kLanes<T>, e.weight, keep);
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
  Key weakest = *step.guarded ? step.rest.cuts[0].key : step.all.cuts[0].key;
  for (int i = 0; *step.guarded && i < step.work.count; ++i) weakest = min(weakest, step.guards.cuts[i].key);
  const double score = score_of(weakest);
  const double size = step.work.squared ? score * score : score;
  const double z = weakest == kTop<Key> ? INFINITY : sum == 0 ? size : size / sum;
  step.scores_out[0] = refused ? NAN : z;
  step.scores_out[1] = refused ? NAN : sum;
}

// ---- Launchers ----

Type type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: return Type::f64;
  }
}

// The work list as the device will hold it.
struct WorkList {
  std::vector<Item> items;
  std::vector<Dim> dims;
  int64_t entries = 0, chunks = 0;

  explicit WorkList(const PruneArguments& arguments) {
    for (size_t i = 0; i < arguments.weights.size(); ++i) add(arguments.operands(i));
  }

  void add(const std::vector<at::Tensor>& operands) {
    const at::Tensor& weight = operands[kWeight];
    std::vector<int64_t> index(weight.dim(), 1);
    for (int64_t d = weight.dim() - 2; d >= 0; --d) index[d] = index[d + 1] * weight.size(d + 1);
    const Walk walk(operands, index, Walk::Order::memory);
    Item item{};
    item.numel = weight.numel();
    item.first_entry = entries;
    item.first_chunk = chunks;
    item.first_dim = static_cast<int32_t>(dims.size());
    item.dims = static_cast<int32_t>(walk.dims().size());
    item.type = type_of(weight);
    const bool one = walk.dims().size() == 1;
    const Walk in_memory = one ? walk : Walk(operands, Walk::Order::memory);
    item.vector = true;
    for (size_t o = 0; o < operands.size(); ++o) {
      item.data[o] = static_cast<char*>(operands[o].data_ptr());
      item.vector = item.vector && in_memory.contiguous(static_cast<int>(o)) &&
          reinterpret_cast<uintptr_t>(item.data[o]) % 16 == 0;
    }
    item.logical = walk.contiguous(kMaxOperands);
    for (const Walk::Dim& dim : walk.dims()) {
      Dim to{dim.size, {}, dim.stride[kMaxOperands]};
      std::copy_n(dim.stride.begin(), kOperands, to.stride);
      dims.push_back(to);
    }
    items.push_back(item);
    entries += item.numel;
    chunks += (item.numel + kChunk - 1) / kChunk;
  }
};

// Hands out places in one piece of memory, on 256 bytes each.
struct Arena {
  char* memory;
  int64_t used = 0;

  template <class T>
  void take(T*& pointer, int64_t count) {
    pointer = reinterpret_cast<T*>(memory + used);
    used = (used + count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
  }
};

// Where everything lies in the scratch memory; what must start at zero comes first.
struct Layout {
  int64_t zeros, bytes;
};

template <class Key>
Layout lay_out(Step<Key>& step, const WorkList& list, int64_t survey_blocks, char* memory) {
  Arena arena{memory};
  const auto items = static_cast<int64_t>(list.items.size());
  const bool guards = step.min_keep > 0;
  const auto take_zeros = [&](Selection<Key>& selection, int64_t segments) {
    arena.take(selection.histograms, segments * kDigits<Key> * kBuckets);
    arena.take(selection.ties, list.chunks);
  };
  const auto take_others = [&](Selection<Key>& selection, int64_t segments) {
    arena.take(selection.searches, segments * (kDigits<Key> + 1));
    arena.take(selection.cuts, segments);
  };
  arena.take(step.totals, 1);
  arena.take(step.guarded, 1);
  arena.take(step.alive, items);
  arena.take(step.nonfinite, items);
  arena.take(step.kept, items);
  arena.take(step.bracket.histograms, 2 * kDigits<Key> * kBuckets);
  take_zeros(step.all, 1);
  if (guards) take_zeros(step.guards, items), take_zeros(step.rest, 1);
  Layout layout{arena.used, 0};

  arena.take(step.work.items, items);
  arena.take(step.work.dims, static_cast<int64_t>(list.dims.size()));
  arena.take(step.bracket.searches, 2 * (kDigits<Key> + 1));
  take_others(step.all, 1);
  if (guards) take_others(step.guards, items), take_others(step.rest, 1);
  arena.take(step.sums, survey_blocks);
  arena.take(step.chunks, list.chunks);
  Arena sample = arena;
  sample.take(step.sample, step.samples);
  arena.take(step.bits, list.chunks * kWords);
  arena.take(step.list, step.places);
  arena.take(step.positions, step.places);
  layout.bytes = std::max(arena.used, sample.used);
  return layout;
}

// Travels as kernel arguments, which need no staging buffer whose life would have to be managed.
template <class T>
void copy_to_device(const std::vector<T>& from, const T* to, cudaStream_t stream) {
  const char* bytes = reinterpret_cast<const char*>(from.data());
  const auto size = static_cast<int64_t>(from.size() * sizeof(T));
  for (int64_t begin = 0; begin < size; begin += sizeof(Piece)) {
    Piece piece{};
    const int64_t count = std::min<int64_t>(size - begin, sizeof(Piece));
    std::memcpy(piece.bytes, bytes + begin, count);
    char* target = const_cast<char*>(reinterpret_cast<const char*>(to)) + begin;
    launch(upload, 1, kThreads, stream, piece, target, static_cast<int>(count));
  }
}

// Steps 3 and 4.
template <class Key, Stage kStage>
void select(const Step<Key>& step, int64_t segments, int64_t blocks, cudaStream_t stream) {
  for (int digit = 0; digit < kDigits<Key>; ++digit) {
    launch(count<Key, kStage>, blocks, kThreads, stream, step, digit);
  }
  launch(ties<Key, kStage>, blocks, kThreads, stream, step);
  launch(cut<Key, kStage>, segments, kThreads, stream, step);
}

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <class Key>
Outputs run(const PruneArguments& arguments) {
  const WorkList list(arguments);
  const auto items = static_cast<int64_t>(list.items.size());
  const at::TensorOptions device = arguments.weights[0].options();
  const at::Tensor kept = at::empty({items}, device.dtype(at::kLong));
  const at::Tensor nonfinite = at::empty({items}, device.dtype(at::kLong));
  const at::Tensor scores = at::empty({2}, device.dtype(at::kDouble));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  int processors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                                        arguments.weights[0].device().index()));
  const auto blocks = [&](int each) {
    return std::max<int64_t>(1, std::min<int64_t>(list.chunks, processors * each));
  };
  constexpr Tuning kTuned = kTuning<Key>;
  const int64_t survey_blocks = blocks(kTuned.survey), count_blocks = blocks(kTuned.count);
  const bool guards = arguments.min_keep > 0;

  Step<Key> step{};
  step.work.count = static_cast<int32_t>(items);
  step.work.fresh = arguments.fresh;
  step.work.alone = arguments.grads.empty();
  step.work.three = !arguments.mask_grads.empty();
  step.work.squared = arguments.squared();
  step.work.entries = list.entries;
  step.work.chunks = list.chunks;
  step.keep = std::max<int64_t>(0, list.entries - arguments.prune);
  step.min_keep = arguments.min_keep;
  if (list.entries > kMinSample) {
    step.samples = list.entries > kManyEntries ? kMaxSample : kMinSample;
    step.ranks = bracket_ranks(step.keep, list.entries, step.samples);
  }
  step.places = std::max(list.entries / kEntriesPerPlace, std::min(list.entries, kMinPlaces));
  step.kept_out = kept.data_ptr<int64_t>();
  step.nonfinite_out = nonfinite.data_ptr<int64_t>();
  step.scores_out = scores.data_ptr<double>();
  const Layout layout = lay_out(step, list, survey_blocks, nullptr);
  const at::Tensor memory = at::empty({layout.bytes}, device.dtype(at::kByte));
  lay_out(step, list, survey_blocks, static_cast<char*>(memory.data_ptr()));

  C10_CUDA_CHECK(cudaMemsetAsync(memory.data_ptr(), 0, layout.zeros, stream));
  copy_to_device(list.items, step.work.items, stream);
  copy_to_device(list.dims, step.work.dims, stream);
  if (step.samples > 0) {
    launch(sample<Key>, count_blocks, kThreads, stream, step);
    for (int digit = 1; digit < kDigits<Key>; ++digit) {
      launch(narrow<Key>, count_blocks, kThreads, stream, step, digit);
    }
  }
  launch(survey<Key>, survey_blocks, kThreads, stream, step);
  select<Key, Stage::all>(step, 1, count_blocks, stream);
  if (guards) {
    launch(tally<Key>, count_blocks, kThreads, stream, step);
    launch(judge<Key>, 1, kThreads, stream, step);
    select<Key, Stage::guards>(step, items, count_blocks, stream);
    select<Key, Stage::rest>(step, 1, count_blocks, stream);
  }
  launch(apply_list<Key>, blocks(kTuned.list), kThreads, stream, step);
  launch(apply_keys<Key>, blocks(kTuned.keys), kThreads, stream, step);
  launch(finish<Key>, 1, kThreads, stream, step, static_cast<int>(survey_blocks));
  return {kept, nonfinite, scores};
}

Outputs prune_cuda(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                   at::TensorList masks, bool fresh, int64_t prune, int64_t min_keep) {
  const PruneArguments arguments{weights, grads, mask_grads, masks, fresh, prune, min_keep};
  const bool wide = arguments.check();
  const c10::cuda::CUDAGuard guard(weights[0].device());
  Outputs outputs = wide ? run<int64_t>(arguments) : run<int32_t>(arguments);
  arguments.bump_versions();
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(drive, CUDA, m) { m.impl("prune_", &prune_cuda); }

}  // namespace drive
