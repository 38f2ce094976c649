// What taps see of rows that are clipped (Product::clip). Part of kernels.h.

namespace drive {
namespace DRIVE_ISA {

// How far to the left or right: no farther than into the next register.
template <class T>
constexpr int kSight = std::min(Register<T>::N, kLanes / 2) - 1;

template <class T>
using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T, int S>
DRIVE_INLINE void read_row(const T* row, V<T> (&seen)[S]) {
#pragma GCC unroll 32
  for (int s = 0; s < S; ++s) seen[s] = read(row + s * Register<T>::N);
}

#if DRIVE_WIDTH == 64
// Of each shift to the right, which lanes of two neighbouring registers are seen.
template <class T>
struct Seen {
  alignas(64) Int<T> lanes[Register<T>::N][Register<T>::N] = {};

  constexpr Seen() {
    for (int shift = 0; shift < Register<T>::N; ++shift) {
      for (int i = 0; i < Register<T>::N; ++i) lanes[shift][i] = shift + i;
    }
  }
};
template <class T>
constexpr Seen<T> kSeen;

DRIVE_INLINE V<float> choose(V<float> a, V<int32_t> lanes, V<float> b) {
  return _mm512_permutex2var_ps(a, reinterpret_cast<__m512i>(lanes), b);
}
DRIVE_INLINE V<double> choose(V<double> a, V<int64_t> lanes, V<double> b) {
  return _mm512_permutex2var_pd(a, reinterpret_cast<__m512i>(lanes), b);
}

// Where reads begin for a tap that sees a row from `from` on: with the register that this lies in.
template <Look look, class T>
DRIVE_INLINE const T* first_read(const T* from, int32_t offset) {
  return look == Look::straight ? from : from - (offset & (Register<T>::N - 1));
}

// The S registers that it sees, put together from neighbouring ones: a read of 64 bytes that are not in one
// cache line takes two, and reads are what these loops wait for (64 channels of 32x32, 95 % zeros: 1.3 times
// as fast as unaligned reads of rows with zeros between them, such reads masked at the ends 1.2 times).
template <Look look, class T, int S>
DRIVE_INLINE void see(const T* from, int32_t offset, V<T> (&seen)[S]) {
  if constexpr (look == Look::straight) return read_row(from, seen);
  constexpr int N = Register<T>::N;
  const V<Int<T>> lanes = read(kSeen<T>.lanes[offset & (N - 1)]);
  V<T> a = look == Look::left ? V<T>{} : read(from);
#pragma GCC unroll 32
  for (int s = 0; s < S; ++s) {
    V<T> b = look == Look::right && s + 1 == S ? V<T>{} : read(from + (s + 1) * N);
    keep_in_register(b);
    seen[s] = choose(a, lanes, b);
    a = b;
  }
}
#else
// From the lowest bits of an offset on: of a row's first register, which lanes of a tap that looks to the
// left see something inside it, all bits or none, and of its last one, if the tap looks to the right.
template <class T>
struct Inside {
  Int<T> left[Register<T>::N + kLanes] = {}, right[Register<T>::N + kLanes] = {};

  constexpr Inside() {
    for (int i = 0; i < Register<T>::N + kLanes; ++i) {
      left[i] = i < kLanes ? 0 : -1;
      right[i] = i < Register<T>::N ? -1 : 0;
    }
  }
};
template <class T>
constexpr Inside<T> kInside;

template <Look look, class T>
DRIVE_INLINE const T* first_read(const T* from, int32_t) {
  return from;
}

template <Look look, class T, int S>
DRIVE_INLINE void see(const T* from, int32_t offset, V<T> (&seen)[S]) {
  read_row(from, seen);
  if constexpr (look == Look::straight) return;
  const Int<T>* const inside = look == Look::left ? kInside<T>.left : kInside<T>.right;
  V<T>& last = seen[look == Look::left ? 0 : S - 1];
  const V<Int<T>> lanes = read(inside + (offset & (kLanes - 1)));
  last = reinterpret_cast<V<T>>(reinterpret_cast<V<Int<T>>>(last) & lanes);
}
#endif

}  // namespace DRIVE_ISA
}  // namespace drive
