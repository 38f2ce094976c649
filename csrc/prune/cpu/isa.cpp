// The inner loops of drive::prune_ and drive::shard_* on CPU, compiled for each instruction set.
#include "prune/cpu/isa.h"

#include <c10/util/Exception.h>

#define DRIVE_KERNELS "prune/cpu/kernels.h"
#include "common/each_isa.h"

namespace drive {

#if defined(__x86_64__)
const bool kPrefetchLines = __builtin_cpu_is("intel");
#else
const bool kPrefetchLines = false;
#endif

namespace {

template <class T, class Key>
const Kernels<Key>& chosen() {
  static const Kernels<Key> table = DRIVE_CHOOSE(kernels_of<T, Key>());
  return table;
}

}  // namespace

template <class Key>
const Kernels<Key>& kernels(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return chosen<float, Key>();
    case at::kBFloat16: return chosen<BFloat16, Key>();
    case at::kHalf: return chosen<Half, Key>();
    default:
      if constexpr (sizeof(Key) == 8) return chosen<double, Key>();
      TORCH_INTERNAL_ASSERT(false, "float64 entries have 64-bit keys");
  }
}

template const Kernels<int32_t>& kernels<int32_t>(at::ScalarType dtype);
template const Kernels<int64_t>& kernels<int64_t>(at::ScalarType dtype);

}  // namespace drive
