// drive::sparse_gather and drive::sparse_scatter on CPU: from a dense weight to its packed values, and back.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "common/recycle.h"
#include "sparse/ops.h"

namespace drive {
namespace {

// Entries that are worth waking a thread for (some 10 us).
constexpr int64_t kGrain = 16384;

void check_index(const char* op, const at::Tensor& index) {
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, op, ": index must be int64, got ", index.scalar_type());
  TORCH_CHECK_VALUE(index.dim() == 1 && index.is_contiguous(), op, ": index must be contiguous, [nnz], got ",
                    index.sizes());
}

}  // namespace

at::Tensor sparse_gather_cpu(const at::Tensor& weight, const at::Tensor& index) {
  check_index("drive::sparse_gather", index);
  const at::Tensor w = weight.contiguous();
  at::Tensor values = w.new_empty(index.sizes());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, w.scalar_type(), "drive::sparse_gather",
                                  [&] {
    const scalar_t* const from = w.data_ptr<scalar_t>();
    const int64_t* const at = index.data_ptr<int64_t>();
    scalar_t* const to = values.data_ptr<scalar_t>();
    at::parallel_for(0, index.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = from[at[i]];
    });
  });
  return values;
}

// Each thread clears a part of the dense tensor and then writes that part's values, while it is in the
// cache: the index is in ascending order.
at::Tensor sparse_scatter_cpu(const at::Tensor& values, const at::Tensor& index, at::IntArrayRef shape) {
  check_index("drive::sparse_scatter", index);
  TORCH_CHECK_VALUE(values.numel() == index.numel(), "drive::sparse_scatter: values must have ",
                    index.numel(), " entries, got ", values.numel());
  const at::Tensor v = values.contiguous();
  at::Tensor dense = empty_recycled(shape, v.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, v.scalar_type(), "drive::sparse_scatter",
                                  [&] {
    const scalar_t* const from = v.data_ptr<scalar_t>();
    const int64_t* const at = index.data_ptr<int64_t>();
    const int64_t* const last = at + index.numel();
    scalar_t* const to = dense.data_ptr<scalar_t>();
    at::parallel_for(0, (dense.numel() + kGrain - 1) / kGrain, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = part * kGrain, stop = std::min(first + kGrain, dense.numel());
        std::fill(to + first, to + stop, scalar_t(0));
        const int64_t* i = std::lower_bound(at, last, first);
        for (; i < last && *i < stop; ++i) to[*i] = from[i - at];
      }
    });
  });
  return dense;
}

}  // namespace drive
