// Gradients of drive::to_blocks, from_blocks and blocked_norm: what they keep, and which op computes them.
#include <tuple>

#include "common/autograd.h"

namespace drive {
namespace {

using ToBlocksOp = Tensor(const Tensor&);
using FromBlocksOp = Tensor(const Tensor&, c10::SymInt);

struct ToBlocks : Function<ToBlocks> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto to_blocks = op<ToBlocksOp>("drive::to_blocks");
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
    static const auto to_blocks = op<ToBlocksOp>("drive::to_blocks");
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

TORCH_LIBRARY_IMPL(drive, Autograd, m) {
  m.impl("to_blocks", &to_blocks);
  m.impl("from_blocks", &from_blocks);
  m.impl("blocked_norm", &blocked_norm);
}

}  // namespace drive
