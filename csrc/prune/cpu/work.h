// The work list: many tensors, of any sizes and strides, as chunks of contiguous entries.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "common/common.h"
#include "prune/arguments.h"
#include "prune/cpu/isa.h"
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

// One tensor with its gradients and its mask, which is only written if `fresh`.
struct Item {
  Item(std::vector<at::Tensor> operands, const PruneArguments& arguments)
      : tensors(std::move(operands)),
        walk(tensors, Walk::Order::memory),
        logical(tensors[kWeight].is_contiguous()),
        fresh(arguments.fresh),
        alone(arguments.grads.empty()) {}

  at::ScalarType dtype() const { return tensors[kWeight].scalar_type(); }
  int64_t numel() const { return tensors[kWeight].numel(); }
  int64_t entry_size(int o) const { return o == kMask ? 1 : tensors[kWeight].element_size(); }
  char* data(int o) const {
    if (static_cast<size_t>(o) >= tensors.size() || (o == kGrad && alone)) return nullptr;
    return static_cast<char*>(tensors[o].data_ptr());
  }
  void walk_logically() {
    walk = Walk(tensors, Walk::Order::logical);
    logical = true;
  }

  std::vector<at::Tensor> tensors;  // in the order of Operand, the last one optional
  Walk walk;
  bool logical;  // does the walk go in row-major order?
  bool fresh;
  bool alone;  // there are no gradients
};

struct Chunk {
  int32_t item;
  int32_t count;
  int64_t begin;  // in the item's walk
};

// Room for contiguous copies of one chunk's operands.
struct Staging {
  alignas(64) char operand[kMaxOperands][kChunk * 8];
  alignas(64) uint8_t new_mask[kChunk];
};

template <class Key>
int64_t padded(int64_t count) {
  return (count + kBlock<Key> - 1) / kBlock<Key> * kBlock<Key>;
}

inline std::vector<Chunk> chunks_of(const std::vector<Item>& items, const std::vector<int32_t>& ids) {
  std::vector<Chunk> chunks;
  for (const int32_t id : ids) {
    const int64_t n = items[id].numel();
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

inline void copy_strided(int64_t size, char* to, int64_t to_stride, const char* from,
                         int64_t from_stride, int64_t n) {
  switch (size) {
    case 1: return copy_strided<uint8_t>(to, to_stride, from, from_stride, n);
    case 2: return copy_strided<uint16_t>(to, to_stride, from, from_stride, n);
    case 4: return copy_strided<uint32_t>(to, to_stride, from, from_stride, n);
    default: return copy_strided<uint64_t>(to, to_stride, from, from_stride, n);
  }
}

// Is the operand's part of the chunk, as it lies in memory, what the kernels can take?
inline bool direct(const Item& item, const Chunk& chunk, int64_t padded, int o) {
  return chunk.count == padded && item.walk.contiguous(o);
}

// The chunk's operands, contiguous and padded to `padded` entries: pointers to the tensors' own memory
// where that will do, else copies. Padding is dead: masked out.
inline Entries stage(const Item& item, const Chunk& chunk, int64_t padded, Staging& room) {
  const auto operand = [&](int o) -> const char* {
    const char* data = item.data(o);
    const int64_t size = item.entry_size(o);
    if (!data) return nullptr;
    if (direct(item, chunk, padded, o)) return data + chunk.begin * size;
    char* to = room.operand[o];
    item.walk.rows(chunk.begin, chunk.count, [&](const Offsets& at, const Offsets& stride, int64_t n) {
      copy_strided(size, to, 1, data + at[o] * size, stride[o], n);
      to += n * size;
    });
    std::memset(to, 0, (padded - chunk.count) * size);
    return room.operand[o];
  };
  const auto mask = [&]() -> const char* {
    if (!item.fresh) return operand(kMask);
    if (chunk.count == padded) return nullptr;
    std::memset(room.operand[kMask], 1, chunk.count);
    std::memset(room.operand[kMask] + chunk.count, 0, padded - chunk.count);
    return room.operand[kMask];
  };
  return {operand(kWeight), operand(kGrad), operand(kMaskGrad), reinterpret_cast<const uint8_t*>(mask())};
}

// Where the chunk's new weights or mask are to be written: the tensor itself, or `room`, from which
// `unstage` takes them to the tensor.
inline char* target(const Item& item, const Chunk& chunk, int64_t padded, int o, void* room) {
  return direct(item, chunk, padded, o) ? item.data(o) + chunk.begin * item.entry_size(o)
                                        : static_cast<char*>(room);
}

inline void unstage(const Item& item, const Chunk& chunk, int o, const char* from) {
  const int64_t size = item.entry_size(o);
  char* data = item.data(o);
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
  const int64_t n = padded<Key>(chunk.count);
  kernels<Key>(item.dtype()).compute_keys(stage(item, chunk, n, room), n, keys);
}

// Of the chunk's entries those survive whose key is at least the cut.
template <class Key>
struct Cut {
  Chunk chunk;
  Key cut;
};

// Writes masks and weights.
template <class Key>
void apply_cuts(const std::vector<Item>& items, const std::vector<Cut<Key>>& cuts) {
  parallel(cuts.size(), kGrain, [&](int64_t begin, int64_t end) {
    Staging room;
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = cuts[i].chunk;
      const Item& item = items[chunk.item];
      const int64_t n = padded<Key>(chunk.count);
      const Entries entries = stage(item, chunk, n, room);
      char* weight = target(item, chunk, n, kWeight, room.operand[kWeight]);
      char* mask = target(item, chunk, n, kMask, room.new_mask);
      kernels<Key>(item.dtype()).apply(entries, n, cuts[i].cut, weight, reinterpret_cast<uint8_t*>(mask));
      unstage(item, chunk, kWeight, weight);
      unstage(item, chunk, kMask, mask);
    }
  });
}

}  // namespace drive
