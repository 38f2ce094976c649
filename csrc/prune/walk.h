// Walk: visits the entries of up to four tensors of one shape together, whatever their strides.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace drive {

constexpr int kMaxOperands = 4;
constexpr int kMaxStrides = kMaxOperands + 1;  // and those of the row-major index, which GPUs walk along
constexpr size_t kMaxDims = 64;                // PyTorch's own limit
using Offsets = std::array<int64_t, kMaxStrides>;  // in entries, one per operand

class Walk {
 public:
  // memory: in the order of the first operand's memory, so that dense tensors of one layout
  // (channels_last, say) become one contiguous row. logical: row-major order of the indices.
  enum class Order { memory, logical };

  struct Dim {
    int64_t size;
    Offsets stride;
  };

  Walk(const std::vector<at::Tensor>& operands, Order order) : Walk(operands, {}, order) {}

  // `index`: strides of one more operand, in place kMaxOperands.
  Walk(const std::vector<at::Tensor>& operands, const std::vector<int64_t>& index, Order order) {
    const at::Tensor& first = operands.front();
    for (int64_t d = 0; d < first.dim(); ++d) {
      if (first.size(d) == 1) continue;
      Dim dim{first.size(d), {}};
      for (size_t o = 0; o < operands.size(); ++o) dim.stride[o] = operands[o].stride(d);
      if (!index.empty()) dim.stride[kMaxOperands] = index[d];
      dims_.push_back(dim);
    }
    if (order == Order::memory) {
      std::stable_sort(dims_.begin(), dims_.end(),
                       [](const Dim& a, const Dim& b) { return a.stride[0] > b.stride[0]; });
    }
    merge();
    if (dims_.empty()) dims_.push_back(Dim{1, {1, 1, 1, 1, 1}});
  }

  const std::vector<Dim>& dims() const { return dims_; }

  // Is this operand's memory visited front to back without gaps?
  bool contiguous(int operand) const {
    return dims_.size() == 1 && dims_[0].stride[operand] == 1;
  }

  // Where entry `index` of the walk lies in each operand.
  Offsets at(int64_t index) const {
    Offsets offset{};
    for (size_t d = dims_.size(); d-- > 0; index /= dims_[d].size) {
      advance(offset, d, index % dims_[d].size);
    }
    return offset;
  }

  // visit(offsets, strides, n) for each row of the entries [begin, begin + count).
  template <class Visit>
  void rows(int64_t begin, int64_t count, Visit visit) const {
    std::array<int64_t, kMaxDims> position{};
    for (size_t d = dims_.size(); d-- > 0; begin /= dims_[d].size) position[d] = begin % dims_[d].size;
    Offsets offset{};
    for (size_t d = 0; d < dims_.size(); ++d) advance(offset, d, position[d]);
    const size_t last = dims_.size() - 1;
    while (count > 0) {
      const int64_t n = std::min(count, dims_[last].size - position[last]);
      visit(offset, dims_[last].stride, n);
      count -= n;
      position[last] += n;
      advance(offset, last, n);
      for (size_t d = last; d > 0 && position[d] == dims_[d].size; --d) {
        advance(offset, d, -position[d]);
        position[d] = 0;
        advance(offset, d - 1, 1);
        ++position[d - 1];
      }
    }
  }

 private:
  void advance(Offsets& offset, size_t d, int64_t by) const {
    for (int o = 0; o < kMaxStrides; ++o) offset[o] += by * dims_[d].stride[o];
  }

  // Joins neighbouring dimensions that every operand steps through evenly.
  void merge() {
    std::vector<Dim> merged;
    for (const Dim& dim : dims_) {
      bool joins = !merged.empty();
      for (int o = 0; joins && o < kMaxStrides; ++o) {
        joins = merged.back().stride[o] == dim.stride[o] * dim.size;
      }
      if (joins) {
        merged.back().size *= dim.size;
        merged.back().stride = dim.stride;
      } else {
        merged.push_back(dim);
      }
    }
    dims_ = std::move(merged);
  }

  std::vector<Dim> dims_;
};

}  // namespace drive
