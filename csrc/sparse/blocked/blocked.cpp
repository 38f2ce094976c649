// drive::to_blocks, drive::from_blocks and drive::blocked_norm on CPU: images with 16 of them innermost.
//
// Batch normalisation goes channel by channel: all images' planes of one channel fit the L2 cache, so that
// mean, variance and output, three passes, read memory once. Lanes beyond the batch stay 0.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>

#include "common/recycle.h"
#include "sparse/ops.h"
#include "sparse/blocked/isa.h"
#include "sparse/layout.h"

namespace drive {
namespace {

// Positions that are worth waking a thread for (some 10 us).
constexpr int64_t kGrain = 4096;

void check_blocked(const char* op, const char* argument, const at::Tensor& t, int64_t batch) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, op, ": ", argument,
                   " must be float32 or float64, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 5 && t.size(4) == kLanes, op, ": ", argument,
                    " must be blocked, [N / 16, C, H, W, 16], got ", t.sizes());
  TORCH_CHECK_VALUE((batch + kLanes - 1) / kLanes == t.size(0), op, ": batch must fit ", t.size(0),
                    " blocks of 16, got ", batch);
}

int64_t plane_grain(int64_t plane) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(plane, 1)); }

Window whole_plane(int64_t height, int64_t width) {
  Window window(kLanes, {height}, {width}, height, width, 0, {true});
  window.move(0);
  return window;
}

// A channel's part of a blocked tensor: one plane a block.
template <class T>
struct Channel {
  const Images<T>& images;
  int64_t channel, batch;

  int64_t last() const { return images.blocks() - 1; }
  int lanes(int64_t block) const {
    return static_cast<int>(std::min<int64_t>(kLanes, batch - block * kLanes));
  }
  T* plane(int64_t block) const { return images.at(block, channel); }

  // Sum over the batch of what add(block, sums) adds to lanes.
  template <class Add>
  double sum(const Add& add) const {
    double total = 0;
    for (int64_t block = 0; block <= last(); ++block) {
      std::array<T, kLanes> sums{};
      add(block, sums.data());
      for (int lane = 0; lane < lanes(block); ++lane) total += sums[lane];
    }
    return total;
  }

  // A factor for each lane: 0 beyond the batch.
  std::array<T, kLanes> spread(int64_t block, double value) const {
    std::array<T, kLanes> factors{};
    std::fill_n(factors.begin(), lanes(block), static_cast<T>(value));
    return factors;
  }
};

}  // namespace

at::Tensor to_blocks_cpu(const at::Tensor& input) {
  constexpr const char* op = "drive::to_blocks";
  TORCH_CHECK_TYPE(input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble, op,
                   ": input must be float32 or float64, got ", input.scalar_type());
  TORCH_CHECK_VALUE(input.dim() == 4, op, ": input must be [N, C, H, W], got ", input.sizes());
  const at::Tensor x = input.contiguous();
  const int64_t blocks = (x.size(0) + kLanes - 1) / kLanes;
  at::Tensor output = empty_recycled({blocks, x.size(1), x.size(2), x.size(3), kLanes}, x.options());
  if (output.numel() == 0) return output;
  const Window window = whole_plane(x.size(2), x.size(3));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), op, [&] {
    const Images<scalar_t> in(x), out(output);
    at::parallel_for(0, out.blocks() * in.channels, plane_grain(in.plane()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        in.load(i / in.channels, i % in.channels, window, out.at(i / in.channels, i % in.channels));
      }
    });
  });
  return output;
}

at::Tensor from_blocks_cpu(const at::Tensor& input, int64_t batch) {
  constexpr const char* op = "drive::from_blocks";
  check_blocked(op, "input", input, batch);
  const at::Tensor x = input.contiguous();
  at::Tensor output = empty_recycled({batch, x.size(1), x.size(2), x.size(3)}, x.options());
  if (output.numel() == 0) return output;
  const Window window = whole_plane(x.size(2), x.size(3));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), op, [&] {
    const Images<scalar_t> in(x), out(output);
    at::parallel_for(0, in.blocks() * in.channels, plane_grain(in.plane()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        out.store(i / in.channels, i % in.channels, window, in.at(i / in.channels, i % in.channels));
      }
    });
  });
  return output;
}

