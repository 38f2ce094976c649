// A batch of images in either of the two layouts that the sparse ops take, and how a block of kLanes
// images travels between it and a Window.
//
//   planes    [N, C, H, W], contiguous
//   blocked   [ceil(N / 16), C, H, W, 16]: the images of a block are the lanes
#pragma once

#include <ATen/core/Tensor.h>

#include "sparse_window.h"

namespace drive {

template <class T>
struct Images {
  T* data;
  int64_t batch;  // of a blocked tensor, all lanes
  int64_t channels, height, width;
  bool blocked;

  explicit Images(const at::Tensor& t)
      : data(t.data_ptr<T>()),
        batch(t.dim() == 5 ? t.size(0) * kLanes : t.size(0)),
        channels(t.size(1)),
        height(t.size(2)),
        width(t.size(3)),
        blocked(t.dim() == 5) {}

  int64_t blocks() const { return (batch + kLanes - 1) / kLanes; }
  int64_t plane() const { return height * width; }
  // A block's plane.
  T* at(int64_t block, int64_t channel) const {
    return data + (block * (blocked ? 1 : kLanes) * channels + channel) * plane() * (blocked ? kLanes : 1);
  }
  int lanes(int64_t block) const {
    return static_cast<int>(std::min<int64_t>(kLanes, batch - block * kLanes));
  }

  void load(int64_t block, int64_t channel, const Window& window, T* to) const {
    for (const int32_t hole : window.holes()) std::fill_n(to + hole, kLanes, T(0));
    const int32_t* offsets = window.offsets();
    const T* from = at(block, channel) + window.first() * (blocked ? kLanes : 1);
    if (!blocked) {
      const auto& to_lanes = sparse_kernels<T>().to_lanes;
      for (int64_t i = 0; i < window.count(); i += kLanes) {
        const int cols = static_cast<int>(std::min<int64_t>(kLanes, window.count() - i));
        to_lanes(from + i, channels * plane(), lanes(block), cols, to, offsets + i);
      }
    } else {
      const int64_t run = window.whole_rows() ? width : 1;
      for (int64_t i = 0; i < window.count(); i += run) {
        std::memcpy(to + offsets[i], from + i * kLanes, run * kLanes * sizeof(T));
      }
    }
  }

  void store(int64_t block, int64_t channel, const Window& window, const T* from) const {
    const int32_t* offsets = window.offsets();
    T* to = at(block, channel) + window.first() * (blocked ? kLanes : 1);
    if (!blocked) {
      const auto& from_lanes = sparse_kernels<T>().from_lanes;
      for (int64_t i = 0; i < window.count(); i += kLanes) {
        const int cols = static_cast<int>(std::min<int64_t>(kLanes, window.count() - i));
        from_lanes(from, offsets + i, to + i, channels * plane(), lanes(block), cols);
      }
    } else {
      for (int64_t i = 0; i < window.count(); ++i) {
        std::memcpy(to + i * kLanes, from + offsets[i], kLanes * sizeof(T));
      }
    }
  }
};

}  // namespace drive
