// A program: the steps of a network, as the planner writes them (drive/sparse/frozen/program.py), all of them
// numbers. A unit is a group of images, the lanes of one field; a phase is a run of steps with units of one size.
#pragma once

#include <cstdint>

namespace drive::engine {

// Where a value's units lie in the arena, and a unit's field there. Sizes in floats.
struct Place {
  int64_t base;    // -1: there is none
  int64_t unit;    // from one unit to the next
  int64_t thread;  // from one thread's units to the next one's; 0: they are shared
  int64_t ring;    // so many units have room, then the first one's is used again; 0: all have
  int64_t first;   // of the channels: the value is a slice of a field
  int64_t channels, rows, cols, top, left;  // of the field
};

enum class Kind : int64_t { conv, move, enter, leave, mean, pool, add, scale };

struct Header {
  Kind kind;
  int64_t size;   // of the step, in numbers
  int64_t items;  // into which it can be split
};

// Tensors are numbers in the lists of constants or of plain tensors, [N, C, H, W] or [N, C].
struct ConvStep {
  Header header;
  Place in, out, residual;
  int64_t taps, counts, starts, bias;  // pack.cpp
  int64_t outputs, block, in_blocks;   // output channels; of them together; blocks of input channels
  int64_t stride[2], tile[2];          // tile: rows and columns of outputs in registers, at most
  int64_t act;
};

struct MoveStep {
  Header header;
  Place from, to;
  int64_t units;  // of `from` that become one of `to`
  int64_t positions, pieces, shuffles, rows;  // [n][3]: offset in `to`, first piece, pieces; rows: [n] first position
  int64_t row_count, chunks, channels;
  int64_t lowest;  // is the fill the lowest number (for pools), not 0?
};

struct EnterStep {
  Header header;
  int64_t plain, image;  // the tensor, and an image's size in it
  int64_t images;        // a unit
  Place to;
  int64_t offsets, masks;  // [rows + borders][cols + borders][16]: in a channel of `plain`, of a unit's first image
  int64_t channel, channels;  // size of a channel in `plain`; how many
};

struct LeaveStep {
  Header header;
  Place from;
  int64_t plain, image, images;
  int64_t offsets, masks;  // [rows][cols][16]
  int64_t channel, channels;
};

struct MeanStep {
  Header header;
  Place from;
  int64_t plain, images;
  int64_t masks, pixels, channels;
};

struct PoolStep {
  Header header;
  Place in, out;
  int64_t kernel[2], stride[2], padding[2], dilation[2], channels;
};

struct AddStep {
  Header header;
  Place a, b, out;
  int64_t channels, act;
};

struct ScaleStep {
  Header header;
  Place a, out;
  int64_t plain, images, channels;
};

struct Phase {
  int64_t units;         // in the batch
  int64_t ratio;         // units of the phase before that one unit of this one is made of
  int64_t begin, end;    // of its steps, in the program
};

}  // namespace drive::engine
