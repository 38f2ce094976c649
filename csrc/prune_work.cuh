// The work list of drive::prune_ on a GPU: tensors of any sizes, strides and dtypes as chunks of 4096
// entries, how a block of threads loads one, and what its entries' keys are.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "key.h"

namespace drive::gpu {

constexpr unsigned kFull = 0xffffffffu;  // all lanes of a warp
constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Entries a chunk: 16 for each thread, so that one round of loads (four 16-byte ones of weights, four of
// gradients) takes in all of it, and the list of keys inside the bracket, at worst all, fits shared memory.
constexpr int kChunk = 4096;

// Loads of 16 bytes that a thread has in flight for each operand: four for weights and four for gradients
// are 128 bytes, at 1024 threads 128 KB a multiprocessor; HBM at 4.3 TB/s and 700 ns asks for 23 KB.
constexpr int kInFlight = 4;

enum Operand { kWeight, kGrad, kMask, kMaskGrad, kOperands };
enum class Type : int32_t { f32, bf16, f16, f64 };

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

// One dimension of the walk through a tensor's entries, which goes in the order of the weight's memory.
struct Dim {
  int64_t size;
  int64_t stride[kOperands];  // in entries
  int64_t index_stride;       // of the row-major index
};

struct Item {
  char* data[kOperands];
  int64_t numel;
  int64_t first_entry;  // of all tensors' entries
  int64_t first_chunk;  // of all tensors' chunks
  int32_t first_dim, dims;
  Type type;
  bool vector;   // every operand lies in the order of the walk, without gaps, on 16 bytes
  bool logical;  // the walk goes in row-major order
};

struct Work {
  const Item* items;
  const Dim* dims;
  int32_t count;
  bool fresh;  // old masks are not read
  bool alone;    // there are no gradients
  bool three;    // there are mask gradients too
  bool squared;  // |S| is the square of the score that is ranked
  int64_t entries, chunks;
};

struct Chunk {
  int32_t item;
  int32_t count;
  int64_t begin;  // in the item's walk
};

// The item that holds entry or chunk i: the last one that begins at or before it.
template <int64_t Item::*kFirst>
__device__ int32_t find(const Work& work, int64_t i) {
  int32_t found = 0;
  for (int32_t end = work.count; end - found > 1;) {
    const int32_t middle = (found + end) / 2;
    if (work.items[middle].*kFirst <= i) {
      found = middle;
    } else {
      end = middle;
    }
  }
  return found;
}

__device__ inline Chunk chunk_at(const Work& work, int64_t c) {
  const int32_t i = find<&Item::first_chunk>(work, c);
  const int64_t begin = (c - work.items[i].first_chunk) * kChunk;
  const int64_t left = work.items[i].numel - begin;
  return {i, static_cast<int32_t>(left < kChunk ? left : kChunk), begin};
}

// Where entry `position` of the walk lies in each operand, in entries.
struct Place {
  int64_t at[kOperands];
};

__device__ inline Place place_of(const Work& work, const Item& item, int64_t position) {
  Place place{};
#pragma unroll 1
  for (int d = item.dims - 1; d >= 0; --d) {
    const Dim& dim = work.dims[item.first_dim + d];
    const int64_t rest = d ? position / dim.size : 0;
#pragma unroll
    for (int o = 0; o < kOperands; ++o) place.at[o] += (position - rest * dim.size) * dim.stride[o];
    position = rest;
  }
  return place;
}

// The row-major index, over all tensors, of entry `position` of the walk. Ties are settled by it.
__device__ inline int64_t global_index(const Work& work, const Item& item, int64_t position) {
  if (item.logical) return item.first_entry + position;
  int64_t index = item.first_entry;
#pragma unroll 1
  for (int d = item.dims - 1; d >= 0; --d) {
    const Dim& dim = work.dims[item.first_dim + d];
    const int64_t rest = d ? position / dim.size : 0;
    index += (position - rest * dim.size) * dim.index_stride;
    position = rest;
  }
  return index;
}

// The inverse: the walk's position of the item's entry with this row-major index.
__device__ inline int64_t position_of(const Work& work, const Item& item, int64_t index) {
  if (item.logical) return index;
  int64_t position = 0;
#pragma unroll 1
  for (int d = 0; d < item.dims; ++d) {
    const Dim& dim = work.dims[item.first_dim + d];
    position = position * dim.size + index / dim.index_stride % dim.size;
  }
  return position;
}

__device__ inline float widen(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
__device__ inline float widen(Half v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }

__device__ inline BFloat16 one(BFloat16) { return {0x3f80}; }
__device__ inline Half one(Half) { return {0x3c00}; }
__device__ inline float one(float) { return 1; }
__device__ inline double one(double) { return 1; }

// The key of an entry that is not pruned: bits of |theta * G|, or of |theta * dL/dm * dL/dtheta|. Single
// IEEE products: no contraction, no flush to zero.
__device__ inline int32_t key_of(float weight, float grad, float, bool) {
  return key_of_bits<int32_t>(__float_as_uint(__fmul_rn(weight, grad)));
}
__device__ inline int64_t key_of(double weight, double grad, double mask_grad, bool three) {
  if (three) weight = __dmul_rn(weight, mask_grad);
  return key_of_bits<int64_t>(static_cast<uint64_t>(__double_as_longlong(__dmul_rn(weight, grad))));
}

__device__ inline double score_of(int32_t key) { return __uint_as_float(bits_of_key(key)); }
__device__ inline double score_of(int64_t key) {
  return __longlong_as_double(static_cast<int64_t>(bits_of_key(key)));
}

// ---- One entry at a time: any strides, any alignment. Not in a hurry, and little code. ----

template <class Score>
__device__ Score value_at(const Item& item, int operand, const Place& place) {
  const char* data = item.data[operand];
  const int64_t at = place.at[operand];
  switch (item.type) {
    case Type::f32: return reinterpret_cast<const float*>(data)[at];
    case Type::bf16: return widen(reinterpret_cast<const BFloat16*>(data)[at]);
    case Type::f16: return widen(reinterpret_cast<const Half*>(data)[at]);
    default: return static_cast<Score>(reinterpret_cast<const double*>(data)[at]);
  }
}

// The key of entry `position` of the walk.
template <class Key>
__device__ Key key_at(const Work& work, const Item& item, int64_t position) {
  using Score = typename KeyTraits<Key>::Score;
  const Place place = place_of(work, item, position);
  if (!work.fresh && !item.data[kMask][place.at[kMask]]) return kDead<Key>;
  return key_of(value_at<Score>(item, kWeight, place), work.alone ? 1 : value_at<Score>(item, kGrad, place),
                work.three ? value_at<Score>(item, kMaskGrad, place) : 0, work.three);
}

// Masks an entry, and makes its weight +0 if it does not survive.
__device__ inline void write_at(const Work& work, const Item& item, int64_t position, bool keep) {
  const Place place = place_of(work, item, position);
  item.data[kMask][place.at[kMask]] = static_cast<char>(keep);
  if (keep) return;
  const int64_t at = place.at[kWeight];
  switch (item.type) {
    case Type::f32: reinterpret_cast<float*>(item.data[kWeight])[at] = 0; break;
    case Type::f64: reinterpret_cast<double*>(item.data[kWeight])[at] = 0; break;
    default: reinterpret_cast<uint16_t*>(item.data[kWeight])[at] = 0;
  }
}

// body(i, does entry i of the chunk exist?) for the entries that are this thread's. All threads of the block
// take the same number of turns, so the body may talk to its warp.
template <class Body>
__device__ void for_each_entry(const Chunk& chunk, Body body) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kChunk; i += kThreads) body(i, i < chunk.count);
}

// ---- Vectors of 16 bytes: the whole chunks of tensors that allow it ----

__device__ inline bool in_vectors(const Item& item, const Chunk& chunk) {
  return item.vector && chunk.count == kChunk;
}

// Entries that one load of 16 bytes brings.
template <class T>
constexpr int kLanes = 16 / sizeof(T);

template <class T>
struct alignas(16) Vec {
  T at[kLanes<T>];
};

template <class T>
struct Entries {
  Vec<T> weight, grad, mask_grad;
  uint32_t alive;  // bit j: entry j is not pruned
};

// A vector's part of the mask, one byte an entry, each 0 or 1.
template <class T>
struct alignas(kLanes<T>) MaskBytes {
  using Word = std::conditional_t<kLanes<T> == 2, uint16_t, uint32_t>;
  static constexpr int kWords = kLanes<T> < 4 ? 1 : kLanes<T> / 4;
  Word word[kWords];

