// A batch of images in memory, what the sparse ops take for their 16 lanes, and how the images travel
// between memory and a Window.
//
//   planes    [N, C, H, W], lanes are images: transposed on the way
//   rows      [N, C, H, W], lanes are neighbours in a row of one image: whole planes are copied as they are
//             (Product::clip)
//   pixels    the same, copied with zeros between rows: where these are too long to be clipped, taps look too
//             far, or only the gradient to the values is made
//   padded    [N, C, H, W], lanes are neighbours in the window on one image, over the ends of its rows: what
//             they compute between the output's rows is left there
//   blocked   [ceil(N / 16), C, H, W, 16], lanes are images
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>

#include "sparse/window.h"
#include "sparse/work.h"

namespace drive {

enum class Layout { planes, rows, pixels, padded, blocked };

template <class T>
void copy_run(const T* from, int64_t count, T* to) {
  if (count == 1) {  // a call of memcpy would take longer
    *to = *from;
  } else {
    std::memcpy(to, from, count * sizeof(T));
  }
}

template <class T>
struct Images {
  Layout layout;
  T* data;
  int64_t batch;  // of a blocked tensor, all lanes
  int64_t channels, height, width;

  explicit Images(const at::Tensor& t) : Images(t, t.dim() == 5 ? Layout::blocked : Layout::planes) {}
  Images(const at::Tensor& t, Layout l)
      : layout(l),
        data(t.data_ptr<T>()),
        batch(t.dim() == 5 ? t.size(0) * kLanes : t.size(0)),
        channels(t.size(1)),
        height(t.size(2)),
        width(t.size(3)) {}

  // Is a row of memory a row of positions?
  bool in_rows() const { return layout == Layout::rows || layout == Layout::pixels; }
  // Can the kernels use the memory as it is, without a window?
  bool direct() const { return in_rows() || layout == Layout::blocked; }
  // What is computed together: images a block, pixels a position, and entries a pixel in a window.
  int64_t block() const { return in_rows() || layout == Layout::padded ? 1 : kLanes; }
  int64_t blocks() const { return (batch + block() - 1) / block(); }
  int64_t position() const { return kLanes / block(); }
  int64_t entry() const { return block(); }
  // Are rows no longer in a window either?
  bool clip() const { return layout == Layout::rows; }
  // Where lanes go over the ends of rows: columns that a window on the result has more, to be as wide as that
  // on the input of taps with this reach.
  int64_t margin(int64_t reach) const { return layout == Layout::padded ? reach : 0; }
  // Entries after the pixels of a window: zeros for lanes that go over the last row's end; where rows are
  // clipped so many that channels are an odd number of kLanes apart, and so in different sets of the caches.
  int64_t tail(int64_t pixels, int64_t reach) const {
    if (clip()) return ((pixels / kLanes + 1) | 1) * kLanes - pixels - entry();
    return layout == Layout::padded ? reach + kLanes : 0;
  }
  // Rows and positions of so much of a window as the kernels see them.
  int64_t rows(int64_t rows) const { return layout == Layout::padded ? 1 : rows; }
  int64_t cols(int64_t rows, int64_t cols, int64_t pitch) const {
    return layout == Layout::padded ? ((rows - 1) * pitch + cols + kLanes - 1) / kLanes : cols / position();
  }
  // Rows that are worth going through all output channels with (0: all): 8 positions have an input so small
  // that it nearly fits the L1 cache. 64 channels of 32x32, 4 taps each: 1.2 times as fast as whole planes.
  int64_t strip() const {
    return in_rows() ? std::max<int64_t>(8 * kLanes / width, 1) : 0;
  }
  // So many channels ahead of the kernels cache lines are fetched, where they write to memory: of strips,
  // too small for the hardware to foresee, several.
  int64_t ahead() const { return !direct() ? 0 : strip() ? 4 : 1; }
  int64_t plane() const { return height * width; }
  // A block's plane, and its entries a pixel in memory.
  T* at(int64_t b, int64_t channel) const {
    return data + (layout == Layout::planes ? b * kLanes * channels + channel : b * channels + channel) *
                      plane() * stored();
  }
  int64_t stored() const { return layout == Layout::blocked ? kLanes : 1; }
  int lanes(int64_t b) const { return static_cast<int>(std::min<int64_t>(kLanes, batch - b * kLanes)); }

