// The inner loops of the engine, included once for each instruction set (common/each_isa.h).

#include "sparse/kernels/register.h"

#include "sparse/engine/kernels/finish.h"
#include "sparse/engine/kernels/tile.h"
#include "sparse/engine/kernels/move.h"
#include "sparse/engine/kernels/planes.h"

namespace drive {
namespace DRIVE_ISA {

inline engine::Kernels engine_kernels() {
  engine::Kernels found{};
  tile_kernels(found, std::make_integer_sequence<int, engine::kMostRows * engine::kMostCols>());
  found.move = &move;
  found.add = &add;
  found.scale = &scale;
  found.largest = &largest;
  found.accumulate = &accumulate;
  found.gather = &gather;
  found.most_sums = kMostSums;
  return found;
}

}  // namespace DRIVE_ISA
}  // namespace drive
