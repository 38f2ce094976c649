#pragma once

#include <c10/core/Device.h>

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(Device) {}
  ~CUDAGuard() {}  // a variable of a type without one would be called unused
};

}  // namespace c10::cuda
