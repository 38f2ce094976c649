// The sparse ops' inner loops, compiled for each instruction set.
#include "sparse/isa.h"

#include <algorithm>
#include <type_traits>

#define DRIVE_KERNELS "sparse/kernels/kernels.h"
#include "common/each_isa.h"

namespace drive {

template <class T>
const SparseKernels<T>& sparse_kernels() {
  static const SparseKernels<T> chosen = DRIVE_CHOOSE(sparse_kernels_of<T>());
  return chosen;
}

template const SparseKernels<float>& sparse_kernels<float>();
template const SparseKernels<double>& sparse_kernels<double>();

}  // namespace drive
