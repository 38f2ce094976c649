// Tensors in memory that was used before: the pages of a fresh allocation cost more than writing them
// (33 MB: 5 ms of page faults, 0.5 ms of stores), and malloc gives large blocks back at once.
#pragma once

#include <ATen/core/Tensor.h>

namespace drive {

// As at::empty on CPU.
at::Tensor empty_recycled(at::IntArrayRef size, const at::TensorOptions& options);

// Gives back what lies unused: 512 MB at most. Returns how many bytes.
size_t release_recycled();

}  // namespace drive
