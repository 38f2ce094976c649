// Registers a CUDA kernel for the GPUs that it was compiled for. On others the op goes on as
// drive_fallback::<name>, of the same schema, which drive_kernels/registry.py serves.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

#include "common/served.h"

namespace drive {

// By an op's first argument. What is not on a GPU is the kernel's to refuse.
inline bool served(const at::Tensor& first) {
  return !first.is_cuda() || why_not_served(first.device().index()) == nullptr;
}
inline bool served(at::TensorList first) { return first.empty() || served(first[0]); }

template <auto kernel>
struct WhereServed;

template <class Result, class First, class... Rest, Result (*kernel)(First, Rest...)>
struct WhereServed<kernel> {
  inline static const char* name = nullptr;

  static Result call(First first, Rest... rest) {
    if (C10_LIKELY(served(first))) return kernel(first, rest...);
    static const auto fallback = c10::Dispatcher::singleton()
                                     .findSchemaOrThrow(("drive_fallback::" + std::string(name)).c_str(), "")
                                     .template typed<Result(First, Rest...)>();
    // straight to its kernel: what comes before kernels, autograd say, has been done
    return fallback.redispatch(c10::DispatchKeySet(c10::DispatchKey::CUDA), first, rest...);
  }
};

template <auto kernel>
void implement(torch::Library& library, const char* name) {
  WhereServed<kernel>::name = name;
  library.impl(name, &WhereServed<kernel>::call);
}

}  // namespace drive
