// drive_kernels._C: build facts. Loading it registers the ops' compiled kernels.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#if defined(DRIVE_WITH_CUDA)
#include "common/served.h"
#endif

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", __VERSION__},
#if defined(__x86_64__)
      {"cpu variants", "portable, AVX2, AVX-512"},
#else
      {"cpu variants", "portable"},
#endif
      {"cpu capability", at::get_cpu_capability()},
#if defined(DRIVE_WITH_CUDA)
      {"cuda", DRIVE_WITH_CUDA},
      {"gpu architectures", DRIVE_GPU_ARCHITECTURES},
#else
      {"cuda", "not built"},
#endif
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "What was compiled, and how.");
#if defined(DRIVE_WITH_CUDA)
  m.def("why_not_served", &drive::why_not_served, "Why the kernels cannot run on a GPU, or None.");
#endif
}
