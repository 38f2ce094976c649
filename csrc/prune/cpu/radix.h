// Selection of the k-th largest key by radix digits (step 3 of step.h).
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "prune/cpu/work.h"
#include "prune/key.h"

namespace drive {

// The k-th largest key between lo and hi: with which the costs of the keys, added up from the largest, reach k (1
// each, as a rule). count(prefix, digit, counts) adds up, by bucket of that digit, the costs of the keys that agree
// with the prefix in the digits before.
template <class Key, class Count>
Key kth_largest(int64_t k, Key lo, Key hi, const Count& count) {
  using Bits = typename KeyTraits<Key>::Bits;
  Bits prefix = 0;
  for (int digit = 0; digit < kDigits<Key>; ++digit) {
    int found = bucket(lo, digit);
    if (!has_prefix(lo, hi, digit + 1)) {
      std::vector<int64_t> counts(kBuckets);
      count(static_cast<Key>(prefix), digit, counts);
      for (found = kBuckets - 1; counts[found] < k; --found) k -= counts[found];
    }
    prefix |= static_cast<Bits>(found) << digit_shift<Key>(digit);
  }
  return static_cast<Key>(prefix);
}

// counts += the histograms that fill(i, histogram) makes for every i in [0, n), over all threads.
template <class Fill>
void count_parallel(int64_t n, int64_t grain, std::vector<int64_t>& counts, const Fill& fill) {
  std::vector<std::vector<int64_t>> partial(at::get_num_threads(), std::vector<int64_t>(counts.size()));
  parallel(n, grain, [&](int64_t begin, int64_t end) {
    auto& into = partial[at::get_thread_num()];
    for (int64_t i = begin; i < end; ++i) fill(i, into);
  });
  for (const auto& part : partial) {
    for (size_t b = 0; b < counts.size(); ++b) counts[b] += part[b];
  }
}

template <class Key>
void add_keys(const Key* keys, int64_t n, int64_t cost, Key prefix, int digit, std::vector<int64_t>& costs) {
  for (int64_t i = 0; i < n; ++i) {
    if (has_prefix(keys[i], prefix, digit)) costs[bucket(keys[i], digit)] += cost;
  }
}

}  // namespace drive
