// drive::prune_ and drive::prune_to_cost_ on GPUs: the k best scores survive, exactly, in two passes over the
// entries and without the host knowing anything: every launch below reads what the ones before left in device memory.
//
//   1. Sample: up to 2^17 keys bracket the threshold, lo <= T <= hi, by a radix search for two ranks (sample,
//      narrow).
//   2. Survey (reads theta, G and an old mask): how many keys lie above, at and inside the bracket; one
//      bit an entry, "at or above hi"; a list of the keys inside, chunk by chunk. Also the sum of |S|, and
//      the count of non-finite scores, which makes the rest of the step a no-op.
//   3. Threshold T, the k-th largest key: a radix search through the list (count). The survey's counts
//      prove that the bracket held; if it did not, or the list is full, through all entries.
//   4. Ties: of the entries on the threshold the first ones in row-major order survive. They are counted by
//      chunk of that order (ties); a scan finds the chunk in which the last survivor lies, and a look at that
//      chunk finds it (cut).
//   5. Apply (reads theta and the bits, and the chunk's list; or theta, G and old mask again, where T lies on
//      the bracket's edge or outside; writes theta, mask).
//
// Where min_keep is given and a tensor would fall below it, steps 3 and 4 run twice more before step 5:
// for every tensor by itself (its guard; a small tensor's by one block), and for all entries that no guard keeps.
//
// With costs, everything counts as many times as it costs, and k is what the survivors may cost: a part of the
// sample is one of equal cost, counts are multiplied by the cost of their chunk (all of it is of one tensor), and
// the ties end before the first that would cost too much. That may be the very first; then the weakest survivor's key
// is the next larger one (next_above). Guards count entries, which cost the same within a tensor.
//
// A digit's bucket is chosen by every block of the next launch for itself (pick): a histogram is complete
// when its launch is, and an all-reduce can go between.
//
// Bytes an entry, float32: read 8, written 1/8; read 4 1/8, written 4 + 1: 17.3, where torch.mul moves 12.
// Scratch: 0.23 byte an entry (bits 0.125, list 0.094, counts 0.01; of 64-bit keys 0.3) and less than 1 MB, or for
// ten thousand tensors 4 MB. With costs 0.28 more: four times the list.
//
// work_list.cuh: the host side. work.cuh: entries and their keys. vectors.cuh: the same, 16 bytes at a time.
// block.cuh: what a block does together. step.cuh: what launches leave to each other. search.cuh: steps 1, 3, 4.
// guards.cuh: min_keep. passes.cuh: steps 2, 5. Here: the launches.
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <tuple>

#include "prune/arguments.h"
#include "prune/cuda/guards.cuh"
#include "prune/cuda/launch.cuh"
#include "prune/cuda/passes.cuh"
#include "prune/cuda/search.cuh"
#include "prune/cuda/step.cuh"
#include "prune/cuda/work.cuh"
#include "prune/cuda/work_list.cuh"
#include "prune/key.h"
#include "prune/ops.h"
#include "prune/sampling.h"

