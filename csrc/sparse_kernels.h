// The inner loops of the sparse ops on CPU, included once for each instruction set, with DRIVE_ISA (a
// namespace), DRIVE_TARGET and DRIVE_INLINE (function attributes), DRIVE_WIDTH (of a register, in bytes)
// and DRIVE_REGISTERS (their number) set.

namespace drive {
namespace DRIVE_ISA {

template <class T>
struct Register {
  static constexpr int N = DRIVE_WIDTH / sizeof(T);
  static constexpr int kParts = kLanes / N;  // registers a position
  typedef T V __attribute__((vector_size(DRIVE_WIDTH)));
  typedef T Memory __attribute__((vector_size(DRIVE_WIDTH), aligned(alignof(T)), may_alias));
};
template <class T>
using V = typename Register<T>::V;

template <class T>
DRIVE_INLINE V<T> read(const T* from) {
  return *reinterpret_cast<const typename Register<T>::Memory*>(from);
}

template <class T>
DRIVE_INLINE void write(T* to, V<T> v) {
  *reinterpret_cast<typename Register<T>::Memory*>(to) = v;
}

template <class T>
DRIVE_INLINE V<T> fill(T value) {
  return value - V<T>{};  // a broadcast: 0 + value would be an addition, for the sign of zeros
}

DRIVE_INLINE V<float> fma(V<float> a, V<float> b, V<float> c) {
#if DRIVE_WIDTH == 64
  return _mm512_fmadd_ps(a, b, c);
#elif DRIVE_WIDTH == 32
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

DRIVE_INLINE V<double> fma(V<double> a, V<double> b, V<double> c) {
#if DRIVE_WIDTH == 64
  return _mm512_fmadd_pd(a, b, c);
#elif DRIVE_WIDTH == 32
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// Positions that one tile may have: its sums, a few of them spare, fill the registers.
template <class T>
constexpr int kTile = DRIVE_REGISTERS == 32 ? 16 / Register<T>::kParts
                      : Register<T>::kParts <= 2 ? 4
                      : Register<T>::kParts == 4 ? 2
                                                 : 1;
// Sums that must be in flight for two FMAs a cycle, each taking four cycles.
constexpr int kInFlight = 8;

// One tile of RY x RX positions, `at` entries behind p.out, of an output with the taps from `tap` to `end`.
// Tiles with few positions keep several sums a position.
template <class T, int RY, int RX>
DRIVE_TARGET void multiply_tile(const Product<T>& p, const Tap<T>* tap, const Tap<T>* const end, T bias,
                                const T* in, int64_t at) {
  constexpr int L = Register<T>::kParts, N = Register<T>::N, S = RX * L;
  constexpr int kSums = RY * S >= kInFlight ? 1 : kInFlight / (RY * S);
  const int64_t pitch = p.in_pitch;
  V<T> sum[kSums][RY][S];
#pragma GCC unroll 16
  for (int u = 0; u < kSums; ++u) {
#pragma GCC unroll 16
    for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
      for (int s = 0; s < S; ++s) sum[u][r][s] = fill<T>(u == 0 ? bias : T(0));
    }
  }
  if (p.residual) {
    const T* residual = p.residual + at;
#pragma GCC unroll 16
    for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
      for (int s = 0; s < S; ++s) sum[0][r][s] += read(residual + r * p.out_pitch + s * N);
    }
  }
  for (; tap + kSums <= end; tap += kSums) {
#pragma GCC unroll 16
    for (int u = 0; u < kSums; ++u) {
      const T* const from = in + tap[u].offset;
      const V<T> value = fill(tap[u].value);
#pragma GCC unroll 16
      for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
        for (int s = 0; s < S; ++s) sum[u][r][s] = fma(value, read(from + r * pitch + s * N), sum[u][r][s]);
      }
    }
  }
  if constexpr (kSums > 1) {
    for (; tap < end; ++tap) {
      const T* const from = in + tap->offset;
      const V<T> value = fill(tap->value);
#pragma GCC unroll 16
      for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
        for (int s = 0; s < S; ++s) sum[0][r][s] = fma(value, read(from + r * pitch + s * N), sum[0][r][s]);
      }
    }
  }
  T* const out = p.out + at;
  const int64_t out_pitch = p.out_pitch;  // else read again after each write
  const V<T> floor = fill(p.floor);
#pragma GCC unroll 16
  for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
    for (int s = 0; s < S; ++s) {
      V<T> total = sum[0][r][s];
#pragma GCC unroll 16
      for (int u = 1; u < kSums; ++u) total += sum[u][r][s];
      write(out + r * out_pitch + s * N, total < floor ? floor : total);
    }
  }
}

