"""drive::block_linear and its backward in Triton: dense products of blocks, on tensor cores.

    output[:, i]     = sum over the blocks (i, j) of row i of      input[:, j] W[i, j]^T
    to_input[:, j]   = sum over the blocks (i, j) of column j of   grad[:, i] W[i, j]
    to_weight[i, j]  = grad[:, i]^T input[:, j], where there is a block

The first two are one kernel, `multiply`, on the rows or the columns of the pattern; with few rows of the
input the blocks of a sum are split among programs, and add_up of packed_triton.py adds what these found. The
third, `sample`, has a program a block. All sums are float32, in an order that depends on the shapes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from drive_kernels.launching import launch_kernel

from . import block as blocks
from .block import Gradients
from .packed_triton import add_parts, check_dtype, splits_of


class Tuning(NamedTuple):
    """Sizes, each with its reason."""

    least: int = 16  # rows of the input a program: the next smaller instructions take no less time
    most: int = 64  # with more, or with deeper products, registers are spilled for float32 on Ampere
    depth: int = 32
    rows_a_warp: int = 8  # likewise
    # Of `sample`, in bytes, since float32 takes three products of TF32. Rows at a time: with twice as many,
    # Triton 3.8 spills registers. Rows of a block a warp, for each byte of an entry: with 8 instead of 16,
    # float32 takes up to 1.7 times the instructions; half floats wait for memory, and like more warps.
    batch: int = 128
    sampled_a_warp: int = 4


TUNING = Tuning()


@triton.jit
def multiply(
    input,  # [rows, inputs]
    weight,
    start, other,  # the blocks of every sum, and where in the input they belong
    bias,  # [outputs] or None
    output,  # [splits, rows, outputs]
    rows, inputs, outputs, splits,
    output_stride, input_stride,  # of the weight along outputs and inputs
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,  # of a product
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group, split = tl.program_id(1), tl.program_id(2)
    out = group * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(tl.load(start + group) + split, tl.load(start + group + 1), splits):
        for k in tl.static_range(0, BLOCK, DEPTH):
            column = tl.load(other + i) * BLOCK + k + tl.arange(0, DEPTH)
            x = tl.load(
                input + row[:, None] * inputs + column[None, :], mask=(row < rows)[:, None], other=0.0
            )
            at = column.to(tl.int64)[:, None] * input_stride + out.to(tl.int64)[None, :] * output_stride
            total = tl.dot(x, tl.load(weight + at), total, input_precision="tf32x3")
    if bias is not None and splits == 1:
        total += tl.load(bias + out).to(tl.float32)[None, :]
    at = (split * rows + row)[:, None] * outputs + out[None, :]
    tl.store(output + at, total.to(output.dtype.element_ty), mask=(row < rows)[:, None])


@triton.jit
def sample(
    grad,  # [rows, outputs]
    input,  # [rows, inputs]
    block_row, block_column,  # [blocks]
    to_weight,  # [outputs, inputs]
    rows, outputs, inputs,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    lane, batch = tl.arange(0, BLOCK), tl.arange(0, BATCH)
    out = tl.load(block_row + tl.program_id(0)).to(tl.int64) * BLOCK + lane
    column = tl.load(block_column + tl.program_id(0)) * BLOCK + lane
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for begin in range(0, rows, BATCH):
        row = (begin + batch).to(tl.int64)[:, None]
        g = tl.load(grad + row * outputs + out[None, :], mask=row < rows, other=0.0)
        x = tl.load(input + row * inputs + column[None, :], mask=row < rows, other=0.0)
        total = tl.dot(tl.trans(g), x, total, input_precision="tf32x3")
    tl.store(to_weight + out[:, None] * inputs + column[None, :], total.to(to_weight.dtype.element_ty))


def _product(
    input: Tensor, weight: Tensor, start: Tensor, other: Tensor, bias: Tensor | None, block: int
) -> Tensor:
    """input [..., I] times the blocks of a weight [O, I], transposed, that start and other list by rows."""
    outputs, inputs = weight.shape
    output = input.new_empty([*input.shape[:-1], outputs])
    if output.numel() == 0:
        return output
    rows, groups = output.numel() // outputs, outputs // block
    x = input.reshape(rows, inputs).contiguous()
    size = min(max(triton.next_power_of_2(rows), TUNING.least), TUNING.most)
    tiles = (triton.cdiv(rows, size), groups)
    splits = splits_of(tiles[0] * groups, triton.cdiv(other.numel(), groups))
    parts = output if splits == 1 else x.new_empty(splits, rows, outputs, dtype=torch.float32)
    grid = (*tiles, splits)
    launch_kernel(
        multiply, grid,
        input=x, weight=weight, start=start, other=other, bias=bias, output=parts,
        rows=rows, inputs=inputs, outputs=outputs, splits=splits,
        output_stride=weight.stride(0), input_stride=weight.stride(1),
        ROWS=size, BLOCK=block, DEPTH=min(block, TUNING.depth),
        num_warps=max(size, block) // TUNING.rows_a_warp, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        add_parts(parts, bias, output)
    return output


def block_linear(
    input: Tensor, weight: Tensor, pattern: Sequence[Tensor], bias: Tensor | None, block: int
) -> Tensor:
    """drive::block_linear for tensors on one GPU; for tensors on the CPU in Triton's interpreter."""
    op = "drive::block_linear"
    blocks.check(op, input, weight, pattern, bias, block)
    check_dtype(op, input)
    with torch.cuda.device_of(input):
        return _product(input, weight, pattern[0], pattern[1], bias, block)


def block_linear_backward(
    grad: Tensor, input: Tensor, weight: Tensor, pattern: Sequence[Tensor], block: int, needed: Sequence[bool]
) -> Gradients:
    """drive::block_linear_backward, likewise."""
    op = "drive::block_linear_backward"
    blocks.check(op, input, weight, pattern, None, block)
    check_dtype(op, input)
    _, column, row, column_start, row_of = pattern
    outputs, inputs = weight.shape
    to_input, to_weight, to_bias = (input.new_empty(0) for _ in range(3))
    with torch.cuda.device_of(input):
        if needed[0]:
            to_input = _product(grad, weight.t(), column_start, row_of, None, block)
        if needed[1]:
            to_weight = input.new_zeros(outputs, inputs)
            g, x = grad.reshape(-1, outputs).contiguous(), input.reshape(-1, inputs).contiguous()
            if row.numel():
                launch_kernel(
                    sample, (row.numel(),),
                    grad=g, input=x, block_row=row, block_column=column, to_weight=to_weight,
                    rows=x.shape[0], outputs=outputs, inputs=inputs,
                    BATCH=TUNING.batch // x.itemsize, BLOCK=block,
                    num_warps=block // (TUNING.sampled_a_warp * x.itemsize), enable_fp_fusion=True,
                )  # fmt: skip
        if needed[2]:
            to_bias = grad.reshape(-1, outputs).sum(0)
    return to_input, to_weight, to_bias
