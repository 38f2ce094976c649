// drive::sparse_conv2d on CPU: direct convolution by the non-zeros of the weight.
//
//   1. Pieces: a block of 16 images, the lanes, or one image whose pixels are, and some rows of the output,
//      so few that the part of the input that they need stays in the L2 cache.
//   2. The input of a piece is copied into a Window: padded, lanes innermost, phases apart. There every
//      non-zero ("tap") is one offset. Rows of whole positions are copied as they are, and their ends clipped
//      while taps see them.
//   3. For each output channel a tile of sums is kept in registers while its taps are walked: one broadcast
//      of the value, one FMA with a load for each 16 outputs. No index an element, only one a non-zero.
//   4. The sums go to their place in the output, transposed if it is [N, C, H, W] and lanes are images.
//
// The gradient to the input is the same with the taps sorted by input channel. The gradient to the weight
// is a dot product a tap, of the same shifted window with the input, made in the same pass.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/recycle.h"
#include "sparse/ops.h"
#include "sparse/conv.h"
#include "sparse/layout.h"
#include "sparse/pattern.h"
#include "sparse/taps.h"
#include "sparse/work.h"

namespace drive {
namespace {

constexpr const char* kOp = "drive::sparse_conv2d";

// Pieces of `blocks` x `places` rows of output: rows so that the input fits the cache, channels split
// where there would be fewer pieces than threads.
struct Pieces {
  int64_t blocks, rows, tiles, channel_groups, channels;

  Pieces(int64_t blocks_, int64_t places, int64_t channels_, int64_t bytes_a_row, int64_t halo)
      : blocks(blocks_), channels(channels_) {
    const int64_t bytes = static_cast<int64_t>(kShareOfL2 * l2_bytes());
    const int64_t fit = bytes / std::max<int64_t>(bytes_a_row, 1) - halo;
    tiles = (places + std::max<int64_t>(fit, 1) - 1) / std::max<int64_t>(fit, 1);
    rows = (places + tiles - 1) / tiles;
    tiles = (places + rows - 1) / rows;
    const int64_t threads = at::get_num_threads();
    channel_groups = blocks * tiles % threads == 0 || blocks * tiles >= 4 * threads
                         ? 1 : std::min(threads, channels);
  }

  // One of the pieces: of the output's channels, those from begin to end.
  struct Piece {
    int64_t block, tile, begin, end;
    bool moved;  // is its input another one than before?
  };

  // make(): what works on the pieces of one thread, one after the other.
  template <class Make>
  void run(const Make& make) const {
    at::parallel_for(0, blocks * tiles * channel_groups, 1, [&](int64_t begin, int64_t end) {
      auto work = make();
      int64_t before = -1;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t input = i / channel_groups, group = i % channel_groups;
        work(Piece{input % blocks, input / blocks, channels * group / channel_groups,
                   channels * (group + 1) / channel_groups, input != before});
        before = input;
      }
    });
  }
};

// Which lanes for [N, C, H, W]? Rows, if they have at most `clipped` positions: the fastest in 522 of 552
// cases of 7 layers, 1 to 32 images, forward and backward on two threads, with 16 and 32 images in the median
// 1.6 times as fast as planes. Else the cheapest ones, in 0.1 ns: a tap at each position of 16, a channel's
// pixel copied or 16 of them transposed, and a tap of a padded plane, however small that is. Fitted to 348
// cases of 12 layers; there the choice costs 1 % in the mean.
template <class T>
Layout lanes_for(const Conv& conv, const at::Tensor& x, int64_t height, int64_t width, int64_t nnz,
                 int64_t clipped) {
  if (x.dim() == 5) return Layout::blocked;
  const bool one = conv.stride[0] == 1 && conv.stride[1] == 1;
  const bool whole = one && x.size(3) == width && width % kLanes == 0;  // positions, in each row
  if (whole && width <= clipped * kLanes && conv.padding[1] <= sparse_kernels<T>().sight) return Layout::rows;
  const double images = x.size(0), blocks = (x.size(0) + kLanes - 1) / kLanes, pixels = height * width;
  const double moved = conv.out_channels * pixels + conv.in_channels() * x.size(2) * x.size(3);
  const double run = (height - 1) * (width + conv.reach(1)) + width, positions = std::ceil(run / kLanes);
  std::array<std::pair<double, Layout>, 3> costs{
      {{blocks * (5.5 * nnz * pixels + 86 * moved), Layout::planes},
       {images * ((8 * positions + 6.5) * nnz + 73 * moved / kLanes), Layout::padded},
       {images * (7.5 * nnz * pixels + 58 * moved) / kLanes, Layout::pixels}}};
  return std::min_element(costs.begin(), costs.end() - (whole ? 0 : 1))->second;
}

}  // namespace

