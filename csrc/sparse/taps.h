// The taps of a convolution: its weight's non-zeros as the loops walk them, in a window on the input and,
// backward, in one on the gradient to the output.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "sparse/conv.h"
#include "sparse/pattern.h"
#include "sparse/window.h"

namespace drive {

// Offsets of the columns of one group's weight in a window on the input.
inline std::vector<int32_t> column_offsets(const Conv& conv, const Window& window) {
  std::vector<int32_t> offsets(conv.columns());
  for (int64_t ky = 0, i = 0; ky < conv.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < conv.kernel[1]; ++kx, ++i) {
      const int64_t slot = window.slot(conv.phase(0, ky), conv.phase(1, kx));
      const int64_t here = slot * window.slot_size() + conv.shift(0, ky) * window.pitch() +
                           (conv.shift(1, kx) - window.col0()) * window.entry();
      for (int64_t c = 0; c < conv.group_channels; ++c) {
        offsets[c * conv.area() + i] = static_cast<int32_t>(c * window.channel_size() + here);
      }
    }
  }
  return offsets;
}

// The taps made from one output's non-zeros [first, last), in the order of Look: a counting sort without
// branches, which would be guessed wrong every other time.
template <class T, class Make>
void sort_taps(int32_t first, int32_t last, const Make& make, Tap<T>* taps) {
  int32_t straight = 0, left = 0;
  for (int32_t i = first; i < last; ++i) {
    const int32_t offset = make(i).offset;
    straight += looks(Look::straight, offset), left += looks(Look::left, offset);
  }
  int32_t next[] = {first, first + straight, first + straight + left};
  for (int32_t i = first; i < last; ++i) {
    const Tap<T> tap = make(i);
    int32_t at = 0;
    for (const Look look : {Look::straight, Look::left, Look::right}) {
      const int32_t here = looks(look, tap.offset), k = static_cast<int>(look);
      at += here * next[k], next[k] += here;
    }
    taps[at] = tap;
  }
}

// `clip`: of the Product that they are for.
template <class T>
Taps<T> forward_taps(const Conv& conv, const Pattern& pattern, const T* values, const Window& window,
                     bool clip = false, ScratchSlot slot = kTapScratch) {
  const std::vector<int32_t> offsets = column_offsets(conv, window);
  Taps<T> taps(pattern.count, slot);
  taps.start.assign(pattern.row_start, pattern.row_start + conv.out_channels + 1);
  const int64_t group_size = conv.group_channels * window.channel_size();
  const int64_t grain = channel_grain(conv.out_channels, pattern.count);
  at::parallel_for(0, conv.out_channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const int32_t base = static_cast<int32_t>(o / (conv.out_channels / conv.groups) * group_size);
      const int32_t first = pattern.row_start[o], last = pattern.row_start[o + 1];
      const auto make = [&](int32_t i) { return Tap<T>{base + offsets[pattern.column[i]], values[i]}; };
      if (clip) {
        sort_taps(first, last, make, taps.taps);
      } else {
        for (int32_t i = first; i < last; ++i) taps.taps[i] = make(i);
      }
    }
  });
  return taps;
}

// Taps of each input channel's phases, in a window on the gradient to the output; `packed`: which of the
// packed values each is.
template <class T>
Taps<T> backward_taps(const Conv& conv, const Pattern& pattern, const T* values, const Window& window,
                      bool clip, std::vector<int32_t>& packed) {
  const int64_t phases = conv.stride[0] * conv.stride[1], area = conv.area();
  const int64_t left = conv.padding[1] / conv.stride[1] - window.col0();  // columns before the first place
  std::vector<int32_t> offset(area), phase(area);
  for (int64_t ky = 0, i = 0; ky < conv.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < conv.kernel[1]; ++kx, ++i) {
      offset[i] = static_cast<int32_t>((conv.reach(0) - conv.shift(0, ky)) * window.pitch() +
                                       (left - conv.shift(1, kx)) * window.entry());
      phase[i] = static_cast<int32_t>(conv.phase(0, ky) * conv.stride[1] + conv.phase(1, kx));
    }
  }
  Taps<T> taps(pattern.count);
  packed.resize(pattern.count);
  taps.start.assign(conv.in_channels() * phases + 1, 0);
  for (int64_t c = 0; c < conv.in_channels(); ++c) {
    const int32_t* start = pattern.column_start + c * area;
    for (int64_t k = 0; k < area; ++k) taps.start[c * phases + phase[k] + 1] += start[k + 1] - start[k];
  }
  for (size_t i = 1; i < taps.start.size(); ++i) taps.start[i] += taps.start[i - 1];
  std::vector<int64_t> order(area);
  std::iota(order.begin(), order.end(), 0);
  for (const Look look : {Look::left, Look::straight}) {
    const auto first = [&](int64_t k) { return clip && looks(look, offset[k]); };
    std::stable_partition(order.begin(), order.end(), first);
  }
  const int64_t grain = channel_grain(conv.in_channels(), pattern.count);
  at::parallel_for(0, conv.in_channels(), grain, [&](int64_t begin, int64_t end) {
    std::vector<Tap<T>*> next(phases);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t p = 0; p < phases; ++p) next[p] = taps.taps + taps.start[c * phases + p];
      for (const int64_t k : order) {
        Tap<T>*& tap = next[phase[k]];
        const int32_t* const range = pattern.column_start + c * area + k;
        for (int32_t i = range[0]; i < range[1]; ++i) {
          packed[tap - taps.taps] = pattern.packed[i];
          *tap++ = {static_cast<int32_t>(pattern.row[i] * window.channel_size()) + offset[k],
                    values[pattern.packed[i]]};
        }
      }
    }
  });
  return taps;
}

}  // namespace drive
