// Where the non-zeros of a weight [O, K] are (a convolution's seen as [O, C / groups * kh * kw]), row by row
// and column by column. The values are packed row by row.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "sparse/isa.h"
#include "sparse/work.h"

namespace drive {

struct Pattern {
  const int32_t* row_start;     // [O + 1]
  const int32_t* column;        // [nnz]
  const int32_t* column_start;  // [groups * K + 1], columns of the first group first
  const int32_t* row;           // [nnz], column by column
  const int32_t* packed;        // [nnz], column by column: which of the packed values
  int64_t count;

  Pattern(const char* op, at::TensorList pattern, int64_t rows, int64_t columns, const at::Tensor& values) {
    TORCH_CHECK_VALUE(pattern.size() == 5, op, ": pattern must be 5 tensors, got ", pattern.size());
    count = values.numel();
    const int64_t sizes[] = {rows + 1, count, columns + 1, count, count};
    for (size_t i = 0; i < 5; ++i) {
      TORCH_CHECK_TYPE(pattern[i].scalar_type() == at::kInt, op, ": pattern[", i, "] must be Int, got ",
                       pattern[i].scalar_type());
      TORCH_CHECK_VALUE(pattern[i].is_contiguous() && pattern[i].numel() == sizes[i], op, ": pattern[", i,
                        "] must be contiguous with ", sizes[i], " entries, got ", pattern[i].numel());
    }
    row_start = pattern[0].data_ptr<int32_t>();
    column = pattern[1].data_ptr<int32_t>();
    column_start = pattern[2].data_ptr<int32_t>();
    row = pattern[3].data_ptr<int32_t>();
    packed = pattern[4].data_ptr<int32_t>();
  }
};

// The taps of every output channel, one after the other, in the calling thread's scratch memory.
template <class T>
struct Taps {
  explicit Taps(int64_t n, ScratchSlot slot = kTapScratch) : taps(scratch<Tap<T>>(slot, n)) {}

  Tap<T>* taps;
  std::vector<int32_t> start;

  const Tap<T>* of(int64_t channel) const { return taps + start[channel]; }
  int64_t count(int64_t channel) const { return start[channel + 1] - start[channel]; }
};

// float32 of what is stored in 16 bits: such layers are computed in float32.
inline bool is_half(const at::Tensor& t) { return at::isReducedFloatingType(t.scalar_type()); }

inline at::Tensor widened(const at::Tensor& t) { return is_half(t) ? t.to(at::kFloat) : t; }

// The gradients of the three, as wide as these.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> narrowed(
    const std::tuple<at::Tensor, at::Tensor, at::Tensor>& gradients, at::ScalarType type) {
  const auto& [input, values, bias] = gradients;
  return {input.to(type), values.to(type), bias.to(type)};
}

// Channels that are worth waking a thread for when taps are made (some 20 us).
constexpr int64_t kTapGrain = 16384;

inline int64_t channel_grain(int64_t channels, int64_t taps) {
  return std::max<int64_t>(1, channels * kTapGrain / std::max<int64_t>(taps, 1));
}

// Of the taps' sums [copies, taps], a copy a thread, the totals, tap i's at packed[i].
template <class T>
void pack_sums(const at::Tensor& sums, const int32_t* packed, T* to) {
  const int64_t copies = sums.size(0), count = sums.size(1);
  const T* const from = sums.data_ptr<T>();
  at::parallel_for(0, count, kTapGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T total = 0;
      for (int64_t t = 0; t < copies; ++t) total += from[t * count + i];
      to[packed[i]] = total;
    }
  });
}

}  // namespace drive