template <class T>
at::Tensor convolve(const Conv& conv, const at::Tensor& input, const Pattern& pattern, const T* values,
                    const Epilogue<T>& epilogue) {
  const int64_t height = conv.out_size(0, input.size(2)), width = conv.out_size(1, input.size(3));
  at::Tensor output = empty_recycled(output_size(conv, input.sizes()), input.options());
  if (output.numel() == 0) return output;
  const auto& kernels = sparse_kernels<T>();
  const Layout lanes = lanes_for<T>(conv, input, height, width, pattern.count, kernels.clipped);
  const Images<T> in(input, lanes), out(output, lanes);
  const int64_t reach = conv.reach(1);
  const int64_t cols = in.clip() ? width : width + reach, col0 = in.clip() ? conv.padding[1] : 0;
  const auto window_of = [&](int64_t rows) {
    const int64_t held = rows + conv.reach(0);
    return Window(in.entry(), conv.in_axis(0, in.height), conv.in_axis(1, in.width), held, cols, col0,
                  conv.used_phases(), in.tail(held * cols, reach));
  };
  const Window row = window_of(1 - conv.reach(0));
  const Pieces pieces(in.blocks(), height, conv.out_channels, row.channel_size() * in.channels * sizeof(T),
                      conv.reach(0));
  const Window in_window = window_of(pieces.rows);
  check_reach(kOp, in_window, in.channels);
  const Taps<T> taps = forward_taps(conv, pattern, values, in_window, in.clip());

  pieces.run([&] {
    const int64_t wide = width + out.margin(reach);
    const Window plane(out.entry(), {height}, {width}, pieces.rows, wide, 0, {true},
                       out.tail(pieces.rows * wide, reach));
    return [&, source = Held<T>(in, in_window, kInputScratch, in.channels),
            target = Held<T>(out, plane, kOutputScratch, 1)](const Pieces::Piece& piece) mutable {
      const int64_t y0 = piece.tile * pieces.rows, rows = std::min(pieces.rows, height - y0);
      if (piece.moved) {
        source.move(y0);
        source.load_used(piece.block, pattern.column_start, conv.area());
        target.move(y0);
      }
      const int64_t at_once = out.direct() ? piece.end - piece.begin : 1;
      for (int64_t o = piece.begin; o < piece.end; o += at_once) {
        T* const to = out.direct() ? out.at(piece.block, o) + y0 * width * out.stored() : target.at(0);
        kernels.multiply({.in = source.at(0),
                          .in_pitch = in_window.pitch(),
                          .taps = taps.of(o),
                          .start = taps.start.data() + o,
                          .outputs = at_once,
                          .rows = out.rows(rows),
                          .cols = out.cols(rows, width, in_window.pitch()),
                          .out = to,
                          .out_pitch = width * out.entry(),
                          .out_size = out.plane() * out.stored(),
                          .residual = epilogue.residual ? epilogue.residual + (to - out.data) : nullptr,
                          .bias = epilogue.bias ? epilogue.bias + o : nullptr,
                          .floor = epilogue.floor,
                          .clip = in.clip(),
                          .strip = out.strip(),
                          .ahead = out.ahead()});
        if (!out.direct()) out.store(piece.block, o, target.window(), to);
      }
    };
  });
  return output;
}
template at::Tensor convolve(const Conv&, const at::Tensor&, const Pattern&, const float*,
                             const Epilogue<float>&);
