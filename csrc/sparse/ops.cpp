// Gradients of drive::sparse_conv2d, sparse_linear and sparse_gather: what they keep, which op computes them.
#include <array>
#include <tuple>
#include <vector>

#include "common/autograd.h"

namespace drive {
namespace {

using at::IntArrayRef;
using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;  // not at::TensorList, of which each would have to be given a gradient
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// input, values, the pattern's tensors, and what else backward needs.
void keep(AutogradContext* ctx, const Tensor& input, const Tensor& values, const Tensors& pattern,
          const Maybe& output) {
  variable_list kept{input, values};
  kept.insert(kept.end(), pattern.begin(), pattern.end());
  if (output) kept.push_back(*output);
  ctx->save_for_backward(std::move(kept));
}

struct SparseConv2d : Function<SparseConv2d> {
  struct Options {
    Ints shape, stride, padding, dilation;
    int64_t groups;
    bool relu;
  };

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& values,
                        const Tensors& pattern, const Maybe& bias, const Maybe& residual,
                        const Options& options) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto forward_op =
        op<Tensor(const Tensor&, const Tensor&, at::TensorList, const Maybe&, IntArrayRef, IntArrayRef,
                  IntArrayRef, IntArrayRef, int64_t, const Maybe&, bool)>("drive::sparse_conv2d");
    Tensor output = forward_op.call(input, values, pattern, bias, options.shape, options.stride,
                                    options.padding, options.dilation, options.groups, residual,
                                    options.relu);
    keep(ctx, input, values, pattern, options.relu ? Maybe(output) : std::nullopt);
    ctx->saved_data["shape"] = options.shape;
    ctx->saved_data["stride"] = options.stride;
    ctx->saved_data["padding"] = options.padding;
    ctx->saved_data["dilation"] = options.dilation;
    ctx->saved_data["groups"] = options.groups;
    ctx->saved_data["relu"] = options.relu;
    ctx->saved_data["bias"] = is_given(bias);
    ctx->saved_data["residual"] = is_given(residual);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto backward_op =
        op<Gradients(const Tensor&, const Tensor&, const Tensor&, at::TensorList, IntArrayRef, IntArrayRef,
                     IntArrayRef, IntArrayRef, int64_t, std::array<bool, 3>)>(
            "drive::sparse_conv2d_backward");
    variable_list kept = ctx->get_saved_variables();
    Tensor grad = grads[0];
    auto& data = ctx->saved_data;
    if (data["relu"].toBool()) {
      grad = grad * (kept.back() > 0);
      kept.pop_back();
    }
    const std::array<bool, 3> needed{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     data["bias"].toBool() && ctx->needs_input_grad(2)};
    auto [to_input, to_values, to_bias] = backward_op.call(
        grad, kept[0], kept[1], at::TensorList(kept).slice(2), data["shape"].toIntVector(),
        data["stride"].toIntVector(), data["padding"].toIntVector(), data["dilation"].toIntVector(),
        data["groups"].toInt(), needed);
    return {if_needed(needed[0], to_input), if_needed(needed[1], to_values), Tensor(),
            if_needed(needed[2], to_bias), if_needed(data["residual"].toBool(), grad), Tensor()};
  }
};

Tensor sparse_conv2d(const Tensor& input, const Tensor& values, at::TensorList pattern, const Maybe& bias,
                     IntArrayRef shape, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                     int64_t groups, const Maybe& residual, bool relu) {
  return SparseConv2d::apply(input, values, pattern.vec(), bias, residual,
                             SparseConv2d::Options{shape.vec(), stride.vec(), padding.vec(), dilation.vec(),
                                                   groups, relu});
}

struct SparseLinear : Function<SparseLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& values,
                        const Tensors& pattern, const Maybe& bias, const Ints& shape) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto forward_op =
        op<Tensor(const Tensor&, const Tensor&, at::TensorList, const Maybe&, IntArrayRef)>(
            "drive::sparse_linear");
    keep(ctx, input, values, pattern, std::nullopt);
    ctx->saved_data["shape"] = shape;
    ctx->saved_data["bias"] = is_given(bias);
    return forward_op.call(input, values, pattern, bias, shape);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto backward_op =
        op<Gradients(const Tensor&, const Tensor&, const Tensor&, at::TensorList, IntArrayRef,
                     std::array<bool, 3>)>("drive::sparse_linear_backward");
    const variable_list kept = ctx->get_saved_variables();
    const std::array<bool, 3> needed{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)};
    auto [to_input, to_values, to_bias] =
        backward_op.call(grads[0], kept[0], kept[1], at::TensorList(kept).slice(2),
                         ctx->saved_data["shape"].toIntVector(), needed);
    return {if_needed(needed[0], to_input), if_needed(needed[1], to_values), Tensor(),
            if_needed(needed[2], to_bias), Tensor()};
  }
};

Tensor sparse_linear(const Tensor& input, const Tensor& values, at::TensorList pattern, const Maybe& bias,
                     IntArrayRef shape) {
  return SparseLinear::apply(input, values, pattern.vec(), bias, shape.vec());
}

struct SparseGather : Function<SparseGather> {
  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const Tensor& index) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto forward_op = op<Tensor(const Tensor&, const Tensor&)>("drive::sparse_gather");
    ctx->save_for_backward({index});
    ctx->saved_data["shape"] = weight.sizes().vec();
    return forward_op.call(weight, index);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto backward_op =
        op<Tensor(const Tensor&, const Tensor&, IntArrayRef)>("drive::sparse_scatter");
    return {backward_op.call(grads[0], ctx->get_saved_variables()[0],
                             ctx->saved_data["shape"].toIntVector()),
            Tensor()};
  }
};

Tensor sparse_gather(const Tensor& weight, const Tensor& index) {
  return SparseGather::apply(weight, index);
}

}  // namespace

TORCH_LIBRARY_IMPL(drive, Autograd, m) {
  m.impl("sparse_conv2d", &sparse_conv2d);
  m.impl("sparse_linear", &sparse_linear);
  m.impl("sparse_gather", &sparse_gather);
}

}  // namespace drive