  // Bit j: byte j. A product moves the last bits of four bytes side by side; no two of its terms meet.
  __device__ uint32_t bits() const {
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) all |= (word[i] * 0x01020408u >> 24 & 0xf) << 4 * i;
    return all;
  }
  __device__ static MaskBytes of(uint32_t bits) {
    MaskBytes bytes;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      bytes.word[i] = static_cast<Word>((bits >> 4 * i & 0xf) * 0x00204081u & 0x01010101u);
    }
    return bytes;
  }
};

// Says that an address found in memory is one of global memory, which the compiler cannot know.
template <class T>
__device__ T& global(char* address) {
  __builtin_assume(__isGlobal(address));
  return *reinterpret_cast<T*>(address);
}

template <class T>
__device__ Vec<T>& vector_at(const Item& item, int operand, int64_t position) {
  return global<Vec<T>>(item.data[operand] + position * sizeof(T));
}

template <class T>
__device__ MaskBytes<T>& mask_at(const Item& item, int64_t position) {
  return global<MaskBytes<T>>(item.data[kMask] + position);
}

template <class Key, class T>
__device__ Entries<T> load(const Work& work, const Item& item, int64_t position) {
  Entries<T> e{};
  e.weight = vector_at<T>(item, kWeight, position);
  if (work.alone) {
#pragma unroll
    for (int j = 0; j < kLanes<T>; ++j) e.grad.at[j] = one(T{});
  } else {
    e.grad = vector_at<T>(item, kGrad, position);
  }
  if (sizeof(Key) == 8 && work.three) e.mask_grad = vector_at<T>(item, kMaskGrad, position);
  e.alive = work.fresh ? (1u << kLanes<T>) - 1 : mask_at<T>(item, position).bits();
  return e;
}

