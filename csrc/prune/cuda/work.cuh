// The work list of drive::prune_ on a GPU: tensors of any sizes, strides and dtypes as chunks of 16 KB, how a
// block of threads loads one, and what its entries' keys are.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

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
  int32_t first_dim, dims;
  int32_t segment;  // of the selections of single tensors; -1: too small for one of its own
  Type type;
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
  bool fresh;  // old masks are not read
  bool alone;    // there are no gradients
  bool three;    // there are mask gradients too
  bool squared;  // |S| is the square of the score that is ranked
  int64_t entries, chunks;
};

struct Chunk {
  int32_t item;
  int32_t from, to;  // entries of the chunk that exist; all chunks of an item but its first and last are whole
  int64_t begin;     // where its entry 0 is in the item's walk, or would be

  __device__ bool has(int i) const { return i >= from && i < to; }
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
// take the same number of turns, so the body may talk to its warp, which has 32 neighbouring entries.
template <class Body>
__device__ void for_each_entry(const Chunk& chunk, Body body) {
#pragma unroll 1
  for (int first = 0; first < chunk.to; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    body(i, chunk.has(i));
  }
}

// ---- Vectors of 16 bytes: the whole chunks of dense tensors ----

__device__ inline bool in_vectors(const Item& item, const Chunk& chunk) {
  return item.dense && chunk.from == 0 && chunk.to == 1 << item.chunk_bits;
}

// Entries that one load of 16 bytes brings.
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

// Entries of a chunk that are a thread's.
template <class T>
constexpr int kOwn = kVectors * kLanes<T>;

template <int kBytes>
using Unsigned = std::conditional_t<kBytes == 1, uint8_t,
                                    std::conditional_t<kBytes == 2, uint16_t,
                                                       std::conditional_t<kBytes == 4, uint32_t, uint64_t>>>;

// Bytes that are loaded at once. Held as words: 16-bit entries would be put together and taken apart again.
template <int kBytes>
struct alignas(kBytes) Pack {
  using Word = Unsigned<kBytes < 4 ? kBytes : 4>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  Word word[kWords];
};

using Vector = Pack<kVectorBytes>;

__device__ inline float value_in(const Vector& v, int j, float) { return __uint_as_float(v.word[j]); }
__device__ inline float value_in(const Vector& v, int j, BFloat16) {
  return __uint_as_float(j % 2 ? v.word[j / 2] & 0xffff0000u : v.word[j / 2] << 16);
}
__device__ inline float value_in(const Vector& v, int j, Half) {
  return widen(Half{static_cast<uint16_t>(v.word[j / 2] >> 16 * (j % 2))});
}
__device__ inline double value_in(const Vector& v, int j, double) {
  const uint64_t bits = static_cast<uint64_t>(v.word[2 * j + 1]) << 32 | v.word[2 * j];
  return __longlong_as_double(static_cast<long long>(bits));
}

__device__ inline Vector ones(float) { return {{0x3f800000u, 0x3f800000u, 0x3f800000u, 0x3f800000u}}; }
__device__ inline Vector ones(BFloat16) { return {{0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u}}; }
__device__ inline Vector ones(Half) { return {{0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u}}; }
__device__ inline Vector ones(double) { return {{0, 0x3ff00000u, 0, 0x3ff00000u}}; }

// Which bits of a vector's word w belong to the entries in `keep`, bit j for entry j.
template <class T>
__device__ uint32_t bits_kept(uint32_t keep, int w) {
  if constexpr (sizeof(T) == 2) return (keep >> 2 * w & 1) * 0xffffu | (keep >> (2 * w + 1) & 1) * 0xffff0000u;
  return 0u - (keep >> w * 4 / static_cast<int>(sizeof(T)) & 1);
}

// A vector's part of the mask: one byte an entry, each 0 or 1. Bit j is byte j. A product moves the last bits of
// four bytes side by side; no two of its terms meet.
template <int kBytes>
__device__ uint32_t bits_of_bytes(const Pack<kBytes>& bytes) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < bytes.kWords; ++i) bits |= (bytes.word[i] * 0x01020408u >> 24 & 0xf) << 4 * i;
  return bits;
}

template <int kBytes>
__device__ Pack<kBytes> bytes_of_bits(uint32_t bits) {
  Pack<kBytes> bytes;
#pragma unroll
  for (int i = 0; i < bytes.kWords; ++i) {
    const uint32_t word = (bits >> 4 * i & 0xf) * 0x00204081u & 0x01010101u;
    bytes.word[i] = static_cast<typename Pack<kBytes>::Word>(word);
  }
  return bytes;
}

// As loaded: what is made of them would wait for the first ones before the last are on their way.
template <class T>
struct Entries {
  Vector weight, grad, mask_grad;
  Pack<kLanes<T>> mask;

  __device__ uint32_t alive() const { return bits_of_bytes(mask); }  // bit j: entry j is not pruned
};

// Says that an address found in memory is one of global memory, which the compiler cannot know.
template <class T>
__device__ T& global(char* address) {
  __builtin_assume(__isGlobal(address));
  return *reinterpret_cast<T*>(address);
}