template at::Tensor convolve(const Conv&, const at::Tensor&, const Pattern&, const double*,
                             const Epilogue<double>&);

void check_convolution(const char* op, at::IntArrayRef input, at::ScalarType type, const at::Tensor& values,
                       at::IntArrayRef shape, at::IntArrayRef stride, at::IntArrayRef padding,
                       at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK_VALUE(shape.size() == 4, op, ": shape must be that of a weight [O, C / groups, kh, kw], got ",
                    shape);
  TORCH_CHECK_VALUE(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                    ": stride, padding and dilation must be two numbers each, got ", stride, ", ", padding,
                    ", ", dilation);
  for (int d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(stride[d] > 0 && dilation[d] > 0 && padding[d] >= 0 && shape[2 + d] > 0, op,
                      ": stride, dilation and the kernel's size must be > 0 and padding >= 0, got ", stride,
                      ", ", dilation, ", ", shape, ", ", padding);
  }
  TORCH_CHECK_VALUE(groups > 0 && shape[0] % groups == 0, op, ": groups must divide ", shape[0],
                    " output channels, got ", groups);
  TORCH_CHECK_TYPE(at::isFloatingType(type), op, ": input must be floating-point, got ", type);
  TORCH_CHECK_TYPE(values.scalar_type() == type, op, ": values must be ", type, ", as input is, got ",
                   values.scalar_type());
  TORCH_CHECK_VALUE(input.size() == 4 || (input.size() == 5 && input[4] == kLanes), op,
                    ": input must be [N, C, H, W] or blocked [N / 16, C, H, W, 16], got ", input);
  TORCH_CHECK_VALUE(input[1] == shape[1] * groups, op, ": input must have ", shape[1] * groups,
                    " channels, got ", input[1]);
  for (int d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(input[2 + d] + 2 * padding[d] > dilation[d] * (shape[2 + d] - 1), op,
                      ": input must, padded, be no smaller than the kernel, got ", input);
  }
}

