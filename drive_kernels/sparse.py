"""drive::sparse_conv2d, drive::sparse_linear - layers that compute with the non-zeros of a weight only.

The weight's non-zeros are packed: `values`, row by row, and where they are, `pattern`, five int32 tensors
made once a mask by `pattern_of`. Images come as [N, C, H, W] or blocked, [ceil(N / 16), C, H, W, 16], and
go as they came; see drive_kernels/blocked.py.

    conv2d   out[n, o, y, x] = bias[o] + residual + sum over non-zeros of value * in[n, c, y', x'], then ReLU
    linear   out[n, o] = bias[o] + sum over non-zeros of value * in[n, i]
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import blocked
from .prune import _library

_library.define(
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
_library.define(
    "sparse_conv2d_backward("
    "Tensor grad, Tensor input, Tensor values, Tensor[] pattern, "
    "int[] shape, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool[3] needed"  # which of the gradients: input, values, bias; the others come back empty
    ") -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "sparse_linear("
    "Tensor input, "  # [..., I]
    "Tensor values, Tensor[] pattern, Tensor? bias, "
    "int[] shape"  # of the weight: [O, I]
    ") -> Tensor"
)
_library.define(
    "sparse_linear_backward("
    "Tensor grad, Tensor input, Tensor values, Tensor[] pattern, int[] shape, bool[3] needed"
    ") -> (Tensor, Tensor, Tensor)"
)
_library.define("sparse_gather(Tensor weight, Tensor index) -> Tensor")  # weight.flatten()[index]
_library.define("sparse_scatter(Tensor values, Tensor index, int[] shape) -> Tensor")  # and back, into zeros

Gradients = tuple[Tensor, Tensor, Tensor]


def pattern_of(mask: Tensor, groups: int = 1) -> list[Tensor]:
    """Where a mask [O, ...] is True, as the ops want it.

    row_start [O + 1] and column [nnz], row by row; column_start [groups * K + 1], row [nnz] and packed [nnz],
    the same non-zeros column by column (columns of the first group first) and where their values are packed.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"pattern_of: mask must be bool, got {mask.dtype}")
    rows = mask.flatten(1)
    row, column = rows.nonzero(as_tuple=True)
    if row.numel() >= 2**31:
        raise ValueError(f"pattern_of: mask must have fewer than 2^31 non-zeros, got {row.numel()}")
    group_column = column + row.div(max(mask.shape[0] // groups, 1), rounding_mode="floor") * rows.shape[1]
    packed = group_column.argsort(stable=True)
    return [
        _starts(row, mask.shape[0]),
        column.int(),
        _starts(group_column, groups * rows.shape[1]),
        row[packed].int(),
        packed.int(),
    ]


def index_of(mask: Tensor) -> Tensor:
    """[nnz] int64: flat indices of the values, in the order in which they are packed."""
    return mask.flatten().nonzero().squeeze(1)


def _starts(index: Tensor, size: int) -> Tensor:
    counts = torch.bincount(index, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def dense_weight(values: Tensor, pattern: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The weight whose non-zeros are packed in `values`."""
    row_start, column = pattern[0].long(), pattern[1].long()
    rows = torch.repeat_interleave(torch.arange(shape[0], device=values.device), row_start.diff())
    columns = 1
    for size in shape[1:]:
        columns *= size
    return (
        values.new_zeros(shape[0] * columns).index_put((rows * columns + column,), values).view(list(shape))
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
    return _gradients(needed, input, to_input, to_weight, to_bias, pattern)


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
    return _gradients(needed, input, to_input, to_weight, flat.sum(0), pattern)


def _gradients(
    needed: Sequence[bool],
    input: Tensor,
    to_input: Tensor | None,
    to_weight: Tensor | None,
    to_bias: Tensor | None,
    pattern: Sequence[Tensor],
) -> Gradients:
    empty = input.new_empty(0)
    row_start, column = pattern[0].long(), pattern[1].long()
    to_values = None
    if to_weight is not None:
        rows = torch.repeat_interleave(
            torch.arange(to_weight.shape[0], device=empty.device), row_start.diff()
        )
        to_values = to_weight.flatten(1)[rows, column]
    found = (to_input, to_values, to_bias)
    return tuple(g if n and g is not None else empty.clone() for n, g in zip(needed, found, strict=True))  # type: ignore[return-value]


def gather_reference(weight: Tensor, index: Tensor) -> Tensor:
    """What drive::sparse_gather means, in plain PyTorch."""
    return weight.flatten()[index]


def scatter_reference(values: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """What drive::sparse_scatter means, in plain PyTorch."""
    dense = values.new_zeros(list(shape))
    dense.view(-1)[index] = values
    return dense


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
    return _linear_backward_fake(grad, input, values, pattern, shape, needed)


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
    sizes = (list(input.shape), [values.shape[0]], [shape[0]])
    to_input, to_values, to_bias = (
        input.new_empty(size if n else [0]) for n, size in zip(needed, sizes, strict=True)
    )
    return to_input, to_values, to_bias


for _name, _fake, _reference in (
    ("sparse_conv2d", _conv2d_fake, conv2d_reference),
    ("sparse_conv2d_backward", _conv2d_backward_fake, conv2d_backward_reference),
    ("sparse_linear", _linear_fake, linear_reference),
    ("sparse_linear_backward", _linear_backward_fake, linear_backward_reference),
    ("sparse_gather", lambda weight, index: weight.new_empty(index.shape), gather_reference),
    ("sparse_scatter", lambda values, index, shape: values.new_empty(shape), scatter_reference),
):
    torch.library.register_fake(f"drive::{_name}", _fake, lib=_library)
    _library.impl(_name, _reference, "CompositeExplicitAutograd")

# Their gradients are registered in csrc/sparse/autograd.cpp.

# Under autocast these are computed in float32: no CPU multiplies 16-bit floats one by one faster.
for _name in ("sparse_conv2d", "sparse_linear", "to_blocks", "blocked_norm"):
    torch.library.register_autocast(f"drive::{_name}", "cpu", torch.float32, lib=_library)
