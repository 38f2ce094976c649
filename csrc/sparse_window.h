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
#include <vector>

#include "sparse_isa.h"

namespace drive {

// One dimension of a plane, height or width.
struct Axis {
  int64_t size;
  int64_t stride = 1;
  int64_t shift = 0;

  int64_t place(int64_t pixel) const { return (pixel + shift) / stride; }
  int64_t phase(int64_t pixel) const { return (pixel + shift) % stride; }
  int64_t first_pixel(int64_t place) const { return std::clamp<int64_t>(place * stride - shift, 0, size); }
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
    std::vector<int64_t> phase(x_.size), col(x_.size);  // divisions, once a column instead of once a pixel
    for (int64_t x = 0; x < x_.size; ++x) phase[x] = x_.phase(x), col[x] = x_.place(x) - col0_;
    std::vector<char> filled(slot_count_ * pixels_a_slot());
    offsets_.assign((end_ - begin_) * x_.size, nowhere());
    for (int64_t y = begin_; y < end_; ++y) {
      const int64_t* const slots = slots_.data() + y_.phase(y) * x_.stride;
      const int64_t row = (y_.place(y) - row0) * cols_;
      for (int64_t x = 0; x < x_.size; ++x) {
        const int64_t where = slots[phase[x]];
        if (where < 0 || col[x] < 0 || col[x] >= cols_) continue;
        const int64_t position = where * pixels_a_slot() + row + col[x];
        filled[position] = true;
        offsets_[(y - begin_) * x_.size + x] = static_cast<int32_t>(position * entry_);
      }
    }
    holes_.clear();
    for (size_t p = 0; p < filled.size(); ++p) {
      if (filled[p]) continue;
      const size_t begin = p;
      while (p < filled.size() && !filled[p]) ++p;
      holes_.push_back({static_cast<int64_t>(begin) * entry_, static_cast<int64_t>(p - begin) * entry_});
    }
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
  // Of the plane's pixels, so many at a time are neighbours in the window too: whole rows, or single ones.
  int64_t run() const {
    const bool whole = x_.stride == 1 && x_.place(0) >= col0_ && x_.place(x_.size - 1) < col0_ + cols_;
    return whole ? x_.size : 1;
  }

 private:
  int64_t pixels_a_slot() const { return rows_ * cols_ + tail_; }

  int64_t entry_;
  Axis y_, x_;
  int64_t rows_, cols_, col0_, tail_;
  std::vector<int64_t> slots_;
  int64_t slot_count_ = 0;
  int64_t begin_ = 0, end_ = 0;
  std::vector<int32_t> offsets_;
  std::vector<Hole> holes_;
};

}  // namespace drive
