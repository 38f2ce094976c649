// The inner loops of the sparse ops on CPU, included once for each instruction set (common/each_isa.h).

#include "sparse/kernels/register.h"
#include "sparse/kernels/clip.h"

#include "sparse/kernels/multiply.h"
#include "sparse/kernels/gradients.h"
#include "sparse/kernels/dot.h"
#include "sparse/kernels/lanes.h"

namespace drive {
namespace DRIVE_ISA {

template <class T>
SparseKernels<T> sparse_kernels_of() {
  return {Multiply<T, true>::kPositions,
          Gradients<T, true>::kPositions,
          kSight<T>,
          &multiply<T>,
          &sample<T>,
          &multiply_and_sample<T>,
          &dot<T>,
          &copy_runs<T>,
          &to_lanes<T>,
          &from_lanes<T>};
}

}  // namespace DRIVE_ISA
}  // namespace drive
