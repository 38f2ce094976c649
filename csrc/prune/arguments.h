// What drive::prune_ and drive::shard_*, on every device, ask of their arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/safe_numerics.h>

#include <cstdint>
#include <vector>

#include "common/common.h"

namespace drive {

struct PruneArguments {
  at::TensorList weights, grads, mask_grads, masks;  // mask_grads may be empty; grads too, if they are
  bool fresh;
  int64_t prune, min_keep;
  const char* op = "drive::prune_";
  bool reads_only = false;  // masks may be empty, if they are fresh
  at::IntArrayRef costs{};          // of an entry of each weight; empty: 1, and `prune` of them go
  at::ArrayRef<double> scales{};    // float32 numbers by which scores are multiplied before they are ranked
  int64_t max_cost = 0;             // of all that survive

  // Throws unless they fit together. Returns whether the scores are float64.
  bool check() const {
    TORCH_CHECK_VALUE(!weights.empty(), op, ": weights must not be empty");
    const auto fits = [&](at::TensorList list, bool optional) {
      return list.size() == weights.size() || (optional && list.empty());
    };
    TORCH_CHECK_VALUE(fits(masks, reads_only) && fits(mask_grads, true) && fits(grads, mask_grads.empty()),
                      op,
                      ": weights, grads, mask_grads and masks must be of one length (or mask_grads empty, "
                      "or both gradients), got ",
                      weights.size(), ", ", grads.size(), ", ", mask_grads.size(), ", ", masks.size());
    TORCH_CHECK_VALUE(prune >= 0 && min_keep >= 0, op, ": prune and min_keep must be >= 0, got ", prune,
                      ", ", min_keep);
    check_costs();
    check_scales();
    bool wide = !mask_grads.empty();
    for (size_t i = 0; i < weights.size(); ++i) {
      const at::ScalarType dtype = weights[i].scalar_type();
      TORCH_CHECK_TYPE(
          dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble, op,
          ": weights[", i, "] must be float32, bfloat16, float16 or float64, got ", dtype);
      TORCH_CHECK_VALUE(weights[i].device() == weights[0].device(), op, ": weights[", i, "] must be on ",
                        weights[0].device(), ", as weights[0] is, got ", weights[i].device());
      if (!grads.empty()) check_like(op, "grads", i, grads[i], weights[i], dtype);
      if (!masks.empty()) check_like(op, "masks", i, masks[i], weights[i], at::kBool);
      if (!mask_grads.empty()) check_like(op, "mask_grads", i, mask_grads[i], weights[i], dtype);
      wide |= dtype == at::kDouble;
    }
    return wide;
  }

  float scale(size_t i) const { return scales.empty() ? 1 : static_cast<float>(scales[i]); }

  // Is |S| the square of the score that is ranked? (With G, that is |theta * G|.)
  bool squared() const { return !grads.empty() && mask_grads.empty(); }

  // Operands of one tensor: weight, gradient, mask and, where there is one, mask gradient. Where there are no
  // gradients or masks, the weight stands in their place, and nobody reads it there.
  std::vector<at::Tensor> operands(size_t i) const {
    std::vector<at::Tensor> tensors{weights[i], grads.empty() ? weights[i] : grads[i],
                                    masks.empty() ? weights[i] : masks[i]};
    if (!mask_grads.empty()) tensors.push_back(mask_grads[i]);
    return tensors;
  }

  int64_t entries() const {
    int64_t n = 0;
    for (const at::Tensor& weight : weights) n += weight.numel();
    return n;
  }

  // What the survivors may cost.
  int64_t budget() const { return costs.empty() ? entries() - prune : max_cost; }

  // Fresh masks are about to be written, whole, on a CPU.
  void expect_fresh_masks() const {
    for (size_t i = 0; fresh && i < masks.size(); ++i) {
      if (i == 0 || !masks[i].is_alias_of(masks[i - 1])) {
        expect_writes(masks[i].storage().mutable_data(), masks[i].storage().nbytes());
      }
    }
  }

  void check_costs() const {
    TORCH_CHECK_VALUE(costs.empty() || (costs.size() == weights.size() && scales.size() == weights.size()), op,
                      ": costs and scales must have a number for each of ", weights.size(), " weights, got ",
                      costs.size(), " and ", scales.size());
    TORCH_CHECK_VALUE(max_cost >= 0, op, ": max_cost must be >= 0, got ", max_cost);
    int64_t total = 0, cost = 0;
    for (size_t i = 0; i < costs.size(); ++i) {
      TORCH_CHECK_VALUE(costs[i] >= 1 && costs[i] < int64_t{1} << 31, op, ": costs[", i,
                        "] must be from 1 to 2^31 - 1, got ", costs[i]);
      TORCH_CHECK_VALUE(!c10::mul_overflows(weights[i].numel(), costs[i], &cost) &&
                            !c10::add_overflows(total, cost, &total),
                        op, ": all entries must cost less than 2^63 together, got more, up to weights[", i, "]");
    }
  }

  void check_scales() const {
    TORCH_CHECK_VALUE(scales.empty() || scales.size() == weights.size(), op,
                      ": scales must have a number for each of ", weights.size(), " weights, or none, got ",
                      scales.size());
    for (size_t i = 0; i < scales.size(); ++i) {
      TORCH_CHECK_VALUE(scales[i] >= 0 && scales[i] <= 1, op, ": scales[", i, "] must be from 0 to 1, got ",
                        scales[i]);
    }
  }

  // Tells autograd that weights and masks have changed.
  void bump_versions() const {
    for (const at::TensorList changed : {weights, masks}) {
      for (const at::Tensor& tensor : changed) {
        if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
      }
    }
  }
};

}  // namespace drive
