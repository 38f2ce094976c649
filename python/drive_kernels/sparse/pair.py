"""drive::sparse_conv2d_pair - two sparse convolutions in a row, for inference.

What lies between them never leaves the cache.
A network's early layers are bound by memory once they are sparse: their images are large and their
non-zeros few.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drive_kernels.library import library, serve

from .conv import conv2d_reference

library.define(
    "sparse_conv2d_pair("  # of the first convolution's arguments, then of the second's:
    "Tensor input, "  # blocked, [ceil(N / 16), C, H, W, 16]
    "Tensor[] values, "
    "Tensor[] pattern, "  # five each
    "Tensor[] bias, "
    "int[] shape, "  # four numbers each
    "int[] stride, int[] padding, int[] dilation, "  # two each; the second's stride is 1
    "int[] groups, "
    "Tensor? residual, "  # shape of the output; added to it
    "bool[2] relu"  # after each of them
    ") -> Tensor"
)


def pair_reference(
    input: Tensor,
    values: Sequence[Tensor],
    pattern: Sequence[Tensor],
    bias: Sequence[Tensor],
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: Sequence[int],
    residual: Tensor | None,
    relu: Sequence[bool],
) -> Tensor:
    """What drive::sparse_conv2d_pair means, in plain PyTorch."""
    output = input
    for i, added in enumerate((None, residual)):
        two = slice(2 * i, 2 * i + 2)
        output = conv2d_reference(
            output, values[i], pattern[5 * i : 5 * i + 5], bias[i], shape[4 * i : 4 * i + 4],
            stride[two], padding[two], dilation[two], groups[i], added, relu[i],
        )  # fmt: skip
    return output


def _pair_fake(input: Tensor, *arguments: Any) -> Tensor:
    _, _, _, shape, stride, padding, dilation, *_ = arguments
    size = list(input.shape)
    for i in range(2):
        size[1] = shape[4 * i]
        for d in range(2):
            reach = dilation[2 * i + d] * (shape[4 * i + 2 + d] - 1)
            size[2 + d] = (size[2 + d] + 2 * padding[2 * i + d] - reach - 1) // stride[2 * i + d] + 1
    return input.new_empty(size)


serve("sparse_conv2d_pair", _pair_fake, pair_reference)
torch.library.register_autocast("drive::sparse_conv2d_pair", "cpu", torch.float32, lib=library)
