// The memory of one step (step.h): one piece, which the next step finds again.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <memory_resource>
#include <vector>

#include "common/recycle.h"
#include "prune/cpu/isa.h"
#include "prune/cpu/work.h"

namespace drive {

// Entries of a chunk above and on a threshold.
struct Split {
  int32_t above, equal;
};

template <class Key>
struct Scratch {
  // Keys for which a thread takes room at a time: any chunk's fit, and a chunk's lie together.
  static constexpr int64_t kSlab = 4 * kChunk;
  // Room for 6 % of the keys, 0.25 byte an entry for 32-bit ones: a bracket of 2^14 samples holds 4 % at most.
  static constexpr int64_t kEntriesPerKey = 16;
  static constexpr size_t kBytesByChunk =
      sizeof(Counts) + sizeof(Chunk) + sizeof(Split) + sizeof(Cut<Key>) + sizeof(int64_t);

  explicit Scratch(const std::vector<Item>& items)
      : chunks(sum(items, [](const Item& item) { return count_chunks(item.numel); })),
        room(sum(items, [](const Item& item) { return item.numel; }) / kEntriesPerKey +
             (at::get_num_threads() + 2) * kSlab),
        memory(empty_recycled({bytes(chunks * kWordsPerChunk * sizeof(Placed), room * sizeof(Key))},
                              at::TensorOptions().dtype(at::kByte))),
        placed(static_cast<Placed*>(memory.data_ptr())),
        inside(reinterpret_cast<Key*>(placed + chunks * kWordsPerChunk)),
        by_chunk(inside + room, bytes_by_chunk()) {}

  int64_t chunks, room;  // of all items; for keys inside
  at::Tensor memory;
  Placed* placed;  // what the latest survey has found, kWordsPerChunk a chunk
  Key* inside;     // the keys inside its bracket
  std::pmr::monotonic_buffer_resource by_chunk;  // for some numbers a chunk; what is more comes from the heap

 private:
  template <class Of>
  static int64_t sum(const std::vector<Item>& items, const Of& of) {
    int64_t total = 0;
    for (const Item& item : items) total += of(item);
    return total;
  }
  size_t bytes_by_chunk() const { return (chunks + 64) * kBytesByChunk; }  // and the odd bytes of alignment
  int64_t bytes(size_t placed, size_t keys) const { return static_cast<int64_t>(placed + keys + bytes_by_chunk()); }
};

}  // namespace drive
