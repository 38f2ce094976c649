// The inner loops of drive::prune_ on CPU, included once for each instruction set (common/each_isa.h).
//
// Every loop sees contiguous blocks of kBlock entries; work.h stages what is strided or short.
// Products are single IEEE operations (no FMA: -ffp-contract=off, no flush to zero: DefaultRounding) and
// sums run in one lane per entry of a block, so that all variants return the same bits.

#include <type_traits>

#include "prune/key.h"

namespace drive {
namespace DRIVE_ISA {

template <class V, class T>
DRIVE_INLINE V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class T>
DRIVE_INLINE void store(T* to, const V& v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

template <class Key>
struct Lanes {
  static constexpr int N = DRIVE_WIDTH / sizeof(Key);
  static constexpr int kParts = kBlock<Key> / N;  // registers per block
  using Score = typename KeyTraits<Key>::Score;
  using Scores = Vector<Score, N>;
  using Bits = Vector<typename KeyTraits<Key>::Bits, N>;
  using Ints = Vector<Key, N>;
  using Bytes = Vector<uint8_t, N>;
};

// One register's entries of 8 or 16 bits, as words.
template <class Key, class T>
DRIVE_INLINE Vector<uint32_t, Lanes<Key>::N> words(const T* p) {
  constexpr int N = Lanes<Key>::N;
#if DRIVE_WIDTH == 64  // one instruction, where the compiler makes four of 16 bits, nine of 8
  if constexpr (N == 16) {
    const auto v = load<Vector<T, N>>(p);
    if constexpr (sizeof(T) == 1) return (Vector<uint32_t, N>)_mm512_cvtepu8_epi32((__m128i)v);
    if constexpr (sizeof(T) == 2) return (Vector<uint32_t, N>)_mm512_cvtepu16_epi32((__m256i)v);
  }
#endif
  // doubling the width step by step: compilers scalarise wider jumps
  const auto halves = __builtin_convertvector(load<Vector<T, N>>(p), Vector<uint16_t, N>);
  return __builtin_convertvector(halves, Vector<uint32_t, N>);
}

// N entries as float32 or float64 scores' factors; exact.
template <class Key>
DRIVE_INLINE typename Lanes<Key>::Scores widen(const Vector<float, Lanes<Key>::N>& v) {
  if constexpr (sizeof(Key) == 4) {
    return v;
  } else {
    return __builtin_convertvector(v, typename Lanes<Key>::Scores);
  }
}

template <class Key, class T>
DRIVE_INLINE typename Lanes<Key>::Scores factor(const T* p) {
  constexpr int N = Lanes<Key>::N;
  using Floats = Vector<float, N>;
  using Words = Vector<uint32_t, N>;
  if constexpr (std::is_same_v<T, double>) {
    return load<typename Lanes<Key>::Scores>(p);
  } else if constexpr (std::is_same_v<T, float>) {
    return widen<Key>(load<Floats>(p));
  } else {
    const Words half = words<Key>(&p->bits);
    if constexpr (std::is_same_v<T, BFloat16>) return widen<Key>((Floats)(half << 16));
    // float16: shift the exponent into place and rescale by 2^112, exact for denormals too. The sign
    // is dropped: only |score| counts.
    const Words magnitude = half & 0x7fffu;
    const Words finite = (Words)((Floats)(magnitude << 13) * 0x1p112f);
    return widen<Key>((Floats)(finite | ((Words)(magnitude >= 0x7c00u) & 0x7f800000u)));
  }
}

// 2 KB ahead, across the end of a page, which hardware prefetchers respect: 1.1 to 1.3 times faster.
template <class T>
DRIVE_INLINE void prefetch(const Entries& e, int64_t i) {
  constexpr int64_t kAhead = 2048 / sizeof(T);
  __builtin_prefetch(static_cast<const T*>(e.weight) + i + kAhead);
  __builtin_prefetch(static_cast<const T*>(e.grad) + i + kAhead);
}

// Bits of |score|.
template <class T, class Key>
DRIVE_INLINE typename Lanes<Key>::Bits score_bits(const Entries& e, int64_t i) {
  using Bits = typename Lanes<Key>::Bits;
  typename Lanes<Key>::Scores product = factor<Key>(static_cast<const T*>(e.weight) + i);
  if (e.mask_grad) product *= factor<Key>(static_cast<const T*>(e.mask_grad) + i);
  if (e.grad) product *= factor<Key>(static_cast<const T*>(e.grad) + i);
  return (Bits)product & (~typename KeyTraits<Key>::Bits{0} >> 1);
}

// -1 for entries that are not pruned yet, 0 for the others.
template <class Key>
DRIVE_INLINE typename Lanes<Key>::Ints alive(const Entries& e, int64_t i) {
  using Ints = typename Lanes<Key>::Ints;
  if (!e.mask) return Ints{} == 0;
  return __builtin_convertvector(words<Key>(e.mask + i), Ints) != 0;
}

// One block's lanes of the sum of |S|, in float64: those of S = (theta * G)^2, or of S itself where
// three operands made it.
template <class Key>
struct Sum {
  static constexpr int kDoubles = DRIVE_WIDTH / 8;
  Vector<double, kDoubles> lanes[kBlock<Key> / kDoubles] = {};

  DRIVE_INLINE void add(Sum& sum, int part, const typename Lanes<Key>::Scores& v, bool squared) {
    if constexpr (sizeof(Key) == 8) {
      sum.lanes[part] += squared ? v * v : v;
    } else {
      Vector<float, kDoubles> half[2];
      __builtin_memcpy(half, &v, sizeof(v));
      for (int h = 0; h < 2; ++h) {
#if DRIVE_WIDTH == 64
        const auto wide = (Vector<double, kDoubles>)_mm512_maskz_cvtps_pd(0xff, (__m256)half[h]);
#else
        const auto wide = __builtin_convertvector(half[h], Vector<double, kDoubles>);
#endif
        sum.lanes[2 * part + h] += squared ? wide * wide : wide;
      }
    }
  }

  DRIVE_INLINE double total(const Sum& sum) {
    double lane[kBlock<Key>];
    __builtin_memcpy(lane, sum.lanes, sizeof(lane));
    double all = 0;
    for (double value : lane) all += value;
    return all;
  }
};

template <class V>
DRIVE_INLINE int32_t total(const V& lanes) {
  int32_t sum = 0;
  for (size_t j = 0; j < sizeof(V) / sizeof(lanes[0]); ++j) sum += static_cast<int32_t>(lanes[j]);
  return sum;
}

// Appends the keys strictly between lo and hi to `to`, which has room for a whole register; returns how
// many. They are 1 to 4 % of all, so most registers hold none.
#if DRIVE_WIDTH == 64
DRIVE_INLINE int append_between(const Vector<int32_t, 16>& key, int32_t lo, int32_t hi, int32_t* to) {
  const __mmask16 inside = _mm512_mask_cmplt_epi32_mask(
      _mm512_cmpgt_epi32_mask((__m512i)key, _mm512_set1_epi32(lo)), (__m512i)key, _mm512_set1_epi32(hi));
  // compressed in a register: to memory it is microcoded on some processors
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(inside, (__m512i)key));
  return __builtin_popcount(inside);
}
DRIVE_INLINE int append_between(const Vector<int64_t, 8>& key, int64_t lo, int64_t hi, int64_t* to) {
  const __mmask8 inside = _mm512_mask_cmplt_epi64_mask(
      _mm512_cmpgt_epi64_mask((__m512i)key, _mm512_set1_epi64(lo)), (__m512i)key, _mm512_set1_epi64(hi));
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(inside, (__m512i)key));
  return __builtin_popcount(inside);
}
#else
template <class Ints>
DRIVE_INLINE bool any(const Ints& lanes) {
#if DRIVE_WIDTH == 32
  return _mm256_movemask_epi8((__m256i)lanes);
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)lanes);
#else
  uint64_t words[2];
  __builtin_memcpy(words, &lanes, sizeof(words));
  return words[0] | words[1];
