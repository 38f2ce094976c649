// The inner loops over blocked images, included once for each instruction set (common/each_isa.h). A "plane" is
// `count` positions of kLanes entries.

#include "sparse/kernels/register.h"

namespace drive {
namespace DRIVE_ISA {

// visit(part of the lanes, entry) for every register of a plane, in lanes' order.
#define DRIVE_EACH_REGISTER(i)                                \
  for (int64_t i = 0, n_ = count * kLanes; i < n_; i += kLanes) \
  _Pragma("GCC unroll 8") for (int part = 0; part < Register<T>::kParts; ++part)

// sums[lane] += (x - center), or its square
template <class T, bool kSquare>
DRIVE_TARGET void add_deviations(const T* x, int64_t count, T center, T* sums) {
  constexpr int N = Register<T>::N, L = Register<T>::kParts;
  V<T> sum[L];
  for (int part = 0; part < L; ++part) sum[part] = V<T>{};
  const V<T> c = fill(center);
  DRIVE_EACH_REGISTER(i) {
    const V<T> d = read(x + i + part * N) - c;
    sum[part] = kSquare ? fma(d, d, sum[part]) : sum[part] + d;
  }
  for (int part = 0; part < L; ++part) write(sums + part * N, read(sums + part * N) + sum[part]);
}

// out = max(floor, x * scale[lane] + shift[lane] + residual)
template <class T>
DRIVE_TARGET void affine(const T* x, const T* residual, int64_t count, const T* scale, const T* shift,
                         T floor,
                         T* out) {
  constexpr int N = Register<T>::N;
  const V<T> low = fill(floor);
  DRIVE_EACH_REGISTER(i) {
    const int64_t at = i + part * N;
    V<T> y = fma(read(x + at), read(scale + part * N), read(shift + part * N));
    if (residual) y += read(residual + at);
    write(out + at, y < low ? low : y);
  }
}

template <class T>
DRIVE_INLINE V<T> passed(const T* grad, const T* out, int64_t at) {
  const V<T> g = read(grad + at);
  return !out ? g : read(out + at) > V<T>{} ? g : V<T>{};
}

// With g the gradient where `out`, if given, is above 0: sums[lane] += g, products[lane] += g * (x - center)
template <class T>
DRIVE_TARGET void add_products(const T* grad, const T* out, const T* x, int64_t count, T center, T* sums,
                               T* products) {
  constexpr int N = Register<T>::N, L = Register<T>::kParts;
  V<T> sum[L], product[L];
  for (int part = 0; part < L; ++part) sum[part] = product[part] = V<T>{};
  const V<T> c = fill(center);
  DRIVE_EACH_REGISTER(i) {
    const V<T> g = passed(grad, out, i + part * N);
    sum[part] += g;
    product[part] = fma(g, read(x + i + part * N) - c, product[part]);
  }
  for (int part = 0; part < L; ++part) {
    write(sums + part * N, read(sums + part * N) + sum[part]);
    write(products + part * N, read(products + part * N) + product[part]);
  }
}

// to = g * scale[lane] + x * slope[lane] + shift[lane]; masked, if given, = g
template <class T>
DRIVE_TARGET void combine(const T* grad, const T* out, const T* x, int64_t count, const T* scale,
                          const T* slope, const T* shift, T* to, T* masked) {
  constexpr int N = Register<T>::N;
  DRIVE_EACH_REGISTER(i) {
    const int64_t at = i + part * N;
    const V<T> g = passed(grad, out, at);
    if (masked) write(masked + at, g);
    const V<T> line = fma(read(x + at), read(slope + part * N), read(shift + part * N));
    write(to + at, fma(g, read(scale + part * N), line));
  }
}

template <class T>
BlockedKernels<T> blocked_kernels_of() {
  return {&add_deviations<T, false>, &add_deviations<T, true>, &affine<T>, &add_products<T>, &combine<T>};
}

#undef DRIVE_EACH_REGISTER

}  // namespace DRIVE_ISA
}  // namespace drive
