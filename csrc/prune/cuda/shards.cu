// drive::shard_* on GPUs: the passes of prune.cu, one op each, so that the ranks can add up their counts in
// between (drive/distributed/step.py tells the algorithm, drive_kernels/prune/shards.py what each means). No op
// waits for the device.
//
// What a survey lists stays in one piece of device memory: chunks' counts, the list, bits and positions, as
// prune.cu has them. Histograms, splits and ties go through the list, a warp for each chunk's part of it; if
// the threshold lies inside the bracket, masks and weights are written by bits and list.
//
// Bytes an entry, float32: shard_survey reads 8 and writes 1/8; shard_apply_ reads 4 1/8 and writes 5: 17.3, as
// drive::prune_. It reads 8 where the threshold is not listed (at an edge of the bracket, or outside, with
// guards, or for copies that another rank counts). What goes through the list: 4 a listed key, 6 with positions.
// Memory: bits 1/8; counts, 24 bytes for every 16 KB of weights; the list 6 a place (64-bit keys: 10), of which
// there is one for every 16 entries: half a byte an entry.
//
// passes.cuh: survey and apply. shard_counts.cuh: what is counted besides. checksum.cuh. Here: launches.
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "prune/cuda/checksum.cuh"
#include "prune/cuda/launch.cuh"
#include "prune/cuda/passes.cuh"
#include "prune/cuda/shard_counts.cuh"
#include "prune/cuda/step.cuh"
#include "prune/cuda/work.cuh"
#include "prune/cuda/work_list.cuh"
#include "prune/key.h"
#include "prune/ops.h"
#include "prune/shard_arguments.h"

namespace drive {
namespace {

using namespace gpu;

// Blocks a multiprocessor of kernels that wait more than they compute: as many as fit.
constexpr int kManyBlocks = 8;

// The device's part of an op: which device and stream, and its work list.
struct OnDevice {
  c10::DeviceGuard guard;
  at::Tensor like;
  cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  int processors = 0;

  explicit OnDevice(const at::Tensor& tensor) : guard(tensor.device()), like(tensor) {
    C10_CUDA_CHECK(
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, tensor.device().index()));
  }

  int64_t blocks(int64_t work, int each) const {
    return std::max<int64_t>(1, std::min<int64_t>(work, static_cast<int64_t>(processors) * each));
  }

  at::Tensor empty(int64_t n, at::ScalarType dtype) const { return like.new_empty({n}, dtype); }

