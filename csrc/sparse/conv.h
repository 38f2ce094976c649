// What the convolutions by non-zeros share: their geometry, and their checks.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <limits>
#include <vector>

#include "sparse/pattern.h"
#include "sparse/window.h"

namespace drive {

struct Conv {
  int64_t out_channels, group_channels, groups;
  std::array<int64_t, 2> kernel, stride, padding, dilation;

  Conv(at::IntArrayRef shape, at::IntArrayRef s, at::IntArrayRef p, at::IntArrayRef d, int64_t g)
      : out_channels(shape[0]),
        group_channels(shape[1]),
        groups(g),
        kernel{shape[2], shape[3]},
        stride{s[0], s[1]},
        padding{p[0], p[1]},
        dilation{d[0], d[1]} {}

  int64_t in_channels() const { return group_channels * groups; }
  int64_t area() const { return kernel[0] * kernel[1]; }
  int64_t columns() const { return group_channels * area(); }
  int64_t out_size(int d, int64_t in) const {
    return (in + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  }
  // Places and phase (see Window) that entry k of the kernel is away from the output's place.
  int64_t shift(int d, int64_t k) const { return k * dilation[d] / stride[d]; }
  int64_t phase(int d, int64_t k) const { return k * dilation[d] % stride[d]; }
  int64_t reach(int d) const { return shift(d, kernel[d] - 1); }
  Axis in_axis(int d, int64_t size) const { return {size, stride[d], padding[d]}; }

  std::vector<bool> used_phases() const {
    std::vector<bool> used(stride[0] * stride[1]);
    for (int64_t ky = 0; ky < kernel[0]; ++ky) {
      for (int64_t kx = 0; kx < kernel[1]; ++kx) used[phase(0, ky) * stride[1] + phase(1, kx)] = true;
    }
    return used;
  }
};

inline void check_reach(const char* op, const Window& window, int64_t channels) {
  TORCH_CHECK_VALUE(window.channel_size() * channels < std::numeric_limits<int32_t>::max(), op,
                    ": input must have rows of fewer than 2^31 entries in all its channels together");
}

inline std::vector<int64_t> output_size(const Conv& conv, at::IntArrayRef input) {
  std::vector<int64_t> size = input.vec();
  size[1] = conv.out_channels;
  for (int d = 0; d < 2; ++d) size[2 + d] = conv.out_size(d, input[2 + d]);
  return size;
}

template <class T>
struct Epilogue {
  const T* bias = nullptr;
  const T* residual = nullptr;  // laid out as the output, which is blocked
  T floor = -std::numeric_limits<T>::infinity();
};

template <class T>
at::Tensor convolve(const Conv& conv, const at::Tensor& input, const Pattern& pattern, const T* values,
                    const Epilogue<T>& epilogue);

// Raises unless the op's arguments fit each other; `input`: sizes.
void check_convolution(const char* op, at::IntArrayRef input, at::ScalarType type, const at::Tensor& values,
                       at::IntArrayRef shape, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, int64_t groups);

}  // namespace drive
