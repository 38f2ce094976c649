// What drive::shard_*, on every device, ask of their arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "common/common.h"
#include "prune/arguments.h"
#include "prune/key.h"

namespace drive {

constexpr int kCounts = 6;  // rows of shard_survey's counts

struct ShardArguments : PruneArguments {
  // Operands that are only read. Throws unless they fit together.
  ShardArguments(const char* op, at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                 at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales)
      : PruneArguments{weights, grads, mask_grads, masks, fresh, 0, 0, op, true, {}, scales} {
    check_wide(wide);
    TORCH_CHECK_VALUE(fresh || !masks.empty(), op, ": masks must not be empty unless they are fresh");
  }

  // Those of drive::shard_apply_.
  ShardArguments(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                 at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales, at::IntArrayRef thresholds,
                 at::IntArrayRef tie_ends)
      : PruneArguments{weights, grads, mask_grads, masks, fresh, 0, 0, "drive::shard_apply_", false, {}, scales} {
    check_wide(wide);
    check_thresholds(thresholds, weights.size());
    check_length("tie_ends", tie_ends, weights.size());
  }

  void check_sample(int64_t count) const {
    TORCH_CHECK_VALUE(count >= 0 && count <= entries(), op, ": count must be from 0 to ", entries(), ", got ",
                      count);
  }

  void check_bracket(int64_t low, int64_t high, int64_t room) const {
    TORCH_CHECK_VALUE(low >= 0 && low < high, op, ": low and high must be 0 <= low < high, got ", low,
                      " and ", high);
    TORCH_CHECK_VALUE(room >= 0, op, ": room must be >= 0, got ", room);
  }

  void check_buckets(int64_t low, int64_t shift, int64_t buckets) const {
    TORCH_CHECK_VALUE(low >= 1 && shift >= 0 && shift < 64 && buckets >= 0 && buckets <= kBuckets, op,
                      ": low, shift and buckets must be at least 1, from 0 to 63 and from 0 to ", kBuckets,
                      ", got ", low, ", ", shift, " and ", buckets);
  }

  void check_tensors(at::IntArrayRef tensors) const {
    for (const int64_t t : tensors) {
      TORCH_CHECK_VALUE(t >= 0 && t < static_cast<int64_t>(weights.size()), op,
                        ": tensors must be from 0 to ", weights.size() - 1, ", got ", t);
    }
  }

  void check_ends(at::IntArrayRef tensors, const at::Tensor& ends) const {
    TORCH_CHECK_VALUE(tensors.size() == 1, op, ": tensors must be one, got ", tensors.size());
    TORCH_CHECK_VALUE(ends.dim() == 1 && ends.numel() > 1 && ends.scalar_type() == at::kLong, op,
                      ": ends must be two int64 positions or more, got ", ends.dtype(), " of shape ",
                      ends.sizes());
    TORCH_CHECK_VALUE(ends.device() == weights[0].device(), op, ": ends must be on ", weights[0].device(),
                      ", got ", ends.device());
  }

  // A pruned entry has the key 0, and is not to be found on a threshold.
  void check_thresholds(at::IntArrayRef thresholds, size_t length) const {
    check_length("thresholds", thresholds, length);
    for (const int64_t t : thresholds) {
      TORCH_CHECK_VALUE(t >= 1, op, ": thresholds must be at least 1, got ", t);
    }
  }

 private:
  void check_length(const char* argument, at::IntArrayRef list, size_t length) const {
    TORCH_CHECK_VALUE(list.size() == length, op, ": ", argument, " must be ", length, ", got ", list.size());
  }

  void check_wide(bool wide) const {
    TORCH_CHECK_VALUE(!check() || wide, op, ": wide must be true for float64 scores, got false");
  }
};

}  // namespace drive
