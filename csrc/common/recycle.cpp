#include "common/recycle.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <deque>
#include <mutex>

#include "common/common.h"

namespace drive {
namespace {

// Below this, malloc itself keeps the memory.
constexpr size_t kLarge = size_t{4} << 20;
// At most so much lies unused; the oldest block goes first.
constexpr size_t kMostUnused = size_t{512} << 20;
// A block serves a request of at least so much of its size.
constexpr double kLeastUse = 0.6;

class Pool {
 public:
  struct Block {
    void* data;
    size_t bytes;
  };

  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = unused_.rbegin(); block != unused_.rend(); ++block) {
        if (block->bytes < bytes || block->bytes * kLeastUse > bytes) continue;
        const Block found = *block;
        unused_.erase(std::next(block).base());
        unused_bytes_ -= found.bytes;
        return found;
      }
    }
    const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* const data = std::aligned_alloc(kHugePage, size);
    if (!data) throw std::bad_alloc();
    expect_writes(data, size);
    return {data, size};
  }

  void give(const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    unused_.push_back(block);
    unused_bytes_ += block.bytes;
    shrink(kMostUnused);
  }

  size_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = unused_bytes_;
    shrink(0);
    return bytes;
  }

 private:
  void shrink(size_t most) {
    while (unused_bytes_ > most) {
      unused_bytes_ -= unused_.front().bytes;
      std::free(unused_.front().data);
      unused_.pop_front();
    }
  }

  std::mutex mutex_;
  std::deque<Block> unused_;
  size_t unused_bytes_ = 0;
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: tensors may outlive static objects
  return *instance;
}

}  // namespace

at::Tensor empty_recycled(at::IntArrayRef size, const at::TensorOptions& options) {
  size_t bytes = options.dtype().itemsize();
  for (const int64_t n : size) bytes *= n;
  if (bytes < kLarge) return at::Tensor(at::detail::empty_cpu(size, options));
  const Pool::Block block = pool().take(bytes);
  return at::from_blob(block.data, size, [block](void*) { pool().give(block); }, options);
}

size_t release_recycled() { return pool().release(); }

}  // namespace drive
