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

// What is read after this word of an operand. Hardware prefetchers stop at the end of a page of 4 KB: on AMD
// Zen 4 the next page's first line, once a page, makes the survey 1.2 and apply 1.7 times as fast, and every line,
// 2 KB ahead, neither; on Intel Xeons every line made the step 1.1 to 1.3 times as fast.
template <class T>
DRIVE_INLINE void prefetch(const void* operand, int64_t word) {
  constexpr int64_t kPage = 4096, kLine = 64, kAhead = 2048;
  const char* const at = static_cast<const char*>(operand) + word * static_cast<int64_t>(sizeof(T));
  if (kPrefetchLines) {
    for (size_t line = 0; line < kWord * sizeof(T); line += kLine) __builtin_prefetch(at + line + kAhead);
  } else if (word * sizeof(T) % kPage == 0) {
    __builtin_prefetch(reinterpret_cast<const char*>((reinterpret_cast<uintptr_t>(at) | (kPage - 1)) + 1));
  }
}

template <class T>
DRIVE_INLINE void prefetch(const Entries& e, int64_t word) {
  prefetch<T>(e.weight, word);
  if (e.grad) prefetch<T>(e.grad, word);
}

// Bits of |score|. Not scaled: both scales are 1, and multiplying by them would take the survey 8 % longer.
template <class T, class Key, bool kScaled = true>
DRIVE_INLINE typename Lanes<Key>::Bits score_bits(const Entries& e, int64_t i) {
  using Bits = typename Lanes<Key>::Bits;
  using Scores = typename Lanes<Key>::Scores;
  Scores product = factor<Key>(static_cast<const T*>(e.weight) + i);
  if (e.mask_grad) product *= factor<Key>(static_cast<const T*>(e.mask_grad) + i);
  if (e.grad) {
    Scores grad = factor<Key>(static_cast<const T*>(e.grad) + i);
    if constexpr (kScaled) grad *= e.grad_scale;
    product *= grad;
  }
  if constexpr (kScaled) product *= e.product_scale;
  return (Bits)product & (~typename KeyTraits<Key>::Bits{0} >> 1);
}

// Lanes in which a comparison holds, a bit each, the first lane's the lowest.
#if DRIVE_WIDTH == 64
template <class Key>
using Few = std::conditional_t<sizeof(Key) == 4, __mmask16, __mmask8>;
DRIVE_INLINE Few<int32_t> greater(const Vector<int32_t, 16>& key, int32_t than) {
  return _mm512_cmpgt_epi32_mask((__m512i)key, _mm512_set1_epi32(than));
}
DRIVE_INLINE Few<int64_t> greater(const Vector<int64_t, 8>& key, int64_t than) {
  return _mm512_cmpgt_epi64_mask((__m512i)key, _mm512_set1_epi64(than));
}
// In a general register, all 64 bits of it: GCC 12 may spill what it has widened itself as the mask's 16, and read 64.
DRIVE_INLINE uint64_t widened(uint64_t bits) {
  asm("" : "+r"(bits));
  return bits;
}
#else
template <class Lane, int N>
DRIVE_INLINE uint64_t bits_of(const Vector<Lane, N>& lanes) {
  uint64_t bits = 0;
#if DRIVE_WIDTH == 32
  if constexpr (sizeof(Lane) == 1) bits = static_cast<uint32_t>(_mm256_movemask_epi8((__m256i)lanes));
  if constexpr (sizeof(Lane) == 4) bits = static_cast<uint32_t>(_mm256_movemask_ps((__m256)lanes));
  if constexpr (sizeof(Lane) == 8) bits = static_cast<uint32_t>(_mm256_movemask_pd((__m256d)lanes));
#elif defined(__SSE2__)
  if constexpr (sizeof(Lane) == 1) bits = static_cast<uint32_t>(_mm_movemask_epi8((__m128i)lanes));
  if constexpr (sizeof(Lane) == 4) bits = static_cast<uint32_t>(_mm_movemask_ps((__m128)lanes));
  if constexpr (sizeof(Lane) == 8) bits = static_cast<uint32_t>(_mm_movemask_pd((__m128d)lanes));
#else
  for (int j = 0; j < N; ++j) bits |= uint64_t{lanes[j] != 0} << j;
#endif
  return bits;
}
template <class Key>
using Few = uint64_t;
template <class Key>
DRIVE_INLINE uint64_t greater(const typename Lanes<Key>::Ints& key, Key than) {
  return bits_of<Key, Lanes<Key>::N>(key > than);
}
DRIVE_INLINE uint64_t widened(uint64_t bits) { return bits; }
#endif

// The lanes whose bits are set, 0 in the others.
template <class Lane, int N>
DRIVE_INLINE Vector<Lane, N> only(const Vector<Lane, N>& v, uint64_t bits) {
#if DRIVE_WIDTH == 64
  if constexpr (sizeof(Lane) == 8) return (Vector<Lane, N>)_mm512_maskz_mov_epi64(bits, (__m512i)v);
  if constexpr (sizeof(Lane) == 4) return (Vector<Lane, N>)_mm512_maskz_mov_epi32(bits, (__m512i)v);
  if constexpr (sizeof(Lane) == 2) return (Vector<Lane, N>)_mm512_maskz_mov_epi16(bits, (__m512i)v);
#else
  using Raw = std::make_unsigned_t<Lane>;
  Vector<Raw, N> own;
  for (int j = 0; j < N; ++j) own[j] = static_cast<Raw>(uint64_t{1} << j);
  return v & (Vector<Lane, N>)(((static_cast<Raw>(bits) - Vector<Raw, N>{}) & own) == own);
#endif
}

