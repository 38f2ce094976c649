// Entries in vectors of 16 bytes: how a block of threads reads and writes the whole chunks of dense tensors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "prune/cuda/work.cuh"
#include "prune/key.h"

namespace drive::gpu {

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

template <class Key, class T, class Scale>
__device__ Key key_of(const Work& work, const Entries<T>& e, uint32_t alive, int j, Scale scale) {
  using Score = typename KeyTraits<Key>::Score;
  if (!(alive >> j & 1)) return kDead<Key>;
  return key_of(static_cast<Score>(value_in(e.weight, j, T{})), static_cast<Score>(value_in(e.grad, j, T{})),
                static_cast<Score>(value_in(e.mask_grad, j, T{})), work.three, scale);
}

// Entries are dealt out to the threads `lanes` at a time. The thread that has entry i of a chunk, which of its
// own entries it is; and back.
__device__ inline int owner(int i, int lanes) { return i / lanes % kThreads; }
__device__ inline int own_index(int i, int lanes) { return i / lanes / kThreads * lanes + i % lanes; }
__device__ inline int chunk_index(int own, int lanes) {
  return (own / lanes * kThreads + static_cast<int>(threadIdx.x)) * lanes + own % lanes;
}

// body(u, where it is in the chunk, what load returned of that) for the u-th vector of this thread. All loads are
// under way before the first body: ptxas would mix them, and hold the last back until the first data are there,
// but not across a loop, so bodies come in two turns. Entry by entry a thread's loads are many anyhow, and code is
// short.
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

// The same for what looks at keys, with the item's scale before the item: of a type of its own where it is 1, so
// that the product by it takes no time.
template <class Key, class Body>
__device__ void with_scaled_vectors(const Item& item, Body body) {
  with_vectors<Key>(item, [&](auto type, auto aligned, const Item& item) {
    if (item.scale == 1) {
      body(type, aligned, One{}, item);
    } else {
      body(type, aligned, item.scale, item);
    }
  });
}

}  // namespace drive::gpu
