// Whether a GPU can run what was compiled: all of it is compiled for the same architectures, so one kernel shows.
#include "common/served.h"

#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAMacros.h>
#include <cuda_runtime.h>

#include <array>
#include <atomic>

namespace drive {
namespace {

__global__ void nothing() {}

// The driver's answer: there is machine code of the device's architecture, or PTX that it can compile.
cudaError_t ask(c10::DeviceIndex device) {
  const c10::DeviceGuard guard(c10::Device(c10::kCUDA, device));
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
  switch (error) {
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:  // PTX of a toolkit newer than the driver
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled: static_cast<void>(cudaGetLastError()); return error;
    default: C10_CUDA_CHECK(error); return error;
  }
}

}  // namespace

const char* why_not_served(c10::DeviceIndex device) {
  static std::array<std::atomic<int>, C10_COMPILE_TIME_MAX_GPUS> answers;  // 1 + cudaError_t; 0: not asked yet
  std::atomic<int>& answer = answers.at(device);
  if (answer.load(std::memory_order_relaxed) == 0) answer.store(1 + ask(device), std::memory_order_relaxed);
  const auto error = static_cast<cudaError_t>(answer.load(std::memory_order_relaxed) - 1);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace drive
