// Which instruction set this processor has, as PyTorch sees it: ATEN_CPU_CAPABILITY=default|avx2|avx512 lowers it,
// for PyTorch's own kernels and for ours.
#pragma once

#include <string>

namespace drive {

// "AVX512", "AVX2", "DEFAULT" or what PyTorch calls others.
std::string cpu_capability();

}  // namespace drive
