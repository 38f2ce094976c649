// drive::prune_ on CPU: the k best scores survive, exactly, in two passes over the entries.
//
//   1. Sample: some 2^14 keys bracket the threshold, lo <= T <= hi, with a chance of failure below 1e-6.
//   2. Survey (reads theta, G and an old mask; writes nothing): per chunk, how many keys lie above, at
//      and inside the bracket; those inside, 1 to 4 % of all, are collected. Also the sum of |S|, and
//      the count of non-finite scores, which ends the step here.
//   3. Threshold T, the k-th largest key: by radix selection among the collected keys. The counts prove
//      that the bracket held; if it did not, by radix selection over all entries, three passes more.
//   4. Ties: of the entries on the threshold the first ones in global order survive. A running sum over
//      the chunks' ties finds the one chunk where they end, which is cut in two; after that, in every
//      chunk an entry survives if its key is at least the chunk's cut.
//   5. Apply (reads theta, G, old mask; writes theta, mask). All memory was taken before, nothing can fail.
//
// Bytes an entry, float32: 8 + 8 read, 4 + 1 written, 2 more for an old mask. Scratch: a quarter of a
// byte an entry for the collected keys, and 0.02 for the counts.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "common/common.h"
#include "prune/arguments.h"
#include "prune/cpu/isa.h"
#include "prune/cpu/radix.h"
#include "prune/cpu/sample.h"
#include "prune/cpu/work.h"
#include "prune/key.h"
#include "prune/ops.h"

namespace drive {
namespace {

// Scratch for the keys in the bracket: 6 % of the entries (a bracket of 2^14 samples holds 4 % at most), 0.25
// byte an entry for 32-bit keys, 0.5 for 64-bit ones.
constexpr int64_t kEntriesPerScratchKey = 16;

// Entries of a chunk above and on a threshold.
struct Split {
  int32_t above, equal;
};

template <class Key>
struct Selection {
  Key threshold;
  int64_t ties;  // of the entries on the threshold, this many survive
  std::vector<Chunk> chunks;
  std::vector<Split> splits;
};

template <class Key>
class PruneStep {
 public:
  using Ids = std::vector<int32_t>;

  explicit PruneStep(std::vector<Item> items)
      : items_(std::move(items)), kept_(items_.size()), alive_(items_.size()), nonfinite_(items_.size()) {
    int64_t n = 0;
    for (const Item& item : items_) n += item.numel();
    const int64_t bytes = std::max<int64_t>(n / kEntriesPerScratchKey, kMinSample) * sizeof(Key);
    scratch_ = empty({bytes}, at::kByte);
    inside_ = static_cast<Key*>(scratch_.data_ptr());
    capacity_ = bytes / sizeof(Key);
    expect_writes(inside_, bytes);
  }

  // Steps 1 to 4: decides everything, writes nothing. False: a score is not finite.
  bool plan(int64_t keep, int64_t min_keep) {
    Ids free(items_.size());
    std::iota(free.begin(), free.end(), 0);
    for (bool first = true;; first = false) {
      Selection<Key> selection = select(free, keep);
      if (first && !take_totals(selection.chunks)) return false;
      const std::vector<int64_t> kept = kept_by(selection);
      // A tensor below its guard keeps exactly its min_keep best: what it gains, the others lose, so
      // the threshold for them only rises, and no such tensor can rise above its guard again.
      Ids guarded, others;
      for (const int32_t id : free) {
        (kept[id] < std::min(min_keep, alive_[id]) ? guarded : others).push_back(id);
      }
      if (guarded.empty()) {
        settle(selection);
        return true;
      }
      for (const int32_t id : guarded) {
        const int64_t guard = std::min(min_keep, alive_[id]);
        Selection<Key> own = select({id}, guard);
        settle(own);
        keep -= guard;
      }
      free = std::move(others);
    }
  }

  // (Step 5)
  void apply() const { apply_cuts(items_, cuts_); }

  const std::vector<int64_t>& kept() const { return kept_; }
  const std::vector<int64_t>& alive() const { return alive_; }
  const std::vector<int64_t>& nonfinite() const { return nonfinite_; }

  // [normalised score of the weakest survivor (inf if none survives), sum of |S|] (Eq. 7)
  std::pair<double, double> scores(bool squared) const {
    if (weakest_ == kTop<Key>) return {INFINITY, sum_};
    typename KeyTraits<Key>::Score score;
    const auto bits = bits_of_key(weakest_);
    std::memcpy(&score, &bits, sizeof(score));
    const double value = squared ? static_cast<double>(score) * score : score;
    return {sum_ == 0 ? value : value / sum_, sum_};
  }

