"""drive::sparse_conv2d - a convolution that computes with the non-zeros of its weight only (pattern.py).

    out[n, o, y, x] = bias[o] + residual + sum over non-zeros of value * in[n, c, y', x'], then ReLU

Images come as [N, C, H, W] or blocked, [ceil(N / 16), C, H, W, 16], and go as they came (blocked.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from drive_kernels.library import library, serve

from . import blocked
from .pattern import Gradients, dense_weight, empty_gradients, gradients_of

library.define(
    "sparse_conv2d("
    "Tensor input, "  # [N, C, H, W] or [ceil(N / 16), C, H, W, 16]
    "Tensor values, "  # [nnz]
    "Tensor[] pattern, "  # pattern_of(mask, groups)
    "Tensor? bias, "  # [O]
    "int[] shape, "  # of the weight: [O, C / groups, kh, kw]
    "int[] stride, int[] padding, int[] dilation, int groups, "
    "Tensor? residual=None, "  # shape of the output, which must be blocked: added to it
    "bool relu=False"  # afterwards
    ") -> Tensor"
)
library.define(
    "sparse_conv2d_backward("
    "Tensor grad, Tensor input, Tensor values, Tensor[] pattern, "
    "int[] shape, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool[3] needed"  # which of the gradients: input, values, bias; the others come back empty
    ") -> (Tensor, Tensor, Tensor)"
)


def conv2d_reference(
    input: Tensor,
    values: Tensor,
    pattern: Sequence[Tensor],
    bias: Tensor | None,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """What drive::sparse_conv2d means, in plain PyTorch."""
    weight = dense_weight(values, pattern, shape)
    plain = (
        input if input.dim() == 4 else blocked.from_blocks_reference(input, input.shape[0] * blocked.LANES)
    )
    output = F.conv2d(plain, weight, bias, list(stride), list(padding), list(dilation), groups)
    if input.dim() == 5:
        output = blocked.to_blocks_reference(output)
    if residual is not None:
        output = output + residual
    return output.relu() if relu else output


def conv2d_backward_reference(
    grad: Tensor,
    input: Tensor,
    values: Tensor,
    pattern: Sequence[Tensor],
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
) -> Gradients:
    """What drive::sparse_conv2d_backward means, in plain PyTorch."""
    weight = dense_weight(values, pattern, shape)
    if input.dim() == 5:
        grad, plain = (blocked.from_blocks_reference(t, t.shape[0] * blocked.LANES) for t in (grad, input))
    else:
        plain = input
    to_input, to_weight, to_bias = torch.ops.aten.convolution_backward(
        grad, plain, weight, [shape[0]], list(stride), list(padding), list(dilation), False, [0, 0], groups,
        list(needed),
    )  # fmt: skip
    if needed[0] and input.dim() == 5:
        to_input = blocked.to_blocks_reference(to_input)
    return gradients_of(needed, input, to_input, to_weight, to_bias, pattern)


def _conv2d_fake(
    input: Tensor,
    values: Tensor,
    pattern: Sequence[Tensor],
    bias: Tensor | None,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    size = list(input.shape)
    size[1] = shape[0]
    for d in range(2):
        size[2 + d] = (input.shape[2 + d] + 2 * padding[d] - dilation[d] * (shape[2 + d] - 1) - 1) // stride[
            d
        ] + 1
    return input.new_empty(size)


def _conv2d_backward_fake(
    grad: Tensor,
    input: Tensor,
    values: Tensor,
    pattern: Sequence[Tensor],
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
) -> Gradients:
    return empty_gradients(input, values, shape, needed)


serve("sparse_conv2d", _conv2d_fake, conv2d_reference)
serve("sparse_conv2d_backward", _conv2d_backward_fake, conv2d_backward_reference)
# Its gradient is registered in csrc/sparse/ops.cpp.

# Under autocast computed in float32, as all sparse ops: no CPU multiplies 16-bit floats one by one faster.
torch.library.register_autocast("drive::sparse_conv2d", "cpu", torch.float32, lib=library)