// The cache lines of such a tile, to be written soon.
template <class T, int RY, int RX>
DRIVE_INLINE void fetch_tile(const Product<T>& p, int64_t at) {
  constexpr int kLine = 64 / sizeof(T);
#pragma GCC unroll 16
  for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
    for (int i = 0; i < RX * kLanes; i += kLine) __builtin_prefetch(p.out + at + r * p.out_pitch + i, 1);
  }
}

// Covers rows x cols with tiles RX wide and as high as the registers allow. The last ones of a row or
// column overlap their neighbours: computing a position twice is cheaper than a narrow tile.
template <class T, int RX, int RY>
DRIVE_TARGET void multiply_with(const Product<T>& p) {
  // Copies: what the tiles write might be `p` for all the compiler knows (1.07 times as fast with 4 taps).
  const int64_t rows = p.rows, cols = p.cols, outputs = p.outputs, ahead = p.ahead;
  const int64_t in_pitch = p.in_pitch, out_pitch = p.out_pitch, out_size = p.out_size;
  const int64_t strip = p.strip ? std::min(p.strip, rows) : rows;
  const int32_t* const start = p.start;
  if (strip < RY) {
    if constexpr (RY > 1) multiply_with<T, RX, RY / 2>(p);
    return;
  }
  for (int64_t top = 0; top < rows; top += strip) {
    const int64_t bottom = std::min(top + strip, rows);
    const Tap<T>* tap = p.taps;
    for (int64_t o = 0; o < outputs; ++o) {
      const Tap<T>* const end = tap + (start[o + 1] - start[o]);
      const T bias = p.bias ? p.bias[o] : T(0);
      // After the last output of this strip comes the first one of the next.
      const bool wraps = o + ahead >= outputs && bottom < rows;
      const int64_t later = ahead * out_size + (wraps ? strip * out_pitch - outputs * out_size : 0);
      for (int64_t y = top; y < bottom; y += RY) {
        const int64_t row = std::min(y, rows - RY);
        for (int64_t x = 0; x < cols; x += RX) {
          const int64_t col = std::min(x, cols - RX) * kLanes;
          const int64_t at = o * out_size + row * out_pitch + col;
          if (ahead) fetch_tile<T, RY, RX>(p, at + later);
          multiply_tile<T, RY, RX>(p, tap, end, bias, p.in + row * in_pitch + col, at);
        }
      }
      tap = end;
    }
  }
}

constexpr int power_of_two_up_to(int n) { return n < 2 ? 1 : 2 * power_of_two_up_to(n / 2); }

template <class T, int RX>
DRIVE_TARGET void multiply_by_width(const Product<T>& p, int64_t width) {
  if (width == RX) {
    multiply_with<T, RX, power_of_two_up_to(kTile<T> / RX)>(p);
  } else if constexpr (RX > 1) {
    multiply_by_width<T, RX - 1>(p, width);
  }
}

template <class T>
DRIVE_TARGET void multiply(const Product<T>& p) {
  const int64_t tiles = (p.cols + kTile<T> - 1) / kTile<T>;
  multiply_by_width<T, kTile<T>>(p, (p.cols + tiles - 1) / tiles);
}

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

// The entries of x at N indices.
template <class T>
DRIVE_INLINE V<T> gather(const T* x, const int32_t* at) {
#if DRIVE_WIDTH == 64
  if constexpr (sizeof(T) == 4) return _mm512_i32gather_ps(_mm512_loadu_si512(at), x, 4);
#elif DRIVE_WIDTH == 32
  if constexpr (sizeof(T) == 4) {
    return _mm256_i32gather_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), 4);
  }
#endif
  V<T> v;
  for (int i = 0; i < Register<T>::N; ++i) v[i] = x[at[i]];
  return v;
}

