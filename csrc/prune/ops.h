// The ops of this folder as the dispatcher calls them, with the types of their schemas (drive_kernels/prune).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace drive {

using MaybeTensor = std::optional<at::Tensor>;
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // survivors, non-finite scores, scores
using Survey = std::tuple<at::Tensor, at::Tensor, at::Tensor>;   // counts, sum of |S|, what it lists

using Prune = Outputs(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                      at::TensorList masks, bool fresh, int64_t prune, int64_t min_keep);
using PruneToCost = Outputs(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                            at::TensorList masks, bool fresh, at::IntArrayRef costs, at::ArrayRef<double> scales,
                            int64_t max_cost, int64_t min_keep);
using ShardSample = at::Tensor(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                               at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                               int64_t count);
using ShardSurvey = Survey(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                           at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales, int64_t low,
                           int64_t high, int64_t room);
using ShardHistogram = at::Tensor(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                                  at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                                  const MaybeTensor& listed, at::IntArrayRef tensors, int64_t low, int64_t shift,
                                  int64_t buckets);
using ShardSplit = at::Tensor(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                              at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                              const MaybeTensor& listed, at::IntArrayRef tensors, at::IntArrayRef thresholds);
using ShardTies = at::Tensor(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                             at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                             const MaybeTensor& listed, at::IntArrayRef tensors, int64_t threshold,
                             const at::Tensor& ends);
using ShardApply = void(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                        at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                        const MaybeTensor& listed, at::IntArrayRef thresholds, at::IntArrayRef tie_ends);
using Checksum = at::Tensor(at::TensorList inputs);
using ZeroPruned = void(at::TensorList tensors, at::TensorList masks);

Prune prune_cpu, prune_cuda;
PruneToCost prune_to_cost_cpu, prune_to_cost_cuda;
ShardSample shard_sample_cpu, shard_sample_cuda;
ShardSurvey shard_survey_cpu, shard_survey_cuda;
ShardHistogram shard_histogram_cpu, shard_histogram_cuda;
ShardSplit shard_split_cpu, shard_split_cuda;
ShardTies shard_ties_cpu, shard_ties_cuda;
ShardApply shard_apply_cpu, shard_apply_cuda;
Checksum checksum_cpu, checksum_cuda;
ZeroPruned zero_pruned_cpu;

}  // namespace drive
