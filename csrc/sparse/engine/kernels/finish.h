// What becomes of a sum at last. Part of kernels.h.

namespace drive {
namespace DRIVE_ISA {

constexpr int kParts = Register<float>::kParts;  // registers a vector of 16
using Integers = int32_t __attribute__((vector_size(DRIVE_WIDTH)));

// Where one of the two is NaN: b, as all of them do.
DRIVE_INLINE V<float> larger(V<float> a, V<float> b) {
#if DRIVE_WIDTH == 64
  return _mm512_max_ps(a, b);
#elif DRIVE_WIDTH == 32
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

DRIVE_INLINE V<float> smaller(V<float> a, V<float> b) {
#if DRIVE_WIDTH == 64
  return _mm512_min_ps(a, b);
#elif DRIVE_WIDTH == 32
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Cephes' expf: 2^n times a polynomial of the rest; error below 2 units in the last place.
DRIVE_INLINE V<float> exponential(V<float> x) {
  x = smaller(fill(88.0f), larger(fill(-87.0f), x));
  const Integers n = __builtin_convertvector(x * 1.44269504f + (x > 0.0f ? fill(0.5f) : fill(-0.5f)), Integers);
  const V<float> whole = __builtin_convertvector(n, V<float>);
  x = fma(whole, fill(2.12194440e-4f), fma(whole, fill(-0.693359375f), x));
  V<float> p = fill(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = fma(p, x, fill(c));
  }
  const Integers bits = (n + 127) << 23;
  return fma(p, x * x, x + 1.0f) * reinterpret_cast<V<float>>(bits);
}

DRIVE_INLINE V<float> clamped(V<float> x, const engine::Finish& f) {
  return smaller(fill(f.high), larger(fill(f.low), x));
}

DRIVE_INLINE V<float> finished(V<float> x, const engine::Finish& f) {
  if (f.then == engine::Activation::silu) return x / (1.0f + exponential(-x));
  if (f.then == engine::Activation::hardswish) {
    return x * smaller(fill(6.0f), larger(fill(0.0f), x + 3.0f)) * (1.0f / 6.0f);
  }
  return clamped(x, f);
}

}  // namespace DRIVE_ISA
}  // namespace drive
