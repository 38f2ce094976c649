// Products of packed values with entries that lie anywhere. Part of kernels.h.

namespace drive {
namespace DRIVE_ISA {

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

}  // namespace DRIVE_ISA
}  // namespace drive
