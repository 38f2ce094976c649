// drive::sparse_conv2d_pair on CPU: two convolutions by the non-zeros of their weights, one after the other.
// What lies between them is never a tensor: some rows of a block of images at a time go through both, from
// one window (see conv.cpp) into another and on into the output, while they are in the L2 cache.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "common/recycle.h"
#include "sparse/ops.h"
#include "sparse/conv.h"
#include "sparse/layout.h"
#include "sparse/taps.h"

namespace drive {
namespace {

constexpr const char* kOp = "drive::sparse_conv2d_pair";
// Of the L2 cache, so much for both windows.
constexpr double kShareForWindows = 0.85;
// With fewer rows at a time, too much of the windows is loaded and moved twice.
constexpr int64_t kLeastRows = 3;

template <class T>
struct Stage {
  const Conv& conv;
  const Pattern& pattern;
  const T* values;
  Epilogue<T> epilogue;

  bool uses(int64_t channel) const {
    const int32_t* const start = pattern.column_start + channel * conv.area();
    return start[0] < start[conv.area()];
  }
};

// Channels of a window, whose rows go up as the work goes down the planes.
template <class T>
struct Rows {
  T* data;
  int64_t channels, channel_size, pitch;

  T* at(int64_t channel, int64_t row) const { return data + channel * channel_size + row * pitch; }

  void clear(int64_t begin, int64_t end) const {
    for (int64_t c = 0; c < channels && begin < end; ++c) std::fill(at(c, begin), at(c, end), T(0));
  }
  // Entries of every row from begin to end.
  void clear_columns(int64_t rows, int64_t begin, int64_t end) const {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t y = 0; y < rows; ++y) std::fill(at(c, y) + begin, at(c, y) + end, T(0));
    }
  }
  void move_up(int64_t from, int64_t count) const {
    for (int64_t c = 0; c < channels && from > 0; ++c) {
      std::memmove(at(c, 0), at(c, from), count * pitch * sizeof(T));
    }
  }
};

// Rows of what lies between that are made at a time; 0 if there is no room for enough of them.
template <class T>
int64_t rows_at_a_time(int64_t places, int64_t bytes_a_row, int64_t bytes_beside) {
  const int64_t fit = (static_cast<int64_t>(kShareForWindows * l2_bytes()) - bytes_beside) / bytes_a_row;
  if (fit >= places) return places;
  if (fit < kLeastRows) return 0;
  const int64_t steps = (places + fit - 1) / fit;
  return (places + steps - 1) / steps;
}

template <class T>
at::Tensor convolve_twice(const Stage<T>& first, const Stage<T>& second, const at::Tensor& input) {
  const Conv &a = first.conv, &b = second.conv;
  const int64_t places = a.out_size(0, input.size(2)), width = a.out_size(1, input.size(3));
  const int64_t out_height = b.out_size(0, places), out_width = b.out_size(1, width);
  const int64_t above = b.padding[0], reach = b.reach(0);

  const auto in_window_of = [&](int64_t rows) {
    return Window(kLanes, a.in_axis(0, input.size(2)), a.in_axis(1, input.size(3)), rows + a.reach(0),
                  width + a.reach(1), 0, a.used_phases());
  };
  const auto between_of = [&](int64_t rows) {
    return Window(kLanes, b.in_axis(0, places), b.in_axis(1, width), rows, out_width + b.reach(1), 0, {true});
  };
  const int64_t in_bytes = in_window_of(1 - a.reach(0)).channel_size() * a.in_channels() * sizeof(T);
  const int64_t between_bytes = between_of(1).channel_size() * a.out_channels * sizeof(T);
  const int64_t rows =
      rows_at_a_time<T>(places, in_bytes + between_bytes, in_bytes * a.reach(0) + between_bytes * reach);
  const int64_t blocks = input.size(0), threads = at::get_num_threads();
  // Rows cannot be shared out to threads as blocks can: each would have to make its first ones twice.
  if (rows == 0 || (blocks % threads != 0 && blocks < 4 * threads) || input.numel() == 0) {
    const at::Tensor middle = convolve(a, input, first.pattern, first.values, first.epilogue);
    return convolve(b, middle, second.pattern, second.values, second.epilogue);
  }

  at::Tensor output =
      empty_recycled({blocks, b.out_channels, out_height, out_width, kLanes}, input.options());
  const Images<T> in(input), out(output);
  const int64_t held = rows + above + std::max(reach, above);  // before or after them, padding
  const Window in_window = in_window_of(rows), between_window = between_of(held);
  check_reach(kOp, in_window, in.channels);
  check_reach(kOp, between_window, a.out_channels);
  const Taps<T> taps = forward_taps(a, first.pattern, first.values, in_window);
  const Taps<T> more =
      forward_taps(b, second.pattern, second.values, between_window, false, kSecondTapScratch);
  const auto multiply = sparse_kernels<T>().multiply;

  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Held<T> source(in, in_window, kInputScratch, in.channels);
    const int64_t size = between_window.channel_size(), pitch = between_window.pitch();
    const Rows<T> between{scratch<T>(kBetweenScratch, a.out_channels * size), a.out_channels, size, pitch};
    const int64_t left = b.padding[1] * kLanes;
    between.clear_columns(held, 0, left);
    between.clear_columns(held, left + width * kLanes, pitch);
    for (int64_t block = begin; block < end; ++block) {
      between.clear(0, above);
      int64_t top = 0;  // of the output's rows, the next one; its first place is the first in `between`
      for (int64_t y = 0; y < places; y += rows) {
        const int64_t y_end = std::min(y + rows, places);
        source.move(y);
        source.load_used(block, first.pattern.column_start, a.area());
        for (int64_t c = 0; c < a.out_channels; ++c) {
          if (!second.uses(c)) continue;
          multiply({.in = source.at(0),
                    .in_pitch = in_window.pitch(),
                    .taps = taps.of(c),
                    .start = taps.start.data() + c,
                    .outputs = 1,
                    .rows = y_end - y,
                    .cols = width,
                    .out = between.at(c, y + above - top) + left,
                    .out_pitch = pitch,
                    .out_size = size,
                    .bias = first.epilogue.bias + c,
                    .floor = first.epilogue.floor});
        }
        const bool last = y_end == places;
        if (last) between.clear(places + above - top, out_height + reach - top);
        const int64_t next = last ? out_height : std::max(top, y_end + above - reach);
        T* const to = out.at(block, 0) + top * out_width * kLanes;
        multiply({.in = between.at(0, 0),
                  .in_pitch = pitch,
                  .taps = more.of(0),
                  .start = more.start.data(),
                  .outputs = b.out_channels,
                  .rows = next - top,
                  .cols = out_width,
                  .out = to,
                  .out_pitch = out_width * kLanes,
                  .out_size = out.plane() * kLanes,
                  .residual = second.epilogue.residual ? second.epilogue.residual + (to - out.data) : nullptr,
                  .bias = second.epilogue.bias,
                  .floor = second.epilogue.floor,
                  .ahead = out.ahead()});
        if (!last) between.move_up(next - top, y_end + above - next);
        top = next;
      }
    }
  });
  return output;
}

}  // namespace

