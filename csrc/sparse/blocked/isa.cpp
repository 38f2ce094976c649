// The loops over blocked images, compiled for each instruction set.
#include "sparse/blocked/isa.h"

#include "sparse/isa.h"

#define DRIVE_KERNELS "sparse/blocked/kernels.h"
#include "common/each_isa.h"

namespace drive {

template <class T>
const BlockedKernels<T>& blocked_kernels() {
  static const BlockedKernels<T> chosen = DRIVE_CHOOSE(blocked_kernels_of<T>());
  return chosen;
}

template const BlockedKernels<float>& blocked_kernels<float>();
template const BlockedKernels<double>& blocked_kernels<double>();

}  // namespace drive
