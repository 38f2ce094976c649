// What the instruction-set variants of the sparse ops' inner loops share: types, and the table through
// which the one that this processor can run is called.
#pragma once

#include <cstdint>
#include <limits>

namespace drive {

// Images (or rows of a linear layer's input) that are computed together, one a lane: 64 bytes of float32,
// a cache line and the widest register. All kernels see "positions" of kLanes entries.
constexpr int kLanes = 16;

// One non-zero, as the loops use it: multiply what lies `offset` entries further on in the input by value.
template <class T>
struct Tap {
  int32_t offset;
  T value;
};

// Which way a tap looks from its output. Where rows are clipped (Product) they lie multiples of kLanes apart,
// so the lowest bits of a tap's offset tell: below kLanes / 2 it looks so far to the right, from there on to
// the left.
enum class Look { straight, left, right };

constexpr bool looks(Look look, int32_t offset) {
  const bool straight = (offset & (kLanes - 1)) == 0, left = (offset & kLanes / 2) != 0;
  return look == Look::straight ? straight : look == Look::left ? left : !straight && !left;
}

// Of each of several outputs (channels, features):
// out[y][x] = max(floor, residual[y][x] + bias + sum over its taps of value * in[y][x + offset])
template <class T>
struct Product {
  const T* in;
  int64_t in_pitch;      // entries from one row of positions to the next
  const Tap<T>* taps;    // one output's after the other's
  const int32_t* start;  // [outputs + 1]: output o has start[o + 1] - start[o] of them
  int64_t outputs;
  int64_t rows, cols;
  T* out;
  int64_t out_pitch, out_size;  // entries from one row, and from one output, to the next
  const T* residual = nullptr;  // null: zeros; laid out as `out`
  const T* bias = nullptr;      // [outputs]; null: zeros
  T floor = -std::numeric_limits<T>::infinity();
  // Are rows of the input whole rows of positions, as those of the outputs are? Then taps see zeros beyond
  // their ends, and an output's come in the order of Look.
  bool clip = false;
  int64_t strip = 0;  // rows of which all outputs are made before the next rows; 0: all rows
  // While an output is made, the cache lines of the one so many later are fetched, be it the next call's;
  // 0: none.
  int64_t ahead = 0;
};

// sums[k] += sum over positions and lanes of grad[y][x] * in[y][x + offset of tap k]
template <class T>
struct Sampled {
  const T* in;
  int64_t in_pitch;
  const Tap<T>* taps;
  int64_t count;
  int64_t rows, cols;
  const T* grad;
  int64_t grad_pitch;
  T* sums;
};

// Taps whose sums over lanes are made together.
constexpr int kTapsTogether = 8;

template <class T>
struct SparseKernels {
  // Of Products with `clip`: most positions a row, for `multiply` and for `multiply_and_sample`, and most
  // entries that taps may look to the left or right.
  int64_t clipped, clipped_for_both, sight;
  void (*multiply)(const Product<T>&);
  void (*sample)(const Sampled<T>&);
  // Both at once: p's outputs (without residual, bias and floor), and, of the same taps, sums[k] += sum over
  // positions and lanes of x[y][x] * in[y][x + offset of tap k]; x is laid out as p.out. `products`: room for
  // kLanes entries a tap, for taps up to a multiple of kTapsTogether.
  void (*multiply_and_sample)(const Product<T>& p, const T* x, T* products, T* sums);
  // Sum of values[i] * x[at[i]].
  T (*dot)(const T* values, const int32_t* at, int64_t count, const T* x);
  // Runs of `size` entries, whole positions, that follow one another: run r goes to offsets[r * step], unless
  // that is `nowhere`. The cache lines behind them are fetched ahead.
  void (*copy_runs)(const T* from, int64_t runs, int64_t size, const int32_t* offsets, int64_t step,
                    int32_t nowhere, T* to);
  // Entry j of row i goes to lane i at offsets[j]; lanes without a row become 0.
  void (*to_lanes)(const T* from, int64_t row_stride, int rows, int cols, T* to, const int32_t* offsets);
  void (*from_lanes)(const T* from, const int32_t* offsets, T* to, int64_t row_stride, int rows, int cols);
};

// The variant for this processor (common/each_isa.h).
template <class T>
const SparseKernels<T>& sparse_kernels();
extern template const SparseKernels<float>& sparse_kernels<float>();
extern template const SparseKernels<double>& sparse_kernels<double>();

}  // namespace drive
