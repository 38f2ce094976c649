// drive::shard_* on CPU: what one rank does for an exact step over tensors that are spread over ranks.
//
// The passes of step.h over its chunks, one op each, so that the ranks can add up their counts in between
// (drive/distributed/step.py tells the algorithm, drive_kernels/prune/shards.py what each means). Bytes an
// entry, float32: 8 read by shard_survey, 8 read and 5 written by shard_apply_, as there.
#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/common.h"
#include "prune/arguments.h"
#include "prune/cpu/isa.h"
#include "prune/cpu/radix.h"
#include "prune/cpu/sample.h"
#include "prune/cpu/work.h"
#include "prune/key.h"
#include "prune/ops.h"
#include "prune/shard_arguments.h"

namespace drive {
namespace {

// Entries whose listed keys lie together: 2^16, what is worth waking a thread for.
constexpr int64_t kListed = kGrain * kChunk;

std::vector<Item> items_of(const PruneArguments& arguments) {
  std::vector<Item> items;
  for (size_t i = 0; i < arguments.weights.size(); ++i) items.emplace_back(arguments, i);
  return items;
}

std::vector<int32_t> all(const std::vector<Item>& items) {
  std::vector<int32_t> ids(items.size());
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

int64_t blocks_of(const Item& item) { return (item.numel + kListed - 1) / kListed; }

template <class Key>
at::Tensor sample_of(const std::vector<Item>& items, int64_t entries, int64_t count) {
  const at::Tensor scores = empty({count}, sizeof(Key) == 8 ? at::kDouble : at::kFloat);
  if (count == 0) return scores;
  const std::vector<Key> keys = sample<Key>(items, all(items), entries, count);
  auto* to = static_cast<typename KeyTraits<Key>::Bits*>(scores.data_ptr());
  std::transform(keys.begin(), keys.end(), to, bits_of_key<Key>);
  return scores;
}

// What a survey lists: of each block of kListed entries the keys strictly inside the bracket, wherever a
// thread has found room for them. One piece of memory: the blocks, then the keys.
template <class Key>
struct Listed {
  struct Block { int64_t begin, count; };
  Block* blocks;
  Key* keys;
  int64_t room;

  static int64_t bytes(int64_t blocks, int64_t room) { return blocks * sizeof(Block) + room * sizeof(Key); }
  Listed(const at::Tensor& memory, int64_t count)
      : blocks(static_cast<Block*>(memory.data_ptr())),
        keys(reinterpret_cast<Key*>(blocks + count)),
        room((memory.numel() - bytes(count, 0)) / static_cast<int64_t>(sizeof(Key))) {}
};

template <class Key>
Survey survey_of(const std::vector<Item>& items, Key low, Key high, int64_t room_inside) {
  const auto tensors = static_cast<int64_t>(items.size());
  int64_t all_blocks = 0;
  for (const Item& item : items) all_blocks += blocks_of(item);
  std::vector<int64_t> counts(kCounts * tensors);
  const at::Tensor memory = empty({Listed<Key>::bytes(all_blocks, room_inside)}, at::kByte);
  expect_writes(memory.data_ptr(), memory.nbytes());
  const Listed<Key> listed(memory, all_blocks);
  auto* block = listed.blocks;
  std::atomic<int64_t> used{0};
  double sum = 0;
  for (int32_t id = 0; id < tensors; ++id) {
    const Chunks chunks = chunks_of(items, {id});
    const auto count = static_cast<int64_t>(chunks.size());
    std::vector<Counts> found(chunks.size());
    parallel(blocks_of(items[id]), 1, [&](int64_t begin, int64_t end) {
      Staging room;
      std::vector<Key> inside(kListed + 2 * kBlock<Key>);
      Placed unused[kWordsPerChunk];
      for (int64_t b = begin; b < end; ++b) {
        int64_t length = 0;
        for (int64_t i = b * kGrain; i < std::min(count, (b + 1) * kGrain); ++i) {
          found[i] = survey_chunk<Key>(items, chunks[i], {low, high, true}, room, unused, &inside[length]);
          length += found[i].inside;
        }
        block[b] = {used.fetch_add(length), length};
        if (block[b].begin + length <= room_inside) {
          std::copy_n(inside.begin(), length, listed.keys + block[b].begin);
        }
      }
    });
    block += blocks_of(items[id]);
    int64_t* to = &counts[id];
    for (const Counts& c : found) {
      const int64_t rows[kCounts] = {c.above, c.top - c.above, c.inside, c.at_lo, c.alive, c.nonfinite};
      for (int row = 0; row < kCounts; ++row) to[row * tensors] += rows[row];
      sum += c.sum;
    }
  }
  const at::Tensor total = empty({}, at::kDouble);
  *total.data_ptr<double>() = sum;
  return {at::tensor(counts, at::kLong).view({kCounts, tensors}), total, memory};
}

// Of some tensors the keys that count, in runs: those of a chunk, or those that are listed of a block.
template <class Key>
class Runs {
 public:
  Runs(const std::vector<Item>& items, const MaybeTensor& memory, at::IntArrayRef tensors) : items_(items) {
    if (!memory) {
      runs_ = chunks_of(items, {tensors.begin(), tensors.end()});
    } else {
      std::vector<int64_t> first{0};  // block of each item
      for (const Item& item : items) first.push_back(first.back() + blocks_of(item));
      const Listed<Key> listed(*memory, first.back());
      listed_ = listed.keys;
      for (const int64_t id : tensors) {
        for (int64_t b = first[id]; b < first[id + 1]; ++b) {
          const auto [begin, count] = listed.blocks[b];
          if (begin + count > listed.room) continue;
          runs_.push_back({static_cast<int32_t>(id), static_cast<int32_t>(count), begin});
        }
      }
    }
  }

  int64_t size() const { return static_cast<int64_t>(runs_.size()); }

  // visit(item, keys, n) of run i. A listed key is one of an entry that is not pruned; others may be kDead.
  template <class Visit>
  void visit(int64_t i, const Visit& visit) const {
    const auto [item, count, begin] = runs_[i];
    if (listed_) return visit(item, listed_ + begin, count);
    Staging room;
    alignas(64) Key keys[kChunk];
    keys_of(items_, runs_[i], room, keys);
    visit(item, keys, count);
  }

 private:
  const std::vector<Item>& items_;
  Chunks runs_;  // `begin`: among what is listed, if that is what counts
  const Key* listed_ = nullptr;
};

template <class Key>
void count_keys(const Runs<Key>& runs, Key low, int shift, std::vector<int64_t>& counts) {
  using Bucket = std::make_unsigned_t<Key>;
  const auto buckets = static_cast<Bucket>(counts.size());
  count_parallel(runs.size(), kGrain, counts, [&](int64_t i, auto& into) {
    int64_t* const counted = into.data();
    runs.visit(i, [&](int32_t, const Key* keys, int32_t n) {
      for (int32_t j = 0; j < n; ++j) {
        // one comparison, which is easily predicted: below `low` it is negative, that is large
        const auto bucket = static_cast<Bucket>((keys[j] - low) >> shift);
        if (bucket < buckets) ++counted[bucket];
      }
    });
  });
}

template <class Key>
void split_keys(const Runs<Key>& runs, const std::vector<Key>& thresholds, std::vector<int64_t>& counts) {
  count_parallel(runs.size(), kGrain, counts, [&](int64_t i, auto& into) {
    runs.visit(i, [&](int32_t item, const Key* keys, int32_t n) {
      const Key threshold = thresholds[item];
      int32_t above = 0, equal = 0;
      for (int32_t j = 0; j < n; ++j) {
        above += keys[j] > threshold;
        equal += keys[j] == threshold;
      }
      into[2 * item] += above;
      into[2 * item + 1] += equal;
    });
  });
}

// Blocks of positions in which a tensor may have a key: all, or those beside which it is listed.
template <class Key>
std::vector<int64_t> blocks_with(const std::vector<Item>& items, int64_t t, const MaybeTensor& memory,
                                 Key key) {
  std::vector<int64_t> blocks(blocks_of(items[t]));
  std::iota(blocks.begin(), blocks.end(), 0);
  if (!memory || !items[t].logical) return blocks;  // else it is not surveyed row by row
  int64_t first = 0, count = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    if (static_cast<int64_t>(i) == t) first = count;
    count += blocks_of(items[i]);
  }
  const Listed<Key> listed(*memory, count);
  const auto lacks = [&](int64_t b) {
    const auto [begin, length] = listed.blocks[first + b];
    const Key* keys = listed.keys + begin;
    if (begin + length > listed.room) return false;
    int32_t found = 0;  // without a branch: 0.1 ns a key
    for (int64_t j = 0; j < length; ++j) found += keys[j] == key;
    return found == 0;
  };
  blocks.erase(std::remove_if(blocks.begin(), blocks.end(), lacks), blocks.end());
  return blocks;
}

template <class Key>
void count_ties(Item item, Key threshold, const std::vector<int64_t>& ends,
                const std::vector<int64_t>& blocks, std::vector<int64_t>& counts) {
  const std::vector<Item> items{std::move(item)};
  std::vector<Chunk> chunks;
  for (const int64_t block : blocks) {
    const int64_t stop = std::min(ends.back(), (block + 1) * kListed);
    for (int64_t begin = std::max(ends.front(), block * kListed); begin < stop; begin += kChunk) {
      chunks.push_back({0, static_cast<int32_t>(std::min(kChunk, stop - begin)), begin});
    }
  }
  count_parallel(chunks.size(), kGrain, counts, [&](int64_t i, auto& into) {
    Staging room;
    alignas(64) Key keys[kChunk];
    keys_of(items, chunks[i], room, keys);
    const int64_t begin = chunks[i].begin;
    size_t range = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin() - 1;
    for (int32_t j = 0; j < chunks[i].count; ++j) {
      if (keys[j] != threshold) continue;
      while (begin + j >= ends[range + 1]) ++range;
      ++into[range];
    }
  });
}

template <class Key>
void apply_to(std::vector<Item> items, at::IntArrayRef thresholds, at::IntArrayRef tie_ends) {
  std::vector<Cut<Key>> cuts;
  for (const int32_t id : all(items)) {
    const Key threshold = static_cast<Key>(thresholds[id]);
    const int64_t tie_end = tie_ends[id];
    if (tie_end > 0 && tie_end < items[id].numel) items[id].walk_logically();
    for (const Chunk& chunk : chunks_of(items, {id})) {
      const auto first = static_cast<int32_t>(std::clamp<int64_t>(tie_end - chunk.begin, 0, chunk.count));
      const Chunk ties{id, first, chunk.begin}, rest{id, chunk.count - first, chunk.begin + first};
      if (ties.count > 0) cuts.push_back({ties, threshold});
      if (rest.count > 0) cuts.push_back({rest, threshold + 1});
    }
  }
  parallel(cuts.size(), kGrain, [&](int64_t begin, int64_t end) {
    Staging room;
    for (int64_t i = begin; i < end; ++i) write(items, cuts[i], room);
  });
}

}  // namespace

// ---- The ops ----

at::Tensor shard_sample_cpu(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                            at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales, int64_t count) {
  const ShardArguments arguments{"drive::shard_sample", weights, grads, mask_grads, masks, fresh, wide, scales};
  arguments.check_sample(count);
  const DefaultRounding rounding;
  const std::vector<Item> items = items_of(arguments);
  return wide ? sample_of<int64_t>(items, arguments.entries(), count)
              : sample_of<int32_t>(items, arguments.entries(), count);
}

Survey shard_survey_cpu(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                        at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales, int64_t low,
                        int64_t high, int64_t room) {
  const ShardArguments arguments{"drive::shard_survey", weights, grads, mask_grads, masks, fresh, wide, scales};
  arguments.check_bracket(low, high, room);
  const DefaultRounding rounding;
  const std::vector<Item> items = items_of(arguments);
  return wide ? survey_of<int64_t>(items, low, high, room)
              : survey_of<int32_t>(items, static_cast<int32_t>(low), static_cast<int32_t>(high), room);
}

at::Tensor shard_histogram_cpu(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                               at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                               const MaybeTensor& listed, at::IntArrayRef tensors, int64_t low, int64_t shift,
                               int64_t buckets) {
  const ShardArguments arguments{"drive::shard_histogram", weights, grads, mask_grads, masks, fresh, wide, scales};
  arguments.check_tensors(tensors);
  arguments.check_buckets(low, shift, buckets);
  const DefaultRounding rounding;
  const std::vector<Item> items = items_of(arguments);
  std::vector<int64_t> counts(buckets);
  if (wide) {
    count_keys<int64_t>({items, listed, tensors}, low, static_cast<int>(shift), counts);
  } else {
    count_keys<int32_t>({items, listed, tensors}, static_cast<int32_t>(low), static_cast<int>(shift), counts);
  }
  return at::tensor(counts, at::kLong);
}

at::Tensor shard_split_cpu(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                           at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                           const MaybeTensor& listed, at::IntArrayRef tensors, at::IntArrayRef thresholds) {
  const ShardArguments arguments{"drive::shard_split", weights, grads, mask_grads, masks, fresh, wide, scales};
  arguments.check_tensors(tensors);
  arguments.check_thresholds(thresholds, tensors.size());
  const DefaultRounding rounding;
  const std::vector<Item> items = items_of(arguments);
  std::vector<int64_t> counts(2 * items.size());
  const auto split = [&](auto key) {
    std::vector<decltype(key)> by_item(items.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      by_item[tensors[i]] = static_cast<decltype(key)>(thresholds[i]);
    }
    split_keys<decltype(key)>({items, listed, tensors}, by_item, counts);
  };
  wide ? split(int64_t{}) : split(int32_t{});
  std::vector<int64_t> rows;
  for (const int64_t t : tensors) rows.insert(rows.end(), {counts[2 * t], counts[2 * t + 1]});
  return at::tensor(rows, at::kLong).view({-1, 2});
}

at::Tensor shard_ties_cpu(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                          at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales,
                          const MaybeTensor& listed, at::IntArrayRef tensors, int64_t threshold,
                          const at::Tensor& ends) {
  const ShardArguments arguments{"drive::shard_ties", weights, grads, mask_grads, masks, fresh, wide, scales};
  arguments.check_tensors(tensors);
  arguments.check_thresholds(threshold, 1);
  arguments.check_ends(tensors, ends);
  const DefaultRounding rounding;
  const at::Tensor dense = ends.contiguous();
  const std::vector<int64_t> positions(dense.data_ptr<int64_t>(), dense.data_ptr<int64_t>() + dense.numel());
  const int64_t t = tensors[0], numel = weights[t].numel();
  TORCH_CHECK_VALUE(std::is_sorted(positions.begin(), positions.end()) && positions.front() >= 0 &&
                        positions.back() <= numel,
                    "drive::shard_ties: ends must rise from 0 to ", numel, " at most, got ",
                    positions.front(), " to ", positions.back());
  std::vector<Item> items = items_of(arguments);
  std::vector<int64_t> counts(positions.size() - 1);
  const auto count = [&](auto key) {
    const std::vector<int64_t> blocks = blocks_with(items, t, listed, key);
    items[t].walk_logically();
    count_ties(items[t], key, positions, blocks, counts);
  };
  wide ? count(threshold) : count(static_cast<int32_t>(threshold));
  return at::tensor(counts, at::kLong);
}

// What is listed is of no use here: to read two operands again costs less than to look every entry up.
void shard_apply_cpu(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                     at::TensorList masks, bool fresh, bool wide, at::ArrayRef<double> scales, const MaybeTensor&,
                     at::IntArrayRef thresholds, at::IntArrayRef tie_ends) {
  const ShardArguments arguments{weights, grads, mask_grads, masks, fresh, wide, scales, thresholds, tie_ends};
  arguments.expect_fresh_masks();
  const DefaultRounding rounding;
  if (wide) {
    apply_to<int64_t>(items_of(arguments), thresholds, tie_ends);
  } else {
    apply_to<int32_t>(items_of(arguments), thresholds, tie_ends);
  }
  arguments.bump_versions();
}

}  // namespace drive
