// drive::sparse_linear on CPU: the loops of sparse_conv2d, with rows of the input in place of pixels.
//
//   1. Pieces: up to 16 positions of 16 rows, the lanes, so that the transposed input [I, rows] stays in the
//      L2 cache; output features are split where there would be fewer pieces than threads.
//   2. Every output feature walks its non-zeros: a broadcast of the value, and an FMA a position.
//   3. Sixteen features at a time are transposed back.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <tuple>
#include <vector>

#include "common/recycle.h"
#include "sparse/ops.h"
#include "sparse/pattern.h"
#include "sparse/work.h"

namespace drive {
namespace {

constexpr const char* kOp = "drive::sparse_linear";
constexpr int64_t kFeatures = 16;  // transposed at once
constexpr int64_t kMostPositions = 16;
constexpr int64_t kFewRows = 2;  // at most so many gain from gathers

// The rows of a matrix [rows, features], some positions of kLanes rows at a time.
struct Pieces {
  int64_t rows, features, positions, count, groups;

  // `features`: of the matrix that is kept in the cache; `others` are split over threads.
  Pieces(int64_t rows_, int64_t features_, int64_t others, size_t entry)
      : rows(rows_), features(others) {
    const int64_t all = (rows + kLanes - 1) / kLanes;
    const int64_t fit = static_cast<int64_t>(kShareOfL2 * l2_bytes()) /
                        std::max<int64_t>(features_ * kLanes * static_cast<int64_t>(entry), 1);
    const int64_t most = std::clamp<int64_t>(fit, 1, kMostPositions);
    count = (all + most - 1) / most;
    positions = (all + count - 1) / count;
    const int64_t threads = at::get_num_threads();
    const int64_t sixteens = (features + kFeatures - 1) / kFeatures;
    groups = count % threads == 0 || count >= 4 * threads ? 1 : std::min(threads, sixteens);
    TORCH_CHECK_VALUE(features_ * stride() < std::numeric_limits<int32_t>::max(), kOp,
                      ": input must have fewer than 2^27 features, got ", features_);
  }

  int64_t stride() const { return positions * kLanes; }

  // body(first row, position count, first feature, last feature, are the rows others than before?)
  template <class Body>
  void run(const Body& body) const {
    at::parallel_for(0, count * groups, 1, [&](int64_t begin, int64_t end) {
      int64_t before = -1;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t piece = i / groups, group = i % groups, row = piece * stride();
        const int64_t here = std::min(positions, (rows - row + kLanes - 1) / kLanes);
        const auto feature = [&](int64_t g) {
          return std::min(features, features * g / groups / kFeatures * kFeatures);
        };
        body(row, here, feature(group), group + 1 == groups ? features : feature(group + 1), piece != before);
        before = piece;
      }
    });
  }
};

// Features [begin, end) of some rows, between a matrix [rows, features] and lanes.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, features;

  template <class Move>
  void each(const Pieces& pieces, int64_t row, int64_t positions, int64_t begin, int64_t end,
            Move move) const {
    std::array<int32_t, kFeatures> offsets;
    for (int64_t j = 0; j < kFeatures; ++j) offsets[j] = static_cast<int32_t>(j * pieces.stride());
    for (int64_t p = 0; p < positions; ++p) {
      const int64_t r = row + p * kLanes;
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, rows - r));
      for (int64_t f = begin; f < end; f += kFeatures) {
        move(data + r * features + f, lanes, static_cast<int>(std::min(kFeatures, end - f)),
             (f - begin) * pieces.stride() + p * kLanes, offsets.data());
      }
    }
  }

  void load(const Pieces& pieces, int64_t row, int64_t positions, int64_t begin, int64_t end, T* to) const {
    const auto move = [&](T* at, int lanes, int cols, int64_t offset, const int32_t* o) {
      sparse_kernels<T>().to_lanes(at, features, lanes, cols, to + offset, o);
    };
    each(pieces, row, positions, begin, end, move);
  }

  void store(const Pieces& pieces, int64_t row, int64_t positions, int64_t begin, int64_t end,
             const T* from) const {
    const auto move = [&](T* at, int lanes, int cols, int64_t offset, const int32_t* o) {
      sparse_kernels<T>().from_lanes(from + offset, o, at, features, lanes, cols);
    };
    each(pieces, row, positions, begin, end, move);
  }
};

template <class T>
Matrix<T> matrix(const at::Tensor& t) {
  return {t.data_ptr<T>(), t.size(0), t.size(1)};
}

// Where the non-zeros of each feature are, and which values they have: as packed, or at `packed` among them.
template <class T>
struct Entries {
  const int32_t *start, *feature, *packed;
  const T* values;
  int64_t features, stride;

  int64_t count(int64_t f) const { return start[f + 1] - start[f]; }
  int64_t count() const { return start[features]; }

  void make(int64_t begin, int64_t end, Tap<T>* to) const {
    constexpr int64_t kAhead = 48;  // values that lie anywhere: backward to the input is 1.3 times as fast
    for (int64_t i = begin; i < end; ++i) {
      if (packed) __builtin_prefetch(values + packed[std::min(i + kAhead, end - 1)]);
      *to++ = {static_cast<int32_t>(feature[i] * stride), values[packed ? packed[i] : i]};
    }
  }
};

