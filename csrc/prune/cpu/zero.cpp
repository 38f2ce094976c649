// drive::zero_pruned_ on CPU: one pass over each tensor and its mask, in pieces for the threads.
//
// Bytes an entry of float32: 5 where the pruned entries are zero already, as after most steps, else 9.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/common.h"
#include "prune/ops.h"
#include "prune/walk.h"

namespace drive {
namespace {

constexpr int64_t kPiece = 4096;  // entries
constexpr int64_t kGrain = 16;    // pieces that are worth waking a thread for
constexpr int64_t kBlock = 64;    // entries that are written if one of them has to be

enum Operand { kTensor, kMask };

struct Item {
  at::Tensor tensor;
  Walk walk;
  char* data;
  const uint8_t* mask;
};

struct Piece {
  int32_t item;
  int64_t begin, count;
};

// By the bits: a product would keep NaN and signs.
template <class Bits>
void zero_block(Bits* bits, const uint8_t* mask, int64_t n) {
  Bits revived = 0;
  for (int64_t i = 0; i < n; ++i) revived |= bits[i] & static_cast<Bits>(mask[i] - 1);
  if (revived == 0) return;
  for (int64_t i = 0; i < n; ++i) bits[i] &= static_cast<Bits>(-static_cast<Bits>(mask[i]));
}

template <class Bits>
void zero(const Item& item, const Piece& piece) {
  item.walk.rows(piece.begin, piece.count, [&](const Offsets& at, const Offsets& stride, int64_t n) {
    Bits* bits = reinterpret_cast<Bits*>(item.data) + at[kTensor];
    const uint8_t* mask = item.mask + at[kMask];
    if (stride[kTensor] == 1 && stride[kMask] == 1) {
      int64_t i = 0;
      for (; i + kBlock <= n; i += kBlock) zero_block(bits + i, mask + i, kBlock);
      return zero_block(bits + i, mask + i, n - i);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (!mask[i * stride[kMask]]) bits[i * stride[kTensor]] = 0;
    }
  });
}

void zero(const Item& item, const Piece& piece) {
  switch (item.tensor.element_size()) {
    case 2: return zero<uint16_t>(item, piece);
    case 4: return zero<uint32_t>(item, piece);
    default: return zero<uint64_t>(item, piece);
  }
}

}  // namespace

void zero_pruned_cpu(at::TensorList tensors, at::TensorList masks) {
  const char* op = "drive::zero_pruned_";
  TORCH_CHECK_VALUE(tensors.size() == masks.size(), op, ": tensors and masks must be of one length, got ",
                    tensors.size(), " and ", masks.size());
  std::vector<Item> items;
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor &tensor = tensors[i], &mask = masks[i];
    TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()) && tensor.element_size() > 1, op, ": tensors[", i,
                     "] must be float32, bfloat16, float16 or float64, got ", tensor.scalar_type());
    check_like(op, "masks", i, mask, tensor, at::kBool);
    items.push_back({tensor, Walk({tensor, mask}, Walk::Order::memory), static_cast<char*>(tensor.data_ptr()),
                     static_cast<const uint8_t*>(mask.data_ptr())});
    for (int64_t begin = 0; begin < tensor.numel(); begin += kPiece) {
      pieces.push_back({static_cast<int32_t>(i), begin, std::min(kPiece, tensor.numel() - begin)});
    }
  }
  at::parallel_for(0, pieces.size(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) zero(items[pieces[i].item], pieces[i]);
  });
}

}  // namespace drive