// Two sums, for the latency of an FMA.
template <class T>
DRIVE_TARGET T dot(const T* values, const int32_t* at, int64_t count, const T* x) {
  constexpr int N = Register<T>::N;
  V<T> sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * N <= count; i += 2 * N) {
    sum[0] = fma(read(values + i), gather(x, at + i), sum[0]);
    sum[1] = fma(read(values + i + N), gather(x, at + i + N), sum[1]);
  }
  for (; i + N <= count; i += N) sum[1] = fma(read(values + i), gather(x, at + i), sum[1]);
  T total = 0;
  for (; i < count; ++i) total += values[i] * x[at[i]];
  T lanes[N];
  write(lanes, sum[0] + sum[1]);
#pragma GCC unroll 4
  for (int half = N / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return total + lanes[0];
}

#if defined(__x86_64__)
// Four registers of float32, seen as 4 x 4 blocks in each 16 bytes, with every block transposed.
struct Four {
  V<float> v[4];
};

DRIVE_INLINE Four transpose_blocks(const Four& f) {
#if DRIVE_WIDTH == 64
  const __m512 a = _mm512_unpacklo_ps(f.v[0], f.v[1]), b = _mm512_unpackhi_ps(f.v[0], f.v[1]);
  const __m512 c = _mm512_unpacklo_ps(f.v[2], f.v[3]), d = _mm512_unpackhi_ps(f.v[2], f.v[3]);
  const __m512d A = _mm512_castps_pd(a), B = _mm512_castps_pd(b), C = _mm512_castps_pd(c),
                D = _mm512_castps_pd(d);
  return {{_mm512_castpd_ps(_mm512_unpacklo_pd(A, C)), _mm512_castpd_ps(_mm512_unpackhi_pd(A, C)),
           _mm512_castpd_ps(_mm512_unpacklo_pd(B, D)), _mm512_castpd_ps(_mm512_unpackhi_pd(B, D))}};
#elif DRIVE_WIDTH == 32
  const __m256 a = _mm256_unpacklo_ps(f.v[0], f.v[1]), b = _mm256_unpackhi_ps(f.v[0], f.v[1]);
  const __m256 c = _mm256_unpacklo_ps(f.v[2], f.v[3]), d = _mm256_unpackhi_ps(f.v[2], f.v[3]);
  const __m256d A = _mm256_castps_pd(a), B = _mm256_castps_pd(b), C = _mm256_castps_pd(c),
                D = _mm256_castps_pd(d);
  return {{_mm256_castpd_ps(_mm256_unpacklo_pd(A, C)), _mm256_castpd_ps(_mm256_unpackhi_pd(A, C)),
           _mm256_castpd_ps(_mm256_unpacklo_pd(B, D)), _mm256_castpd_ps(_mm256_unpackhi_pd(B, D))}};
#else
  __m128 a = f.v[0], b = f.v[1], c = f.v[2], d = f.v[3];
  _MM_TRANSPOSE4_PS(a, b, c, d);
  return {{a, b, c, d}};
#endif
}

#if DRIVE_WIDTH < 64
// 16 bytes from each of every fourth row: block b of the result is rows[4 * b].
DRIVE_INLINE V<float> gather_blocks(const float* from, int64_t row_stride) {
#if DRIVE_WIDTH == 32
  const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps(from));
  return _mm256_insertf128_ps(v, _mm_loadu_ps(from + 4 * row_stride), 1);
#else
  return _mm_loadu_ps(from);
#endif
}

DRIVE_INLINE void scatter_blocks(V<float> v, float* to, int64_t row_stride) {
#if DRIVE_WIDTH == 32
  _mm_storeu_ps(to, _mm256_castps256_ps128(v));
  _mm_storeu_ps(to + 4 * row_stride, _mm256_extractf128_ps(v, 1));
#else
  _mm_storeu_ps(to, v);
#endif
}
#endif

