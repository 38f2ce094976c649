// Window: the part of a tensor's planes that one piece of work reads or writes, copied to where every
// tap is one fixed offset: padded, with the pixels that a stride visits side by side, and either 16 images
// innermost, an entry each, or only one.
//
// A stride s splits a plane into s * s smaller ones ("phases"). With pixel + shift = s * v + phase, a
// strided convolution is one of stride 1 over the places v, from more channels; its gradient to the input
// is one to more channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "sparse/isa.h"

namespace drive {

// One dimension of a plane, height or width.
struct Axis {
  int64_t size;
  int64_t stride = 1;
  int64_t shift = 0;

  int64_t place(int64_t pixel) const { return (pixel + shift) / stride; }
  int64_t phase(int64_t pixel) const { return (pixel + shift) % stride; }
  int64_t first_pixel(int64_t place) const { return std::clamp<int64_t>(place * stride - shift, 0, size); }
  bool has(int64_t place, int64_t phase) const {
    const int64_t pixel = place * stride + phase - shift;
    return pixel >= 0 && pixel < size;
  }
  // The places that a phase has, from the first to behind the last.
  std::pair<int64_t, int64_t> places(int64_t phase) const {
    const auto up = [&](int64_t pixel) { return (pixel + shift - phase + stride - 1) / stride; };
    return {up(0), up(size)};
  }
};

class Window {
 public:
  // `entry`: entries a pixel, kLanes or 1. `used`: which of the stride_y * stride_x phases matter; the others
  // take no room. `tail`: zeros after each phase, for lanes that go on beyond its last row.
  Window(int64_t entry, Axis y, Axis x, int64_t rows, int64_t cols, int64_t col0,
         const std::vector<bool>& used, int64_t tail = 0)
      : entry_(entry), y_(y), x_(x), rows_(rows), cols_(cols), col0_(col0), tail_(tail) {
    for (const bool u : used) slots_.push_back(u ? slot_count_++ : -1);
  }

  int64_t entry() const { return entry_; }
  int64_t col0() const { return col0_; }
  int64_t pitch() const { return cols_ * entry_; }
  int64_t slot(int64_t phase_y, int64_t phase_x) const { return slots_[phase_y * x_.stride + phase_x]; }
  int64_t slot_size() const { return pixels_a_slot() * entry_; }
  // Entries a channel, with one pixel more, for those that no tap needs.
  int64_t channel_size() const { return slot_count_ * slot_size() + entry_; }
  // The offset of those.
  int32_t nowhere() const { return static_cast<int32_t>(slot_count_ * slot_size()); }

  // Puts the window where its first row is the row `row0` of places.
  void move(int64_t row0) {
    begin_ = y_.first_pixel(row0);
    end_ = y_.first_pixel(row0 + rows_);
    if (columns_.empty()) find_columns();
    offsets_.resize((end_ - begin_) * x_.size);
    for (int64_t y = begin_; y < end_; ++y) {
      const int32_t* const column = columns_.data() + y_.phase(y) * x_.size;
      int32_t* const to = offsets_.data() + (y - begin_) * x_.size;
      const int32_t row = static_cast<int32_t>((y_.place(y) - row0) * pitch()), none = nowhere();
      for (int64_t x = 0; x < x_.size; ++x) to[x] = column[x] < 0 ? none : column[x] + row;
    }
    find_holes(row0);
  }

  // The pixels inside, in row-major order of their plane: their first, their number, where they lie.
  int64_t first() const { return begin_ * x_.size; }
  int64_t count() const { return static_cast<int64_t>(offsets_.size()); }
  const int32_t* offsets() const { return offsets_.data(); }
  // Where pixels outside the plane lie, which must be 0.
  struct Hole {
    int64_t begin, size;
  };
  const std::vector<Hole>& holes() const { return holes_; }
  // Of the plane's pixels, so many at a time are neighbours in the window too: all rows, one, or single ones.
  int64_t run() const {
    const bool whole = x_.stride == 1 && x_.place(0) >= col0_ && x_.place(x_.size - 1) < col0_ + cols_;
    if (whole && y_.stride == 1 && cols_ == x_.size) return std::max<int64_t>(count(), 1);
    return whole ? x_.size : 1;
  }

 private:
  int64_t pixels_a_slot() const { return rows_ * cols_ + tail_; }

  // Offsets of the pixels of a row, as the window's first, for each phase of rows; below 0: not inside.
  void find_columns() {
    for (int64_t phase = 0; phase < y_.stride; ++phase) {
      for (int64_t x = 0; x < x_.size; ++x) {
        const int64_t where = slot(phase, x_.phase(x)), col = x_.place(x) - col0_;
        const bool inside = where >= 0 && col >= 0 && col < cols_;
        columns_.push_back(inside ? static_cast<int32_t>(where * slot_size() + col * entry_) : -1);
      }
    }
  }

  // All but the pixels: these are neighbours in each row of a slot.
  void find_holes(int64_t row0) {
    holes_.clear();
    int64_t begin = 0;
    const auto fill_to = [&](int64_t end) {
      if (begin < end) holes_.push_back({begin * entry_, (end - begin) * entry_});
    };
    for (int64_t phase_y = 0; phase_y < y_.stride; ++phase_y) {
      for (int64_t phase_x = 0; phase_x < x_.stride; ++phase_x) {
        const int64_t where = slot(phase_y, phase_x);
        const auto [first, last] = x_.places(phase_x);
        const int64_t from = std::max(first - col0_, int64_t{0}), to = std::min(last - col0_, cols_);
        for (int64_t row = 0; where >= 0 && from < to && row < rows_; ++row) {
          if (!y_.has(row0 + row, phase_y)) continue;
          const int64_t position = where * pixels_a_slot() + row * cols_;
          fill_to(position + from);
          begin = position + to;
        }
      }
    }
    fill_to(slot_count_ * pixels_a_slot());
  }

  int64_t entry_;
  Axis y_, x_;
  int64_t rows_, cols_, col0_, tail_;
  std::vector<int64_t> slots_;
  int64_t slot_count_ = 0;
  int64_t begin_ = 0, end_ = 0;
  std::vector<int32_t> columns_, offsets_;
  std::vector<Hole> holes_;
};

}  // namespace drive
