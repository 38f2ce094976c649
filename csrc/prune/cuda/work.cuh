// The work list of drive::prune_ on a GPU: tensors of any sizes, strides and dtypes as chunks of 16 KB, and what
// their entries' keys are. vectors.cuh: whole chunks of dense tensors.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "prune/key.h"

namespace drive::gpu {

constexpr unsigned kFull = 0xffffffffu;  // all lanes of a warp
constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// A chunk is 16 KB of weights: 2048, 4096 or 8192 entries. Each thread has four vectors of 16 bytes of every
// operand, and all are in flight before it looks at the first: with a gradient 128 bytes, at 768 threads 96 KB a
// multiprocessor, where HBM at 4.3 TB/s and 700 ns asks for 23 KB.
constexpr int kVectorBytes = 16;
constexpr int kVectors = 4;
constexpr int kChunkBytes = kVectorBytes * kVectors * kThreads;
constexpr int kMaxChunk = kChunkBytes / 2;  // entries, of 16 bits each

enum Operand { kWeight, kGrad, kMask, kMaskGrad, kOperands };
constexpr uint8_t kAllAligned = (1 << kOperands) - 1;
enum class Type : int32_t { f32, bf16, f16, f64 };

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

// One dimension of the walk through a tensor's entries, which goes in the order of the weight's memory.
struct Dim {
  int64_t size;
  int64_t stride[kOperands];  // in entries
  int64_t index_stride;       // of the row-major index
  // n / size for 0 <= n < 2^31, if size is there too: a product instead of the hundred instructions of a
  // 64-bit division (Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994).
  uint32_t magic;
  int32_t shift;
};

struct Item {
  char* data[kOperands];
  int64_t numel;
  int64_t first_entry;  // of all tensors' entries
  int64_t first_chunk;  // of all tensors' chunks
  int64_t first_word;   // of all tensors' bits
  int64_t first_cost;   // of all entries' costs
  int32_t first_dim, dims;
  int32_t segment;  // of the selections of single tensors; -1: too small for one of its own
  Type type;
  int32_t cost;   // of an entry
  float scale;    // its scores are multiplied by it before they are ranked
  int16_t chunk_bits;  // log2 of the entries of a chunk
  int16_t missing;     // entries at the front of its first chunk: the others begin on 16 bytes of the weight
  bool dense;          // every operand lies in the order of the walk, without gaps
  bool logical;        // the walk goes in row-major order
  uint8_t aligned;     // bit o: a vector of a dense operand can be loaded as one
};

struct Work {
  const Item* items;
  const Dim* dims;
  int32_t count;
  bool fresh;    // old masks are not read
  bool alone;    // there are no gradients
  bool three;    // there are mask gradients too
  bool squared;  // |S| is the square of the score that is ranked
  bool priced;   // entries do not all cost 1
  int64_t entries, chunks, cost;  // cost: of all entries
};

struct Chunk {
  int32_t item;
  int32_t from, to;  // entries of the chunk that exist; all chunks of an item but its first and last are whole
  int64_t begin;     // where its entry 0 is in the item's walk, or would be

  __device__ bool has(int i) const { return i >= from && i < to; }
};

// The item that holds entry, chunk or unit of cost i: the last one that begins at or before it.
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

// How many an item has.
__host__ __device__ inline int64_t chunks_of(const Item& item) {
  if (item.numel == 0) return 0;
  return (item.numel + item.missing + (int64_t{1} << item.chunk_bits) - 1) >> item.chunk_bits;
}

__device__ inline Chunk chunk_at(const Work& work, int64_t c) {
  const int32_t i = find<&Item::first_chunk>(work, c);
  const Item& item = work.items[i];
  const int64_t begin = ((c - item.first_chunk) << item.chunk_bits) - item.missing;
  const int64_t left = item.numel - begin, size = int64_t{1} << item.chunk_bits;
  return {i, static_cast<int32_t>(begin < 0 ? -begin : 0), static_cast<int32_t>(left < size ? left : size),
          begin};
}

// position / dim.size. Only strided tensors of 2^31 entries or more are divided the long way.
__device__ inline int64_t divided(const Item& item, const Dim& dim, int64_t position) {
  if (item.numel >= int64_t{1} << 31) return position / dim.size;
  const auto n = static_cast<uint32_t>(position);
  return (__umulhi(n, dim.magic) + n) >> dim.shift;
}

// Where entry `position` of the walk lies in each operand, in entries.
struct Place {
  int64_t at[kOperands];
};

__device__ inline Place place_of(const Work& work, const Item& item, int64_t position) {
  if (item.dense) return {{position, position, position, position}};
  Place place{};
#pragma unroll 1
  for (int d = item.dims - 1; d >= 0; --d) {
    const Dim& dim = work.dims[item.first_dim + d];
    const int64_t rest = d ? divided(item, dim, position) : 0;
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
    const int64_t rest = d ? divided(item, dim, position) : 0;
    index += (position - rest * dim.size) * dim.index_stride;
    position = rest;
  }
  return index;
}

// The inverse: the walk's position of the item's entry with this row-major index. Asked for one chunk a tensor.
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

__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }
__device__ inline double product(double a, float b) { return __dmul_rn(a, b); }

// In place of a scale of 1: no instruction.
struct One {};
__device__ inline float product(float a, One) { return a; }
__device__ inline double product(double a, One) { return a; }

// The key of an entry that is not pruned: bits of |theta * (G * scale)|, or of |theta * dL/dm * dL/dtheta * scale|.
// Single IEEE products: no contraction, no flush to zero.
template <class Scale>
__device__ int32_t key_of(float weight, float grad, float, bool, Scale scale) {
  return key_of_bits<int32_t>(__float_as_uint(product(weight, product(grad, scale))));
}
template <class Scale>
__device__ int64_t key_of(double weight, double grad, double mask_grad, bool three, Scale scale) {
  if (three) {
    weight = product(weight, mask_grad);
  } else {
    grad = product(grad, scale);
  }
  double score = product(weight, grad);
  if (three) score = product(score, scale);
  return key_of_bits<int64_t>(static_cast<uint64_t>(__double_as_longlong(score)));
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
                work.three ? value_at<Score>(item, kMaskGrad, place) : 0, work.three, item.scale);
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
// take the same number of turns, so the body may talk to its warp, which has 32 neighbouring entries.
template <class Body>
__device__ void for_each_entry(const Chunk& chunk, Body body) {
#pragma unroll 1
  for (int first = 0; first < chunk.to; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    body(i, chunk.has(i));
  }
}

}  // namespace drive::gpu