#if DRIVE_WIDTH == 64
// A 16 x 16 transpose: pieces of 16 bytes have been transposed, now the pieces themselves.
DRIVE_INLINE void transpose_pieces(const Four (&f)[4], V<float> (&to)[16]) {
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const __m512 a = _mm512_shuffle_f32x4(f[0].v[r], f[1].v[r], 0x44);
    const __m512 b = _mm512_shuffle_f32x4(f[2].v[r], f[3].v[r], 0x44);
    const __m512 c = _mm512_shuffle_f32x4(f[0].v[r], f[1].v[r], 0xee);
    const __m512 d = _mm512_shuffle_f32x4(f[2].v[r], f[3].v[r], 0xee);
    to[r] = _mm512_shuffle_f32x4(a, b, 0x88);
    to[r + 4] = _mm512_shuffle_f32x4(a, b, 0xdd);
    to[r + 8] = _mm512_shuffle_f32x4(c, d, 0x88);
    to[r + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}
#endif

// Entries that transposes look ahead: the next cache lines of their sixteen rows, too far apart and too
// many for the hardware to foresee.
constexpr int kAhead = 16;

// Sixteen rows a power of two apart fall into one set of the cache, which cannot hold them all: each of
// their lines is touched once, in the AVX-512 variants.
DRIVE_TARGET inline void to_lanes_whole(const float* from, int64_t row_stride, float* to,
                                        const int32_t* offsets) {
#if DRIVE_WIDTH == 64
  Four f[4];
  V<float> lanes[16];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const float* const row = from + (4 * q + r) * row_stride;
      __builtin_prefetch(row + kAhead);
      f[q].v[r] = read(row);
    }
    f[q] = transpose_blocks(f[q]);
  }
  transpose_pieces(f, lanes);
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) write<float>(to + offsets[j], lanes[j]);
#else
  constexpr int N = Register<float>::N;
#pragma GCC unroll 4
  for (int j = 0; j < 16; j += 4) {
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; lane += N) {
      Four f;
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) f.v[r] = gather_blocks(from + (lane + r) * row_stride + j, row_stride);
      f = transpose_blocks(f);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) write(to + offsets[j + r] + lane, f.v[r]);
    }
  }
#endif
}

DRIVE_TARGET inline void from_lanes_whole(const float* from, const int32_t* offsets, float* to,
                                          int64_t row_stride) {
#if DRIVE_WIDTH == 64
  Four f[4];
  V<float> rows[16];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) f[q].v[r] = read(from + offsets[4 * q + r]);
    f[q] = transpose_blocks(f[q]);
  }
  transpose_pieces(f, rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    __builtin_prefetch(to + i * row_stride + kAhead, 1);
    write<float>(to + i * row_stride, rows[i]);
  }
#else
  constexpr int N = Register<float>::N;
#pragma GCC unroll 4
  for (int j = 0; j < 16; j += 4) {
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; lane += N) {
      Four f;
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) f.v[r] = read(from + offsets[j + r] + lane);
      f = transpose_blocks(f);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) scatter_blocks(f.v[r], to + (lane + r) * row_stride + j, row_stride);
    }
  }
#endif
}
#endif

// Entries that a copy looks ahead, 2 KB of float32; twice and four times as many gained less.
constexpr int kCopyAhead = 512;

// All runs of a plane in one call: where it is 32 wide, a run is two registers.
template <class T>
DRIVE_TARGET void copy_runs(const T* from, int64_t runs, int64_t size, const int32_t* offsets, int64_t step,
                            int32_t nowhere, T* to) {
  for (int64_t r = 0; r < runs; ++r, from += size) {
    if (offsets[r * step] == nowhere) continue;  // no room for it there, and its cache lines are not needed
    T* const at = to + offsets[r * step];
    for (int64_t i = 0; i < size; i += Register<T>::N) {
      __builtin_prefetch(from + i + kCopyAhead);
      write(at + i, read(from + i));
    }
  }
}

template <class T>
DRIVE_TARGET void to_lanes(const T* from, int64_t row_stride, int rows, int cols, T* to,
                           const int32_t* offsets) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 4) {
    if (rows == 16 && cols == 16) return to_lanes_whole(from, row_stride, to, offsets);
  }
#endif
  for (int j = 0; j < cols; ++j) {
    T* const at = to + offsets[j];
    for (int i = 0; i < rows; ++i) at[i] = from[i * row_stride + j];
    for (int i = rows; i < kLanes; ++i) at[i] = 0;
  }
}

template <class T>
DRIVE_TARGET void from_lanes(const T* from, const int32_t* offsets, T* to, int64_t row_stride, int rows,
                             int cols) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 4) {
    if (rows == 16 && cols == 16) return from_lanes_whole(from, offsets, to, row_stride);
  }
#endif
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) to[i * row_stride + j] = from[offsets[j] + i];
  }
}

template <class T>
SparseKernels<T> sparse_kernels_of() {
  return {&multiply<T>, &sample<T>, &dot<T>, &copy_runs<T>, &to_lanes<T>, &from_lanes<T>};
}

}  // namespace DRIVE_ISA
}  // namespace drive
