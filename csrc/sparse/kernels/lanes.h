// How entries travel between memory and lanes. Part of kernels.h.

namespace drive {
namespace DRIVE_ISA {

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

}  // namespace DRIVE_ISA
}  // namespace drive
