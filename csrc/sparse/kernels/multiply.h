// Outputs by the non-zeros of a weight: tiles of sums in registers. Part of kernels.h.

namespace drive {
namespace DRIVE_ISA {

// Positions that one tile may have: its sums, a few of them spare, fill the registers.
template <class T>
constexpr int kTile = DRIVE_REGISTERS == 32 ? 16 / Register<T>::kParts
                      : Register<T>::kParts <= 2 ? 4
                      : Register<T>::kParts == 4 ? 2
                                                 : 1;
// Sums that must be in flight for two FMAs a cycle, each taking four cycles.
constexpr int kInFlight = 8;

// Of which output a tile is, and how many of its rows and columns tiles before it have made too.
struct Place {
  int64_t output, above, left;
};

// The cache lines of a tile, to be written soon.
template <class T, int RY, int RX>
DRIVE_INLINE void fetch_tile(const T* tile, int64_t pitch) {
  constexpr int kLine = 64 / sizeof(T);
#pragma GCC unroll 16
  for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
    for (int i = 0; i < RX * kLanes; i += kLine) __builtin_prefetch(tile + r * pitch + i, 1);
  }
}

// Covers rows x cols of each output with tiles: work.tile<RY, RX>(p, an output's taps, their end, the tile's
// input, where it lies behind p.out, its place), not inlined, so that its loops have all registers. The last
// tiles of a row or column overlap their neighbours: computing one twice is cheaper than a narrow tile.
template <class T, class Work, int RX, int RY>
DRIVE_TARGET void cover_with(const Product<T>& p, const Work& work) {
  // Copies: what the tiles write might be `p` for all the compiler knows (1.07 times as fast with 4 taps).
  const int64_t rows = p.rows, cols = p.cols, outputs = p.outputs, ahead = p.ahead;
  const int64_t in_pitch = p.in_pitch, out_pitch = p.out_pitch, out_size = p.out_size;
  const int64_t strip = p.strip ? std::min(p.strip, rows) : rows;
  const int32_t* const start = p.start;
  if (strip < RY) {
    if constexpr (RY > 1) cover_with<T, Work, RX, RY / 2>(p, work);
    return;
  }
  for (int64_t top = 0; top < rows; top += strip) {
    const int64_t bottom = std::min(top + strip, rows);
    const Tap<T>* tap = p.taps;
    for (int64_t o = 0; o < outputs; ++o) {
      const Tap<T>* const end = tap + (start[o + 1] - start[o]);
      // After the last output of this strip comes the first one of the next.
      const bool wraps = o + ahead >= outputs && bottom < rows;
      const int64_t later = ahead * out_size + (wraps ? strip * out_pitch - outputs * out_size : 0);
      for (int64_t y = top; y < bottom; y += RY) {
        const int64_t row = std::min(y, bottom - RY);
        for (int64_t x = 0; x < cols; x += RX) {
          const int64_t col = std::min(x, cols - RX);
          const int64_t at = o * out_size + row * out_pitch + col * kLanes;
          if (ahead) fetch_tile<T, RY, RX>(p.out + at + later, out_pitch);
          const T* const in = p.in + row * in_pitch + col * kLanes;
          work.template tile<RY, RX>(p, tap, end, in, at, Place{o, y - row, x - col});
        }
      }
      tap = end;
    }
  }
}

constexpr int power_of_two_up_to(int n) { return n < 2 ? 1 : 2 * power_of_two_up_to(n / 2); }

template <class T, class Work, int RX>
DRIVE_TARGET void cover_by_width(const Product<T>& p, const Work& work, int64_t width) {
  if (width == RX) {
    cover_with<T, Work, RX, power_of_two_up_to(Work::kPositions / RX)>(p, work);
  } else if constexpr (RX > 1) {
    cover_by_width<T, Work, RX - 1>(p, work, width);
  }
}

// Tiles RX wide, whose widths are as even as can be, and as high as the registers allow.
template <class T, class Work>
DRIVE_TARGET void cover(const Product<T>& p, const Work& work) {
  const int64_t tiles = (p.cols + Work::kPositions - 1) / Work::kPositions;
  cover_by_width<T, Work, Work::kPositions>(p, work, (p.cols + tiles - 1) / tiles);
}

// Tiles with few positions keep several sums a position.
template <class T, bool kClip>
struct Multiply {
  static constexpr int kPositions = kTile<T>;

