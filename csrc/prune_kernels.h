// The inner loops of drive::prune_ on CPU, in GCC/Clang vector types: included once for each
// instruction set, with DRIVE_ISA (a namespace) and DRIVE_TARGET (a function attribute) set.
//
// Every loop sees whole vectors of contiguous entries; prune.cpp stages what is strided or short.
// Products are single IEEE operations (no FMA: -ffp-contract=off, no flush to zero: see
// DefaultRounding) and sums run in fixed lanes, so all variants return the same bits.

namespace drive {
namespace DRIVE_ISA {

#define DRIVE_INLINE DRIVE_TARGET __attribute__((always_inline)) static inline

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

// Magnitudes of the operands in the float type that the key is made from. The sign is dropped where
// that is free: only |product| counts.
template <class Key>
struct Lanes;

template <>
struct Lanes<int32_t> {
  using Value = f32x16;
  using Ints = i32x16;
  using Bits = u32x16;
  using Bytes = u8x16;
  using Halves = u16x16;

  DRIVE_INLINE Value value(const float* p) { return load<f32x16>(p); }
  DRIVE_INLINE Value value(const BFloat16* p) {
    return (Value)(__builtin_convertvector(load<u16x16>(p), u32x16) << 16);
  }
  DRIVE_INLINE Value value(const Half* p) {
    // half to float: shift the exponent into place and rescale by 2^112, exact for denormals too
    const u32x16 h = __builtin_convertvector(load<u16x16>(p), u32x16) & 0x7fffu;
    const f32x16 finite = (f32x16)(h << 13) * 0x1p112f;
    return (f32x16)((u32x16)finite | ((u32x16)(h >= 0x7c00u) & 0x7f800000u));
  }
  DRIVE_INLINE void add_squares(f64x8* sum, Value v) {
    f32x8 half[2];
    __builtin_memcpy(half, &v, sizeof(v));
    const f64x8 low = __builtin_convertvector(half[0], f64x8);
    const f64x8 high = __builtin_convertvector(half[1], f64x8);
    sum[0] += low * low;
    sum[1] += high * high;
  }
  DRIVE_INLINE void add(f64x8*, Value) {}  // three operands rank in float64
};

template <>
struct Lanes<int64_t> {
  using Value = f64x8;
  using Ints = i64x8;
  using Bits = u64x8;
  using Bytes = u8x8;
  using Halves = u16x8;

