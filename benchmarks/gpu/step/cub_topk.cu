// cub::DeviceTopK on a vector of scores: a rival in the benchmark, no part of the package.
//
// The selection alone: the k largest scores in any order, which of equal ones is left open. Plain C, called
// through ctypes, so that it compiles without PyTorch's headers, in seconds.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#if __has_include(<cub/device/device_topk.cuh>)  // CCCL 3.2
#include <cub/device/device_topk.cuh>

#include <cuda/__execution/determinism.h>
#include <cuda/__execution/output_ordering.h>
#include <cuda/__execution/require.h>
#include <cuda/std/__execution/env.h>
#include <cuda/stream_ref>

// With scratch == nullptr: only sets *scratch_bytes. Returns a cudaError_t.
extern "C" int cub_topk(void* scratch, size_t* scratch_bytes, const float* scores, float* largest, int64_t n,
                        int64_t k, cudaStream_t stream) {
  namespace execution = cuda::execution;
  const auto requirements =
      execution::require(execution::determinism::not_guaranteed, execution::output_ordering::unsorted);
  const auto environment = cuda::std::execution::env{cuda::stream_ref{stream}, requirements};
  return cub::DeviceTopK::MaxKeys(scratch, *scratch_bytes, scores, largest, n, k, environment);
}

#else

extern "C" int cub_topk(void*, size_t*, const float*, float*, int64_t, int64_t, cudaStream_t) { return -1; }

#endif
