// The engine's inner loops, compiled for each instruction set.
#include "sparse/engine/isa.h"

#include <algorithm>

#define DRIVE_KERNELS "sparse/engine/kernels/kernels.h"
#include "common/each_isa.h"

namespace drive::engine {

const Kernels& kernels() {
  static const Kernels chosen = DRIVE_CHOOSE(engine_kernels());
  return chosen;
}

}  // namespace drive::engine
