// Gradients to the non-zeros of a weight, alone and with that to the input. Part of kernels.h.

namespace drive {
namespace DRIVE_ISA {

template <class T, int G>
DRIVE_INLINE void add_sums(const V<T> (&v)[G], T* to) {
  for (int g = 0; g < G; ++g) {
    T total = 0;
    for (int i = 0; i < Register<T>::N; ++i) total += v[g][i];
    to[g] += total;
  }
}

#if DRIVE_WIDTH == 64
// Sums of eight registers: 15 shuffles together, where one at a time would take 32.
DRIVE_INLINE void add_sums(const V<float> (&v)[8], float* to) {
  __m512 pair[4], four[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                            _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 halves = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x44),
                                      _mm512_shuffle_f32x4(four[0], four[1], 0xee));
  const __m256 lo = _mm512_castps512_ps256(halves), hi = _mm512_extractf32x8_ps(halves, 1);
  const __m256 sums = _mm256_add_ps(_mm256_permute2f128_ps(lo, hi, 0x20),
                                    _mm256_permute2f128_ps(lo, hi, 0x31));
  _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sums));
}
#elif DRIVE_WIDTH == 32
DRIVE_INLINE void add_sums(const V<float> (&v)[8], float* to) {
  __m256 four[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    four[i] = _mm256_hadd_ps(_mm256_hadd_ps(v[4 * i], v[4 * i + 1]),
                             _mm256_hadd_ps(v[4 * i + 2], v[4 * i + 3]));
  }
  const __m256 sums = _mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20),
                                    _mm256_permute2f128_ps(four[0], four[1], 0x31));
  _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sums));
}
#endif

// G taps at once: G sums in flight, one load of the gradient for all of them.
template <class T, int G>
DRIVE_TARGET int64_t sample_group(const Sampled<T>& p, int64_t k) {
  constexpr int L = Register<T>::kParts, N = Register<T>::N;
  for (; k + G <= p.count; k += G) {
    V<T> sum[G];
    const T* from[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      sum[g] = V<T>{};
      from[g] = p.in + p.taps[k + g].offset;
    }
    for (int64_t y = 0; y < p.rows; ++y) {
      const T* const grad = p.grad + y * p.grad_pitch;
      const int64_t row = y * p.in_pitch;
      for (int64_t i = 0; i < p.cols * L; ++i) {
        const V<T> v = read(grad + i * N);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) sum[g] = fma(v, read(from[g] + row + i * N), sum[g]);
      }
    }
    add_sums(sum, p.sums + k);
  }
  return k;
}

template <class T>
DRIVE_TARGET void sample(const Sampled<T>& p) {
  int64_t k = sample_group<T, 8>(p, 0);
  k = sample_group<T, 4>(p, k);
  k = sample_group<T, 2>(p, k);
  sample_group<T, 1>(p, k);
}

// Both gradients of a tile: what a tap sees of the gradient is loaded once for two FMAs. The tile's sums and
// its input share the registers; a tap's products stay a register wide in memory, from tile to tile.
template <class T, bool kClip>
struct Gradients {
  static constexpr int kPositions = kTile<T> > 1 ? kTile<T> / 2 : 1;

  const T* x;   // laid out as p.out
  T* products;  // a register a tap

  template <int RY, int RX>
  DRIVE_TARGET __attribute__((noinline)) void tile(const Product<T>& p, const Tap<T>* tap,
                                                   const Tap<T>* const end, const T* in, int64_t at,
                                                   Place place) const {
    constexpr int L = Register<T>::kParts, N = Register<T>::N, S = RX * L;
    const T* const input = x + at;
    T *const out = p.out + at, *to = products + (tap - p.taps) * N;
    const int64_t pitch = p.out_pitch, in_pitch = p.in_pitch;
    V<T> sum[RY][S], here[RY][S];
#pragma GCC unroll 16
    for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
      for (int s = 0; s < S; ++s) sum[r][s] = V<T>{}, here[r][s] = read(input + r * pitch + s * N);
    }
    if (place.above || place.left) {  // these positions' products have been added before
#pragma GCC unroll 16
      for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
        for (int s = 0; s < S; ++s) {
          if (r < place.above || s < place.left * L) here[r][s] = V<T>{};
        }
      }
    }
    const auto more = [&](Look look) { return tap < end && (!kClip || looks(look, tap->offset)); };
    for (; more(Look::straight); ++tap, to += N) add<Look::straight>(*tap, in, in_pitch, here, sum, to);
    if constexpr (kClip) {
      for (; more(Look::left); ++tap, to += N) add<Look::left>(*tap, in, in_pitch, here, sum, to);
      for (; more(Look::right); ++tap, to += N) add<Look::right>(*tap, in, in_pitch, here, sum, to);
    }
#pragma GCC unroll 16
    for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
      for (int s = 0; s < S; ++s) write(out + r * pitch + s * N, sum[r][s]);
    }
  }

 private:
  template <Look look, int RY, int S>
  DRIVE_INLINE void add(const Tap<T>& tap, const T* in, int64_t pitch, const V<T> (&here)[RY][S],
                        V<T> (&sum)[RY][S], T* to) {
    const T* from = first_read<look>(in + tap.offset, tap.offset);
    const V<T> value = fill(tap.value);
    V<T> product = read(to);
#pragma GCC unroll 16
    for (int r = 0; r < RY; ++r, from += pitch) {
      V<T> grad[S];
      see<look>(from, tap.offset, grad);
#pragma GCC unroll 32
      for (int s = 0; s < S; ++s) {
        keep_in_register(grad[s]);
        sum[r][s] = fma(value, grad[s], sum[r][s]);
        product = fma(here[r][s], grad[s], product);
      }
    }
    write(to, product);
  }
};

template <class T>
DRIVE_TARGET void multiply_and_sample(const Product<T>& p, const T* x, T* products, T* sums) {
  constexpr int N = Register<T>::N, G = kTapsTogether;
  const int64_t count = p.start[p.outputs] - p.start[0];
  std::fill_n(products, (count + G - 1) / G * G * N, T(0));
  if (p.clip) {
    cover(p, Gradients<T, true>{x, products});
  } else {
    cover(p, Gradients<T, false>{x, products});
  }
  for (int64_t k = 0; k < count; k += G) {
    V<T> sum[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) sum[g] = read(products + (k + g) * N);
    T totals[G] = {};
    T* const to = k + G <= count ? sums + k : totals;
    add_sums(sum, to);
    for (int64_t i = 0; to == totals && k + i < count; ++i) sums[k + i] += totals[i];
  }
}

}  // namespace DRIVE_ISA
}  // namespace drive
