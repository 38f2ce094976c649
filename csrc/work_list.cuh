// The host's part of a step on a GPU: the work list of all tensors, places in the scratch memory, and how the list
// comes to the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "launch.cuh"
#include "prune_arguments.h"
#include "prune_work.cuh"
#include "walk.h"

namespace drive::gpu {

inline Type type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: return Type::f64;
  }
}

// The work list as the device will hold it.
struct WorkList {
  std::vector<Item> items;
  std::vector<Dim> dims;
  int64_t entries = 0, chunks = 0;

  explicit WorkList(const PruneArguments& arguments) {
    for (size_t i = 0; i < arguments.weights.size(); ++i) add(arguments.operands(i));
  }

  void add(const std::vector<at::Tensor>& operands) {
    const at::Tensor& weight = operands[kWeight];
    std::vector<int64_t> index(weight.dim(), 1);
    for (int64_t d = weight.dim() - 2; d >= 0; --d) index[d] = index[d + 1] * weight.size(d + 1);
    const Walk walk(operands, index, Walk::Order::memory);
    Item item{};
    item.numel = weight.numel();
    item.first_entry = entries;
    item.first_chunk = chunks;
    item.first_dim = static_cast<int32_t>(dims.size());
    item.dims = static_cast<int32_t>(walk.dims().size());
    item.type = type_of(weight);
    const bool one = walk.dims().size() == 1;
    const Walk in_memory = one ? walk : Walk(operands, Walk::Order::memory);
    item.vector = true;
    for (size_t o = 0; o < operands.size(); ++o) {
      item.data[o] = static_cast<char*>(operands[o].data_ptr());
      item.vector = item.vector && in_memory.contiguous(static_cast<int>(o)) &&
          reinterpret_cast<uintptr_t>(item.data[o]) % 16 == 0;
    }
    item.logical = walk.contiguous(kMaxOperands);
    for (const Walk::Dim& dim : walk.dims()) {
      Dim to{dim.size, {}, dim.stride[kMaxOperands]};
      std::copy_n(dim.stride.begin(), kOperands, to.stride);
      dims.push_back(to);
    }
    items.push_back(item);
    entries += item.numel;
    chunks += (item.numel + kChunk - 1) / kChunk;
  }
};

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

inline __global__ void upload(const __grid_constant__ Piece piece, char* to, int count) {
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
    launch(upload, 1, kThreads, stream, piece, target, static_cast<int>(count));
  }
}

}  // namespace drive::gpu
