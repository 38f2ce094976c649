// Includes DRIVE_KERNELS, a file of inner loops, once for each instruction set, with these set:
//
//   DRIVE_ISA        a namespace: portable, avx2 or avx512
//   DRIVE_WIDTH      of a register, in bytes
//   DRIVE_REGISTERS  their number
//   DRIVE_TARGET     a function attribute
//   DRIVE_INLINE     the same, of functions without a call of their own
//
// Then DRIVE_CHOOSE(call) is that call in the namespace for this processor (capability.h).
#pragma once

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12: in its own AVX-512 headers

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/capability.h"

#define DRIVE_INLINE DRIVE_TARGET __attribute__((always_inline)) static inline

#define DRIVE_ISA portable
#define DRIVE_WIDTH 16
#define DRIVE_REGISTERS 16
#define DRIVE_TARGET
#include DRIVE_KERNELS
#undef DRIVE_ISA
#undef DRIVE_WIDTH
#undef DRIVE_REGISTERS
#undef DRIVE_TARGET

#if defined(__x86_64__)
#define DRIVE_ISA avx2
#define DRIVE_WIDTH 32
#define DRIVE_REGISTERS 16
#define DRIVE_TARGET __attribute__((target("avx2,fma")))
#include DRIVE_KERNELS
#undef DRIVE_ISA
#undef DRIVE_WIDTH
#undef DRIVE_REGISTERS
#undef DRIVE_TARGET

#define DRIVE_ISA avx512
#define DRIVE_WIDTH 64
#define DRIVE_REGISTERS 32
#define DRIVE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,bmi2")))
#include DRIVE_KERNELS

#define DRIVE_CHOOSE(...)                                    \
  (drive::cpu_capability() == "AVX512" ? avx512::__VA_ARGS__ \
   : drive::cpu_capability() == "AVX2" ? avx2::__VA_ARGS__   \
                                       : portable::__VA_ARGS__)
#else
#define DRIVE_CHOOSE(...) portable::__VA_ARGS__
#endif
