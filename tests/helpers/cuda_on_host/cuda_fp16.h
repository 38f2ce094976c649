#pragma once

#include <c10/util/Half.h>

#include <cstdint>

struct __half { uint16_t bits; };

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half v) { return c10::Half(v.bits, c10::Half::from_bits()); }
