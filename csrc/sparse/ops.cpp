// Registers the ops of this folder and of blocked/: their kernels on CPU, and their gradients: what these keep, and
// which op computes them. In one file, as the headers of autograd take seconds to compile.
//
// Gradients are in C++, because a layer of a small network takes tens of microseconds, and
// torch.library.register_autograd adds 100 to each forward and backward, 200 where a list of tensors is among the
// arguments.
#include "sparse/ops.h"

#define AT_PER_OPERATOR_HEADERS  // else these include all of PyTorch's operators
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace drive {
namespace {

using at::IntArrayRef;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;  // not at::TensorList, of which each would have to be given a gradient

// The op of this name, through the dispatcher.
template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

bool is_given(const Maybe& t) { return t.has_value() && t->defined(); }

Tensor if_needed(bool needed, Tensor gradient) { return needed ? std::move(gradient) : Tensor(); }

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
    static const auto forward_op = op<decltype(sparse_conv2d_cpu)>("drive::sparse_conv2d");
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
        op<decltype(sparse_conv2d_backward_cpu)>("drive::sparse_conv2d_backward");
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
    static const auto forward_op = op<decltype(sparse_linear_cpu)>("drive::sparse_linear");
    keep(ctx, input, values, pattern, std::nullopt);
    ctx->saved_data["shape"] = shape;
    ctx->saved_data["bias"] = is_given(bias);
    return forward_op.call(input, values, pattern, bias, shape);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto backward_op =
        op<decltype(sparse_linear_backward_cpu)>("drive::sparse_linear_backward");
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
    static const auto forward_op = op<decltype(sparse_gather_cpu)>("drive::sparse_gather");
    ctx->save_for_backward({index});
    ctx->saved_data["shape"] = weight.sizes().vec();
    return forward_op.call(weight, index);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto backward_op = op<decltype(sparse_scatter_cpu)>("drive::sparse_scatter");
    return {backward_op.call(grads[0], ctx->get_saved_variables()[0],
                             ctx->saved_data["shape"].toIntVector()),
            Tensor()};
  }
};

Tensor sparse_gather(const Tensor& weight, const Tensor& index) {
  return SparseGather::apply(weight, index);
}

// ---- Images in blocks. Their batch may be symbolic above the kernels. ----

using FromBlocksOp = Tensor(const Tensor& input, c10::SymInt batch);

struct ToBlocks : Function<ToBlocks> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto to_blocks = op<decltype(to_blocks_cpu)>("drive::to_blocks");
    ctx->saved_data["batch"] = input.sym_size(0);
    return to_blocks.call(input);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto from_blocks = op<FromBlocksOp>("drive::from_blocks");
    return {from_blocks.call(grads[0], ctx->saved_data["batch"].toSymInt())};
  }
};

struct FromBlocks : Function<FromBlocks> {
  static Tensor forward(AutogradContext*, const Tensor& input, const c10::SymInt& batch) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto from_blocks = op<FromBlocksOp>("drive::from_blocks");
    return from_blocks.call(input, batch);
  }

  static variable_list backward(AutogradContext*, variable_list grads) {
    static const auto to_blocks = op<decltype(to_blocks_cpu)>("drive::to_blocks");
    return {to_blocks.call(grads[0]), Tensor()};
  }
};

struct BlockedNorm : Function<BlockedNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const c10::SymInt& batch,
                               const Tensor& weight, const Tensor& bias, double eps, const Maybe& residual,
                               bool relu) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto norm =
        op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, c10::SymInt, const Tensor&, const Tensor&,
                                              double, const Maybe&, bool)>("drive::blocked_norm");
    auto [output, mean, var] = norm.call(input, batch, weight, bias, eps, residual, relu);
    ctx->mark_non_differentiable({mean, var});
    ctx->save_for_backward({input, weight, mean, var, relu ? output : Tensor()});
    ctx->saved_data["batch"] = batch;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["residual"] = is_given(residual);
    return {output, mean, var};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto norm_backward =
        op<std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, c10::SymInt,
                                                      const Tensor&, double, const Tensor&, const Tensor&,
                                                      const Maybe&, bool)>("drive::blocked_norm_backward");
    const variable_list kept = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const bool residual = data["residual"].toBool();
    auto [to_input, to_weight, to_bias, to_residual] = norm_backward.call(
        grads[0], kept[0], data["batch"].toSymInt(), kept[1], data["eps"].toDouble(), kept[2], kept[3],
        kept[4].defined() ? Maybe(kept[4]) : std::nullopt, residual);
    return {to_input, Tensor(), to_weight, to_bias, Tensor(), if_needed(residual, to_residual), Tensor()};
  }
};

Tensor to_blocks(const Tensor& input) { return ToBlocks::apply(input); }

Tensor from_blocks(const Tensor& input, c10::SymInt batch) { return FromBlocks::apply(input, batch); }

std::tuple<Tensor, Tensor, Tensor> blocked_norm(const Tensor& input, c10::SymInt batch, const Tensor& weight,
                                                const Tensor& bias, double eps, const Maybe& residual,
                                                bool relu) {
  variable_list found = BlockedNorm::apply(input, batch, weight, bias, eps, residual, relu);
  return {found[0], found[1], found[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(drive, CPU, m) {
  m.impl("sparse_conv2d", &sparse_conv2d_cpu);
  m.impl("sparse_conv2d_backward", &sparse_conv2d_backward_cpu);
  m.impl("sparse_linear", &sparse_linear_cpu);
  m.impl("sparse_linear_backward", &sparse_linear_backward_cpu);
  m.impl("sparse_gather", &sparse_gather_cpu);
  m.impl("sparse_scatter", &sparse_scatter_cpu);
  m.impl("to_blocks", &to_blocks_cpu);
  m.impl("from_blocks", &from_blocks_cpu);
  m.impl("blocked_norm", &blocked_norm_cpu);
  m.impl("blocked_norm_backward", &blocked_norm_backward_cpu);
}

TORCH_LIBRARY_IMPL(drive, Autograd, m) {
  m.impl("sparse_conv2d", &sparse_conv2d);
  m.impl("sparse_linear", &sparse_linear);
  m.impl("sparse_gather", &sparse_gather);
  m.impl("to_blocks", &to_blocks);
  m.impl("from_blocks", &from_blocks);
  m.impl("blocked_norm", &blocked_norm);
}

}  // namespace drive