at::Tensor sparse_conv2d_pair_cpu(const at::Tensor& input, at::TensorList values, at::TensorList pattern,
                                  at::TensorList bias, at::IntArrayRef shape, at::IntArrayRef stride,
                                  at::IntArrayRef padding, at::IntArrayRef dilation, at::IntArrayRef groups,
                                  const Maybe& residual, std::array<bool, 2> relu) {
  TORCH_CHECK_VALUE(values.size() == 2 && bias.size() == 2 && groups.size() == 2 && pattern.size() == 10, kOp,
                    ": values, bias and groups must be two each and pattern ten, got ", values.size(), ", ",
                    bias.size(), ", ", groups.size(), " and ", pattern.size());
  TORCH_CHECK_VALUE(shape.size() == 8 && stride.size() == 4 && padding.size() == 4 && dilation.size() == 4,
                    kOp, ": shape must be 8 numbers, stride, padding and dilation 4 each, got ", shape, ", ",
                    stride, ", ", padding, ", ", dilation);
  TORCH_CHECK_VALUE(input.dim() == 5, kOp, ": input must be blocked, got ", input.sizes());
  TORCH_CHECK_VALUE(stride[2] == 1 && stride[3] == 1, kOp, ": the second stride must be 1, got ", stride);
  const auto conv_of = [&](int64_t i, at::IntArrayRef size) {
    const auto two = [i](at::IntArrayRef of) { return of.slice(2 * i, 2); };
    check_convolution(kOp, size, input.scalar_type(), values[i], shape.slice(4 * i, 4), two(stride),
                      two(padding), two(dilation), groups[i]);
    return Conv(shape.slice(4 * i, 4), two(stride), two(padding), two(dilation), groups[i]);
  };
  const Conv a = conv_of(0, input.sizes());
  const auto between = output_size(a, input.sizes());
  const Conv b = conv_of(1, between);
  const std::vector<int64_t> output = output_size(b, between);
  const at::IntArrayRef size = output;
  TORCH_CHECK_VALUE(!residual || residual->sizes() == size, kOp,
                    ": residual must have shape ", size, ", got ", residual->sizes());
  const Pattern where_a(kOp, pattern.slice(0, 5), a.out_channels, a.columns() * a.groups, values[0]);
  const Pattern where_b(kOp, pattern.slice(5, 5), b.out_channels, b.columns() * b.groups, values[1]);
  const auto like_input = [&](const at::Tensor& t) { return t.to(input.scalar_type()).contiguous(); };
  const at::Tensor x = input.contiguous();
  const at::Tensor values_a = values[0].contiguous(), values_b = values[1].contiguous();
  const at::Tensor bias_a = like_input(bias[0]), bias_b = like_input(bias[1]);
  TORCH_CHECK_VALUE(bias_a.numel() == a.out_channels && bias_b.numel() == b.out_channels, kOp,
                    ": bias must have ", a.out_channels, " and ", b.out_channels, " entries, got ",
                    bias_a.sizes(), " and ", bias_b.sizes());
  const at::Tensor r = residual ? like_input(*residual) : at::Tensor();
  return AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), kOp, [&] {
    Epilogue<scalar_t> then_a, then_b;
    then_a.bias = bias_a.data_ptr<scalar_t>(), then_b.bias = bias_b.data_ptr<scalar_t>();
    if (residual) then_b.residual = r.data_ptr<scalar_t>();
    if (relu[0]) then_a.floor = 0;
    if (relu[1]) then_b.floor = 0;
    return convolve_twice<scalar_t>({a, where_a, values_a.data_ptr<scalar_t>(), then_a},
                                    {b, where_b, values_b.data_ptr<scalar_t>(), then_b}, x);
  });
}

}  // namespace drive
