// Registers the kernels of this folder's ops. In a file of its own: torch/library.h takes seconds to compile, in
// CUDA for every architecture.
#include "prune/ops.h"

#include <torch/library.h>

#include "common/recycle.h"

#if defined(DRIVE_WITH_CUDA)
#include "common/implement.h"
#endif

namespace drive {

TORCH_LIBRARY_IMPL(drive, CPU, m) {
  m.impl("prune_", &prune_cpu);
  m.impl("prune_to_cost_", &prune_to_cost_cpu);
  m.impl("new_masks", [](const at::Tensor& like, int64_t entries) {
    TORCH_CHECK_VALUE(entries >= 0, "drive::new_masks: entries must be >= 0, got ", entries);
    return empty_recycled({entries}, like.options().dtype(at::kBool));
  });
  m.impl("shard_sample", &shard_sample_cpu);
  m.impl("shard_survey", &shard_survey_cpu);
  m.impl("shard_histogram", &shard_histogram_cpu);
  m.impl("shard_split", &shard_split_cpu);
  m.impl("shard_ties", &shard_ties_cpu);
  m.impl("shard_apply_", &shard_apply_cpu);
  m.impl("checksum", &checksum_cpu);
  m.impl("zero_pruned_", &zero_pruned_cpu);
}

#if defined(DRIVE_WITH_CUDA)
TORCH_LIBRARY_IMPL(drive, CUDA, m) {
  implement<prune_cuda>(m, "prune_");
  implement<prune_to_cost_cuda>(m, "prune_to_cost_");
  implement<shard_sample_cuda>(m, "shard_sample");
  implement<shard_survey_cuda>(m, "shard_survey");
  implement<shard_histogram_cuda>(m, "shard_histogram");
  implement<shard_split_cuda>(m, "shard_split");
  implement<shard_ties_cuda>(m, "shard_ties");
  implement<shard_apply_cuda>(m, "shard_apply_");
  implement<checksum_cuda>(m, "checksum");
}
#endif

}  // namespace drive