Normed blocked_norm_cpu(const at::Tensor& input, int64_t batch, const at::Tensor& weight,
                        const at::Tensor& bias, double eps, const Maybe& residual, bool relu) {
  constexpr const char* op = "drive::blocked_norm";
  check_blocked(op, "input", input, batch);
  const at::Tensor x = input.contiguous(), w = weight.contiguous(), b = bias.contiguous();
  const at::Tensor r = residual ? residual->contiguous() : at::Tensor();
  TORCH_CHECK_VALUE(!residual || r.sizes() == x.sizes(), op, ": residual must have shape ", x.sizes(),
                    ", got ", residual ? r.sizes() : x.sizes());
  at::Tensor output = empty_recycled(x.sizes(), x.options());
  at::Tensor mean = x.new_empty({x.size(1)}), var = x.new_empty({x.size(1)});
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), op, [&] {
    const Images<scalar_t> in(x), out(output);
    const auto& kernels = blocked_kernels<scalar_t>();
    const scalar_t* const extra = residual ? r.data_ptr<scalar_t>() : nullptr;
    const int64_t n = in.plane();
    const double count = static_cast<double>(batch) * n;
    const scalar_t floor = relu ? 0 : -std::numeric_limits<scalar_t>::infinity();
    at::parallel_for(0, in.channels, plane_grain(n * in.blocks()), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const Channel<scalar_t> channel{in, c, batch};
        const double m = channel.sum([&](int64_t block, scalar_t* sums) {
          kernels.add(channel.plane(block), n, 0, sums);
        }) / count;
        const double v = channel.sum([&](int64_t block, scalar_t* sums) {
          kernels.add_squares(channel.plane(block), n, static_cast<scalar_t>(m), sums);
        }) / count;
        mean.data_ptr<scalar_t>()[c] = static_cast<scalar_t>(m);
        var.data_ptr<scalar_t>()[c] = static_cast<scalar_t>(v);
        const double scale = w.data_ptr<scalar_t>()[c] / std::sqrt(v + eps);
        const double shift = b.data_ptr<scalar_t>()[c] - m * scale;
        for (int64_t block = 0; block <= channel.last(); ++block) {
          const scalar_t* const from = channel.plane(block);
          kernels.affine(from, extra ? extra + (from - in.data) : nullptr, n,
                         channel.spread(block, scale).data(), channel.spread(block, shift).data(), floor,
                         out.at(block, c));
        }
      }
    });
  });
  return {output, mean, var};
}

NormGradients blocked_norm_backward_cpu(const at::Tensor& grad, const at::Tensor& input, int64_t batch,
                                        const at::Tensor& weight, double eps, const at::Tensor& mean,
                                        const at::Tensor& var, const Maybe& output,
                                        bool residual) {
  constexpr const char* op = "drive::blocked_norm_backward";
  check_blocked(op, "grad", grad, batch);
  const at::Tensor g = grad.contiguous(), x = input.contiguous(), w = weight.contiguous();
  const at::Tensor y = output ? output->contiguous() : at::Tensor();
  at::Tensor to_input = empty_recycled(x.sizes(), x.options());
  at::Tensor to_residual = residual ? empty_recycled(x.sizes(), x.options()) : x.new_empty({0});
  at::Tensor to_weight = x.new_empty({x.size(1)}), to_bias = x.new_empty({x.size(1)});
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), op, [&] {
    const Images<scalar_t> in(x), from(g), to(to_input);
    const auto& kernels = blocked_kernels<scalar_t>();
    const scalar_t* const out = output ? y.data_ptr<scalar_t>() : nullptr;
    scalar_t* const masked = residual ? to_residual.data_ptr<scalar_t>() : nullptr;
    const int64_t n = in.plane();
    const double count = static_cast<double>(batch) * n;
    at::parallel_for(0, in.channels, plane_grain(n * in.blocks()), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const Channel<scalar_t> channel{in, c, batch};
        const double m = mean.data_ptr<scalar_t>()[c];
        const double invstd = 1 / std::sqrt(var.data_ptr<scalar_t>()[c] + eps);
        double sum = 0;
        const double product = channel.sum([&](int64_t block, scalar_t* products) {
          std::array<scalar_t, kLanes> sums{};
          const int64_t at = channel.plane(block) - in.data;
          kernels.add_products(from.data + at, out ? out + at : nullptr, in.data + at, n,
                               static_cast<scalar_t>(m),
                               sums.data(), products);
          for (int lane = 0; lane < channel.lanes(block); ++lane) sum += sums[lane];
        });
        to_bias.data_ptr<scalar_t>()[c] = static_cast<scalar_t>(sum);
        to_weight.data_ptr<scalar_t>()[c] = static_cast<scalar_t>(product * invstd);
        const double scale = w.data_ptr<scalar_t>()[c] * invstd;
        const double slope = -scale * product * invstd * invstd / count;
        const double shift = -scale * sum / count - slope * m;
        for (int64_t block = 0; block <= channel.last(); ++block) {
          const int64_t at = channel.plane(block) - in.data;
          kernels.combine(from.data + at, out ? out + at : nullptr, in.data + at, n,
                          channel.spread(block, scale).data(), channel.spread(block, slope).data(),
                          channel.spread(block, shift).data(), to.data + at, masked ? masked + at : nullptr);
        }
      }
    });
  });
  return {to_input, to_weight, to_bias, to_residual};
}

}  // namespace drive
