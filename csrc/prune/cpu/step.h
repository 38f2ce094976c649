// drive::prune_ and drive::prune_to_cost_ on CPU: the best scores survive, exactly, in two passes over the entries.
//
//   1. Sample: some 2^14 keys bracket the threshold, lo <= T <= hi, with a chance of failure below 1e-6.
//   2. Survey (reads theta, G and an old mask; writes no tensor): leaves two bits an entry, whether its key is at or
//      above the bracket, and whether inside; the keys inside, 1 to 4 % of all, are listed in the order of the
//      entries. Also the counts of each chunk of 4096 entries, the sum of |S|, and, where that is not finite, the
//      count of non-finite scores, which ends the step here.
//   3. Threshold T, the k-th largest key: one of those listed as a rule. The counts prove that the bracket held; if
//      it did not, by radix selection over all entries, three passes more.
//   4. Ties: of the entries on the threshold the first ones in global order survive. A running sum over
//      the chunks' ties finds the one chunk where they end, which is cut in two; after that, in every
//      chunk an entry survives if its key is at least the chunk's cut.
//   5. Apply (reads theta; writes theta, mask). The bits and the list tell which entries survive; where T is not in
//      the list, their keys do, from theta, G and the old mask. All memory was taken before, nothing can fail.
//
// Bytes an entry, float32: 8 + 4 read, 4 + 1 written (and 1 that a store of a mask reads), 0.7 for bits and list, 1 more
// for an old mask. Scratch: a quarter of a byte an entry for the bits and as much for the list (twice that for 64-bit
// keys), and 0.03 for the counts.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory_resource>
#include <numeric>
#include <utility>
#include <vector>

#include "common/common.h"
#include "prune/cpu/isa.h"
#include "prune/cpu/radix.h"
#include "prune/cpu/sample.h"
#include "prune/cpu/scratch.h"
#include "prune/cpu/work.h"
#include "prune/key.h"

namespace drive {

// Chunks whose collected keys are worth waking a thread for: 64 M entries, a ms.
constexpr int64_t kListedGrain = 1 << 14;

template <class Key>
struct Selection {
  Key threshold;
  int64_t ties;  // what the entries on the threshold that survive may cost
  Bracket<Key> known;  // the survey tells what survives by a cut, lo < cut <= hi
  Chunks chunks;
  std::pmr::vector<Split> splits;
};

template <class Key>
class PruneStep {
 public:
  using Ids = std::vector<int32_t>;

  explicit PruneStep(std::vector<Item> items)
      : items_(std::move(items)),
        scratch_(items_),
        counts_(&scratch_.by_chunk),
        cuts_(&scratch_.by_chunk),
        found_(&scratch_.by_chunk),
        kept_(items_.size()),
        alive_(items_.size()),
        nonfinite_(items_.size()) {
    counts_.reserve(scratch_.chunks);
    cuts_.reserve(scratch_.chunks + 1);  // that with the last tie that survives becomes two
    found_.reserve(scratch_.chunks + 1);
  }

  // Steps 1 to 4: decides everything, writes nothing. False: a score is not finite.
  bool plan(int64_t budget, int64_t min_keep) {
    Ids free(items_.size());
    std::iota(free.begin(), free.end(), 0);
    for (bool first = true;; first = false) {
      Selection<Key> selection = select(free, budget);
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
        Selection<Key> own = select({id}, guard * items_[id].cost);
        own.known = nothing_known();  // what its survey has found is gone with the next one
        settle(own);
        budget -= guard * items_[id].cost;
      }
      free = std::move(others);
    }
  }

  // (Step 5)
  void apply() const {
    parallel(cuts_.size(), kGrain, [&](int64_t begin, int64_t end) {
      Staging room;
      uint64_t keep[kWordsPerChunk];
      for (int64_t i = begin; i < end; ++i) {
        const Item& item = items_[cuts_[i].chunk.item];
        if (const int64_t found = found_[i]; found < 0) {
          write(items_, cuts_[i], room);
        } else {
          kernels<Key>(item.dtype).resolve(scratch_.placed + found * kWordsPerChunk, padded(cuts_[i].chunk.count),
                                           scratch_.inside + counts_[found].inside_begin, cuts_[i].cut, keep);
          write<Key>(item, cuts_[i].chunk, room, keep);
        }
      }
    });
  }

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
  // (Step 2) Fills counts_ and the scratch memory. False: the keys inside did not fit.
  bool survey(const Chunks& chunks, const Bracket<Key>& bracket) {
    counts_.resize(chunks.size());
    std::atomic<int64_t> used{0};
    std::atomic<bool> fits{true};
    parallel(chunks.size(), kGrain, [&](int64_t begin, int64_t end) {
      Staging room;
      Key nowhere[kChunk + kBlock<Key>];
      int64_t at = 0, slab_end = 0;
      for (int64_t i = begin; i < end; ++i) {
        if (slab_end - at < padded(chunks[i].count) + kBlock<Key>) {
          at = used.fetch_add(Scratch<Key>::kSlab);
          slab_end = at + Scratch<Key>::kSlab;
        }
        const bool fit = slab_end <= scratch_.room;
        if (!fit) fits = false;
        counts_[i] = survey_chunk(items_, chunks[i], bracket, room, scratch_.placed + i * kWordsPerChunk,
                                  fit ? scratch_.inside + at : nowhere);
        counts_[i].inside_begin = at;
        at += counts_[i].inside;
      }
    });
    return fits;
  }