 private:
  // (Step 2) Fills counts_. False: the keys inside did not fit.
  bool survey(const std::vector<Chunk>& chunks, Key lo, Key hi) {
    counts_.resize(chunks.size());
    std::atomic<int64_t> used{0};
    parallel(chunks.size(), kGrain, [&](int64_t begin, int64_t end) {
      Staging room;
      Key inside[kChunk + kBlock<Key>];
      for (int64_t i = begin; i < end; ++i) {
        const Item& item = items_[chunks[i].item];
        const int64_t n = padded<Key>(chunks[i].count);
        Counts& c = counts_[i];
        c = kernels<Key>(item.dtype()).survey(stage(item, chunks[i], n, room), n, lo, hi, inside);
        c.inside_begin = used.fetch_add(c.inside);
        if (c.inside_begin + c.inside <= capacity_) std::copy_n(inside, c.inside, inside_ + c.inside_begin);
      }
    });
    return used <= capacity_;
  }

  // (Steps 1 to 3) The k-th largest key among these items, and every chunk's place relative to it.
  Selection<Key> select(const Ids& ids, int64_t k) {
    Selection<Key> s{kTop<Key>, 0, chunks_of(items_, ids), {}};
    int64_t n = 0;
    for (const int32_t id : ids) n += items_[id].numel();
    const auto [lo, hi] = bracket<Key>(items_, ids, n, k);
    const bool complete = survey(s.chunks, lo, hi);
    int64_t above = 0, at_hi = 0, inside = 0, at_lo = 0, alive = 0;
    for (const Counts& c : counts_) {
      above += c.above, at_hi += c.at_hi, inside += c.inside, at_lo += c.at_lo, alive += c.alive;
    }
    k = std::min(k, alive);
    s.splits.resize(s.chunks.size());
    if (k == 0) return s;

    const bool held = complete && above < k && k <= above + at_hi + inside + at_lo;
    if (!held) {
      s.threshold = kth_largest<Key>(k, kDead<Key>, kTop<Key>, [&](Key prefix, int digit, auto& counts) {
        count_parallel(s.chunks.size(), counts, [&](int64_t i, auto& into) {
          Staging room;
          alignas(64) Key keys[kChunk];
          keys_of(items_, s.chunks[i], room, keys);
          add_keys(keys, s.chunks[i].count, prefix, digit, into);
        });
      });
    } else if (k <= above + at_hi) {
      s.threshold = hi;
    } else if (k > above + at_hi + inside) {
      s.threshold = lo;
    } else {
      s.threshold = kth_largest<Key>(k - above - at_hi, lo + 1, hi - 1, [&](Key prefix, int digit, auto& counts) {
        count_parallel((inside + kChunk - 1) / kChunk, counts, [&](int64_t i, auto& into) {
          add_keys(inside_ + i * kChunk, std::min(kChunk, inside - i * kChunk), prefix, digit, into);
        });
      });
    }
    parallel(s.chunks.size(), kGrain, [&, lo = lo, hi = hi](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        s.splits[i] = held ? known_split(counts_[i], lo, hi, s.threshold) : split(s.chunks[i], s.threshold);
      }
    });
    s.ties = k;
    for (const Split& split : s.splits) s.ties -= split.above;
    return s;
  }

  static Split split_of(const Key* keys, int64_t n, Key threshold) {
    Split split{0, 0};
    for (int64_t i = 0; i < n; ++i) {
      split.above += keys[i] > threshold;
      split.equal += keys[i] == threshold;
    }
    return split;
  }

  Split split(const Chunk& chunk, Key threshold) const {
    Staging room;
    alignas(64) Key keys[kChunk];
    keys_of(items_, chunk, room, keys);
    return split_of(keys, chunk.count, threshold);
  }

  Split known_split(const Counts& c, Key lo, Key hi, Key threshold) const {
    if (threshold == hi) return {c.above, c.at_hi};
    if (threshold == lo) return {c.above + c.at_hi + c.inside, c.at_lo};
    Split split = split_of(inside_ + c.inside_begin, c.inside, threshold);
    split.above += c.above + c.at_hi;
    return split;
  }

  // Sums of the first survey, of all items. False: a score is not finite.
  bool take_totals(const std::vector<Chunk>& chunks) {
    int64_t bad = 0;
    for (size_t i = 0; i < chunks.size(); ++i) {
      alive_[chunks[i].item] += counts_[i].alive;
      nonfinite_[chunks[i].item] += counts_[i].nonfinite;
      bad += counts_[i].nonfinite;
      sum_ += counts_[i].sum;
    }
    return bad == 0;
  }