#endif
}

template <class Ints, class Key>
DRIVE_INLINE int append_between(const Ints& key, Key lo, Key hi, Key* to) {
  const Ints inside = (key > lo) & (key < hi);
  int count = 0;
  if (any(inside)) {
    for (int j = 0; j < Lanes<Key>::N; ++j) {
      to[count] = key[j];
      count -= static_cast<int>(inside[j]);
    }
  }
  return count;
}
#endif

// Step 2: counts of the entries above, at and inside the bracket; the keys inside go to `inside`, which
// has room for n and one block more.
template <class T, class Key>
DRIVE_TARGET Counts survey(const Entries& entries, int64_t n, Key lo, Key hi, Key* inside) {
  using L = Lanes<Key>;
  using Ints = typename L::Ints;
  const Entries e = entries;  // a copy, which the stores below cannot alias
  Ints above{}, at_hi{}, at_lo{}, living{}, bad{};
  Sum<Key> sum;
  Key* end = inside;
  for (int64_t block = 0; block < n; block += kBlock<Key>) {
    for (int part = 0; part < L::kParts; ++part) {
      const int64_t i = block + part * L::N;
      prefetch<T>(e, i);
      const typename L::Bits bits = score_bits<T, Key>(e, i);
      const Ints live = alive<Key>(e, i);
      const Ints key = (Ints)(bits + 1) & live;
      living -= live;
      bad -= live & ((Ints)bits >= static_cast<Key>(KeyTraits<Key>::kInfinity));
      above -= key > hi;
      at_hi -= key == hi;
      at_lo -= key == lo;
      end += append_between(key, lo, hi, end);
      Sum<Key>::add(sum, part, (typename L::Scores)((Ints)bits & live), e.grad && !e.mask_grad);
    }
  }
  Counts c{};
  c.above = total(above);
  c.at_hi = total(at_hi);
  c.inside = static_cast<int32_t>(end - inside);
  c.at_lo = total(at_lo);
  c.alive = total(living);
  c.nonfinite = total(bad);
  c.sum = Sum<Key>::total(sum);
  return c;
}

