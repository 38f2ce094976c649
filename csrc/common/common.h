// Checks and scopes that every op needs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace drive {

inline void check_like(const char* op, const char* argument, size_t index, const at::Tensor& tensor,
                       const at::Tensor& weight, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.sizes() == weight.sizes(), op, ": ", argument, "[", index,
                    "] must have shape ", weight.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", argument, "[", index, "] must be ", dtype,
                   ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == weight.device(), op, ": ", argument, "[", index,
                    "] must be on ", weight.device(), ", got ", tensor.device());
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, op, ": ", argument, "[", index,
                   "] must be a dense tensor, got layout ", tensor.layout());
}

constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages behind memory that is about to be written for the first time: in 4 KB pages the
// page faults of a new mask take half as long as the whole step. Only a hint, so no result is checked.
inline void expect_writes(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// IEEE rounding on this thread, whatever torch.set_flush_denormal or a library set: a denormal
// score that is flushed to zero would change the masks.
class DefaultRounding {
 public:
#if defined(__SSE2__)
  DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~kNonDefault); }
  ~DefaultRounding() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kNonDefault = 0x8000 | 0x0040 | 0x6000;  // flush, denormals are 0, mode
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultRounding() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ & ~kNonDefault));
  }
  ~DefaultRounding() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  static constexpr uint64_t kNonDefault = 7ull << 22;  // flush and mode
  uint64_t saved_;
#endif
};

}  // namespace drive
