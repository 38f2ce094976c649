// The host's part of a step on a GPU: the work list of all tensors, places in the scratch memory, and how the list
// comes to the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "prune/arguments.h"
#include "prune/cuda/launch.cuh"
#include "prune/cuda/work.cuh"
#include "prune/walk.h"

namespace drive::gpu {

inline Type type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: return Type::f64;
  }
}

// n / size as (n * magic / 2^32 + n) / 2^shift, for 0 <= n < 2^31 (see Dim).
inline void set_divisor(Dim& dim) {
  if (dim.size == 0 || dim.size >= int64_t{1} << 31) return;  // no position below 2^31 is divided by it
  while (int64_t{1} << dim.shift < dim.size) ++dim.shift;
  const uint64_t size = dim.size, above = (uint64_t{1} << dim.shift) - size;
  dim.magic = static_cast<uint32_t>((above << 32) / size + 1);
}

// The work list as the device will hold it.
struct WorkList {
  std::vector<Item> items;
  std::vector<Dim> dims;
  int64_t entries = 0, chunks = 0, words = 0, cost = 0;

  explicit WorkList(const PruneArguments& arguments) {
    for (size_t i = 0; i < arguments.weights.size(); ++i) {
      add(arguments.operands(i), arguments.costs.empty() ? 1 : arguments.costs[i],
          arguments.scales.empty() ? 1 : static_cast<float>(arguments.scales[i]));
    }
  }

  void add(const std::vector<at::Tensor>& operands, int64_t cost_of_entry, float scale) {
    const at::Tensor& weight = operands[kWeight];
    std::vector<int64_t> index(weight.dim(), 1);
    for (int64_t d = weight.dim() - 2; d >= 0; --d) index[d] = index[d + 1] * weight.size(d + 1);
    const Walk walk(operands, index, Walk::Order::memory);
    Item item{};
    item.numel = weight.numel();
    item.first_entry = entries;
    item.first_chunk = chunks;
    item.first_word = words;
    item.first_cost = cost;
    item.cost = static_cast<int32_t>(cost_of_entry);
    item.scale = scale;
    item.first_dim = static_cast<int32_t>(dims.size());
    item.dims = static_cast<int32_t>(walk.dims().size());
    item.type = type_of(weight);
    item.logical = walk.contiguous(kMaxOperands);
    align(item, operands, walk.dims().size() == 1 ? walk : Walk(operands, Walk::Order::memory));
    for (const Walk::Dim& dim : walk.dims()) {
      Dim to{dim.size, {}, dim.stride[kMaxOperands], 0, 0};
      std::copy_n(dim.stride.begin(), kOperands, to.stride);
      set_divisor(to);
      dims.push_back(to);
    }
    items.push_back(item);
    entries += item.numel;
    chunks += chunks_of(item);
    words += (item.numel + item.missing + 31) / 32;
    cost += item.numel * cost_of_entry;
  }

 private:
  // Where chunks begin, and what can be loaded in vectors. `walk` is without the row-major index.
  static void align(Item& item, const std::vector<at::Tensor>& operands, const Walk& walk) {
    const auto size = static_cast<int>(operands[kWeight].element_size());
    while (size << item.chunk_bits < kChunkBytes) ++item.chunk_bits;
    item.dense = true;
    item.aligned = kAllAligned;
    for (size_t o = 0; o < operands.size(); ++o) {
      item.data[o] = static_cast<char*>(operands[o].data_ptr());
      item.dense = item.dense && walk.contiguous(static_cast<int>(o));
    }
    const auto address = [&](size_t o) { return reinterpret_cast<uintptr_t>(item.data[o]); };
    if (item.dense) item.missing = static_cast<int16_t>(address(kWeight) % kVectorBytes / size);
    for (size_t o = 0; o < operands.size(); ++o) {
      const int each = o == kMask ? 1 : size;  // bytes of an entry, and of a vector's entries
      if ((address(o) - item.missing * each) % (kVectorBytes / size * each)) item.aligned &= ~(1 << o);
    }
  }
};

// What kernels know of a call, but for where its items lie.
inline Work work_of(const PruneArguments& arguments, const WorkList& list) {
  Work work{};
  work.count = static_cast<int32_t>(list.items.size());
  work.fresh = arguments.fresh;
  work.alone = arguments.grads.empty();
  work.three = !arguments.mask_grads.empty();
  work.squared = arguments.squared();
  work.priced = list.cost != list.entries;
  work.entries = list.entries;
  work.chunks = list.chunks;
  work.cost = list.cost;
  return work;
}

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

struct Piece {
  char bytes[4000];  // arguments of a kernel: 4 KB at most
};

template <class Bytes>  // a template, as kernels of several files are
__global__ void upload(const __grid_constant__ Bytes piece, char* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = piece.bytes[i];
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
    launch(upload<Piece>, 1, kThreads, stream, piece, target, static_cast<int>(count));
  }
}

}  // namespace drive::gpu
