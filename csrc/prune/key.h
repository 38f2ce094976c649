// Key, digit and bucket: the one definition of the order in which scores are ranked.
// No torch headers; included by C++ and CUDA, tested on the host (tests/kernels/prune/test_key.py).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DRIVE_HOST_DEVICE __host__ __device__
#else
#define DRIVE_HOST_DEVICE
#endif

namespace drive {

// A key is 1 + the bits of |score| read as an integer: for non-negative IEEE floats integer order is
// value order. 0 is an entry that was pruned before, below every score. int32 for float32 scores,
// int64 for float64; signed, because AVX2 compares signed integers only.
template <class Key>
struct KeyTraits;

template <>
struct KeyTraits<int32_t> {
  using Bits = uint32_t;
  using Score = float;
  static constexpr Bits kInfinity = 0x7f800000u;
};

template <>
struct KeyTraits<int64_t> {
  using Bits = uint64_t;
  using Score = double;
  static constexpr Bits kInfinity = 0x7ff0000000000000u;
};

template <class Key>
constexpr Key kDead = 0;

// Larger than the key of any finite score.
template <class Key>
constexpr Key kTop = static_cast<Key>(KeyTraits<Key>::kInfinity + 1);

template <class Key>
DRIVE_HOST_DEVICE constexpr Key key_of_bits(typename KeyTraits<Key>::Bits score_bits) {
  using Bits = typename KeyTraits<Key>::Bits;
  return static_cast<Key>((score_bits & (~Bits{0} >> 1)) + 1);
}

template <class Key>
DRIVE_HOST_DEVICE constexpr typename KeyTraits<Key>::Bits bits_of_key(Key key) {
  return static_cast<typename KeyTraits<Key>::Bits>(key - (key != kDead<Key>));
}

template <class Key>
DRIVE_HOST_DEVICE constexpr bool is_finite(Key key) {
  return key >= 0 && key < kTop<Key>;  // the NaN of all ones wraps around to the lowest integer
}

// Digits, most significant first: 11 bits (2048 buckets: 8 KB of 32-bit counters, which fit L1 and
// shared memory), so 3 digits for 32-bit keys and 6 for 64-bit ones. The last digit overlaps the
// one before it; those bits are part of the prefix by then, so the overlap is harmless.
constexpr int kDigitBits = 11;
constexpr int kBuckets = 1 << kDigitBits;

template <class Key>
constexpr int kDigits = (8 * static_cast<int>(sizeof(Key)) + kDigitBits - 1) / kDigitBits;

template <class Key>
DRIVE_HOST_DEVICE constexpr int digit_shift(int digit) {
  const int shift = 8 * static_cast<int>(sizeof(Key)) - kDigitBits * (digit + 1);
  return shift > 0 ? shift : 0;
}

template <class Key>
DRIVE_HOST_DEVICE constexpr int bucket(Key key, int digit) {
  using Bits = typename KeyTraits<Key>::Bits;
  return static_cast<int>((static_cast<Bits>(key) >> digit_shift<Key>(digit)) & (kBuckets - 1));
}

// Do key and prefix agree in all digits before `digit`?
template <class Key>
DRIVE_HOST_DEVICE constexpr bool has_prefix(Key key, Key prefix, int digit) {
  using Bits = typename KeyTraits<Key>::Bits;
  return digit == 0 ||
      ((static_cast<Bits>(key) ^ static_cast<Bits>(prefix)) >> digit_shift<Key>(digit - 1)) == 0;
}

}  // namespace drive
