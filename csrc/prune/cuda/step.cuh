// What the launches of a step leave to each other in device memory (prune.cu tells the steps).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "prune/cuda/block.cuh"
#include "prune/cuda/vectors.cuh"
#include "prune/cuda/work.cuh"
#include "prune/key.h"
#include "prune/sampling.h"

namespace drive::gpu {

// ---- Tuning: blocks of 256 threads a multiprocessor, on which the registers a thread may use depend ----

struct Tuning {
  int survey;  // 85 registers hold four vectors of both operands and the counts; its part of the list 32 KB
  int list;    // one operand in flight; more blocks hide the wait for a chunk's part of the list
  int keys;    // as the survey, and the cuts
  int count;   // few, so that a block counts many keys before it adds its 2048 counters to the global ones
};
template <class Key>  // scores of 64 bits need twice the registers
constexpr Tuning kTuning = sizeof(Key) == 4 ? Tuning{3, 5, 2, 2} : Tuning{2, 5, 2, 2};

// ---- State on the device ----

// Sums of the survey over all entries.
struct Totals {
  Counter above, at_hi, inside, at_lo, alive;  // what these cost
  Counter listed, nonfinite;                   // how many; listed: those inside
};

// What the survey found in one chunk.
struct ChunkCounts {
  int64_t list;  // where its part of the list begins
  int32_t inside, at_hi, at_lo;
  int32_t top;  // at the upper edge or above
};

// An entry survives if its key is larger, or equal and its global row-major index not beyond `last`; -1: none of
// these do.
template <class Key>
struct Cut {
  Key key;
  int64_t last;

  __device__ bool keeps(Key k, int64_t index) const { return k > key || (k == key && index <= last); }
};

// A selection: over all entries (one segment), or over each tensor's. Of the latter only large ones have a segment,
// as its histograms are 48 KB: what a block counts for itself suffices for the others.
template <class Key>
struct Selection {
  Search<Key>* searches;  // [segments, kDigits + 1]: before each digit and after the last one
  Counter* histograms;    // [segments, kDigits, kBuckets]
  Cut<Key>* cuts;         // [1], or [items]
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

// How the threshold of Stage::all is found, as the survey's totals tell (or the host: Told).
enum class Where { untold, refused, edge, list, entries };

// What the host knows before a launch, where ranks add up their counts in between (shards.cu). A step of one
// process finds all of it out on the device.
template <class Key>
struct Told {
  Key high = kTop<Key>, low = kDead<Key>;  // the bracket's edges, where no rank of a sample is one
  Where where = Where::untold;
};

template <class Key>
struct Step {
  Work work;
  Told<Key> told;
  int64_t budget, min_keep;  // budget: of what all survivors may cost
  BracketRanks ranks;
  int64_t samples, places;  // places: of the list
  int64_t segments;         // of guards

  Key* sample;            // [samples], in the memory of bits and list, which come later
  Selection<Key> bracket;  // [2]: hi and lo
  Totals* totals;
  double* sums;           // [survey's blocks] of |S|
  Counter* alive;         // [items]
  Counter* nonfinite;     // [items]
  Counter* kept;          // [items]
  ChunkCounts* chunks;    // [chunks]
  uint32_t* bits;         // [words]: is the key at least hi?
  Key* list;              // [places]: keys strictly inside the bracket
  uint16_t* positions;    // [places]: where in their chunks
  Selection<Key> all, guards, rest;
  bool* guarded;          // does a guard count?
  Counter* next;          // the least key of a survivor where none on the threshold survives

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
  if (step.told.where != Where::untold) return {step.told.where, {}};
  const Totals& t = *step.totals;
  const auto above = static_cast<int64_t>(t.above), at_hi = static_cast<int64_t>(t.at_hi);
  const auto inside = static_cast<int64_t>(t.inside), at_lo = static_cast<int64_t>(t.at_lo);
  const int64_t k = min(step.budget, static_cast<int64_t>(t.alive));
  if (t.nonfinite) return {Where::refused, {kDead<Key>, 0, 0}};
  if (k == 0) return {Where::edge, {kTop<Key>, 0, 0}};
  const bool held = static_cast<int64_t>(t.listed) <= step.places && above < k &&
      k <= above + at_hi + inside + at_lo;
  if (!held) return {Where::entries, {kDead<Key>, k, step.work.cost}};
  if (k <= above + at_hi) return {Where::edge, {bracket_edge(step, 0), k - above, at_hi}};
  if (k <= above + at_hi + inside) return {Where::list, {kDead<Key>, k - above - at_hi, inside}};
  return {Where::edge, {bracket_edge(step, 1), k - above - at_hi - inside, at_lo}};
}

// ---- Bits: one an entry. In chunks of vectors a thread's own lie side by side, else all in their order. ----

constexpr int kMaxWords = kMaxChunk / 32;

__device__ inline uint32_t* words_of(uint32_t* bits, const Item& item, const Chunk& chunk) {
  return bits + item.first_word + (chunk.begin + item.missing) / 32;
}

__device__ inline int count_words(const Chunk& chunk) { return (chunk.to + 31) / 32; }

__device__ inline int lanes_of(const Item& item, const Chunk& chunk) {
  return in_vectors(item, chunk) ? (1 << item.chunk_bits) / (kVectors * kThreads) : 1;
}

// The place of entry i's bit; lanes: of the item where the chunk is read in vectors, else 1.
__device__ inline int bit_of(int i, int lanes) {
  return lanes == 1 ? i : owner(i, lanes) * (kVectors * lanes) + own_index(i, lanes);
}

// A thread's own bits of a chunk of vectors of T.
template <class T>
using OwnBits = Unsigned<kOwn<T> / 8>;

template <class T>
__device__ OwnBits<T>& own_bits(uint32_t* words) {
  return reinterpret_cast<OwnBits<T>*>(words)[threadIdx.x];
}

}  // namespace drive::gpu