  std::vector<int64_t> kept_by(const Selection<Key>& s) const {
    std::vector<int64_t> kept(items_.size());
    int64_t ties = s.ties;
    for (size_t i = 0; i < s.chunks.size(); ++i) {
      const int64_t survive = std::min<int64_t>(ties, s.splits[i].equal);
      kept[s.chunks[i].item] += s.splits[i].above + survive;
      ties -= survive;
    }
    return kept;
  }

  // (Step 4) Turns the selection into one cut a chunk.
  void settle(Selection<Key>& s) {
    const std::vector<int64_t> kept = kept_by(s);
    int64_t ties = s.ties;
    for (size_t i = 0; i < s.chunks.size(); ++i) {
      const Chunk& chunk = s.chunks[i];
      if (chunk.begin == 0) {
        count_ties_in_order(s, i, ties);
        kept_[chunk.item] = kept[chunk.item];
      }
      const int64_t survive = std::min<int64_t>(ties, s.splits[i].equal);
      if (survive == s.splits[i].equal) {
        cuts_.push_back({chunk, s.threshold});
      } else if (survive == 0) {
        cuts_.push_back({chunk, s.threshold + 1});
      } else {
        const int32_t first = entries_up_to_tie(chunk, s.threshold, survive);
        cuts_.push_back({{chunk.item, first, chunk.begin}, s.threshold});
        cuts_.push_back({{chunk.item, chunk.count - first, chunk.begin + first}, s.threshold + 1});
      }
      ties -= survive;
    }
    if (s.threshold != kTop<Key>) weakest_ = std::min(weakest_, s.threshold);
  }

  // If the surviving ties end within the item whose first chunk is s.chunks[i], and its walk is not in
  // row-major order, walk it again in that order: only then does it matter which ties come first.
  void count_ties_in_order(Selection<Key>& s, size_t i, int64_t ties) {
    Item& item = items_[s.chunks[i].item];
    const size_t end = i + (item.numel() + kChunk - 1) / kChunk;
    int64_t equal = 0;
    for (size_t j = i; j < end; ++j) equal += s.splits[j].equal;
    if (item.logical || ties == 0 || ties >= equal) return;
    item.walk_logically();
    parallel(end - i, kGrain, [&](int64_t begin, int64_t stop) {
      for (int64_t j = begin; j < stop; ++j) s.splits[i + j] = split(s.chunks[i + j], s.threshold);
    });
  }

  // How many entries of the chunk, from its first, hold `ties` entries on the threshold.
  int32_t entries_up_to_tie(const Chunk& chunk, Key threshold, int64_t ties) const {
    Staging room;
    alignas(64) Key keys[kChunk];
    keys_of(items_, chunk, room, keys);
    int32_t i = 0;
    for (; ties > 0; ++i) ties -= keys[i] == threshold;
    return i;
  }

  std::vector<Item> items_;
  at::Tensor scratch_;
  Key* inside_;
  int64_t capacity_;
  std::vector<Counts> counts_;  // of the latest survey
  std::vector<Cut<Key>> cuts_;
  std::vector<int64_t> kept_, alive_, nonfinite_;
  double sum_ = 0;
  Key weakest_ = kTop<Key>;
};

template <class Key>
Outputs run(const PruneArguments& arguments) {
  std::vector<Item> items;
  for (size_t i = 0; i < arguments.weights.size(); ++i) items.emplace_back(arguments.operands(i), arguments);
  const auto tensors = static_cast<int64_t>(items.size());
  const at::Tensor kept = empty({tensors}, at::kLong), nonfinite = empty({tensors}, at::kLong);
  const at::Tensor scores = empty({2}, at::kDouble);

  PruneStep<Key> step(std::move(items));
  const bool finite = step.plan(arguments.entries() - arguments.prune, arguments.min_keep);
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

}  // namespace

Outputs prune_cpu(at::TensorList weights, at::TensorList grads, at::TensorList mask_grads,
                  at::TensorList masks, bool fresh, int64_t prune, int64_t min_keep) {
  const PruneArguments arguments{weights, grads, mask_grads, masks, fresh, prune, min_keep};
  const bool wide = arguments.check();
  arguments.expect_fresh_masks();
  const DefaultRounding rounding;
  Outputs outputs = wide ? run<int64_t>(arguments) : run<int32_t>(arguments);
  arguments.bump_versions();
  return outputs;
}

}  // namespace drive
