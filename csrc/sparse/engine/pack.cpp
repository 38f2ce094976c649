// The non-zeros of a convolution's weight as the engine's loops walk them: blocks of output channels, in them
// blocks of input channels, in them outputs, each with its taps row by row.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#define AT_PER_OPERATOR_HEADERS
#include <ATen/ops/empty.h>

#include "sparse/engine/isa.h"

namespace drive::engine {
namespace {

// field: channels, vectors a row (borders too), the value's first channel. Offsets are bytes from the vector under
// a kernel's first entry that is not padding, at the value's first channel.
std::tuple<at::Tensor, at::Tensor, at::Tensor> pack_taps(const at::Tensor& weight, int64_t groups, int64_t block,
                                                         int64_t in_block, at::IntArrayRef padding,
                                                         at::IntArrayRef dilation, at::IntArrayRef field) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.is_contiguous() && weight.scalar_type() == at::kFloat,
                    "pack_taps: weight must be contiguous float32 [O, C, kh, kw], got ", weight.scalar_type(), " ",
                    weight.sizes());
  const int64_t outputs = weight.size(0), channels = weight.size(1), kh = weight.size(2), kw = weight.size(3);
  const int64_t per_group = outputs / groups, blocks = (outputs + block - 1) / block;
  // Blocks of input channels are counted within a group; where outputs of several groups are together, a block
  // is all of them.
  const int64_t in_blocks = (channels + in_block - 1) / in_block;
  const float* const w = weight.const_data_ptr<float>();
  int64_t nonzeros = 0;
  for (int64_t i = 0; i < weight.numel(); ++i) nonzeros += w[i] != 0;
  const int64_t pitch = field[0] * field[1] * kLanes * sizeof(float);  // of a row
  const int64_t furthest = std::max(padding[0], (kh - 1) * dilation[0]) * pitch + pitch;
  TORCH_CHECK_VALUE(furthest < std::numeric_limits<int32_t>::max(),
                    "pack_taps: rows under the kernel must take less than 2 GB, got ", furthest, " bytes");
  const auto ints = weight.options().dtype(at::kInt), longs = weight.options().dtype(at::kLong);
  at::Tensor taps = at::empty({nonzeros, 2}, ints), counts = at::empty({outputs * in_blocks}, ints);
  at::Tensor starts = at::empty({blocks}, longs);
  auto* tap = reinterpret_cast<Tap<float>*>(taps.data_ptr<int32_t>());
  Tap<float>* const first = tap;
  int32_t* count = counts.data_ptr<int32_t>();
  for (int64_t b = 0; b < blocks; ++b) {
    starts.data_ptr<int64_t>()[b] = tap - first;
    const int64_t o0 = b * block, o1 = std::min(outputs, o0 + block);
    for (int64_t c0 = 0; c0 < channels; c0 += in_block) {
      const int64_t c1 = std::min(channels, c0 + in_block);
      for (int64_t o = o0; o < o1; ++o) {
        const Tap<float>* const before = tap;
        for (int64_t ky = 0; ky < kh; ++ky) {
          for (int64_t c = c0; c < c1; ++c) {
            for (int64_t kx = 0; kx < kw; ++kx) {
              const float value = w[((o * channels + c) * kh + ky) * kw + kx];
              if (value == 0) continue;
              const int64_t channel = o / per_group * channels + c;
              const int64_t at = (ky * dilation[0] - padding[0]) * pitch +
                                 (channel * field[1] + kx * dilation[1] - padding[1]) * int64_t{kLanes * sizeof(float)};
              *tap++ = {static_cast<int32_t>(at), value};
            }
          }
        }
        *count++ = static_cast<int32_t>(tap - before);
      }
    }
  }
  return {taps, counts, starts};
}

// The most positions that a tile can have on this processor.
int64_t most_sums() { return kernels().most_sums; }

}  // namespace

TORCH_LIBRARY_IMPL(drive, CPU, m) { m.impl("engine_pack", &pack_taps); }
TORCH_LIBRARY_IMPL(drive, CompositeExplicitAutograd, m) { m.impl("engine_sums", &most_sums); }

}  // namespace drive::engine