  // Memory for all that `lay_out` takes from an arena.
  template <class LayOut>
  at::Tensor memory(LayOut lay_out) const {
    Arena measured{nullptr};
    lay_out(measured);
    const at::Tensor memory = empty(measured.used, at::kByte);
    Arena arena{static_cast<char*>(memory.data_ptr())};
    lay_out(arena);
    return memory;
  }
};

template <class T>
T* data_of(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

void take(Arena& arena, Work& work, const WorkList& list) {
  arena.take(work.items, static_cast<int64_t>(list.items.size()));
  arena.take(work.dims, static_cast<int64_t>(list.dims.size()));
}

void send(const Work& work, const WorkList& list, cudaStream_t stream) {
  copy_to_device(list.items, work.items, stream);
  copy_to_device(list.dims, work.dims, stream);
}

// ---- What a survey lists ----

template <class Key>
int64_t listed_bytes(const WorkList& list, int64_t places) {
  return list.chunks * static_cast<int64_t>(sizeof(ChunkCounts)) +
      list.words * static_cast<int64_t>(sizeof(uint32_t)) +
      places * static_cast<int64_t>(sizeof(Key) + sizeof(uint16_t));
}

// Its parts, in an order that leaves each aligned.
template <class Key>
void open_listed(const char* op, const at::Tensor& listed, const WorkList& list, Step<Key>& step) {
  const int64_t spare = listed.numel() - listed_bytes<Key>(list, 0);
  TORCH_CHECK_VALUE(spare >= 0, op, ": listed must be of a survey of these tensors, got ", listed.numel(),
                    " bytes for ", list.chunks, " chunks");
  step.places = spare / static_cast<int64_t>(sizeof(Key) + sizeof(uint16_t));
  step.chunks = data_of<ChunkCounts>(listed);
  step.list = reinterpret_cast<Key*>(step.chunks + list.chunks);
  step.bits = reinterpret_cast<uint32_t*>(step.list + step.places);
  step.positions = reinterpret_cast<uint16_t*>(step.bits + list.words);
}

// ---- Launchers ----

template <class Key>
at::Tensor sample_of(const ShardArguments& arguments, int64_t count) {
  const OnDevice device(arguments.weights[0]);
  const WorkList list(arguments);
  Work work = work_of(arguments, list);
  const at::Tensor scores = device.empty(count, sizeof(Key) == 8 ? at::kDouble : at::kFloat);
  if (count == 0) return scores;
  const at::Tensor memory = device.memory([&](Arena& arena) { take(arena, work, list); });
  send(work, list, device.stream);
  const int64_t blocks = device.blocks((count + kThreads - 1) / kThreads, kManyBlocks);
  launch(sample_scores<Key>, blocks, kThreads, device.stream, work, count,
         data_of<typename KeyTraits<Key>::Bits>(scores));
  return scores;
}

template <class Key>
Survey survey_of(const ShardArguments& arguments, Key low, Key high, int64_t room) {
  const OnDevice device(arguments.weights[0]);
  const WorkList list(arguments);
  const auto items = static_cast<int64_t>(list.items.size());
  const int64_t blocks = device.blocks(list.chunks, kTuning<Key>.survey);
  const at::Tensor counts = device.like.new_zeros({kCounts, items}, at::kLong);
  const at::Tensor sum = device.like.new_empty({}, at::kDouble);
  const at::Tensor listed = device.empty(listed_bytes<Key>(list, room), at::kByte);

  Step<Key> step{};
  step.work = work_of(arguments, list);
  step.told.low = low;
  step.told.high = high;
  open_listed(arguments.op, listed, list, step);
  auto* const rows = data_of<Counter>(counts);
  step.alive = rows + 4 * items;
  step.nonfinite = rows + 5 * items;
  const at::Tensor memory = device.memory([&](Arena& arena) {
    arena.take(step.totals, 1);
    take(arena, step.work, list);
    arena.take(step.bracket.searches, 2 * (kDigits<Key> + 1));
    arena.take(step.sums, blocks);
  });
  C10_CUDA_CHECK(cudaMemsetAsync(step.totals, 0, sizeof(Totals), device.stream));
  send(step.work, list, device.stream);
  launch(survey<Key>, blocks, kThreads, device.stream, step);
  launch(collect<Key>, device.blocks(list.chunks / kThreads, kManyBlocks), kThreads, device.stream, step,
         static_cast<int>(blocks), rows, data_of<double>(sum));
  return {counts, sum, listed};
}

// A query about some tensors, in device memory: count(query, stream, blocks) launches what counts, in `each`
// blocks a multiprocessor.
template <class Key, class Count>
void ask(const ShardArguments& arguments, const MaybeTensor& listed, at::IntArrayRef tensors,
         at::IntArrayRef thresholds, int each, Count count) {
  const OnDevice device(arguments.weights[0]);
  const WorkList list(arguments);
  Query<Key> query{};
  query.work = work_of(arguments, list);
  if (listed) {
    Step<Key> step{};
    open_listed(arguments.op, *listed, list, step);
    query.chunks = step.chunks, query.list = step.list, query.positions = step.positions;
    query.places = step.places;
  }
  std::vector<Asked<Key>> asked(list.items.size(), {-1, 0});
  for (size_t i = 0; i < tensors.size(); ++i) {
    asked[tensors[i]] = {static_cast<int32_t>(i), static_cast<Key>(thresholds.empty() ? 0 : thresholds[i])};
  }
  const at::Tensor memory = device.memory([&](Arena& arena) {
    take(arena, query.work, list);
    arena.take(query.asked, static_cast<int64_t>(asked.size()));
  });
  send(query.work, list, device.stream);
  copy_to_device(asked, query.asked, device.stream);
  count(query, device.stream, device.blocks(list.chunks, each));
}

// In order, the first entries of all tensors with the key on one threshold? Then one cut tells them all.
template <class Key>
std::optional<Cut<Key>> common_cut(const WorkList& list, at::IntArrayRef thresholds,
                                   at::IntArrayRef tie_ends) {
  Cut<Key> cut{static_cast<Key>(thresholds[0]), -1};
  bool ended = false;
  for (size_t i = 0; i < list.items.size(); ++i) {
    const Item& item = list.items[i];
    if (thresholds[i] != thresholds[0] || (ended && tie_ends[i] > 0)) return std::nullopt;
    if (tie_ends[i] > 0) cut.last = item.first_entry + tie_ends[i] - 1;
    ended = ended || tie_ends[i] < item.numel;
  }
  return cut;
}

template <class Key>
void apply_to(const ShardArguments& arguments, const MaybeTensor& listed, at::IntArrayRef thresholds,
              at::IntArrayRef tie_ends) {
  const OnDevice device(arguments.weights[0]);
  const WorkList list(arguments);
  const auto items = static_cast<int64_t>(list.items.size());
  Step<Key> step{};
  step.work = work_of(arguments, list);
  const std::optional<Cut<Key>> common = common_cut<Key>(list, thresholds, tie_ends);
  const bool by_list = listed && common;
  step.told.where = by_list ? Where::list : Where::entries;
  if (listed) open_listed(arguments.op, *listed, list, step);
  // Cuts by tensor are its guard; then nothing else survives.
  std::vector<Cut<Key>> cuts, rest{common.value_or(Cut<Key>{})};
  if (!by_list) {
    rest = {{kTop<Key>, -1}};
    for (int64_t i = 0; i < items; ++i) {
      cuts.push_back({static_cast<Key>(thresholds[i]), list.items[i].first_entry + tie_ends[i] - 1});
    }
  }
  const at::Tensor memory = device.memory([&](Arena& arena) {
    arena.take(step.guarded, 1);
    arena.take(step.kept, items);
    take(arena, step.work, list);
    arena.take(step.guards.cuts, static_cast<int64_t>(cuts.size()));
    arena.take(by_list ? step.all.cuts : step.rest.cuts, 1);
  });
  C10_CUDA_CHECK(cudaMemsetAsync(step.guarded, by_list ? 0 : 1, sizeof(bool), device.stream));
  C10_CUDA_CHECK(cudaMemsetAsync(step.kept, 0, items * sizeof(Counter), device.stream));
  send(step.work, list, device.stream);
  copy_to_device(cuts, step.guards.cuts, device.stream);
  copy_to_device(rest, by_list ? step.all.cuts : step.rest.cuts, device.stream);
  if (by_list) {
    launch(apply_list<Key>, device.blocks(list.chunks, kTuning<Key>.list), kThreads, device.stream, step);
  } else {
    launch(apply_keys<Key>, device.blocks(list.chunks, kTuning<Key>.keys), kThreads, device.stream, step);
  }
}

template <class Bits>
void add_bits(const OnDevice& device, const at::Tensor& dense, int64_t n, Counter* sum) {
  const int64_t threads = n / Loaded<Bits>::kEntries;
  launch(sum_bits<Bits>, device.blocks(threads / kThreads, kManyBlocks), kThreads, device.stream,
         data_of<char>(dense), n, sum);
}

}  // namespace

// ---- The ops ----

at::Tensor shard_sample_cuda(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                             at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                             int64_t count) {
  const ShardArguments arguments{"drive::shard_sample", weights, grads, mask_grads, masks, fresh, wide, scales};
  arguments.check_sample(count);
  return wide ? sample_of<int64_t>(arguments, count) : sample_of<int32_t>(arguments, count);
}

Survey shard_survey_cuda(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                         at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales, int64_t low,
                         int64_t high, int64_t room) {
  const ShardArguments arguments{"drive::shard_survey", weights, grads, mask_grads, masks, fresh, wide, scales};
  arguments.check_bracket(low, high, room);
  return wide ? survey_of<int64_t>(arguments, low, high, room)
              : survey_of<int32_t>(arguments, static_cast<int32_t>(low), static_cast<int32_t>(high), room);
}

at::Tensor shard_histogram_cuda(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                                at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                                const MaybeTensor& listed, at::IntArrayRef tensors, int64_t low, int64_t shift,
                                int64_t buckets) {
  const ShardArguments arguments{"drive::shard_histogram", weights, grads, mask_grads, masks, fresh, wide, scales};
  arguments.check_tensors(tensors);
  arguments.check_buckets(low, shift, buckets);
  const at::Tensor counts = weights[0].new_zeros({buckets}, at::kLong);
  const auto count = [&](auto key) {
    using Key = decltype(key);
    ask<Key>(arguments, listed, tensors, {}, kTuning<Key>.count,
             [&](const Query<Key>& query, cudaStream_t stream, int64_t blocks) {
               launch(bucket_counts<Key>, blocks, kThreads, stream, query, low, static_cast<int>(shift),
                      static_cast<int>(buckets), data_of<Counter>(counts));
             });
  };
  wide ? count(int64_t{}) : count(int32_t{});
  return counts;
}

at::Tensor shard_split_cuda(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                            at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                            const MaybeTensor& listed, at::IntArrayRef tensors, at::IntArrayRef thresholds) {
  const ShardArguments arguments{"drive::shard_split", weights, grads, mask_grads, masks, fresh, wide, scales};
  arguments.check_tensors(tensors);
  arguments.check_thresholds(thresholds, tensors.size());
  const at::Tensor counts = weights[0].new_zeros({static_cast<int64_t>(tensors.size()), 2}, at::kLong);
  const auto count = [&](auto key) {
    using Key = decltype(key);
    ask<Key>(arguments, listed, tensors, thresholds, kManyBlocks,
             [&](const Query<Key>& query, cudaStream_t stream, int64_t blocks) {
               launch(split_counts<Key>, blocks, kThreads, stream, query, data_of<Counter>(counts));
             });
  };
  wide ? count(int64_t{}) : count(int32_t{});
  return counts;
}

at::Tensor shard_ties_cuda(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                           at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                           const MaybeTensor& listed, at::IntArrayRef tensors, int64_t threshold,
                           const at::Tensor& ends) {
  const ShardArguments arguments{"drive::shard_ties", weights, grads, mask_grads, masks, fresh, wide, scales};
  arguments.check_tensors(tensors);
  arguments.check_thresholds(threshold, 1);
  arguments.check_ends(tensors, ends);
  const at::Tensor positions = ends.contiguous(), counts = ends.new_zeros({ends.numel() - 1});
  const auto count = [&](auto key) {
    using Key = decltype(key);
    ask<Key>(arguments, listed, tensors, threshold, kManyBlocks,
             [&](const Query<Key>& query, cudaStream_t stream, int64_t blocks) {
               launch(tie_counts<Key>, blocks, kThreads, stream, query, data_of<int64_t>(positions),
                      static_cast<int>(counts.numel()), data_of<Counter>(counts));
             });
  };
  wide ? count(int64_t{}) : count(int32_t{});
  return counts;
}

void shard_apply_cuda(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                      at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                      const MaybeTensor& listed, at::IntArrayRef thresholds, at::IntArrayRef tie_ends) {
  const ShardArguments arguments{weights, grads, mask_grads, masks, fresh, wide, scales, thresholds, tie_ends};
  if (wide) {
    apply_to<int64_t>(arguments, listed, thresholds, tie_ends);
  } else {
    apply_to<int32_t>(arguments, listed, thresholds, tie_ends);
  }
  arguments.bump_versions();
}

at::Tensor checksum_cuda(at::TensorList inputs) {
  const OnDevice device(inputs[0]);
  const at::Tensor sums = inputs[0].new_zeros({static_cast<int64_t>(inputs.size())}, at::kLong);
  auto* sum = data_of<Counter>(sums);
  for (const at::Tensor& input : inputs) {
    check_checksum(input);
    const at::Tensor dense = input.contiguous();
    const int64_t n = dense.numel();
    switch (dense.element_size()) {
      case 1: add_bits<uint8_t>(device, dense, n, sum++); break;
      case 2: add_bits<int16_t>(device, dense, n, sum++); break;
      case 4: add_bits<int32_t>(device, dense, n, sum++); break;
      default: add_bits<int32_t>(device, dense, 2 * n, sum++);
    }
  }
  launch(scramble_sums<Counter>, 1, kThreads, device.stream, data_of<Counter>(sums),
         static_cast<int>(sums.numel()));
  return sums;
}

}  // namespace drive
