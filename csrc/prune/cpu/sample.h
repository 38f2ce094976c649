// A bracket for the k-th largest key, from a sample (step 1 of step.h).
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "prune/cpu/work.h"
#include "prune/key.h"
#include "prune/sampling.h"

namespace drive {

// 2^14 samples put 2.4 % (k = n / 10) to 4 % (k = n / 2) of the entries into the bracket, 2^16 half of
// that, which pays from some 64 M entries on.
constexpr int64_t kMaxSample = 1 << 16;
constexpr int64_t kEntriesPerSample = 1 << 12;
constexpr int64_t kSampleRun = 512;  // samples gathered together

template <class Size>
void gather(char* to, const char* from, int operand, const Offsets* at, int64_t m) {
  for (int64_t i = 0; i < m; ++i) {
    reinterpret_cast<Size*>(to)[i] = reinterpret_cast<const Size*>(from)[at[i][operand]];
  }
}

// Keys of `m` entries of one item.
template <class Key>
void sample_item(const Item& item, const int64_t* position, int64_t m, Staging& room, Key* keys) {
  std::array<Offsets, kSampleRun> at;
  for (int64_t i = 0; i < m; ++i) at[i] = item.walk.at(position[i]);
  // Nearly every entry is a cache miss: all are on their way before the first is waited for.
  for (int o = 0; o < kMaxOperands; ++o) {
    if (!item.data[o]) continue;
    for (int64_t i = 0; i < m; ++i) __builtin_prefetch(item.data[o] + at[i][o] * item.size(o));
  }
  for (int o = 0; o < kMaxOperands; ++o) {
    if (!item.data[o]) continue;
    by_size(item.size(o), [&](auto entry) {
      gather<decltype(entry)>(room.operand[o], item.data[o], o, at.data(), m);
    });
  }
  const auto there = [&](Operand o) { return item.data[o] ? room.operand[o] : nullptr; };
  const Entries entries =
      item.entries(there(kWeight), there(kGrad), there(kMaskGrad), item.fresh ? nullptr : room.operand[kMask]);
  std::array<Key, kSampleRun> found;
  kernels<Key>(item.dtype).compute_keys(entries, padded(m), found.data());
  std::copy_n(found.begin(), m, keys);
}

// (Step 1) Keys of `count` entries: one of each of `count` parts of equal cost, at random by cost. `cost`: of all.
template <class Key>
std::vector<Key> sample(const std::vector<Item>& items, const std::vector<int32_t>& ids, int64_t cost,
                        int64_t count) {
  std::vector<int64_t> ends;
  for (const int32_t id : ids) ends.push_back((ends.empty() ? 0 : ends.back()) + items[id].numel * items[id].cost);
  std::vector<Key> keys(count);
  parallel((count + kSampleRun - 1) / kSampleRun, 1, [&](int64_t first, int64_t last) {
    Staging room;
    std::array<int64_t, kSampleRun> position;
    for (int64_t run = first; run < last; ++run) {
      const int64_t length = std::min(kSampleRun, count - run * kSampleRun);
      for (int64_t j = 0; j < length; ++j) {
        const int64_t part = run * kSampleRun + j;
        position[j] = sampled_entry(part, count, cost);
      }
      for (int64_t j = 0; j < length;) {  // the part of the run that lies in one item
        const int64_t which = std::upper_bound(ends.begin(), ends.end(), position[j]) - ends.begin();
        const auto stop = std::lower_bound(position.begin() + j, position.begin() + length, ends[which]);
        const int64_t m = stop - position.begin() - j;
        const Item& item = items[ids[which]];
        for (int64_t i = j; i < j + m; ++i) {
          position[i] -= ends[which] - item.numel * item.cost;
          if (item.cost > 1) position[i] /= item.cost;
        }
        sample_item<Key>(item, &position[j], m, room, &keys[run * kSampleRun + j]);
        j += m;
      }
    }
  });
  return keys;
}

// The k-th largest of the items' keys (radix.h) very likely lies between lo and hi, lo < hi.
template <class Key>
Bracket<Key> bracket(const std::vector<Item>& items, const std::vector<int32_t>& ids, int64_t k) {
  int64_t n = 0, cost = 0;
  for (const int32_t id : ids) n += items[id].numel, cost += items[id].numel * items[id].cost;
  if (n <= kMinSample) return {kDead<Key>, kTop<Key>, false};
  const int64_t count = n / kEntriesPerSample < kMinSample ? kMinSample : kMaxSample;
  std::vector<Key> keys = sample<Key>(items, ids, cost, count);
  const BracketRanks ranks = bracket_ranks(k, cost, count);
  auto rest = keys.begin();  // from which on keys are not larger than what was asked for before
  const auto ranked = [&](int64_t rank) {
    const auto nth = keys.begin() + rank - 1;
    std::nth_element(rest, nth, keys.end(), std::greater<Key>());
    return *(rest = nth);
  };
  const Key hi = ranks.high == 0 ? kTop<Key> : ranked(ranks.high);
  const Key lo = ranks.low == 0 ? kDead<Key> : ranked(ranks.low);
  // Many equal ones show in the sample, and then the threshold may be one of them.
  const auto repeated = [&](Key key) { return std::count(keys.begin(), keys.end(), key) > 1; };
  return {std::min<Key>(lo, hi - 1), hi, repeated(hi) || repeated(lo)};
}

}  // namespace drive