// The taps of some features at a time: made when they are needed, while they are in the cache, or, where
// several pieces need them, all beforehand.
template <class T>
class FeatureTaps {
 public:
  FeatureTaps(const Entries<T>& entries, const Pieces& pieces) : entries_(entries) {
    if (pieces.count == 1) return;
    all_ = scratch<Tap<T>>(kTapScratch, entries.count());
    at::parallel_for(0, entries.count(), kTapGrain, [&](int64_t begin, int64_t end) {
      entries_.make(begin, end, all_ + begin);
    });
  }

  // Those of features [begin, end), one feature's after the other's; valid until the next call.
  const Tap<T>* of(int64_t begin, int64_t end) const {
    const int64_t first = entries_.start[begin], last = entries_.start[end];
    if (all_) return all_ + first;
    Tap<T>* const some = scratch<Tap<T>>(kTapScratch, last - first);
    entries_.make(first, last, some);
    return some;
  }
  int64_t count(int64_t feature) const { return entries_.count(feature); }
  const int32_t* start(int64_t feature) const { return entries_.start + feature; }

 private:
  Entries<T> entries_;
  Tap<T>* all_ = nullptr;
};

// out = in * entries + bias
template <class T>
void multiply(const Matrix<T>& in, const Matrix<T>& out, const Pieces& pieces, const Entries<T>& entries,
              const T* bias) {
  const FeatureTaps<T> taps(entries, pieces);
  const auto multiply = sparse_kernels<T>().multiply;
  pieces.run([&](int64_t row, int64_t positions, int64_t begin, int64_t end, bool moved) {
    T* const lanes = scratch<T>(kInputScratch, in.features * pieces.stride());
    T* const sums = scratch<T>(kOutputScratch, kFeatures * pieces.stride());
    if (moved) in.load(pieces, row, positions, 0, in.features, lanes);
    for (int64_t f = begin; f < end; f += kFeatures) {
      const int64_t last = std::min(f + kFeatures, end);
      multiply({.in = lanes,
                .in_pitch = 0,
                .taps = taps.of(f, last),
                .start = taps.start(f),
                .outputs = last - f,
                .rows = 1,
                .cols = positions,
                .out = sums,
                .out_pitch = 0,
                .out_size = pieces.stride(),
                .bias = bias ? bias + f : nullptr});
      out.store(pieces, row, positions, f, last, sums);
    }
  });
}

// Few rows would leave most lanes idle: there a dot product for each entry of the output.
template <class T>
void multiply_few(const at::Tensor& input, const at::Tensor& output, const T* values, const Pattern& pattern,
                  const T* bias) {
  const Matrix<T> in = matrix<T>(input), out = matrix<T>(output);
  const auto dot = sparse_kernels<T>().dot;
  const int64_t grain = channel_grain(out.features, pattern.count * in.rows);
  at::parallel_for(0, out.features, grain, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const int32_t first = pattern.row_start[o], count = pattern.row_start[o + 1] - first;
      for (int64_t r = 0; r < in.rows; ++r) {
        const T product = dot(values + first, pattern.column + first, count, in.data + r * in.features);
        out.data[r * out.features + o] = product + (bias ? bias[o] : T(0));
      }
    }
  });
}

template <class T>
at::Tensor forward(const at::Tensor& input, const T* values, const Pattern& pattern, const T* bias,
                   int64_t features) {
  at::Tensor output = empty_recycled({input.size(0), features}, input.options());
  if (output.numel() == 0) return output;
  if (input.size(0) <= kFewRows) {
    multiply_few(input, output, values, pattern, bias);
    return output;
  }
  const Pieces pieces(input.size(0), input.size(1), features, sizeof(T));
  const Entries<T> entries{pattern.row_start, pattern.column, nullptr, values, features, pieces.stride()};
  multiply(matrix<T>(input), matrix<T>(output), pieces, entries, bias);
  return output;
}

template <class T>
at::Tensor backward_input(const at::Tensor& grad, const T* values, const Pattern& pattern, int64_t features) {
  at::Tensor output = empty_recycled({grad.size(0), features}, grad.options());
  if (output.numel() == 0) return output;
  const Pieces pieces(grad.size(0), grad.size(1), features, sizeof(T));
  const Entries<T> entries{pattern.column_start, pattern.row, pattern.packed, values, features,
                           pieces.stride()};
  multiply<T>(matrix<T>(grad), matrix<T>(output), pieces, entries, nullptr);
  return output;
}

