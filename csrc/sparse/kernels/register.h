// Registers, for the inner loops of the sparse ops (kernels.h).

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

// What is used twice the compiler would rather read twice, as memory operands.
template <class Vector>
DRIVE_INLINE void keep_in_register(Vector& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
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

}  // namespace DRIVE_ISA
}  // namespace drive
