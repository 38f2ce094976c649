"""drive::block_linear - a Linear with the blocks of its weight that survive; also its backward.

Blocks are square, of 16, 32 or 64 entries a side. The weight stays dense, and what lies outside of the blocks
is never read: nothing has to be packed anew when an optimizer has changed the weight, and its gradient needs
no unpacking. Where the blocks are is made once a mask by `pattern_of`, five int32 tensors:

    row_start [O / block + 1], column [n], row [n]    the blocks row by row
    column_start [I / block + 1], row_of [n]          the same column by column
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from drive_kernels.library import library, serve

BLOCKS = (64, 32, 16)

library.define(
    "block_linear("
    "Tensor input, "  # [..., I], float32, bfloat16 or float16 (the reference takes any floating point)
    "Tensor weight, "  # [O, I], any strides, of the input's dtype
    "Tensor[] pattern, "  # pattern_of(mask, block)
    "Tensor? bias, "  # [O]
    "int block"
    ") -> Tensor"
)
library.define(
    "block_linear_backward("
    "Tensor grad, Tensor input, Tensor weight, Tensor[] pattern, int block, "
    "bool[3] needed"  # which of the gradients: input, weight, bias; the others come back empty
    ") -> (Tensor, Tensor, Tensor)"
)

Gradients = tuple[Tensor, Tensor, Tensor]


def block_of(mask: Tensor) -> int | None:
    """The largest block of which the mask [O, I] is made; None: of none."""
    for block in BLOCKS:
        if mask.shape[0] % block == 0 and mask.shape[1] % block == 0:
            blocks = _blocks(mask, block)
            if torch.equal(blocks.any(-1), blocks.all(-1)):
                return block
    return None


def pattern_of(mask: Tensor, block: int) -> list[Tensor]:
    """Where the blocks are that a mask [O, I] leaves."""
    if mask.dtype != torch.bool:
        raise TypeError(f"pattern_of: mask must be bool, got {mask.dtype}")
    if mask.shape[0] % block or mask.shape[1] % block:
        raise ValueError(
            f"pattern_of: mask must have a shape of whole blocks of {block}, got {list(mask.shape)}"
        )
    blocks = _blocks(mask, block)
    alive = blocks.any(-1)
    if not torch.equal(alive, blocks.all(-1)):
        raise ValueError(f"pattern_of: mask must be of whole blocks of {block}, got some in part")
    row, column = alive.nonzero(as_tuple=True)
    row_of = alive.t().nonzero()[:, 1]
    return [t.int() for t in (_starts(alive.sum(1)), column, row, _starts(alive.sum(0)), row_of)]


def _blocks(matrix: Tensor, block: int) -> Tensor:
    """[rows / block, columns / block, block * block]"""
    blocks: Tensor = matrix.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    return blocks.transpose(1, 2).flatten(2)


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def mask_of(pattern: Sequence[Tensor], block: int) -> Tensor:
    """The mask of which a pattern is."""
    row_start, column, row, column_start, _ = pattern
    alive = row.new_zeros(len(row_start) - 1, len(column_start) - 1, dtype=torch.bool)
    alive[row.long(), column.long()] = True
    return alive.repeat_interleave(block, 0).repeat_interleave(block, 1)


def check(
    op: str, input: Tensor, weight: Tensor, pattern: Sequence[Tensor], bias: Tensor | None, block: int
) -> None:
    """Raise unless the arguments fit together: kernels see addresses only."""
    if block not in BLOCKS:
        raise ValueError(f"{op}: block must be 16, 32 or 64, got {block}")
    if weight.dim() != 2 or weight.shape[0] % block or weight.shape[1] % block:
        raise ValueError(
            f"{op}: weight must have a shape of whole blocks of {block}, got {list(weight.shape)}"
        )
    outputs, inputs = weight.shape
    if input.dim() == 0 or input.shape[-1] != inputs:
        raise ValueError(f"{op}: input must have shape [..., {inputs}], got {list(input.shape)}")
    if len(pattern) != 5:
        raise ValueError(f"{op}: pattern must be the five tensors of pattern_of, got {len(pattern)}")
    count = pattern[1].numel()
    sizes = ([outputs // block + 1], [count], [count], [inputs // block + 1], [count])
    tensors = [("weight", weight, input.dtype, list(weight.shape))]
    tensors += [
        (f"pattern[{i}]", tensor, torch.int32, size)
        for i, (tensor, size) in enumerate(zip(pattern, sizes, strict=True))
    ]
    if bias is not None:
        tensors.append(("bias", bias, input.dtype, [outputs]))
    for name, tensor, dtype, size in tensors:
        if list(tensor.shape) != size:
            raise ValueError(f"{op}: {name} must have shape {size}, got {list(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{op}: {name} must be on {input.device}, got {tensor.device}")


def reference(
    input: Tensor, weight: Tensor, pattern: Sequence[Tensor], bias: Tensor | None, block: int
) -> Tensor:
    """What drive::block_linear means, in plain PyTorch."""
    check("drive::block_linear", input, weight, pattern, bias, block)
    return F.linear(input, weight.masked_fill(~mask_of(pattern, block), 0), bias)


def backward_reference(
    grad: Tensor, input: Tensor, weight: Tensor, pattern: Sequence[Tensor], block: int, needed: Sequence[bool]
) -> Gradients:
    """What drive::block_linear_backward means, in plain PyTorch."""
    check("drive::block_linear_backward", input, weight, pattern, None, block)
    pruned = ~mask_of(pattern, block)
    rows = grad.reshape(-1, weight.shape[0])
    empty = input.new_empty(0)
    return (
        grad @ weight.masked_fill(pruned, 0) if needed[0] else empty,
        (rows.t() @ input.reshape(-1, weight.shape[1])).masked_fill(pruned, 0)
        if needed[1]
        else empty.clone(),
        rows.sum(0) if needed[2] else empty.clone(),
    )


def _fake(
    input: Tensor, weight: Tensor, pattern: Sequence[Tensor], bias: Tensor | None, block: int
) -> Tensor:
    return input.new_empty([*input.shape[:-1], weight.shape[0]])


def _backward_fake(
    grad: Tensor, input: Tensor, weight: Tensor, pattern: Sequence[Tensor], block: int, needed: Sequence[bool]
) -> Gradients:
    sizes = (list(input.shape), list(weight.shape), [weight.shape[0]])
    to_input, to_weight, to_bias = (
        input.new_empty(size if n else [0]) for n, size in zip(needed, sizes, strict=True)
    )
    return to_input, to_weight, to_bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, pattern, bias, ctx.block = inputs
    ctx.save_for_backward(input, weight, *pattern)
    ctx.bias = bias is not None


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight, *pattern = ctx.saved_tensors
    needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.bias and ctx.needs_input_grad[3]]
    found = torch.ops.drive.block_linear_backward(grad, input, weight, pattern, ctx.block, needed)
    to_input, to_weight, to_bias = (g if n else None for g, n in zip(found, needed, strict=True))
    return to_input, to_weight, [None] * 5, to_bias, None


for _name, _shapes, _reference in (
    ("block_linear", _fake, reference),
    ("block_linear_backward", _backward_fake, backward_reference),
):
    serve(_name, _shapes, _reference)
torch.library.register_autograd("drive::block_linear", _autograd, setup_context=_setup, lib=library)
