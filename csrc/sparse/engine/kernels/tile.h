// The convolution's loop: a tap (non-zero) is one broadcast, and one load and FMA for each of TY x TX sums, which
// stay in registers while all taps of an output in a block of input channels go by. Part of kernels.h.

namespace drive {
namespace DRIVE_ISA {

constexpr int kVector = kLanes * sizeof(float);

// Sums that fit the registers, beside the broadcast value and a load.
constexpr int kMostSums = DRIVE_WIDTH == 64 ? 28 : DRIVE_WIDTH == 32 ? 6 : 3;

// So few sums that their latency counts are made as several, of every second or fourth tap.
constexpr int chains(int sums) { return sums <= 2 ? 4 : sums <= 4 ? 2 : 1; }

template <int TY, int TX, int SX>
struct TileOf {
  static constexpr int kSums = TY * TX;
  static constexpr int kWanted = chains(kSums), kChains = kSums * kWanted <= kMostSums ? kWanted : 1;
  using R = V<float>;

  DRIVE_INLINE void multiply(const engine::Tile& t, const Tap<float>& tap, R (&a)[TY][TX][kParts]) {
    const char* p = t.in + static_cast<int64_t>(tap.offset);
    const R value = fill(tap.value);
    const int64_t step = SX ? SX * kVector : t.in_col;
#pragma GCC unroll 4
    for (int y = 0; y < TY; ++y, p += t.in_row) {
#pragma GCC unroll 14
      for (int x = 0; x < TX; ++x) {
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
          const float* from = reinterpret_cast<const float*>(p + x * step) + i * Register<float>::N;
          a[y][x][i] = fma(value, read(from), a[y][x][i]);
        }
      }
    }
  }

  DRIVE_TARGET static const Tap<float>* run(const engine::Tile& tile) {
    const engine::Tile t = tile;
    const Tap<float>* tap = t.taps;
    for (int64_t o = 0; o < t.outputs; ++o) {
      R a[kChains][TY][TX][kParts];
      float* const sums = t.sums + o * kSums * kLanes;
      const R bias = fill(t.bias[o]);
#pragma GCC unroll 28
      for (int s = 0; s < kSums; ++s) {
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
          a[0][s / TX][s % TX][i] = t.first ? bias : read(sums + s * kLanes + i * Register<float>::N);
        }
      }
      const Tap<float>* const end = tap + t.counts[o];
      if constexpr (kChains > 1) {
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) {
#pragma GCC unroll 4
          for (int s = 0; s < kSums; ++s) {
#pragma GCC unroll 4
            for (int i = 0; i < kParts; ++i) a[c][s / TX][s % TX][i] = fill(0.0f);
          }
        }
        for (; tap + kChains <= end; tap += kChains) {
#pragma GCC unroll 4
          for (int c = 0; c < kChains; ++c) multiply(t, tap[c], a[c]);
        }
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) {
#pragma GCC unroll 4
          for (int s = 0; s < kSums; ++s) {
#pragma GCC unroll 4
            for (int i = 0; i < kParts; ++i) a[0][s / TX][s % TX][i] += a[c][s / TX][s % TX][i];
          }
        }
      }
      for (; tap < end; ++tap) multiply(t, *tap, a[0]);
      if (t.last) {
        finish(t, o, a[0]);
      } else {
#pragma GCC unroll 28
        for (int s = 0; s < kSums; ++s) {
#pragma GCC unroll 4
          for (int i = 0; i < kParts; ++i) {
            write(sums + s * kLanes + i * Register<float>::N, a[0][s / TX][s % TX][i]);
          }
        }
      }
    }
    return tap;
  }

  DRIVE_INLINE void finish(const engine::Tile& t, int64_t o, R (&a)[TY][TX][kParts]) {
    float* const out = t.out + o * t.out_channel;
    const float* const residual = t.residual ? t.residual + o * t.residual_channel : nullptr;
#pragma GCC unroll 4
    for (int y = 0; y < TY; ++y) {
#pragma GCC unroll 14
      for (int x = 0; x < TX; ++x) {
#pragma GCC unroll 4
        for (int i = 0; i < kParts; ++i) {
          const int64_t at = x * kLanes + i * Register<float>::N;
          if (residual) a[y][x][i] += read(residual + y * t.residual_row + at);
          if (t.finish.then == engine::Activation::none) {
            write(out + y * t.out_row + at, clamped(a[y][x][i], t.finish));
          } else {
            write(out + y * t.out_row + at, a[y][x][i]);
          }
        }
      }
    }
    if (t.finish.then == engine::Activation::none) return;
    // not from the registers: functions of this length would be unrolled once a sum
    for (int y = 0; y < TY; ++y) {
      for (int64_t at = 0; at < TX * kLanes; at += Register<float>::N) {
        write(out + y * t.out_row + at, finished(read(out + y * t.out_row + at), t.finish));
      }
    }
  }
};

template <int TY, int TX>
inline void tile_kernel(engine::Kernels& found) {
  // 14 columns of one row are as good as 7 of two; wide tiles between need not be
  if constexpr (TY * TX <= kMostSums && (TX <= 8 || TX == 14)) {
    auto& of = found.tiles[TY - 1][TX - 1];
    of[0] = &TileOf<TY, TX, 1>::run;
    of[1] = &TileOf<TY, TX, 2>::run;
    of[2] = &TileOf<TY, TX, 0>::run;
  }
}

template <int... I>
inline void tile_kernels(engine::Kernels& found, std::integer_sequence<int, I...>) {
  (tile_kernel<I / engine::kMostCols + 1, I % engine::kMostCols + 1>(found), ...);
}

}  // namespace DRIVE_ISA
}  // namespace drive
