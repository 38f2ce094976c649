#include "sparse/engine/steps.h"

#include <algorithm>
#include <limits>

#include "sparse/engine/isa.h"

namespace drive::engine {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Finish finish_of(int64_t act) {
  switch (act) {
    case 1: return {0, kInfinity, Activation::none};
    case 2: return {0, 6, Activation::none};
    case 3: return {-kInfinity, kInfinity, Activation::silu};
    case 4: return {-kInfinity, kInfinity, Activation::hardswish};
    default: return {-kInfinity, kInfinity, Activation::none};
  }
}

// A unit's field, and the slice of channels that a value is.
struct Field {
  float* data;
  int64_t row, channel;  // floats

  Field(const Place& p, const Memory& m, int64_t unit, int thread)
      : row(p.channels * (p.cols + 2 * p.left) * kLanes), channel((p.cols + 2 * p.left) * kLanes) {
    float* const begin = m.arena + p.base + p.unit * (p.ring ? unit % p.ring : unit) + p.thread * thread;
    data = begin + p.top * row + p.first * channel + p.left * kLanes;
  }
  Field(const Place& p, const Memory& m, const Unit& u) : Field(p, m, u.index, u.thread) {}

  float* at(int64_t y, int64_t c, int64_t x) const { return data + y * row + c * channel + x * kLanes; }
};

template <class T>
const T* constant(const Memory& m, int64_t index) {
  return static_cast<const T*>(m.constants[index]);
}

// Piece i of `size`, of pieces that differ by one at most and are no larger than `most`.
struct Span {
  int64_t begin, size;
};
int64_t spans(int64_t size, int64_t most) { return (size + most - 1) / most; }
Span span(int64_t size, int64_t most, int64_t i) {
  const int64_t n = spans(size, most), begin = size * i / n;
  return {begin, size * (i + 1) / n - begin};
}

void run(const ConvStep& s, const Memory& m, const Unit& unit, int64_t item) {
  const Field in(s.in, m, unit), out(s.out, m, unit);
  const int64_t blocks = spans(s.outputs, s.block), across = spans(s.out.cols, s.tile[1]);
  const int64_t o0 = item % blocks * s.block, outputs = std::min(s.block, s.outputs - o0), place = item / blocks;
  const Span y = span(s.out.rows, s.tile[0], place / across), x = span(s.out.cols, s.tile[1], place % across);
  Tile t{};
  t.in = reinterpret_cast<const char*>(in.at(y.begin * s.stride[0], 0, x.begin * s.stride[1]));
  t.in_row = s.stride[0] * in.row * sizeof(float);
  t.in_col = s.stride[1] * kLanes * sizeof(float);
  t.taps = constant<Tap<float>>(m, s.taps) + constant<int64_t>(m, s.starts)[item % blocks];
  t.counts = constant<int32_t>(m, s.counts) + o0 * s.in_blocks;
  t.outputs = outputs;
  t.sums = m.sums;
  t.bias = constant<float>(m, s.bias) + o0;
  t.out = out.at(y.begin, o0, x.begin);
  t.out_channel = out.channel;
  t.out_row = out.row;
  if (s.residual.base >= 0) {
    const Field residual(s.residual, m, unit);
    t.residual = residual.at(y.begin, o0, x.begin);
    t.residual_channel = residual.channel;
    t.residual_row = residual.row;
  }
  t.finish = finish_of(s.act);
  const int64_t by = s.stride[1] <= 2 ? s.stride[1] - 1 : 2;
  const TileKernel kernel = kernels().tiles[y.size - 1][x.size - 1][by];
  for (int64_t b = 0; b < s.in_blocks; ++b, t.counts += outputs) {
    t.first = b == 0;
    t.last = b == s.in_blocks - 1;
    t.taps = kernel(t);
  }
}

void run(const MoveStep& s, const Memory& m, const Unit& unit, int64_t item) {
  const Field from(s.from, m, unit.index * s.units, unit.thread), to(s.to, m, unit);
  const int64_t row = item / s.chunks, chunk = item % s.chunks;
  const int64_t c0 = s.channels * chunk / s.chunks, c1 = s.channels * (chunk + 1) / s.chunks;
  const int32_t* const rows = constant<int32_t>(m, s.rows);
  Moved moved{};
  moved.from = from.at(0, c0, 0);
  moved.from_channel = from.channel;
  moved.to_channel = to.channel;
  moved.shuffles = constant<Shuffle>(m, s.shuffles);
  moved.channels = c1 - c0;
  moved.fill = s.lowest ? -kInfinity : 0.0f;
  for (int64_t p = rows[row]; p < rows[row + 1]; ++p) {
    const int32_t* const position = constant<int32_t>(m, s.positions) + p * 3;
    moved.to = to.at(0, c0, 0) + position[0];
    moved.pieces = constant<Piece>(m, s.pieces) + position[1];
    moved.count = position[2];
    kernels().move(moved);
  }
}

// Lanes of images that the batch has.
uint16_t present(const Memory& m, int64_t first_image, int64_t images) {
  const int64_t lanes = kLanes / images * std::min(images, m.batch - first_image);
  return static_cast<uint16_t>((1u << lanes) - 1);
}

void run(const EnterStep& s, const Memory& m, const Unit& unit, int64_t row) {
  const Field to(s.to, m, unit);
  const int64_t cols = s.to.cols + 2 * s.to.left, image = unit.index * s.images;
  const uint16_t there = present(m, image, s.images);
  for (int64_t c = 0; c < s.channels; ++c) {
    const float* const from = m.plain[s.plain] + image * s.image + c * s.channel;
    for (int64_t x = 0; x < cols; ++x) {
      const int64_t p = row * cols + x;
      kernels().gather(from, constant<int32_t>(m, s.offsets) + p * kLanes,
                       constant<uint16_t>(m, s.masks)[p] & there, 0.0f,
                       to.at(row - s.to.top, c, x - s.to.left));
    }
  }
}

void run(const LeaveStep& s, const Memory& m, const Unit& unit, int64_t row) {
  const Field from(s.from, m, unit);
  const int64_t image = unit.index * s.images;
  const uint16_t there = present(m, image, s.images);
  for (int64_t c = 0; c < s.channels; ++c) {
    float* const to = m.plain[s.plain] + image * s.image + c * s.channel;
    for (int64_t x = 0; x < s.from.cols; ++x) {
      const int64_t p = row * s.from.cols + x;
      const int32_t* const offsets = constant<int32_t>(m, s.offsets) + p * kLanes;
      const float* const lanes = from.at(row, c, x);
      for (unsigned left = constant<uint16_t>(m, s.masks)[p] & there; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        to[offsets[lane]] = lanes[lane];
      }
    }
  }
}

void run(const MeanStep& s, const Memory& m, const Unit& unit, int64_t item) {
  const Field from(s.from, m, unit);
  const uint16_t* const masks = constant<uint16_t>(m, s.masks);
  const int64_t image = unit.index * s.images, images = std::min(s.images, m.batch - image);
  const int64_t lanes = kLanes / s.images, items = s.header.items;
  for (int64_t c = s.channels * item / items; c < s.channels * (item + 1) / items; ++c) {
    alignas(64) float sums[kLanes] = {};
    for (int64_t y = 0; y < s.from.rows; ++y) {
      for (int64_t x = 0; x < s.from.cols; ++x) {
        kernels().accumulate(from.at(y, c, x), masks[y * s.from.cols + x], sums);
      }
    }
    for (int64_t i = 0; i < images; ++i) {
      float sum = 0;
      for (int64_t lane = i * lanes; lane < (i + 1) * lanes; ++lane) sum += sums[lane];
      m.plain[s.plain][(image + i) * s.channels + c] = sum / static_cast<float>(s.pixels);
    }
  }
}

void run(const PoolStep& s, const Memory& m, const Unit& unit, int64_t row) {
  const Field in(s.in, m, unit), out(s.out, m, unit);
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t x = 0; x < s.out.cols; ++x) {
      kernels().largest(in.at(row * s.stride[0] - s.padding[0], c, x * s.stride[1] - s.padding[1]), s.kernel[0],
                        s.dilation[0] * in.row, s.kernel[1], s.dilation[1] * kLanes, out.at(row, c, x));
    }
  }
}