// Of an operand with entries of kEntry bytes. In steps of an entry where its address is no multiple of the size: a
// gradient that is a view of a bucket, say, beside a weight that is not.
template <int kBytes, int kEntry, bool kAligned>
__device__ Pack<kBytes> read(const Item& item, int operand, int64_t position) {
  char* address = item.data[operand] + position * kEntry;
  if constexpr (!kAligned) {
    if (!(item.aligned >> operand & 1)) {
      using Word = typename Pack<kBytes>::Word;
      Pack<kBytes> pack{};
#pragma unroll
      for (int at = 0; at < kBytes; at += kEntry) {
        const auto entry = global<Unsigned<kEntry>>(address + at);
#pragma unroll
        for (int part = 0; part < kEntry; part += sizeof(Word)) {
          pack.word[(at + part) / sizeof(Word)] |= static_cast<Word>(entry >> 8 * part) << at % sizeof(Word) * 8;
        }
      }
      return pack;
    }
  }
  return global<Pack<kBytes>>(address);
}

template <int kEntry, bool kAligned, int kBytes>
__device__ void write(const Item& item, int operand, int64_t position, const Pack<kBytes>& pack) {
  char* address = item.data[operand] + position * kEntry;
  if constexpr (!kAligned) {
    if (!(item.aligned >> operand & 1)) {
      using Word = typename Pack<kBytes>::Word;
#pragma unroll
      for (int at = 0; at < kBytes; at += kEntry) {
        Unsigned<kEntry> entry = 0;
#pragma unroll
        for (int part = 0; part < kEntry; part += sizeof(Word)) {
          const Word word = pack.word[(at + part) / sizeof(Word)] >> at % sizeof(Word) * 8;
          entry |= static_cast<Unsigned<kEntry>>(word) << 8 * part;
        }
        global<Unsigned<kEntry>>(address + at) = entry;
      }
      return;
    }
  }
  global<Pack<kBytes>>(address) = pack;
}

template <class Key, class T, bool kAligned>
__device__ Entries<T> load(const Work& work, const Item& item, int64_t position) {
  constexpr int kSize = sizeof(T);
  Entries<T> e{};
  const auto vector = [&](int o) { return read<kVectorBytes, kSize, kAligned>(item, o, position); };
  e.mask = work.fresh ? bytes_of_bits<kLanes<T>>(~0u) : read<kLanes<T>, 1, kAligned>(item, kMask, position);
  e.weight = vector(kWeight);
  e.grad = work.alone ? ones(T{}) : vector(kGrad);
  if (sizeof(Key) == 8 && work.three) e.mask_grad = vector(kMaskGrad);
  return e;
}

template <class Key, class T>
__device__ Key key_of(const Work& work, const Entries<T>& e, uint32_t alive, int j) {
  using Score = typename KeyTraits<Key>::Score;
  if (!(alive >> j & 1)) return kDead<Key>;
  return key_of(static_cast<Score>(value_in(e.weight, j, T{})), static_cast<Score>(value_in(e.grad, j, T{})),
                static_cast<Score>(value_in(e.mask_grad, j, T{})), work.three);
}

// Entries are dealt out to the threads `lanes` at a time. The thread that has entry i of a chunk, which of its
// own entries it is; and back.
__device__ inline int owner(int i, int lanes) { return i / lanes % kThreads; }
__device__ inline int own_index(int i, int lanes) { return i / lanes / kThreads * lanes + i % lanes; }
__device__ inline int chunk_index(int own, int lanes) {
  return (own / lanes * kThreads + static_cast<int>(threadIdx.x)) * lanes + own % lanes;
}

// body(u, where it is in the chunk, what load returned of that) for the u-th vector of this thread. All loads are
// under way before the first body: ptxas would mix them, and hold the last back until the first data are there, but
// not across a loop, so bodies come in two turns. Entry by entry a thread's loads are many anyhow, and code is short.
template <class T, bool kAligned, class Load, class Body>
__device__ void for_each_vector(Load load, Body body) {
  constexpr int kInFlight = kAligned ? kVectors : 1, kTurn = (kInFlight + 1) / 2;
  const auto at = [](int u) { return (u * kThreads + static_cast<int>(threadIdx.x)) * kLanes<T>; };
#pragma unroll 1
  for (int first = 0; first < kVectors; first += kInFlight) {
    decltype(load(0)) loaded[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) loaded[u] = load(at(first + u));
#pragma unroll 1
    for (int turn = first; turn < first + kInFlight; turn += kTurn) {
#pragma unroll
      for (int u = 0; u < kTurn; ++u) body(turn + u, at(turn + u), loaded[u]);
#pragma unroll
      for (int u = kTurn; u < kInFlight; ++u) loaded[u - kTurn] = loaded[u];
    }
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

// body(a value of the item's dtype; as a type, whether all its operands are aligned; the item) for a chunk in
// vectors. What is needed of the item there is held in registers, and what would be needed of others is not.
template <class Key, class Body>
__device__ void with_vectors(const Item item, Body body) {
  __builtin_assume(item.dense);
  with_type<Key>(item, [&](auto type) {
    if (item.aligned == kAllAligned) {
      body(type, std::true_type{}, item);
    } else {
      body(type, std::false_type{}, item);
    }
  });
}

}  // namespace drive::gpu
