"""drive::sparse_linear - a linear layer that computes with the non-zeros of its weight only (pattern.py).

out[n, o] = bias[o] + sum over non-zeros of value * in[n, i]
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from drive_kernels.library import library, serve

from .pattern import Gradients, dense_weight, empty_gradients, gradients_of

library.define(
    "sparse_linear("
    "Tensor input, "  # [..., I]
    "Tensor values, Tensor[] pattern, Tensor? bias, "
    "int[] shape"  # of the weight: [O, I]
    ") -> Tensor"
)
library.define(
    "sparse_linear_backward("
    "Tensor grad, Tensor input, Tensor values, Tensor[] pattern, int[] shape, bool[3] needed"
    ") -> (Tensor, Tensor, Tensor)"
)


def linear_reference(
    input: Tensor, values: Tensor, pattern: Sequence[Tensor], bias: Tensor | None, shape: Sequence[int]
) -> Tensor:
    """What drive::sparse_linear means, in plain PyTorch."""
    return F.linear(input, dense_weight(values, pattern, shape), bias)


def linear_backward_reference(
    grad: Tensor,
    input: Tensor,
    values: Tensor,
    pattern: Sequence[Tensor],
    shape: Sequence[int],
    needed: Sequence[bool],
) -> Gradients:
    """What drive::sparse_linear_backward means, in plain PyTorch."""
    flat = grad.reshape(-1, shape[0])
    to_input = grad @ dense_weight(values, pattern, shape) if needed[0] else None
    to_weight = flat.t() @ input.reshape(-1, shape[1]) if needed[1] else None
    return gradients_of(needed, input, to_input, to_weight, flat.sum(0), pattern)


def _linear_fake(
    input: Tensor, values: Tensor, pattern: Sequence[Tensor], bias: Tensor | None, shape: Sequence[int]
) -> Tensor:
    return input.new_empty([*input.shape[:-1], shape[0]])


def _linear_backward_fake(
    grad: Tensor,
    input: Tensor,
    values: Tensor,
    pattern: Sequence[Tensor],
    shape: Sequence[int],
    needed: Sequence[bool],
) -> Gradients:
    return empty_gradients(input, values, shape, needed)


serve("sparse_linear", _linear_fake, linear_reference)
serve("sparse_linear_backward", _linear_backward_fake, linear_backward_reference)
# Its gradient is registered in csrc/sparse/ops.cpp.
torch.library.register_autocast("drive::sparse_linear", "cpu", torch.float32, lib=library)  # as in conv.py
