// The work list: many tensors, of any sizes and strides, as chunks of contiguous entries.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory_resource>
#include <utility>
#include <vector>

#include "common/common.h"
#include "prune/arguments.h"
#include "prune/cpu/isa.h"
#include "prune/key.h"
#include "prune/walk.h"

namespace drive {

// Entries a chunk: its keys stay in the L1 cache (16 KB, or 32 KB of 64-bit keys).
constexpr int64_t kChunk = 4096;
// Chunks that are worth waking a thread for: 64 K entries, some 20 us.
constexpr int64_t kGrain = 16;

// at::empty, whose header takes two seconds to compile.
inline at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype) {
  return at::Tensor(at::detail::empty_cpu(size, dtype));
}

enum Operand { kWeight, kGrad, kMask, kMaskGrad };

// One tensor with its gradients and its mask, which is only written if `fresh`. What every chunk asks for lies
// here: through the tensors, a chunk would wait for some ten loads one after the other, a quarter of the survey's time.
struct Item {
  Item(const PruneArguments& arguments, size_t i)
      : tensors(arguments.operands(i)),
        numel(tensors[kWeight].numel()),
        dtype(tensors[kWeight].scalar_type()),
        entry_size(tensors[kWeight].element_size()),
        walk(tensors, Walk::Order::memory),
        logical(tensors[kWeight].is_contiguous()),
        fresh(arguments.fresh),
        cost(arguments.costs.empty() ? 1 : arguments.costs[i]),
        grad_scale(arguments.squared() ? arguments.scale(i) : 1),
        product_scale(arguments.squared() ? 1 : arguments.scale(i)) {
    for (size_t o = 0; o < tensors.size(); ++o) {
      if (o != kGrad || !arguments.grads.empty()) data[o] = static_cast<char*>(tensors[o].data_ptr());
    }
    note_contiguous();
  }

  int64_t size(int o) const { return o == kMask ? 1 : entry_size; }
  void walk_logically() {
    rewalked |= !logical;
    walk = Walk(tensors, Walk::Order::logical);
    logical = true;
    note_contiguous();
  }

  std::vector<at::Tensor> tensors;  // in the order of Operand, the last one optional
  int64_t numel;
  at::ScalarType dtype;
  int64_t entry_size;
  std::array<char*, kMaxOperands> data{};  // null: there is none
  std::array<bool, kMaxOperands> contiguous{};  // does the walk go front to back through its memory, without gaps?
  Walk walk;
  bool logical;  // does the walk go in row-major order?
  bool rewalked = false;  // has it not, at first?
  bool fresh;
  int64_t cost;  // of an entry
  float grad_scale, product_scale;

  Entries entries(const void* weight, const void* grad, const void* mask_grad, const void* mask) const {
    return {weight, grad, mask_grad, static_cast<const uint8_t*>(mask), grad_scale, product_scale};
  }

 private:
  void note_contiguous() {
    for (int o = 0; o < kMaxOperands; ++o) contiguous[o] = walk.contiguous(o);
  }
};

struct Chunk {
  int32_t item;
  int32_t count;
  int64_t begin;  // in the item's walk
};

// Room for contiguous copies of one chunk's operands.
struct Staging {
  alignas(64) char operand[kMaxOperands][kChunk * 8];
};

constexpr int64_t kWordsPerChunk = kChunk / kWord;

inline int64_t padded(int64_t count) { return (count + kWord - 1) / kWord * kWord; }

using Chunks = std::pmr::vector<Chunk>;

inline int64_t count_chunks(int64_t entries) { return (entries + kChunk - 1) / kChunk; }

inline Chunks chunks_of(const std::vector<Item>& items, const std::vector<int32_t>& ids,
                        std::pmr::memory_resource* memory = std::pmr::get_default_resource()) {
  int64_t count = 0;
  for (const int32_t id : ids) count += count_chunks(items[id].numel);
  Chunks chunks(memory);
  chunks.reserve(count);
  for (const int32_t id : ids) {
    const int64_t n = items[id].numel;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      chunks.push_back({id, static_cast<int32_t>(std::min(kChunk, n - begin)), begin});
    }
  }
  return chunks;
}

// body(begin, end) on ranges of [0, n) over PyTorch's threads.
template <class Body>
void parallel(int64_t n, int64_t grain, const Body& body) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    const DefaultRounding rounding;
    body(begin, end);
  });
}

template <class Size>
void copy_strided(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n) {
  auto* out = reinterpret_cast<Size*>(to);
  auto* in = reinterpret_cast<const Size*>(from);
  if (to_stride == 1 && from_stride == 1) {
    std::memcpy(out, in, n * sizeof(Size));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i * to_stride] = in[i * from_stride];
  }
}

// body(an unsigned integer of so many bytes).
template <class Body>
void by_size(int64_t size, const Body& body) {
  switch (size) {
    case 1: return body(uint8_t{});
    case 2: return body(uint16_t{});
    case 4: return body(uint32_t{});
    default: return body(uint64_t{});
  }
}

