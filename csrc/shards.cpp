// drive::shard_* on CPU: what one rank does for an exact step over tensors that are spread over ranks.
//
// The passes of prune.cpp over its chunks, one op each, so that the ranks can add up their counts in between
// (python/drive/distributed.py tells the algorithm, drive_kernels/shards.py what each op means). Bytes an
// entry, float32: 8 read by shard_survey, 8 read and 5 written by shard_apply_, as there.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common.h"
#include "key.h"
#include "prune_arguments.h"
#include "prune_isa.h"
#include "radix.h"
#include "sample.h"
#include "sampling.h"
#include "work.h"

namespace drive {
namespace {

constexpr int kCounts = 6;  // columns of shard_survey's counts

// Entries whose listed scores lie together: 2^16, what is worth waking a thread for.
constexpr int64_t kListed = kGrain * kChunk;

std::vector<Item> items_of(const PruneArguments& arguments) {
  std::vector<Item> items;
  for (size_t i = 0; i < arguments.weights.size(); ++i) items.emplace_back(arguments.operands(i), arguments);
  return items;
}

// Operands that are only read.
PruneArguments checked(const char* op, at::TensorList weights, at::TensorList grads,
                       at::TensorList mask_grads, at::TensorList masks, bool wide) {
  PruneArguments arguments{weights, grads, mask_grads, masks, masks.empty(), 0, 0, op, true};
  TORCH_CHECK_VALUE(!arguments.check() || wide, op, ": wide must be true for float64 scores, got false");
  return arguments;
}

std::vector<int32_t> all(const std::vector<Item>& items) {
  std::vector<int32_t> ids(items.size());
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

template <class Key>
at::Tensor empty_scores(int64_t n) {
  return at::empty({n}, sizeof(Key) == 8 ? at::kDouble : at::kFloat);
}

template <class Key>
auto bits_in(const at::Tensor& scores) {
  return static_cast<typename KeyTraits<Key>::Bits*>(scores.data_ptr());
}

template <class Key>
at::Tensor sample_of(const std::vector<Item>& items, int64_t entries, int64_t count) {
  std::vector<Key> keys;
  if (entries > 0 && count > 0) keys = sample<Key>(items, all(items), entries, count);
  at::Tensor scores = empty_scores<Key>(keys.size());
  auto* end = bits_in<Key>(scores);
  for (const Key key : keys) {
    if (key != kDead<Key>) *end++ = bits_of_key(key);
  }
  return scores.narrow(0, 0, end - bits_in<Key>(scores));
}

at::Tensor shard_sample(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                        at::TensorList masks, bool wide, int64_t count) {
  const PruneArguments arguments = checked("drive::shard_sample", weights, grads, mask_grads, masks, wide);
  const DefaultRounding rounding;
  const std::vector<Item> items = items_of(arguments);
  return wide ? sample_of<int64_t>(items, arguments.entries(), count)
              : sample_of<int32_t>(items, arguments.entries(), count);
}

template <class Key>
void count_keys(const std::vector<Item>& items, Key low, int shift, std::vector<int64_t>& counts) {
  const std::vector<Chunk> chunks = chunks_of(items, all(items));
  using Bucket = std::make_unsigned_t<Key>;
  const auto buckets = static_cast<Bucket>(counts.size());
  count_parallel(chunks.size(), counts, [&](int64_t i, auto& into) {
    Staging room;
    alignas(64) Key keys[kChunk];
    keys_of(items, chunks[i], room, keys);
    int64_t* const counted = into.data();
    for (int32_t j = 0; j < chunks[i].count; ++j) {
      // one comparison, which is easily predicted: below `low` it is negative, that is large
      const auto bucket = static_cast<Bucket>((keys[j] - low) >> shift);
      if (bucket < buckets) ++counted[bucket];
    }
  });
}

at::Tensor shard_histogram(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                           at::TensorList masks, bool wide, int64_t low, int64_t shift, int64_t buckets) {
  const PruneArguments arguments = checked("drive::shard_histogram", weights, grads, mask_grads, masks, wide);
  const DefaultRounding rounding;
  const std::vector<Item> items = items_of(arguments);
  std::vector<int64_t> counts(buckets);
  if (wide) {
    count_keys<int64_t>(items, low, static_cast<int>(shift), counts);
  } else {
    count_keys<int32_t>(items, static_cast<int32_t>(low), static_cast<int>(shift), counts);
  }
  return at::tensor(counts, at::kLong);
}

using Survey = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Counts of a chunk; its keys in the bracket go to `inside`.
template <class Key>
Counts survey_chunk(const Item& item, const Chunk& chunk, Key low, Key high, Staging& room, Key* inside) {
  const int64_t n = padded<Key>(chunk.count);
  Counts c = kernels_for<Key>(item).survey(stage(item, chunk, n, room), n, low, high, inside);
  const auto padding = static_cast<int32_t>(n - chunk.count);  // dead entries
  if (low == kDead<Key>) c.at_lo -= padding;
  if (high == kDead<Key>) c.at_hi -= padding;
  return c;
}

template <class Key>
Survey survey_of(const std::vector<Item>& items, Key low, Key high, int64_t room_inside) {
  const auto tensors = static_cast<int64_t>(items.size());
  int64_t all_blocks = 0;
  for (const Item& item : items) all_blocks += (item.numel() + kListed - 1) / kListed;
  at::Tensor counts = at::zeros({tensors, kCounts}, at::kLong), sums = at::zeros({tensors}, at::kDouble);
  at::Tensor blocks = at::empty({all_blocks, 2}, at::kLong);
  at::Tensor scores = empty_scores<Key>(room_inside);
  expect_writes(scores.data_ptr(), scores.nbytes());
  auto* listed = bits_in<Key>(scores);
  auto* where = blocks.data_ptr<int64_t>();
  int64_t total = 0;
  // tensor by tensor, so that each one's scores lie together
  for (int32_t id = 0; id < tensors; ++id) {
    const std::vector<Chunk> chunks = chunks_of(items, {id});
    const auto count = static_cast<int64_t>(chunks.size()), own_blocks = (count + kGrain - 1) / kGrain;
    std::vector<Counts> found(chunks.size());
    std::atomic<int64_t> used{total};
    parallel(own_blocks, 1, [&](int64_t begin, int64_t end) {
      Staging room;
      std::vector<Key> inside(kListed + 2 * kBlock<Key>);
      for (int64_t b = begin; b < end; ++b) {
        int64_t length = 0;
        for (int64_t i = b * kGrain; i < std::min(count, (b + 1) * kGrain); ++i) {
          found[i] = survey_chunk(items[id], chunks[i], low, high, room, &inside[length]);
          length += found[i].inside;
        }
        const int64_t at = used.fetch_add(length);
        where[2 * b] = at, where[2 * b + 1] = length;
        if (at + length <= room_inside) {
          std::transform(inside.begin(), inside.begin() + length, listed + at, bits_of_key<Key>);
        }
      }
    });
    total = used;
    where += 2 * own_blocks;
    int64_t* row = counts.data_ptr<int64_t>() + id * kCounts;
    for (const Counts& c : found) {
      const int64_t columns[kCounts] = {c.above, c.at_hi, c.inside, c.at_lo, c.alive, c.nonfinite};
      for (int column = 0; column < kCounts; ++column) row[column] += columns[column];
      sums.data_ptr<double>()[id] += c.sum;
    }
  }
  return {counts, sums, scores.narrow(0, 0, total <= room_inside ? total : 0), blocks};
}

Survey shard_survey(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                    at::TensorList masks, bool wide, int64_t low, int64_t high, int64_t room) {
  const PruneArguments arguments = checked("drive::shard_survey", weights, grads, mask_grads, masks, wide);
  const DefaultRounding rounding;
  const std::vector<Item> items = items_of(arguments);
  return wide ? survey_of<int64_t>(items, low, high, room)
              : survey_of<int32_t>(items, static_cast<int32_t>(low), static_cast<int32_t>(high), room);
}

template <class Key>
std::vector<int64_t> ties_of(std::vector<Item> items, Key threshold, const std::vector<int64_t>& ends,
                             const std::vector<int64_t>& blocks) {
  items[0].walk_logically();
  std::vector<Chunk> chunks;
  for (const int64_t block : blocks) {
    const int64_t stop = std::min(ends.back(), (block + 1) * kListed);
    for (int64_t begin = std::max(ends.front(), block * kListed); begin < stop; begin += kChunk) {
      chunks.push_back({0, static_cast<int32_t>(std::min(kChunk, stop - begin)), begin});
    }
  }
  std::vector<int64_t> found(2 * (ends.size() - 1));  // by range: how many, and the position if that is one
  count_parallel(chunks.size(), found, [&](int64_t i, auto& into) {
    Staging room;
    alignas(64) Key keys[kChunk];
    keys_of(items, chunks[i], room, keys);
    const int64_t begin = chunks[i].begin;
    size_t range = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin() - 1;
    for (int32_t j = 0; j < chunks[i].count; ++j) {
      if (keys[j] != threshold) continue;
      while (begin + j >= ends[range + 1]) ++range;
      into[2 * range] += 1;
      into[2 * range + 1] = begin + j;
    }
  });
  for (size_t range = 0; range < found.size(); range += 2) {
    if (found[range] != 1) found[range + 1] = 0;
  }
  return found;
}

std::vector<int64_t> as_vector(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  return {dense.data_ptr<int64_t>(), dense.data_ptr<int64_t>() + dense.numel()};
}

at::Tensor shard_ties(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                      at::TensorList masks, bool wide, int64_t threshold, const at::Tensor& ends,
                      const std::optional<at::Tensor>& blocks) {
  const PruneArguments arguments = checked("drive::shard_ties", weights, grads, mask_grads, masks, wide);
  TORCH_CHECK_VALUE(weights.size() == 1 && ends.dim() == 1 && ends.numel() > 1 &&
                        ends.scalar_type() == at::kLong,
                    "drive::shard_ties: ends must be two int64 positions or more in one tensor, got ",
                    ends.numel(), " in ", weights.size());
  const DefaultRounding rounding;
  const std::vector<int64_t> positions = as_vector(ends);
  TORCH_CHECK_VALUE(std::is_sorted(positions.begin(), positions.end()) && positions.front() >= 0 &&
                        positions.back() <= weights[0].numel(),
                    "drive::shard_ties: ends must rise from 0 to ", weights[0].numel(), " at most, got ",
                    positions.front(), " to ", positions.back());
  std::vector<int64_t> visited((weights[0].numel() + kListed - 1) / kListed);
  std::iota(visited.begin(), visited.end(), 0);
  if (blocks) visited = as_vector(*blocks);
  const std::vector<int64_t> found =
      wide ? ties_of<int64_t>(items_of(arguments), threshold, positions, visited)
           : ties_of<int32_t>(items_of(arguments), static_cast<int32_t>(threshold), positions, visited);
  return at::tensor(found, at::kLong).view({-1, 2});
}

template <class Key>
void apply_to(std::vector<Item> items, at::IntArrayRef thresholds, at::IntArrayRef tie_ends) {
  std::vector<Cut<Key>> cuts;
  for (const int32_t id : all(items)) {
    const Key threshold = static_cast<Key>(thresholds[id]);
    const int64_t tie_end = tie_ends[id];
    if (tie_end > 0 && tie_end < items[id].numel()) items[id].walk_logically();
    for (const Chunk& chunk : chunks_of(items, {id})) {
      const auto first = static_cast<int32_t>(std::clamp<int64_t>(tie_end - chunk.begin, 0, chunk.count));
      const Chunk ties{id, first, chunk.begin}, rest{id, chunk.count - first, chunk.begin + first};
      if (ties.count > 0) cuts.push_back({ties, threshold});
      if (rest.count > 0) cuts.push_back({rest, threshold + 1});
    }
  }
  apply_cuts(items, cuts);
}

void shard_apply(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                 at::TensorList masks, bool fresh, bool wide, at::IntArrayRef thresholds,
                 at::IntArrayRef tie_ends) {
  const char* op = "drive::shard_apply_";
  const PruneArguments arguments{weights, grads, mask_grads, masks, fresh, 0, 0, op};
  TORCH_CHECK_VALUE(!arguments.check() || wide, op, ": wide must be true for float64 scores, got false");
  TORCH_CHECK_VALUE(thresholds.size() == weights.size() && tie_ends.size() == weights.size(), op,
                    ": thresholds and tie_ends must be ", weights.size(), ", got ", thresholds.size(),
                    " and ", tie_ends.size());
  arguments.expect_fresh_masks();
  const DefaultRounding rounding;
  if (wide) {
    apply_to<int64_t>(items_of(arguments), thresholds, tie_ends);
  } else {
    apply_to<int32_t>(items_of(arguments), thresholds, tie_ends);
  }
  arguments.bump_versions();
}

// Every position has a multiplier of its own, scattered over 64 bits, so that differences do not add up to 0.
template <class Bits>
uint64_t checksum_of(const Bits* bits, int64_t n) {
  constexpr int64_t kPiece = 1 << 16;
  constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;
  std::atomic<uint64_t> sum{0};  // modulo 2^64: in any order
  at::parallel_for(0, (n + kPiece - 1) / kPiece, 1, [&](int64_t first, int64_t last) {
    uint64_t mine = 0;
    for (int64_t i = first * kPiece; i < std::min(n, last * kPiece); ++i) {
      const uint64_t x = (static_cast<uint64_t>(i) + 1) * kStep;
      mine += static_cast<uint64_t>(static_cast<int64_t>(bits[i])) * (x ^ (x >> 32));
    }
    sum += mine;
  });
  return scramble(sum);
}

at::Tensor checksum(const at::Tensor& input) {
  const at::Tensor dense = input.contiguous();
  const void* data = dense.data_ptr();
  const int64_t n = dense.numel();
  uint64_t sum = 0;
  switch (dense.element_size()) {
    case 1: sum = checksum_of(static_cast<const uint8_t*>(data), n); break;
    case 2: sum = checksum_of(static_cast<const int16_t*>(data), n); break;
    case 4: sum = checksum_of(static_cast<const int32_t*>(data), n); break;
    case 8: sum = checksum_of(static_cast<const int32_t*>(data), 2 * n); break;
    default:
      TORCH_CHECK_TYPE(false, "drive::checksum: input must have entries of 1 to 8 bytes, got ",
                       dense.dtype());
  }
  return at::scalar_tensor(static_cast<int64_t>(sum), at::kLong);
}

}  // namespace

TORCH_LIBRARY_IMPL(drive, CPU, m) {
  m.impl("shard_sample", &shard_sample);
  m.impl("shard_histogram", &shard_histogram);
  m.impl("shard_survey", &shard_survey);
  m.impl("shard_ties", &shard_ties);
  m.impl("shard_apply_", &shard_apply);
  m.impl("checksum", &checksum);
}

}  // namespace drive