// Which of a word's entries are not pruned yet, a bit each.
DRIVE_INLINE uint64_t living(const Entries& e, int64_t word) {
  if (!e.mask) return ~uint64_t{0};
#if DRIVE_WIDTH == 64
  const __m512i mask = _mm512_loadu_si512(e.mask + word);
  return _mm512_test_epi8_mask(mask, mask);
#else
  constexpr int N = DRIVE_WIDTH;
  uint64_t bits = 0;
  for (int j = 0; j < kWord; j += N) {
    bits |= bits_of<int8_t, N>(load<Vector<int8_t, N>>(e.mask + word + j) != 0) << j;
  }
  return bits;
#endif
}

// 1 + the bits of |score|, 0 of what is pruned already.
template <class Key>
DRIVE_INLINE typename Lanes<Key>::Ints key_of(const typename Lanes<Key>::Bits& score, const Entries& e,
                                              uint64_t live) {
  const auto key = (typename Lanes<Key>::Ints)(score + 1);
  return e.mask ? only<Key, Lanes<Key>::N>(key, live) : key;
}

// One block's lanes of the sum of |S|, in float64: those of S = (theta * G)^2, or of S itself where
// three operands made it. The square of a float32 is exact there, so that FMA returns the same bits.
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
        auto& lanes = sum.lanes[2 * part + h];
#if DRIVE_WIDTH == 64
        const __m512d wide = _mm512_maskz_cvtps_pd(0xff, (__m256)half[h]);
        using Doubles = Vector<double, kDoubles>;
        lanes = squared ? (Doubles)_mm512_fmadd_pd(wide, wide, (__m512d)lanes) : lanes + (Doubles)wide;
#else
        const auto wide = __builtin_convertvector(half[h], Vector<double, kDoubles>);
        lanes += squared ? wide * wide : wide;
#endif
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

// Appends these lanes' keys to `to`, which has room for a whole register.
template <class Key>
DRIVE_INLINE void append(const typename Lanes<Key>::Ints& key, Few<Key> lanes, int count, Key* to) {
#if DRIVE_WIDTH == 64  // compressed in a register: to memory it is microcoded on some processors
  __m512i front;
  if constexpr (sizeof(Key) == 4) front = _mm512_maskz_compress_epi32(lanes, (__m512i)key);
  if constexpr (sizeof(Key) == 8) front = _mm512_maskz_compress_epi64(lanes, (__m512i)key);
  // They are 1 to 4 % of all keys, so that four have room in nearly all registers. A store of 64 bytes each, across
  // two lines, takes as long as all the rest (Zen 4).
  __builtin_memcpy(to, &front, 4 * sizeof(Key));
  if (__builtin_expect(count > 4, 0)) store(to, front);
#else
  for (; lanes; lanes &= lanes - 1) *to++ = key[__builtin_ctzll(lanes)];
#endif
}

// Step 2: how many entries are at or above the bracket, inside and, if `edges`, on it, and where they are; the keys
// inside go to `inside`, in the order of the entries, which has room for n and one block more.
template <class T, class Key, bool kScaled>
DRIVE_TARGET Counts survey_as(const Entries& entries, int64_t n, const Bracket<Key>& bracket, Placed* placed,
                              Key* inside) {
  using L = Lanes<Key>;
  const Entries e = entries;  // copies, which the stores below cannot alias
  const auto [lo, hi, edges] = bracket;
  Counts c{};
  Sum<Key> sum;
  Key* end = inside;
  for (int64_t word = 0; word < n; word += kWord) {
    prefetch<T>(e, word);
    const uint64_t live = living(e, word);
    uint64_t over = 0, top = 0, above = 0, from_lo = 0;
    for (int r = 0; r < kWord / L::N; ++r) {
      const int first = r * L::N;
      const typename L::Bits score = score_bits<T, Key, kScaled>(e, word + first);
      const typename L::Ints key = key_of<Key>(score, e, live >> first);
      const Few<Key> over_lo = greater(key, lo), reach_hi = greater(key, static_cast<Key>(hi - 1));
      over |= widened(over_lo) << first;
      top |= widened(reach_hi) << first;
      if (edges) {
        above |= widened(greater(key, hi)) << first;
        from_lo |= widened(greater(key, static_cast<Key>(lo - 1))) << first;
      }
      const Few<Key> between = over_lo & ~reach_hi;
      const int count = __builtin_popcountll(widened(between));
      append<Key>(key, between, count, end);
      end += count;
      const auto ints = (typename L::Ints)score;
      const auto counted = (typename L::Scores)(e.mask ? only<Key, L::N>(ints, live >> first) : ints);
      Sum<Key>::add(sum, r % L::kParts, counted, e.grad && !e.mask_grad);
    }
    placed[word / kWord] = {top, over & ~top};
    c.top += __builtin_popcountll(top);
    c.above += __builtin_popcountll(above);
    c.at_lo += __builtin_popcountll(from_lo & ~over & live);
    c.alive += __builtin_popcountll(live);
  }
  c.inside = static_cast<int32_t>(end - inside);
  c.sum = Sum<Key>::total(sum);
  return c;
}