inline void copy_strided(int64_t size, char* to, int64_t to_stride, const char* from,
                         int64_t from_stride, int64_t n) {
  by_size(size, [&](auto entry) { copy_strided<decltype(entry)>(to, to_stride, from, from_stride, n); });
}

// Is the operand's part of the chunk, as it lies in memory, what the kernels can take?
inline bool direct(const Item& item, const Chunk& chunk, int64_t padded, int o) {
  return chunk.count == padded && item.contiguous[o];
}

// One operand of a chunk, contiguous and padded to `padded` entries: the tensor's own memory where that will
// do, else a copy. Null: there is none.
inline char* stage(const Item& item, const Chunk& chunk, int64_t padded, Staging& room, int o) {
  char* data = item.data[o];
  const int64_t size = item.size(o);
  if (!data) return nullptr;
  if (direct(item, chunk, padded, o)) return data + chunk.begin * size;
  char* to = room.operand[o];
  item.walk.rows(chunk.begin, chunk.count, [&](const Offsets& at, const Offsets& stride, int64_t n) {
    copy_strided(size, to, 1, data + at[o] * size, stride[o], n);
    to += n * size;
  });
  std::memset(to, 0, (padded - chunk.count) * size);
  return room.operand[o];
}

// All that are read. Padding is dead: masked out.
inline Entries stage(const Item& item, const Chunk& chunk, int64_t padded, Staging& room) {
  const auto operand = [&](int o) -> const char* { return stage(item, chunk, padded, room, o); };
  const auto mask = [&]() -> const char* {
    if (!item.fresh) return operand(kMask);
    if (chunk.count == padded) return nullptr;
    std::memset(room.operand[kMask], 1, chunk.count);
    std::memset(room.operand[kMask] + chunk.count, 0, padded - chunk.count);
    return room.operand[kMask];
  };
  return item.entries(operand(kWeight), operand(kGrad), operand(kMaskGrad), mask());
}

inline void unstage(const Item& item, const Chunk& chunk, int o, const char* from) {
  const int64_t size = item.size(o);
  char* data = item.data[o];
  if (from == data + chunk.begin * size) return;
  item.walk.rows(chunk.begin, chunk.count, [&](const Offsets& at, const Offsets& stride, int64_t n) {
    copy_strided(size, data + at[o] * size, stride[o], from, 1, n);
    from += n * size;
  });
}

// The chunk's keys, in `keys` (room for kChunk of them).
template <class Key>
void keys_of(const std::vector<Item>& items, const Chunk& chunk, Staging& room, Key* keys) {
  const Item& item = items[chunk.item];
  const int64_t n = padded(chunk.count);
  kernels<Key>(item.dtype).compute_keys(stage(item, chunk, n, room), n, keys);
}

// What a chunk has inside, at and above a bracket (isa.h); `inside` has room for a block more than the chunk.
template <class Key>
Counts survey_chunk(const std::vector<Item>& items, const Chunk& chunk, const Bracket<Key>& bracket, Staging& room,
                    Placed* placed, Key* inside) {
  const Item& item = items[chunk.item];
  const int64_t n = padded(chunk.count);
  Counts counts = kernels<Key>(item.dtype).survey(stage(item, chunk, n, room), n, bracket, placed, inside);
  if (!std::isfinite(counts.sum)) {
    alignas(64) Key keys[kChunk];
    keys_of(items, chunk, room, keys);
    counts.nonfinite = std::count_if(keys, keys + chunk.count, [](Key key) { return !is_finite(key); });
  }
  return counts;
}

// Of the chunk's entries those survive whose key is at least the cut.
template <class Key>
struct Cut {
  Chunk chunk;
  Key cut;
};

// Writes the chunk's mask and weights: the entries survive whose bits are set.
template <class Key>
void write(const Item& item, const Chunk& chunk, Staging& room, const uint64_t* keep) {
  const int64_t n = padded(chunk.count);
  char* const weight = stage(item, chunk, n, room, kWeight);
  char* const mask = direct(item, chunk, n, kMask) ? item.data[kMask] + chunk.begin : room.operand[kMask];
  kernels<Key>(item.dtype).apply(keep, n, weight, reinterpret_cast<uint8_t*>(mask));
  unstage(item, chunk, kWeight, weight);
  unstage(item, chunk, kMask, mask);
}

// The same of a cut, by the entries' keys.
template <class Key>
void write(const std::vector<Item>& items, const Cut<Key>& cut, Staging& room) {
  const Item& item = items[cut.chunk.item];
  const int64_t n = padded(cut.chunk.count);
  uint64_t keep[kWordsPerChunk];
  kernels<Key>(item.dtype).reaching(stage(item, cut.chunk, n, room), n, cut.cut, keep);
  write<Key>(item, cut.chunk, room, keep);
}

}  // namespace drive