  template <int RY, int RX>
  DRIVE_TARGET __attribute__((noinline)) void tile(const Product<T>& p, const Tap<T>* tap,
                                                   const Tap<T>* const end, const T* in, int64_t at,
                                                   Place place) const {
    constexpr int L = Register<T>::kParts, N = Register<T>::N, S = RX * L;
    constexpr int kSums = RY * S >= kInFlight ? 1 : kInFlight / (RY * S);
    const T bias = p.bias ? p.bias[place.output] : T(0);
    const int64_t pitch = p.in_pitch;
    V<T> sum[kSums][RY][S];
#pragma GCC unroll 16
    for (int u = 0; u < kSums; ++u) {
#pragma GCC unroll 16
      for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
        for (int s = 0; s < S; ++s) sum[u][r][s] = fill<T>(u == 0 ? bias : T(0));
      }
    }
    if (p.residual) {
      const T* residual = p.residual + at;
#pragma GCC unroll 16
      for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
        for (int s = 0; s < S; ++s) sum[0][r][s] += read(residual + r * p.out_pitch + s * N);
      }
    }
    if constexpr (kClip) {
      for (; tap < end && looks(Look::straight, tap->offset); ++tap) {
        add<Look::straight>(*tap, in, pitch, sum[0]);
      }
      for (; tap < end && looks(Look::left, tap->offset); ++tap) add<Look::left>(*tap, in, pitch, sum[0]);
      for (; tap < end; ++tap) add<Look::right>(*tap, in, pitch, sum[0]);
    } else {
      for (; kSums > 1 && tap + kSums <= end; tap += kSums) {
#pragma GCC unroll 16
        for (int u = 0; u < kSums; ++u) add<Look::straight>(tap[u], in, pitch, sum[u]);
      }
      for (; tap < end; ++tap) add<Look::straight>(*tap, in, pitch, sum[0]);
    }
    T* const out = p.out + at;
    const int64_t out_pitch = p.out_pitch;  // else read again after each write
    const V<T> floor = fill(p.floor);
#pragma GCC unroll 16
    for (int r = 0; r < RY; ++r) {
#pragma GCC unroll 32
      for (int s = 0; s < S; ++s) {
        V<T> total = sum[0][r][s];
#pragma GCC unroll 16
        for (int u = 1; u < kSums; ++u) total += sum[u][r][s];
        write(out + r * out_pitch + s * N, total < floor ? floor : total);
      }
    }
  }

 private:
  template <Look look, int RY, int S>
  DRIVE_INLINE void add(const Tap<T>& tap, const T* in, int64_t pitch, V<T> (&sum)[RY][S]) {
    const T* from = first_read<look>(in + tap.offset, tap.offset);
    const V<T> value = fill(tap.value);
#pragma GCC unroll 16
    for (int r = 0; r < RY; ++r, from += pitch) {
      V<T> seen[S];
      see<look>(from, tap.offset, seen);
#pragma GCC unroll 32
      for (int s = 0; s < S; ++s) sum[r][s] = fma(value, seen[s], sum[r][s]);
    }
  }
};

template <class T>
DRIVE_TARGET void multiply(const Product<T>& p) {
  if (p.clip) {
    cover(p, Multiply<T, true>());
  } else {
    cover(p, Multiply<T, false>());
  }
}

}  // namespace DRIVE_ISA
}  // namespace drive