template <class T, class Key>
DRIVE_TARGET Counts survey(const Entries& e, int64_t n, const Bracket<Key>& bracket, Placed* placed, Key* inside) {
  const bool scaled = e.grad_scale != 1 || e.product_scale != 1;
  return scaled ? survey_as<T, Key, true>(e, n, bracket, placed, inside)
                : survey_as<T, Key, false>(e, n, bracket, placed, inside);
}

template <class T, class Key>
DRIVE_TARGET void compute_keys(const Entries& entries, int64_t n, Key* keys) {
  const Entries e = entries;
  for (int64_t word = 0; word < n; word += kWord) {
    prefetch<T>(e, word);
    const uint64_t live = living(e, word);
    for (int j = 0; j < kWord; j += Lanes<Key>::N) {
      store(keys + word + j, key_of<Key>(score_bits<T, Key>(e, word + j), e, live >> j));
    }
  }
}

// Step 5, by the entries: those survive whose key is at least `cut`.
template <class T, class Key>
DRIVE_TARGET void reaching(const Entries& entries, int64_t n, Key cut, uint64_t* keep) {
  using Ints = typename Lanes<Key>::Ints;
  const Entries e = entries;
  for (int64_t word = 0; word < n; word += kWord) {
    prefetch<T>(e, word);
    uint64_t found = 0;
    for (int j = 0; j < kWord; j += Lanes<Key>::N) {
      const auto key = (Ints)(score_bits<T, Key>(e, word + j) + 1);
      found |= widened(greater(key, static_cast<Key>(cut - 1))) << j;
    }
    keep[word / kWord] = found & living(e, word);
  }
}

// The lowest bits, one after the other, in the places of `places`.
DRIVE_INLINE uint64_t spread(uint64_t bits, uint64_t places) {
#if DRIVE_WIDTH == 64
  return _pdep_u64(bits, places);
#else  // microcoded on AMD before Zen 3
  uint64_t found = 0;
  for (; places; places &= places - 1, bits >>= 1) found |= places & -places & -(bits & 1);
  return found;
#endif
}

// Step 5, by what the survey has found: those survive that are at or above the bracket, and those inside whose key,
// of which `inside` is the list with a block more to read behind it, is at least `cut`.
template <class Key>
DRIVE_TARGET void resolve(const Placed* placed, int64_t n, const Key* inside, Key cut, uint64_t* keep) {
  using L = Lanes<Key>;
  for (int64_t word = 0; word < n / kWord; ++word) {
    const int count = __builtin_popcountll(placed[word].inside);
    uint64_t reach = 0;
    int j = 0;
    do {  // once in nearly all cases
      reach |= widened(greater(load<typename L::Ints>(inside + j), static_cast<Key>(cut - 1))) << j;
      j += L::N;
    } while (j < count);
    inside += count;
    keep[word] = placed[word].top | spread(reach, placed[word].inside);
  }
}

// The bytes of 64 bits, 1 or 0.
DRIVE_INLINE void store_bytes(uint8_t* to, uint64_t bits) {
#if DRIVE_WIDTH == 64
  _mm512_storeu_si512(to, _mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(1)));
#else
  for (int j = 0; j < 8; ++j, bits >>= 8) {
    // each byte keeps its own bit, and is 1 if that is set
    const uint64_t own = (bits & 0xff) * 0x0101010101010101u & 0x8040201008040201u;
    const uint64_t bytes = (own + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
    __builtin_memcpy(to + 8 * j, &bytes, 8);
  }
#endif
}

// Step 5: weights that do not survive become +0 (by AND, never by a product: -0.0 and inf * 0).
template <class T>
DRIVE_TARGET void apply(const uint64_t* keep, int64_t n, void* weights, uint8_t* mask) {
  using Raw = std::conditional_t<sizeof(T) == 8, int64_t, std::conditional_t<sizeof(T) == 4, int32_t, int16_t>>;
  constexpr int N = DRIVE_WIDTH / sizeof(T);
  T* const weight = static_cast<T*>(weights);
  for (int64_t word = 0; word < n; word += kWord) {
    prefetch<T>(weight, word);
    const uint64_t bits = keep[word / kWord];
    for (int j = 0; j < kWord; j += N) {
      store(weight + word + j, only<Raw, N>(load<Vector<Raw, N>>(weight + word + j), bits >> j));
    }
    store_bytes(mask + word, bits);
  }
}

template <class T, class Key>
constexpr Kernels<Key> kernels_of() {
  return {survey<T, Key>, compute_keys<T, Key>, reaching<T, Key>, resolve<Key>, apply<T>};
}

}  // namespace DRIVE_ISA
}  // namespace drive
