"""A weight as its non-zeros: `values`, row by row, and where they are, `pattern`.

The pattern is five int32 tensors, made once a mask by `pattern_of`. drive::sparse_gather packs a weight's
values, drive::sparse_scatter puts them back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from drive_kernels.library import library, serve

library.define("sparse_gather(Tensor weight, Tensor index) -> Tensor")  # weight.flatten()[index]
library.define("sparse_scatter(Tensor values, Tensor index, int[] shape) -> Tensor")  # and back, into zeros

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


def gradients_of(
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


def empty_gradients(input: Tensor, values: Tensor, shape: Sequence[int], needed: Sequence[bool]) -> Gradients:
    sizes = (list(input.shape), [values.shape[0]], [shape[0]])
    to_input, to_values, to_bias = (
        input.new_empty(size if n else [0]) for n, size in zip(needed, sizes, strict=True)
    )
    return to_input, to_values, to_bias


def gather_reference(weight: Tensor, index: Tensor) -> Tensor:
    """What drive::sparse_gather means, in plain PyTorch."""
    return weight.flatten()[index]


def scatter_reference(values: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """What drive::sparse_scatter means, in plain PyTorch."""
    dense = values.new_zeros(list(shape))
    dense.view(-1)[index] = values
    return dense


serve("sparse_gather", lambda weight, index: weight.new_empty(index.shape), gather_reference)
serve("sparse_scatter", lambda values, index, shape: values.new_empty(shape), scatter_reference)
