// csrc/**/*.cu as a Python module, and kernels with mistakes that the emulation must notice.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "common/implement.h"
#include "prune/cuda/prune.cu"
#include "prune/cuda/shards.cu"

namespace drive {

// In place of csrc/common/served.cu: the device runs what a test says.
static const char* fault = nullptr;
const char* why_not_served(c10::DeviceIndex) { return fault; }

}  // namespace drive

namespace {

using Prune = drive::WhereServed<drive::prune_cuda>;
using Tensors = std::vector<at::Tensor>;

// A tensor that says that it is on a GPU; it has no memory.
at::Tensor on_gpu() {
  return at::detail::make_tensor<c10::TensorImpl>(c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                                  caffe2::TypeMeta::Make<float>(), c10::Device(c10::kCUDA, 1));
}

// Each thread reads its neighbour's number: without the barrier, perhaps before it is written.
__global__ void neighbours(bool barrier, int* sum) {
  __shared__ int numbers[64];
  const int i = static_cast<int>(threadIdx.x);
  numbers[i] = 0;
  __syncthreads();
  numbers[i] = i + 1;
  if (barrier) __syncthreads();
  *sum += numbers[(i + 1) % 64];
}

__global__ void diverging() {
  if (threadIdx.x < 7) {
    __ballot_sync(0xffffffffu, 1);
  } else {
    __any_sync(0xffffffffu, 1);
  }
}

__global__ void leaving() {
  if (threadIdx.x < 32) return;
  __syncthreads();
}

// An op of drive::shard_*.
template <class Result, class... Rest>
void define(py::module_& m, const char* name, Result (*op)(at::TensorList, at::TensorList, at::TensorList,
                                                           at::TensorList, bool, bool, at::ArrayRef<double>, Rest...)) {
  m.def(name, [op](const Tensors& weights, const Tensors& grads, const Tensors& mask_grads,
                   const Tensors& masks, bool fresh, bool wide, const std::vector<double>& scales,
                   std::decay_t<Rest>... rest) {
    return op(weights, grads, mask_grads, masks, fresh, wide, scales, rest...);
  });
}

}  // namespace

PYBIND11_MODULE(cuda_on_host, m) {
  m.def("set_order", [](int order) { cuda_on_host::order = order; });
  m.def("prune_", [](Tensors weights, Tensors grads, Tensors mask_grads, Tensors masks, bool fresh,
                     int64_t prune, int64_t min_keep) {
    return Prune::call(weights, grads, mask_grads, masks, fresh, prune, min_keep);
  });
  m.def("prune_to_cost_", [](Tensors weights, Tensors grads, Tensors mask_grads, Tensors masks, bool fresh,
                             std::vector<int64_t> costs, std::vector<double> scales, int64_t max_cost,
                             int64_t min_keep) {
    return drive::prune_to_cost_cuda(weights, grads, mask_grads, masks, fresh, costs, scales, max_cost, min_keep);
  });
  Prune::name = "prune_";
  m.def("prune_on_gpu", [](const char* fault) {
    drive::fault = fault;
    const Tensors weights{on_gpu()};
    const auto outputs = Prune::call(weights, {}, {}, {}, true, 7, 1);
    drive::fault = nullptr;
    return outputs;
  });
  m.def("scratch", [](Tensors weights, Tensors grads, Tensors masks, int64_t min_keep) {
    const drive::PruneArguments arguments{weights, grads, {}, masks, false, 0, min_keep};
    drive::gpu::WorkList list(arguments);
    auto step = drive::planned<int32_t>(arguments, list);
    return drive::lay_out(step, list, 400, nullptr).bytes;
  });
  m.def("divided", [](int64_t n, int64_t size) {
    drive::gpu::Dim dim{size, {}, 0, 0, 0};
    drive::gpu::set_divisor(dim);
    drive::gpu::Item item{};
    item.numel = n + 1;
    return drive::gpu::divided(item, dim, n);
  });
  define(m, "shard_sample", drive::shard_sample_cuda);
  define(m, "shard_survey", drive::shard_survey_cuda);
  define(m, "shard_histogram", drive::shard_histogram_cuda);
  define(m, "shard_split", drive::shard_split_cuda);
  define(m, "shard_ties", drive::shard_ties_cuda);
  define(m, "shard_apply_", drive::shard_apply_cuda);
  m.def("checksum", [](Tensors inputs) { return drive::checksum_cuda(inputs); });
  m.def("neighbours", [](bool barrier) {
    int sum = 0;
    drive::launch(neighbours, 1, 64, nullptr, barrier, &sum);
    return sum;
  });
  m.def("diverging", [] { drive::launch(diverging, 1, 32, nullptr); });
  m.def("leaving", [] { drive::launch(leaving, 1, 64, nullptr); });
}