template <class Key, class T>
__device__ Key key_of(const Work& work, T weight, T grad, T mask_grad, bool alive) {
  using Score = typename KeyTraits<Key>::Score;
  if (!alive) return kDead<Key>;
  return key_of(static_cast<Score>(widen(weight)), static_cast<Score>(widen(grad)),
                static_cast<Score>(widen(mask_grad)), work.three);
}

template <class Key, class T>
__device__ Key key_of(const Work& work, const Entries<T>& e, int j) {
  return key_of<Key>(work, e.weight.at[j], e.grad.at[j], e.mask_grad.at[j], e.alive >> j & 1);
}

// The same of an entry that is not pruned, loaded once more.
template <class Key, class T>
__device__ Key living_key_at(const Work& work, const Item& item, int64_t position) {
  const auto entry = [&](int o) { return global<T>(item.data[o] + position * sizeof(T)); };
  return key_of<Key>(work, entry(kWeight), work.alone ? one(T{}) : entry(kGrad),
                     work.three ? entry(kMaskGrad) : T{}, true);
}

// A thread's entries of a chunk, and so the bits of a word that it keeps of them.
constexpr int kOwn = kChunk / kThreads;

// Entries are dealt out to the threads `lanes` at a time (a vector, or one). The thread that has entry i of
// a chunk, which of its own entries it is; and back.
__device__ inline int owner(int i, int lanes) { return i / lanes % kThreads; }
__device__ inline int own_index(int i, int lanes) { return i / lanes / kThreads * lanes + i % lanes; }
__device__ inline int chunk_index(int own, int lanes) {
  return (own / lanes * kThreads + static_cast<int>(threadIdx.x)) * lanes + own % lanes;
}

// body(v, what load(v) returned) for each vector v of a chunk that is this thread's; kInFlight loads go
// before the first body.
template <class T, class Load, class Body>
__device__ void for_each_vector(Load load, Body body) {
  constexpr int kVectors = kOwn / kLanes<T>;
  constexpr int kTurn = kVectors < kInFlight ? kVectors : kInFlight;
#pragma unroll 1
  for (int first = threadIdx.x; first < kVectors * kThreads; first += kTurn * kThreads) {
    decltype(load(0)) loaded[kTurn];
#pragma unroll
    for (int u = 0; u < kTurn; ++u) loaded[u] = load(first + u * kThreads);
#pragma unroll
    for (int u = 0; u < kTurn; ++u) body(first + u * kThreads, loaded[u]);
  }
}

// body(a value of the item's dtype)
template <class Key, class Body>
__device__ void with_type(const Item& item, Body body) {
  switch (item.type) {
    case Type::f32: return body(float{});
    case Type::bf16: return body(BFloat16{});
    case Type::f16: return body(Half{});
    case Type::f64:
      if constexpr (sizeof(Key) == 8) body(double{});
  }
}

}  // namespace drive::gpu