namespace drive {
namespace {

using namespace gpu;

// ---- Sizes ----

// 2^14 samples put 4 % of the entries into the bracket (k = n / 2), 2^17 1.4 %, less than the list holds from
// there on.
constexpr int64_t kMaxSample = 1 << 17;
constexpr int64_t kManyEntries = 1 << 20;
// The list has room for one entry of 64 (1.6 %), and for 2^16 at least. The bracket is as narrow in costs, but cheap
// entries may crowd there: then for one of 16.
constexpr int64_t kEntriesPerPlace = 64;
constexpr int64_t kPricedEntriesPerPlace = 16;
constexpr int64_t kMinPlaces = 1 << 16;

// Counters of a segment. Tensors of 2^18 entries (of 64-bit keys 2^19) or more have one in the selection of guards:
// 0.19 byte an entry, no more than the bits and the list whose memory they take over.
template <class Key>
constexpr int64_t kHistograms = kDigits<Key> * kBuckets;
template <class Key>
constexpr int64_t kSegment = (int64_t{1} << 18) * kDigits<Key> / kDigits<int32_t>;

// ---- Launchers ----

// Where everything lies in the scratch memory; what must start at zero comes first.
struct Layout {
  int64_t zeros, bytes;
};

template <class Key>
Layout lay_out(Step<Key>& step, const WorkList& list, int64_t survey_blocks, char* memory) {
  Arena arena{memory};
  const auto items = static_cast<int64_t>(list.items.size());
  const bool guards = step.min_keep > 0;
  arena.take(step.totals, 1);
  arena.take(step.guarded, 1);
  arena.take(step.next, 1);
  arena.take(step.alive, items);
  arena.take(step.nonfinite, items);
  arena.take(step.kept, items);
  arena.take(step.bracket.histograms, 2 * kHistograms<Key>);
  arena.take(step.all.histograms, kHistograms<Key>);
  arena.take(step.all.ties, list.chunks);
  if (guards) {
    arena.take(step.rest.histograms, kHistograms<Key>);
    arena.take(step.rest.ties, list.chunks);
    arena.take(step.guards.ties, list.chunks);
  }
  Layout layout{arena.used, 0};

  arena.take(step.work.items, items);
  arena.take(step.work.dims, static_cast<int64_t>(list.dims.size()));
  arena.take(step.bracket.searches, 2 * (kDigits<Key> + 1));
  arena.take(step.all.searches, kDigits<Key> + 1);
  arena.take(step.all.cuts, 1);
  if (guards) {
    arena.take(step.rest.searches, kDigits<Key> + 1);
    arena.take(step.rest.cuts, 1);
    arena.take(step.guards.searches, step.segments * (kDigits<Key> + 1));
    arena.take(step.guards.cuts, items);
  }
  arena.take(step.sums, survey_blocks);
  arena.take(step.chunks, list.chunks);
  // One after the other: the sample, the survey's findings, the guards' histograms.
  Arena sample = arena, guarding = arena;
  sample.take(step.sample, step.samples);
  guarding.take(step.guards.histograms, step.segments * kHistograms<Key>);
  arena.take(step.bits, list.words);
  arena.take(step.list, step.places);
  arena.take(step.positions, step.places);
  layout.bytes = std::max({arena.used, sample.used, guarding.used});
  return layout;
}

// Steps 3 and 4.
template <class Key, Stage kStage>
void select(const Step<Key>& step, int64_t tensors, int64_t blocks, cudaStream_t stream) {
  constexpr bool kByCost = kStage != Stage::guards;
  const bool priced = kByCost && step.work.priced;
  for (int digit = 0; digit < kDigits<Key>; ++digit) {
    launch(priced ? count<Key, kStage, kByCost> : count<Key, kStage, false>, blocks, kThreads, stream, step, digit);
  }
  launch(ties<Key, kStage>, blocks, kThreads, stream, step);
  launch(cut<Key, kStage>, tensors, kThreads, stream, step);
  if constexpr (kByCost) {
    if (priced) launch(next_above<Key, kStage>, blocks, kThreads, stream, step);
  }
}

// Everything about a step that the host decides.
template <class Key>
Step<Key> planned(const PruneArguments& arguments, WorkList& list) {
  Step<Key> step{};
  step.work = work_of(arguments, list);
  step.budget = std::clamp<int64_t>(arguments.budget(), 0, list.cost);
  step.min_keep = arguments.min_keep;
  for (Item& item : list.items) {
    const bool own = step.min_keep > 0 && item.numel >= kSegment<Key>;
    item.segment = own ? static_cast<int32_t>(step.segments++) : -1;
  }
  if (list.entries > kMinSample) {
    step.samples = list.entries > kManyEntries ? kMaxSample : kMinSample;
    step.ranks = bracket_ranks(step.budget, list.cost, step.samples);
  }
  const int64_t each = step.work.priced ? kPricedEntriesPerPlace : kEntriesPerPlace;
  step.places = std::max(list.entries / each, std::min(list.entries, kMinPlaces));
  return step;
}

template <class Key>
Outputs run(const PruneArguments& arguments) {
  WorkList list(arguments);
  Step<Key> step = planned<Key>(arguments, list);
  const auto items = static_cast<int64_t>(list.items.size());
  const at::Tensor& like = arguments.weights[0];
  const at::Tensor kept = like.new_empty({items}, at::kLong), nonfinite = like.new_empty({items}, at::kLong);
  const at::Tensor scores = like.new_empty({2}, at::kDouble);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  int processors = 0;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, like.device().index()));
  const auto blocks = [&](int each) {
    return std::max<int64_t>(1, std::min<int64_t>(list.chunks, processors * each));
  };
  constexpr Tuning kTuned = kTuning<Key>;
  const int64_t survey_blocks = blocks(kTuned.survey), count_blocks = blocks(kTuned.count);
  step.kept_out = kept.data_ptr<int64_t>();
  step.nonfinite_out = nonfinite.data_ptr<int64_t>();
  step.scores_out = scores.data_ptr<double>();
  const Layout layout = lay_out(step, list, survey_blocks, nullptr);
  const at::Tensor memory = like.new_empty({layout.bytes}, at::kByte);
  lay_out(step, list, survey_blocks, static_cast<char*>(memory.data_ptr()));

