// Which entries are sampled, and between which of their ranks the k-th largest key very likely lies.
// No torch headers; included by C++ and CUDA.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "prune/key.h"

namespace drive {

// 5 sigma on both sides: with the k-th largest key's rank in the sample binomial, the bracket fails to
// hold it in fewer than one step of a million.
constexpr double kSigmas = 5;

// Up to this many entries, all of them are in the bracket and no sample is taken.
constexpr int64_t kMinSample = 1 << 14;

// A pseudo-random 64-bit number for an index (splitmix64): samples must not fall in step with a
// tensor's shape, and the time of a step should not depend on anything but its input.
DRIVE_HOST_DEVICE constexpr uint64_t scramble(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The one of n entries that is sampled in the given one of `count` equal parts.
DRIVE_HOST_DEVICE constexpr int64_t sampled_entry(int64_t part, int64_t count, int64_t n) {
  const double at = static_cast<double>(part) +
      static_cast<double>(scramble(static_cast<uint64_t>(part)) >> 11) * 0x1p-53;
  const auto entry = static_cast<int64_t>(at * static_cast<double>(n) / static_cast<double>(count));
  return entry < n ? entry : n - 1;
}

// Ranks in the sample, counted from 1 at the largest key, between whose keys the bracket lies; 0: there is
// no such sample, the bracket is open on that side.
struct BracketRanks {
  int64_t high, low;
};

// For the k-th largest of n keys, from a sample of `count`. k may lie outside, where a budget is more than all cost.
inline BracketRanks bracket_ranks(int64_t k, int64_t n, int64_t count) {
  const double share = std::clamp(static_cast<double>(k) / static_cast<double>(n), 0.0, 1.0);
  const double sampled = static_cast<double>(count);
  const double margin = kSigmas * std::sqrt(sampled * share * (1 - share)) + 1;
  const double high = share * sampled - margin, low = share * sampled + margin;
  return {high < 0 ? 0 : static_cast<int64_t>(high) + 1, low >= sampled ? 0 : static_cast<int64_t>(low) + 1};
}

}  // namespace drive