  // (Steps 1 to 3) The k-th largest key among these items (radix.h), and every chunk's place relative to it.
  Selection<Key> select(const Ids& ids, int64_t k) {
    Selection<Key> s{kTop<Key>, 0, nothing_known(), chunks_of(items_, ids, &scratch_.by_chunk),
                     std::pmr::vector<Split>(&scratch_.by_chunk)};
    const Bracket<Key> bracket = drive::bracket<Key>(items_, ids, k);
    const bool complete = survey(s.chunks, bracket);
    if (complete) s.known = bracket;
    int64_t above = 0, top = 0, inside = 0, at_lo = 0, alive = 0;
    for (size_t i = 0; i < counts_.size(); ++i) {
      const Counts& c = counts_[i];
      const int64_t cost = cost_of(s.chunks[i]);
      above += cost * c.above, top += cost * c.top, inside += cost * c.inside, at_lo += cost * c.at_lo;
      alive += cost * c.alive;
    }
    k = std::min(k, alive);
    s.splits.resize(s.chunks.size());
    if (k <= 0) return s;

    const bool held = complete && (bracket.edges ? above : top) < k && k <= top + inside + at_lo;
    if (!held) {
      s.threshold = kth_largest<Key>(k, kDead<Key>, kTop<Key>, [&](Key prefix, int digit, auto& counts) {
        count_parallel(s.chunks.size(), kGrain, counts, [&](int64_t i, auto& into) {
          Staging room;
          alignas(64) Key keys[kChunk];
          keys_of(items_, s.chunks[i], room, keys);
          add_keys(keys, s.chunks[i].count, cost_of(s.chunks[i]), prefix, digit, into);
        });
      });
    } else if (k <= top) {
      s.threshold = bracket.hi;
    } else if (k > top + inside) {
      s.threshold = bracket.lo;
    } else {
      s.threshold = kth_listed(s.chunks, k - top, bracket);
    }
    parallel(s.chunks.size(), held ? kListedGrain : kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        s.splits[i] = held ? known_split(counts_[i], bracket, s.threshold) : split(s.chunks[i], s.threshold);
      }
    });
    s.ties = k;
    for (size_t i = 0; i < s.splits.size(); ++i) s.ties -= cost_of(s.chunks[i]) * s.splits[i].above;
    return s;
  }

  int64_t cost_of(const Chunk& chunk) const { return items_[chunk.item].cost; }

  // How many of the chunk's entries on the threshold survive, of what is left for them: those that come next, up to
  // the first that would cost too much.
  int64_t afford(const Selection<Key>& s, size_t i, int64_t& left) const {
    const int64_t cost = cost_of(s.chunks[i]), survive = std::min<int64_t>(left / cost, s.splits[i].equal);
    left = survive < s.splits[i].equal ? 0 : left - survive * cost;
    return survive;
  }

  // The k-th largest of the keys that are listed: counted by 2048 equal parts of the bracket, of the part that holds
  // it, and so on.
  Key kth_listed(const Chunks& chunks, int64_t k, const Bracket<Key>& bracket) const {
    using Bits = typename KeyTraits<Key>::Bits;
    Bits lo = bracket.lo, last = bracket.hi - bracket.lo;  // it lies in [lo, lo + last]
    while (last > 0) {
      int shift = 0;
      while (last >> shift >= kBuckets) ++shift;
      std::vector<int64_t> costs(kBuckets);
      count_parallel(chunks.size(), kListedGrain, costs, [&](int64_t i, auto& into) {
        const int64_t cost = cost_of(chunks[i]);
        const Key* const keys = scratch_.inside + counts_[i].inside_begin;
        for (int32_t j = 0; j < counts_[i].inside; ++j) {
          const Bits at = keys[j] - lo;  // large, if the key is less
          if (at <= last) into[at >> shift] += cost;
        }
      });
      Bits found = kBuckets - 1;
      for (; costs[found] < k; --found) k -= costs[found];
      lo += found << shift;
      last = std::min(last - (found << shift), (Bits{1} << shift) - 1);
    }
    return static_cast<Key>(lo);
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

  Split known_split(const Counts& c, const Bracket<Key>& bracket, Key threshold) const {
    if (threshold == bracket.hi) return {c.above, c.top - c.above};
    if (threshold == bracket.lo) return {c.top + c.inside, c.at_lo};
    Split split = split_of(scratch_.inside + c.inside_begin, c.inside, threshold);
    split.above += c.top;
    return split;
  }

  // Sums of the first survey, of all items. False: a score is not finite.
  bool take_totals(const Chunks& chunks) {
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
      kept[s.chunks[i].item] += s.splits[i].above + afford(s, i, ties);
    }
    return kept;
  }

  // (Step 4) Turns the selection into one cut a chunk.
  void settle(Selection<Key>& s) {
    const std::vector<int64_t> kept = kept_by(s);
    int64_t ties = s.ties;
    bool any = false;  // of the ties that survive
    for (size_t i = 0; i < s.chunks.size(); ++i) {
      const Chunk& chunk = s.chunks[i];
      if (chunk.begin == 0) {
        count_ties_in_order(s, i, ties);
        kept_[chunk.item] = kept[chunk.item];
      }
      const int64_t survive = afford(s, i, ties);
      any |= s.splits[i].equal > 0 && survive > 0;
      if (survive == 0 || survive == s.splits[i].equal) {
        const Key key = survive == s.splits[i].equal ? s.threshold : s.threshold + 1;
        // what the survey has found lies in the order of its walk
        const bool known = s.known.lo < key && key <= s.known.hi && !items_[chunk.item].rewalked;
        cut(chunk, key, known ? static_cast<int64_t>(i) : -1);
      } else {
        const int32_t first = entries_up_to_tie(chunk, s.threshold, survive);
        cut({chunk.item, first, chunk.begin}, s.threshold);
        cut({chunk.item, chunk.count - first, chunk.begin + first}, s.threshold + 1);
      }
    }
    if (s.threshold != kTop<Key>) weakest_ = std::min(weakest_, any ? s.threshold : next_above(s));
  }

  // The least key above the threshold, kTop if there is none. Costly entries seldom fit to the last, so that the
  // threshold's own go.
  Key next_above(const Selection<Key>& s) const {
    Key next = kTop<Key>;
    const auto see = [&](const Key* keys, int32_t n) {
      for (int32_t j = 0; j < n; ++j) next = keys[j] > s.threshold ? std::min(next, keys[j]) : next;
    };
    if (s.known.lo <= s.threshold && s.threshold < s.known.hi) {  // nearly always there is one in the list
      for (const Counts& c : counts_) see(scratch_.inside + c.inside_begin, c.inside);
    }
    if (next != kTop<Key>) return next;
    for (size_t i = 0; i < s.chunks.size(); ++i) {
      if (s.splits[i].above == 0) continue;
      Staging room;
      alignas(64) Key keys[kChunk];
      keys_of(items_, s.chunks[i], room, keys);
      see(keys, s.chunks[i].count);
    }
    return next;
  }

  static Bracket<Key> nothing_known() { return {kTop<Key>, kTop<Key>, false}; }

  // `found`: the chunk's place in the latest survey, where that tells what survives; else -1.
  void cut(const Chunk& chunk, Key key, int64_t found = -1) {
    cuts_.push_back({chunk, key});
    found_.push_back(found);
  }

  // If the surviving ties end within the item whose first chunk is s.chunks[i], and its walk is not in
  // row-major order, walk it again in that order: only then does it matter which ties come first.
  void count_ties_in_order(Selection<Key>& s, size_t i, int64_t ties) {
    Item& item = items_[s.chunks[i].item];
    const size_t end = i + count_chunks(item.numel);
    int64_t equal = 0;
    for (size_t j = i; j < end; ++j) equal += s.splits[j].equal;
    if (item.logical || ties / item.cost == 0 || ties / item.cost >= equal) return;
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
  Scratch<Key> scratch_;
  std::pmr::vector<Counts> counts_;  // of the latest survey
  std::pmr::vector<Cut<Key>> cuts_;
  std::pmr::vector<int64_t> found_;  // by cut
  std::vector<int64_t> kept_, alive_, nonfinite_;
  double sum_ = 0;
  Key weakest_ = kTop<Key>;
};

}  // namespace drive
