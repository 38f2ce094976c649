// Loops over the vectors of planes. Part of kernels.h.

namespace drive {
namespace DRIVE_ISA {

DRIVE_TARGET inline void add(const float* a, const float* b, float* to, int64_t count, const engine::Finish& f) {
  for (int64_t i = 0; i < count * kLanes; i += Register<float>::N) {
    V<float> v = read(a + i);
    if (b) v += read(b + i);
    write(to + i, finished(v, f));
  }
}

DRIVE_TARGET inline void scale(const float* a, const float* by, float* to, int64_t count) {
  for (int64_t i = 0; i < count * kLanes; i += Register<float>::N) {
    write(to + i, read(a + i) * read(by + i % kLanes));
  }
}

DRIVE_TARGET inline void largest(const float* from, int64_t rows, int64_t row, int64_t cols, int64_t col, float* to) {
  for (int part = 0; part < kLanes; part += Register<float>::N) {
    V<float> v = read(from + part);
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t x = 0; x < cols; ++x) {
        const V<float> other = read(from + y * row + x * col + part);
        v = (other > v) | (other != other) ? other : v;  // NaN stays NaN
      }
    }
    write(to + part, v);
  }
}

DRIVE_TARGET inline void accumulate(const float* a, uint16_t mask, float* sum) {
  if (mask == 0xffff) {
    for (int i = 0; i < kLanes; i += Register<float>::N) write(sum + i, read(sum + i) + read(a + i));
  } else {
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] += mask >> lane & 1 ? a[lane] : 0.0f;
  }
}

}  // namespace DRIVE_ISA
}  // namespace drive
