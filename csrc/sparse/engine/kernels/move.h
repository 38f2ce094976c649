// Lanes that change places: the borders of pieces, and other pieces than before. Part of kernels.h.

namespace drive {
namespace DRIVE_ISA {

#if DRIVE_WIDTH == 64
template <int PIECES>
DRIVE_TARGET inline void move_some(const engine::Moved& m) {
  __m512i index[PIECES];
  __mmask16 mask[PIECES];
  const float* from[PIECES];
  for (int i = 0; i < PIECES; ++i) {
    index[i] = _mm512_load_si512(m.shuffles[m.pieces[i].shuffle].index);
    mask[i] = m.pieces[i].mask;
    from[i] = m.from + m.pieces[i].offset;
  }
  const __m512 fill = _mm512_set1_ps(m.fill);
  for (int64_t c = 0; c < m.channels; ++c) {
    __m512 v = fill;
#pragma GCC unroll 4
    for (int i = 0; i < PIECES; ++i) {
      v = _mm512_mask_permutexvar_ps(v, mask[i], index[i], _mm512_loadu_ps(from[i] + c * m.from_channel));
    }
    _mm512_storeu_ps(m.to + c * m.to_channel, v);
  }
}
#endif

DRIVE_TARGET inline void move(const engine::Moved& m) {
#if DRIVE_WIDTH == 64
  switch (m.count) {
    case 0: return move_some<0>(m);
    case 1: return move_some<1>(m);
    case 2: return move_some<2>(m);
    case 4: return move_some<4>(m);
  }
#endif
  for (int64_t c = 0; c < m.channels; ++c) {
    alignas(64) float v[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) v[lane] = m.fill;
    for (int64_t i = 0; i < m.count; ++i) {
      const float* const from = m.from + m.pieces[i].offset + c * m.from_channel;
      const int32_t* const index = m.shuffles[m.pieces[i].shuffle].index;
#if DRIVE_WIDTH == 64
      const __m512 moved = _mm512_permutexvar_ps(_mm512_load_si512(index), _mm512_loadu_ps(from));
      _mm512_mask_store_ps(v, m.pieces[i].mask, moved);
#else
      for (unsigned left = m.pieces[i].mask; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        v[lane] = from[index[lane]];
      }
#endif
    }
    for (int lane = 0; lane < kLanes; ++lane) m.to[c * m.to_channel + lane] = v[lane];
  }
}

DRIVE_TARGET inline void gather(const float* from, const int32_t* offsets, uint16_t mask, float fill, float* to) {
#if DRIVE_WIDTH == 64
  _mm512_storeu_ps(
      to, _mm512_mask_i32gather_ps(_mm512_set1_ps(fill), mask, _mm512_loadu_si512(offsets), from, sizeof(float)));
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = mask >> lane & 1 ? from[offsets[lane]] : fill;
#endif
}

}  // namespace DRIVE_ISA
}  // namespace drive