void run(const AddStep& s, const Memory& m, const Unit& unit, int64_t row) {
  const Field a(s.a, m, unit), b(s.b, m, unit), out(s.out, m, unit);
  const Finish finish = finish_of(s.act);
  for (int64_t c = 0; c < s.channels; ++c) {
    const float* const other = s.b.base >= 0 ? b.at(row, c, 0) : nullptr;
    kernels().add(a.at(row, c, 0), other, out.at(row, c, 0), s.out.cols, finish);
  }
}

void run(const ScaleStep& s, const Memory& m, const Unit& unit, int64_t row) {
  const Field a(s.a, m, unit), out(s.out, m, unit);
  const int64_t image = unit.index * s.images, lanes = kLanes / s.images;
  for (int64_t c = 0; c < s.channels; ++c) {
    alignas(64) float by[kLanes] = {};
    for (int64_t i = 0; i < std::min(s.images, m.batch - image); ++i) {
      std::fill_n(by + i * lanes, lanes, m.plain[s.plain][(image + i) * s.channels + c]);
    }
    kernels().scale(a.at(row, c, 0), by, out.at(row, c, 0), s.out.cols);
  }
}

template <class Step>
void run_as(const Header* step, const Memory& m, const Unit& unit, int64_t item) {
  run(*reinterpret_cast<const Step*>(step), m, unit, item);
}

}  // namespace

void run_item(const Header* step, const Memory& m, const Unit& unit, int64_t item) {
  switch (step->kind) {
    case Kind::conv: return run_as<ConvStep>(step, m, unit, item);
    case Kind::move: return run_as<MoveStep>(step, m, unit, item);
    case Kind::enter: return run_as<EnterStep>(step, m, unit, item);
    case Kind::leave: return run_as<LeaveStep>(step, m, unit, item);
    case Kind::mean: return run_as<MeanStep>(step, m, unit, item);
    case Kind::pool: return run_as<PoolStep>(step, m, unit, item);
    case Kind::add: return run_as<AddStep>(step, m, unit, item);
    case Kind::scale: return run_as<ScaleStep>(step, m, unit, item);
  }
}

}  // namespace drive::engine