  DRIVE_INLINE Value value(const double* p) { return load<f64x8>(p); }
  DRIVE_INLINE Value value(const float* p) {
    return __builtin_convertvector(load<f32x8>(p), f64x8);
  }
  DRIVE_INLINE Value value(const BFloat16* p) {
    return __builtin_convertvector(
        (f32x8)(__builtin_convertvector(load<u16x8>(p), u32x8) << 16), f64x8);
  }
  DRIVE_INLINE Value value(const Half* p) {
    const u32x8 h = __builtin_convertvector(load<u16x8>(p), u32x8) & 0x7fffu;
    const f32x8 finite = (f32x8)(h << 13) * 0x1p112f;
    return __builtin_convertvector(
        (f32x8)((u32x8)finite | ((u32x8)(h >= 0x7c00u) & 0x7f800000u)), f64x8);
  }
  DRIVE_INLINE void add_squares(f64x8* sum, Value v) { sum[0] += v * v; }
  DRIVE_INLINE void add(f64x8* sum, Value v) { sum[0] += v; }
};

// Bits of |score|, and -1 / 0 lanes that tell who is alive.
template <class T, class Key>
DRIVE_INLINE typename Lanes<Key>::Bits score_bits(const Entries& e, int64_t i) {
  using L = Lanes<Key>;
  using Bits = typename L::Bits;
  typename L::Value product = L::value(static_cast<const T*>(e.weight) + i);
  if (e.mask_grad) product *= L::value(static_cast<const T*>(e.mask_grad) + i);
  product *= L::value(static_cast<const T*>(e.grad) + i);
  return (Bits)product & (~typename KeyTraits<Key>::Bits{0} >> 1);
}

template <class Key>
DRIVE_INLINE typename Lanes<Key>::Ints alive(const Entries& e, int64_t i) {
  using L = Lanes<Key>;
  using Ints = typename L::Ints;
  if (!e.mask) return Ints{} == 0;
  return __builtin_convertvector(load<typename L::Bytes>(e.mask + i), Ints) != 0;
}

template <class V>
DRIVE_INLINE int64_t total(const V& lanes) {
  int64_t sum = 0;
  for (size_t j = 0; j < sizeof(V) / sizeof(lanes[0]); ++j) sum += lanes[j];
  return sum;
}

// Steps 1 and 3: counts of the entries above, at and inside the bracket; the keys inside go to
// `inside`. `keys` is room for n keys, `flags` for n bytes.
template <class T, class Key>
DRIVE_TARGET Counts survey(const Entries& e, int64_t n, Key lo, Key hi, Key* keys, uint8_t* flags,
                           Key* inside) {
  using L = Lanes<Key>;
  using Ints = typename L::Ints;
  constexpr int64_t kLanes = kLanesOf<Key>;
  Ints above{}, at_hi{}, at_lo{}, living{}, bad{};
  f64x8 sum[2] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const typename L::Bits bits = score_bits<T, Key>(e, i);
    const Ints live = alive<Key>(e, i);
    const Ints key = (Ints)(bits + 1) & live;
    living -= live;
    bad -= live & ((Ints)bits >= (Ints{} + static_cast<Key>(KeyTraits<Key>::kInfinity)));
    above -= key > hi;
    at_hi -= key == hi;
    at_lo -= key == lo;
    store(keys + i, key);
    store(flags + i, __builtin_convertvector((key > lo) & (key < hi), typename L::Bytes));
    const typename L::Value score = (typename L::Value)((Ints)bits & live);
    if (e.mask_grad) {
      L::add(sum, score);
    } else {
      L::add_squares(sum, score);
    }
  }
  Counts c{};
  c.above = static_cast<int32_t>(total(above));
  c.at_hi = static_cast<int32_t>(total(at_hi));
  c.at_lo = static_cast<int32_t>(total(at_lo));
  c.alive = static_cast<int32_t>(total(living));
  c.nonfinite = static_cast<int32_t>(total(bad));
  for (int j = 0; j < 8; ++j) c.sum += sum[0][j] + sum[1][j];
  for (int64_t i = 0; i < n; i += 8) {  // few entries are inside: eight flags a look
    uint64_t word;
    __builtin_memcpy(&word, flags + i, 8);
    while (word) {
      const int byte = __builtin_ctzll(word) / 8;
      inside[c.inside++] = keys[i + byte];
      word &= ~(0xffull << (8 * byte));
    }
  }
  return c;
}

template <class T, class Key>
DRIVE_TARGET void compute_keys(const Entries& e, int64_t n, Key* keys) {
  using Ints = typename Lanes<Key>::Ints;
  for (int64_t i = 0; i < n; i += kLanesOf<Key>) {
    store(keys + i, (Ints)(score_bits<T, Key>(e, i) + 1) & alive<Key>(e, i));
  }
}

DRIVE_INLINE void keep_where(float* w, const i32x16& keep) {
  store(w, load<i32x16>(w) & keep);
}
DRIVE_INLINE void keep_where(double* w, const i64x8& keep) {
  store(w, load<i64x8>(w) & keep);
}
DRIVE_INLINE void keep_where(float* w, const i64x8& keep) {
  store(w, load<i32x8>(w) & __builtin_convertvector(keep, i32x8));
}
template <class H, class Ints>
DRIVE_INLINE void keep_where(H* w, const Ints& keep) {
  using V = std::conditional_t<sizeof(keep[0]) == 4, i16x16, i16x8>;
  store(w, load<V>(w) & __builtin_convertvector(keep, V));
}

// Step 5: an entry survives if its key is at least `cut`; the others become +0 (by AND, never by a
// product: -0.0 and inf * 0). Reads what it needs of a vector before it writes that vector.
template <class T, class Key>
DRIVE_TARGET void apply(const Entries& e, int64_t n, Key cut, T* weight, uint8_t* mask) {
  using L = Lanes<Key>;
  using Ints = typename L::Ints;
  for (int64_t i = 0; i < n; i += kLanesOf<Key>) {
    const Ints key = (Ints)(score_bits<T, Key>(e, i) + 1) & alive<Key>(e, i);
    const Ints keep = key >= cut;
    keep_where(weight + i, keep);
    store(mask + i, __builtin_convertvector(keep, typename L::Bytes) & 1);
  }
}

template <class T, class Key>
DRIVE_TARGET void apply_untyped(const Entries& e, int64_t n, Key cut, void* weight, uint8_t* mask) {
  apply<T, Key>(e, n, cut, static_cast<T*>(weight), mask);
}

template <class T, class Key>
constexpr Kernels<Key> kernels_of() {
  return {survey<T, Key>, compute_keys<T, Key>, apply_untyped<T, Key>};
}

#undef DRIVE_INLINE

}  // namespace DRIVE_ISA
}  // namespace drive
