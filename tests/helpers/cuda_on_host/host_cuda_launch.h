// In place of csrc/prune/cuda/launch.cuh's kernel<<<blocks, threads, 0, stream>>>(arguments...).
#pragma once

#include <cuda_runtime.h>

#include <tuple>

namespace drive {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t, Args&&... args) {
  const std::tuple<Params...> copies{static_cast<Params>(args)...};
  cuda_on_host::kernel = [&] { std::apply(kernel, copies); };
  cuda_on_host::run(static_cast<int>(blocks), threads);
}

}  // namespace drive