  void load(int64_t b, int64_t channel, const Window& window, T* to) const {
    const int32_t* offsets = window.offsets();
    const T* from = at(b, channel) + window.first() * stored();
    if (layout == Layout::planes) {
      const auto& to_lanes = sparse_kernels<T>().to_lanes;
      for (int64_t i = 0; i < window.count(); i += kLanes) {
        const int cols = static_cast<int>(std::min<int64_t>(kLanes, window.count() - i));
        to_lanes(from + i, channels * plane(), lanes(b), cols, to, offsets + i);
      }
    } else if (layout == Layout::padded) {
      const int64_t run = window.run();
      for (int64_t i = 0; i < window.count(); i += run) {
        if (offsets[i] != window.nowhere()) copy_run(from + i, run, to + offsets[i]);
      }
    } else {
      const int64_t run = window.run();
      sparse_kernels<T>().copy_runs(from, window.count() / run, run * entry(), offsets, run, window.nowhere(),
                                    to);
    }
  }

  void store(int64_t b, int64_t channel, const Window& window, const T* from) const {
    const int32_t* offsets = window.offsets();
    T* to = at(b, channel) + window.first() * stored();
    if (layout == Layout::planes) {
      const auto& from_lanes = sparse_kernels<T>().from_lanes;
      for (int64_t i = 0; i < window.count(); i += kLanes) {
        const int cols = static_cast<int>(std::min<int64_t>(kLanes, window.count() - i));
        from_lanes(from, offsets + i, to + i, channels * plane(), lanes(b), cols);
      }
    } else if (layout == Layout::padded) {
      const int64_t run = window.run();
      for (int64_t i = 0; i < window.count(); i += run) copy_run(from + offsets[i], run, to + i);
    } else {
      for (int64_t i = 0; i < window.count(); ++i) {
        std::memcpy(to + i * kLanes, from + offsets[i], kLanes * sizeof(T));
      }
    }
  }
};

// A window on some channels, in the calling thread's scratch memory, behind what is read and clipped before
// its first row. Where it lies outside the planes is cleared only when it has moved.
template <class T>
class Held {
 public:
  Held(const Images<T>& images, const Window& window, ScratchSlot slot, int64_t channels)
      : images_(images),
        window_(window),
        channels_(channels),
        data_(scratch<T>(slot, channels * window.channel_size() + kLanes) + kLanes) {}

  void move(int64_t row0) {
    if (moved_ && row0 == row0_) return;
    moved_ = true, row0_ = row0;
    window_.move(row0);
    for (int64_t i = 0; i < channels_; ++i) {
      for (const Window::Hole& hole : window_.holes()) std::fill_n(at(i) + hole.begin, hole.size, T(0));
    }
  }
  void load(int64_t block, int64_t channel, int64_t i) { images_.load(block, channel, window_, at(i)); }
  // All channels that have taps: those from start[c * step] to start[(c + 1) * step].
  void load_used(int64_t block, const int32_t* start, int64_t step) {
    for (int64_t c = 0; c < channels_; ++c) {
      if (start[c * step] < start[(c + 1) * step]) load(block, c, c);
    }
  }

  const Window& window() const { return window_; }
  T* at(int64_t i) const { return data_ + i * window_.channel_size(); }

 private:
  const Images<T>& images_;
  Window window_;
  int64_t channels_;
  T* data_;
  bool moved_ = false;
  int64_t row0_ = 0;
};

}  // namespace drive
