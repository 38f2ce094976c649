// drive::prune_ and drive::prune_to_cost_ on CPU: the ops. step.h has the algorithm.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "common/common.h"
#include "prune/arguments.h"
#include "prune/cpu/step.h"
#include "prune/cpu/work.h"
#include "prune/ops.h"

namespace drive {
namespace {

template <class Key>
Outputs run(const PruneArguments& arguments) {
  std::vector<Item> items;
  for (size_t i = 0; i < arguments.weights.size(); ++i) items.emplace_back(arguments, i);
  const auto tensors = static_cast<int64_t>(items.size());
  const at::Tensor kept = empty({tensors}, at::kLong), nonfinite = empty({tensors}, at::kLong);
  const at::Tensor scores = empty({2}, at::kDouble);

  PruneStep<Key> step(std::move(items));
  const bool finite = step.plan(arguments.budget(), arguments.min_keep);
  if (finite) {
    step.apply();
  } else if (arguments.fresh) {
    for (const at::Tensor& mask : arguments.masks) mask.fill_(true);
  }
  const std::vector<int64_t>& survivors = finite ? step.kept() : step.alive();
  std::copy(survivors.begin(), survivors.end(), kept.data_ptr<int64_t>());
  std::copy(step.nonfinite().begin(), step.nonfinite().end(), nonfinite.data_ptr<int64_t>());
  double* const score = scores.data_ptr<double>();
  std::tie(score[0], score[1]) = finite ? step.scores(arguments.squared()) : std::pair<double, double>(NAN, NAN);
  return {kept, nonfinite, scores};
}

Outputs run(const PruneArguments& arguments) {
  const bool wide = arguments.check();
  arguments.expect_fresh_masks();
  const DefaultRounding rounding;
  Outputs outputs = wide ? run<int64_t>(arguments) : run<int32_t>(arguments);
  arguments.bump_versions();
  return outputs;
}

}  // namespace

Outputs prune_cpu(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                  at::TensorList masks, bool fresh, int64_t prune, int64_t min_keep) {
  return run({weights, grads, mask_grads, masks, fresh, prune, min_keep});
}

Outputs prune_to_cost_cpu(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                          at::TensorList masks, bool fresh, at::IntArrayRef costs, at::ArrayRef<double> scales,
                          int64_t max_cost, int64_t min_keep) {
  return run({weights, grads, mask_grads, masks, fresh, 0, min_keep, "drive::prune_to_cost_", false, costs, scales,
              max_cost});
}

}  // namespace drive