  C10_CUDA_CHECK(cudaMemsetAsync(memory.data_ptr(), 0, layout.zeros, stream));
  copy_to_device(list.items, step.work.items, stream);
  copy_to_device(list.dims, step.work.dims, stream);
  if (step.samples > 0) {
    launch(sample<Key>, count_blocks, kThreads, stream, step);
    for (int digit = 1; digit < kDigits<Key>; ++digit) {
      launch(narrow<Key>, count_blocks, kThreads, stream, step, digit);
    }
  }
  launch(survey<Key>, survey_blocks, kThreads, stream, step);
  select<Key, Stage::all>(step, 1, count_blocks, stream);
  if (step.min_keep > 0) {
    launch(tally<Key>, count_blocks, kThreads, stream, step);
    launch(judge<Key>, 1, kThreads, stream, step);
    if (step.segments > 0) {
      launch(clear<Key>, count_blocks, kThreads, stream, step);
      select<Key, Stage::guards>(step, items, count_blocks, stream);
    }
    launch(guard<Key>, std::min<int64_t>(items, processors * kTuned.count), kThreads, stream, step);
    select<Key, Stage::rest>(step, 1, count_blocks, stream);
  }
  launch(apply_list<Key>, blocks(kTuned.list), kThreads, stream, step);
  launch(apply_keys<Key>, blocks(kTuned.keys), kThreads, stream, step);
  launch(finish<Key>, 1, kThreads, stream, step, static_cast<int>(survey_blocks));
  return {kept, nonfinite, scores};
}

Outputs run(const PruneArguments& arguments) {
  const bool wide = arguments.check();
  const c10::DeviceGuard guard(arguments.weights[0].device());
  Outputs outputs = wide ? run<int64_t>(arguments) : run<int32_t>(arguments);
  arguments.bump_versions();
  return outputs;
}

}  // namespace

Outputs prune_cuda(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                   at::TensorList masks, bool fresh, int64_t prune, int64_t min_keep) {
  return run({weights, grads, mask_grads, masks, fresh, prune, min_keep});
}

Outputs prune_to_cost_cuda(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                           at::TensorList masks, bool fresh, at::IntArrayRef costs, at::ArrayRef<double> scales,
                           int64_t max_cost, int64_t min_keep) {
  return run({weights, grads, mask_grads, masks, fresh, 0, min_keep, "drive::prune_to_cost_", false, costs, scales,
              max_cost});
}

}  // namespace drive
