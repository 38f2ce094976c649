// What the ops' gradients share. They are in C++, because a layer of a small network takes tens of
// microseconds, and torch.library.register_autograd adds 100 to each forward and backward, 200 where a list
// of tensors is among the arguments.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <utility>

namespace drive {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Maybe = std::optional<Tensor>;

// The op of this name, through the dispatcher.
template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline bool is_given(const Maybe& t) { return t.has_value() && t->defined(); }

inline Tensor if_needed(bool needed, Tensor gradient) { return needed ? std::move(gradient) : Tensor(); }

}  // namespace drive
