// Launching kernels: the one place with <<<>>>, which the host emulation of the tests replaces.
#pragma once

#if defined(DRIVE_HOST_CUDA)
#include <host_cuda_launch.h>
#else

#include <c10/cuda/CUDAException.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace drive {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream, Args&&... args) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(static_cast<Params>(args)...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace drive

#endif
