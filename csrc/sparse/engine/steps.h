// What a step does to one unit: item i of it, for all that it can be split into.
#pragma once

#include "sparse/engine/program.h"

namespace drive::engine {

// Where things are in this run.
struct Memory {
  float* arena;
  float* const* plain;
  const void* const* constants;
  int64_t batch;

  // Of a thread: room for the sums of an output block.
  float* sums;
};

// A unit, and whose buffers it goes through.
struct Unit {
  int64_t index;
  int thread;
};

void run_item(const Header* step, const Memory& memory, const Unit& unit, int64_t item);

}  // namespace drive::engine