namespace {

// Of channels whose gradients are both made in one call, at most so many taps: their products stay in the L1
// cache. One channel a call takes 1.1 times as long with 4 and 11 taps each; from 64 taps on it is the same.
constexpr int64_t kTapsAtOnce = 256;

// The gradients to the input and to the packed values. With the taps sorted by input channel, both come from
// the same window on the gradient to the output: a tap adds what it sees there, times its value, to its
// channel's gradient, and gets the product of what it sees there and its channel's input. Both go plane by
// plane, of rows with the next plane's lines fetched ahead: 1.04 to 1.1 times as fast after other work, with
// the forward, as without, or as strips and what those fetch (64 channels of 32x32, 99.3 % zeros).
template <class T>
void backward(const Conv& conv, const at::Tensor& grad, const at::Tensor& input, const Pattern& pattern,
              const T* values, at::Tensor* to_input, at::Tensor* to_values) {
  const auto& kernels = sparse_kernels<T>();
  const int64_t clipped = to_input ? kernels.clipped_for_both : 0;  // `sample` does not clip
  const Layout lanes = lanes_for<T>(conv, input, grad.size(2), grad.size(3), pattern.count, clipped);
  const Images<T> in(grad, lanes), x(input, lanes), out(to_input ? *to_input : input, lanes);
  const int64_t phases = conv.stride[0] * conv.stride[1];
  const Axis y_axis = conv.in_axis(0, x.height), x_axis = conv.in_axis(1, x.width);
  const int64_t y_first = y_axis.place(0), places = y_axis.place(x.height - 1) + 1 - y_first;
  const int64_t x_first = x_axis.place(0), cols = x_axis.place(x.width - 1) + 1 - x_first;
  const int64_t reach = conv.reach(1);
  const int64_t wide = in.clip() ? cols : cols + reach, col0 = in.clip() ? 0 : x_first - reach;
  const auto window_of = [&](int64_t rows) {
    const int64_t held = rows + conv.reach(0);
    return Window(in.entry(), {in.height}, {in.width}, held, wide, col0, {true},
                  in.tail(held * wide, reach));
  };
  const Window row = window_of(1 - conv.reach(0));
  const Pieces pieces(x.blocks(), places, x.channels, row.channel_size() * in.channels * sizeof(T),
                      conv.reach(0));
  const Window in_window = window_of(pieces.rows);
  check_reach(kOp, in_window, in.channels);
  std::vector<int32_t> packed;
  const Taps<T> taps = backward_taps(conv, pattern, values, in_window, in.clip(), packed);
  const int64_t copies = to_values ? at::get_num_threads() : 0;
  const at::Tensor sums = input.new_zeros({copies, pattern.count});
  const bool direct = x.direct() && phases == 1;

  pieces.run([&] {
    const int64_t own = cols + x.margin(reach);
    const Window plane(x.entry(), y_axis, x_axis, pieces.rows, own, x_first, std::vector<bool>(phases, true),
                       x.tail(pieces.rows * own, reach));
    T* const mine = to_values ? sums.data_ptr<T>() + at::get_thread_num() * pattern.count : nullptr;
    return [&, mine, source = Held<T>(in, in_window, kInputScratch, in.channels),
            plane_in = Held<T>(x, plane, kPlaneScratch, 1),
            plane_out = Held<T>(out, plane, kOutputScratch, 1)](const Pieces::Piece& piece) mutable {
      const int64_t y0 = y_first + piece.tile * pieces.rows;
      const int64_t places_here = std::min(pieces.rows, y_first + places - y0);
      const int64_t rows = x.rows(places_here), positions = x.cols(places_here, cols, in_window.pitch());
      if (piece.moved) {
        source.move(y0 - conv.reach(0));
        source.load_used(piece.block, pattern.row_start, 1);
        plane_in.move(y0);
        plane_out.move(y0);
      }
      const Window& window = plane_in.window();
      const auto last = [&](int64_t c) {
        if (!direct) return c + 1;
        if (!to_input || !mine) return piece.end;
        const auto starts = taps.start.begin();
        return std::upper_bound(starts + c + 2, starts + piece.end + 1, starts[c] + kTapsAtOnce) - starts - 1;
      };
      const int64_t here = window.first() * x.stored();
      for (int64_t c = piece.begin, at_once; c < piece.end; c += at_once) {
        at_once = last(c) - c;
        const bool used = taps.start[c * phases] < taps.start[(c + at_once) * phases];
        if (mine && !direct && used) plane_in.load(piece.block, c, 0);
        T* const from = direct ? x.at(piece.block, c) + here : plane_in.at(0);
        T* const to = direct ? out.at(piece.block, c) + here : plane_out.at(0);
        for (int64_t p = 0, v = c * phases; p < phases; ++p, ++v) {
          const int64_t at = p * window.slot_size();
          const Product<T> product{.in = source.at(0),
                                   .in_pitch = in_window.pitch(),
                                   .taps = taps.of(v),
                                   .start = taps.start.data() + v,
                                   .outputs = at_once,
                                   .rows = rows,
                                   .cols = positions,
                                   .out = to + at,
                                   .out_pitch = window.pitch(),
                                   .out_size = out.plane() * out.stored(),
                                   .clip = in.clip(),
                                   .strip = mine ? 0 : out.strip(),
                                   .ahead = !direct ? 0 : mine ? x.in_rows() : out.ahead()};
          if (to_input && mine) {
            const int64_t count = taps.start[v + at_once] - taps.start[v];
            T* const products = scratch<T>(kProductScratch, (count + kTapsTogether) * kLanes);
            kernels.multiply_and_sample(product, from + at, products, mine + taps.start[v]);
          } else if (to_input) {
            kernels.multiply(product);
          }
          for (int64_t i = 0; !to_input && i < at_once; ++i) {
            kernels.sample({source.at(0), in_window.pitch(), taps.of(v + i), taps.count(v + i), rows,
                            positions, from + at + i * x.plane() * x.stored(), window.pitch(),
                            mine + taps.start[v + i]});
          }
        }
        if (to_input && !direct) out.store(piece.block, c, window, to);
      }
    };
  });
  if (to_values) pack_sums(sums, packed.data(), to_values->data_ptr<T>());
}

}  // namespace