// The gradient to the packed values.
template <class T>
at::Tensor backward_values(const at::Tensor& grad, const at::Tensor& input, const T* values,
                           const Pattern& pattern) {
  const Matrix<T> in = matrix<T>(input), out = matrix<T>(grad);
  const Pieces pieces(in.rows, in.features, out.features, sizeof(T));
  // Pieces that differ in their output features only write different sums.
  const int64_t copies = pieces.count == 1 ? 1 : at::get_num_threads();
  at::Tensor sums = input.new_zeros({copies, pattern.count});
  if (input.numel() == 0 || grad.numel() == 0) return sums.sum(0);
  const FeatureTaps<T> taps(
      Entries<T>{pattern.row_start, pattern.column, nullptr, values, out.features, pieces.stride()}, pieces);
  const auto sample = sparse_kernels<T>().sample;
  pieces.run([&](int64_t row, int64_t positions, int64_t begin, int64_t end, bool moved) {
    T* const lanes = scratch<T>(kInputScratch, in.features * pieces.stride());
    T* const grads = scratch<T>(kOutputScratch, kFeatures * pieces.stride());
    T* const mine = sums.data_ptr<T>() + (copies == 1 ? 0 : at::get_thread_num() * pattern.count);
    if (moved) in.load(pieces, row, positions, 0, in.features, lanes);
    for (int64_t f = begin; f < end; f += kFeatures) {
      const int64_t last = std::min(f + kFeatures, end);
      out.load(pieces, row, positions, f, last, grads);
      const Tap<T>* tap = taps.of(f, last);
      for (int64_t o = f; o < last; tap += taps.count(o++)) {
        sample({lanes, 0, tap, taps.count(o), 1, positions, grads + (o - f) * pieces.stride(), 0,
                mine + pattern.row_start[o]});
      }
    }
  });
  return copies == 1 ? sums[0] : sums.sum(0);
}

void check_arguments(const at::Tensor& input, const at::Tensor& values, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(shape.size() == 2, kOp, ": shape must be that of a weight [O, I], got ", shape);
  TORCH_CHECK_TYPE(at::isFloatingType(input.scalar_type()), kOp,
                   ": input must be floating-point, got ", input.scalar_type());
  TORCH_CHECK_TYPE(values.scalar_type() == input.scalar_type(), kOp, ": values must be ", input.scalar_type(),
                   ", as input is, got ", values.scalar_type());
  TORCH_CHECK_VALUE(input.dim() > 0 && input.size(-1) == shape[1], kOp, ": input must have ", shape[1],
                    " features, got ", input.sizes());
}

at::Tensor rows_of(const at::Tensor& t) { return t.contiguous().view({-1, t.size(-1)}); }

}  // namespace

at::Tensor sparse_linear_cpu(const at::Tensor& input, const at::Tensor& values, at::TensorList pattern,
                             const Maybe& bias, at::IntArrayRef shape) {
  if (is_half(input) && values.scalar_type() == input.scalar_type()) {
    return sparse_linear_cpu(widened(input), widened(values), pattern, bias, shape).to(input.scalar_type());
  }
  check_arguments(input, values, shape);
  const Pattern where(kOp, pattern, shape[0], shape[1], values);
  std::vector<int64_t> size = input.sizes().vec();
  size.back() = shape[0];
  if (input.numel() == 0) return bias ? bias->expand(size).contiguous() : input.new_zeros(size);
  const at::Tensor x = rows_of(input), v = values.contiguous();
  const at::Tensor b = bias ? bias->to(x.scalar_type()).contiguous() : at::Tensor();
  if (bias) {
    TORCH_CHECK_VALUE(b.dim() == 1 && b.numel() == shape[0], kOp, ": bias must have shape [", shape[0],
                      "], got ", b.sizes());
  }
  return AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), kOp, [&] {
    const scalar_t* const offset = bias ? b.data_ptr<scalar_t>() : nullptr;
    return forward<scalar_t>(x, v.data_ptr<scalar_t>(), where, offset, shape[0]).view(size);
  });
}

Gradients sparse_linear_backward_cpu(const at::Tensor& grad, const at::Tensor& input,
                                     const at::Tensor& values, at::TensorList pattern,
                                     at::IntArrayRef shape, std::array<bool, 3> needed) {
  if (is_half(input) && values.scalar_type() == input.scalar_type()) {
    return narrowed(
        sparse_linear_backward_cpu(widened(grad), widened(input), widened(values), pattern, shape, needed),
        input.scalar_type());
  }
  check_arguments(input, values, shape);
  const Pattern where(kOp, pattern, shape[0], shape[1], values);
  const at::Tensor none = input.new_empty({0});
  Gradients gradients{none, none.clone(), none.clone()};
  if (input.numel() == 0 || grad.numel() == 0) {
    if (needed[0]) std::get<0>(gradients) = input.new_zeros(input.sizes());
    if (needed[1]) std::get<1>(gradients) = values.new_zeros(values.sizes());
    if (needed[2]) std::get<2>(gradients) = grad.reshape({-1, shape[0]}).sum(0);
    return gradients;
  }
  const at::Tensor g = rows_of(grad), x = rows_of(input), v = values.contiguous();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), kOp, [&] {
    if (needed[0]) {
      const at::Tensor found = backward_input<scalar_t>(g, v.data_ptr<scalar_t>(), where, shape[1]);
      std::get<0>(gradients) = found.view(input.sizes());
    }
    if (needed[1]) std::get<1>(gradients) = backward_values<scalar_t>(g, x, v.data_ptr<scalar_t>(), where);
  });
  if (needed[2]) std::get<2>(gradients) = g.sum(0);
  return gradients;
}

}  // namespace drive
