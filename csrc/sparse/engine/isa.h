// What the instruction-set variants of the engine's inner loops share: types, and the table through which the
// one that this processor can run is called.
//
// A field is [rows + 2 top][channels][cols + 2 left][16] floats: 16 lanes, each a piece of an image's plane, with
// a border of what lies around it. Lanes are never neighbours, so whatever a tap looks at is one aligned vector
// at a distance that is the same for all positions.
#pragma once

#include <cstdint>

#include "sparse/isa.h"  // kLanes, Tap

namespace drive::engine {

enum class Activation : int64_t { none, silu, hardswish };

// max(low, min(high, x)), or what `then` says: bounds are infinite then.
struct Finish {
  float low, high;
  Activation then;
};

// Some outputs (channels) at TY x TX positions, by taps in one block of input channels.
struct Tile {
  const char* in;                    // the vector that a tap of offset 0 sees at the first position
  int64_t in_row, in_col;            // bytes between what neighbouring positions see
  const Tap<float>* taps;            // one output's after the other's; offsets are bytes
  const int32_t* counts;             // [outputs]: how many
  int64_t outputs;
  float* sums;                       // [outputs][TY][TX][16]: those of the blocks before
  const float* bias;                 // [outputs]
  float* out;
  int64_t out_channel, out_row;      // floats between outputs, and between rows
  const float* residual;             // null: none
  int64_t residual_channel, residual_row;
  bool first, last;                  // of the blocks: sums begin with the bias, end in `out`
  Finish finish;
};
// Returns where the taps end.
using TileKernel = const Tap<float>* (*)(const Tile&);

constexpr int kMostRows = 4, kMostCols = 14;

// A vector put together from others: lane i is lane index[i] of the source, where mask has bit i.
struct Shuffle {
  alignas(64) int32_t index[kLanes];
};
struct Piece {
  int32_t offset;   // floats, from the source's first vector of a channel
  uint16_t shuffle;
  uint16_t mask;
};
struct Moved {
  const float* from;
  int64_t from_channel;
  float* to;
  int64_t to_channel;
  const Piece* pieces;
  int64_t count;
  const Shuffle* shuffles;
  int64_t channels;
  float fill;  // of lanes that no piece gives
};

struct Kernels {
  // [rows - 1][cols - 1][by which columns are apart: 1 vector, 2, any]; null: too many sums for the registers.
  TileKernel tiles[kMostRows][kMostCols][3];
  void (*move)(const Moved&);
  // count vectors: to = finish(a + b); b may be null
  void (*add)(const float* a, const float* b, float* to, int64_t count, const Finish&);
  // to = a * by, lane by lane; `by` is one vector
  void (*scale)(const float* a, const float* by, float* to, int64_t count);
  // Largest of rows x cols vectors, `row` and `col` floats apart.
  void (*largest)(const float* from, int64_t rows, int64_t row, int64_t cols, int64_t col, float* to);
  // sum += the lanes of a that mask has
  void (*accumulate)(const float* a, uint16_t mask, float* sum);
  // lane i becomes from[offsets[i]] where mask has bit i, else `fill`
  void (*gather)(const float* from, const int32_t* offsets, uint16_t mask, float fill, float* to);
  int64_t most_sums;  // positions of a tile
};

const Kernels& kernels();

}  // namespace drive::engine