at::Tensor sparse_conv2d_cpu(const at::Tensor& input, const at::Tensor& values, at::TensorList pattern,
                             const Maybe& bias, at::IntArrayRef shape, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                             const Maybe& residual, bool relu) {
  if (is_half(input) && values.scalar_type() == input.scalar_type()) {
    const auto extra = residual ? std::optional(widened(*residual)) : std::nullopt;
    return sparse_conv2d_cpu(widened(input), widened(values), pattern, bias, shape, stride, padding, dilation,
                             groups, extra, relu)
        .to(input.scalar_type());
  }
  check_convolution(kOp, input.sizes(), input.scalar_type(), values, shape, stride, padding, dilation,
                    groups);
  const Conv conv(shape, stride, padding, dilation, groups);
  const Pattern where(kOp, pattern, conv.out_channels, conv.columns() * groups, values);
  const at::Tensor x = input.contiguous(), v = values.contiguous();
  const at::Tensor b = bias ? bias->to(x.scalar_type()).contiguous() : at::Tensor();
  if (bias) {
    TORCH_CHECK_VALUE(b.dim() == 1 && b.numel() == conv.out_channels, kOp, ": bias must have shape [",
                      conv.out_channels, "], got ", b.sizes());
  }
  at::Tensor r;
  if (residual) {
    const std::vector<int64_t> output = output_size(conv, x.sizes());
    const at::IntArrayRef size = output;
    TORCH_CHECK_VALUE(x.dim() == 5 && residual->sizes() == size, kOp,
                      ": residual must be blocked, of shape ", size, ", got ", residual->sizes());
    r = residual->to(x.scalar_type()).contiguous();
  }
  return AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), kOp, [&] {
    Epilogue<scalar_t> epilogue;
    if (bias) epilogue.bias = b.data_ptr<scalar_t>();
    if (residual) epilogue.residual = r.data_ptr<scalar_t>();
    if (relu) epilogue.floor = 0;
    return convolve<scalar_t>(conv, x, where, v.data_ptr<scalar_t>(), epilogue);
  });
}

Gradients sparse_conv2d_backward_cpu(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& values,
                                     at::TensorList pattern, at::IntArrayRef shape, at::IntArrayRef stride,
                                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                     std::array<bool, 3> needed) {
  if (is_half(input) && values.scalar_type() == input.scalar_type()) {
    return narrowed(sparse_conv2d_backward_cpu(widened(grad), widened(input), widened(values), pattern, shape,
                                               stride, padding, dilation, groups, needed),
                    input.scalar_type());
  }
  check_convolution(kOp, input.sizes(), input.scalar_type(), values, shape, stride, padding, dilation,
                    groups);
  const Conv conv(shape, stride, padding, dilation, groups);
  const Pattern where(kOp, pattern, conv.out_channels, conv.columns() * groups, values);
  const at::Tensor g = grad.contiguous(), x = input.contiguous(), v = values.contiguous();
  const at::Tensor none = x.new_empty({0});
  Gradients gradients{needed[0] ? empty_recycled(x.sizes(), x.options()) : none,
                      needed[1] ? x.new_zeros({where.count}) : none.clone(), none.clone()};
  if (x.numel() > 0 && g.numel() > 0 && (needed[0] || needed[1])) {
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), kOp, [&] {
      backward<scalar_t>(conv, g, x, where, v.data_ptr<scalar_t>(),
                         needed[0] ? &std::get<0>(gradients) : nullptr,
                         needed[1] ? &std::get<1>(gradients) : nullptr);
    });
  } else if (needed[0]) {
    std::get<0>(gradients).zero_();
  }
  if (needed[2]) {
    std::get<2>(gradients) = g.dim() == 5 ? g.sum({0, 2, 3, 4}) : g.sum({0, 2, 3});
  }
  return gradients;
}

}  // namespace drive
