// What drive::prune_ and drive::shard_*, on every device, ask of their arguments.
#pragma once

#include <ATen/core/Tensor.h>

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

  // Fresh masks are about to be written, whole, on a CPU.
  void expect_fresh_masks() const {
    for (size_t i = 0; fresh && i < masks.size(); ++i) {
      if (i == 0 || !masks[i].is_alias_of(masks[i - 1])) {
        expect_writes(masks[i].storage().mutable_data(), masks[i].storage().nbytes());
      }
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