template <class T, class Key>
DRIVE_TARGET void compute_keys(const Entries& entries, int64_t n, Key* keys) {
  using Ints = typename Lanes<Key>::Ints;
  const Entries e = entries;
  for (int64_t i = 0; i < n; i += Lanes<Key>::N) {
    store(keys + i, (Ints)(score_bits<T, Key>(e, i) + 1) & alive<Key>(e, i));
  }
}

// Step 5: an entry survives if its key is at least `cut`; the others become +0 (by AND, never by a
// product: -0.0 and inf * 0). A register is read before it is written: masks may be updated in place.
template <class T, class Key>
DRIVE_TARGET void apply(const Entries& entries, int64_t n, Key cut, void* weights, uint8_t* mask) {
  using L = Lanes<Key>;
  using Ints = typename L::Ints;
  using Raw = Vector<std::conditional_t<sizeof(T) == 8, int64_t,
                                        std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>, L::N>;
  const Entries e = entries;
  T* weight = static_cast<T*>(weights);
  for (int64_t i = 0; i < n; i += L::N) {
    prefetch<T>(e, i);
    const Ints key = (Ints)(score_bits<T, Key>(e, i) + 1) & alive<Key>(e, i);
    const Ints keep = key >= cut;
    const Raw kept = load<Raw>(static_cast<const T*>(e.weight) + i) & __builtin_convertvector(keep, Raw);
    store(weight + i, kept);
    store(mask + i, __builtin_convertvector(keep, typename L::Bytes) & 1);
  }
}

template <class T, class Key>
constexpr Kernels<Key> kernels_of() {
  return {survey<T, Key>, compute_keys<T, Key>, apply<T, Key>};
}

}  // namespace DRIVE_ISA
}  // namespace drive
