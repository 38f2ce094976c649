"""drive::packed_linear in Triton.

A program multiplies a row of 64 x 64 tiles of the weight, or every `splits`-th of them, with some rows of
the input:

  1. Load the bitmap of a tile, bytes for 8 columns of a row. A running sum of the bits says where the values
     of each 8 begin (bytes_of), which a thread then takes bit after bit (take).
  2. Multiply on tensor cores with 16 or 32 rows of the input (expanded, multiply); one to four rows without:
     then no entry leaves the thread that has loaded it (multiply_few).
  3. If the tiles of a row were split among programs, for else there are too few to fill a GPU, add up what
     they found, in the order of the splits (add_up).

Sums are float32; float32 products on tensor cores are three of TF32, nearly as exact as one of float32.
Bytes: 1/8 + density * itemsize an entry of the weight, for every 32 rows of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from drive_kernels.launching import launch_kernel

from . import packed
from .packed import GROUP, TILE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tuning(NamedTuple):
    """Sizes, each with its reason."""

    few: int = 4  # rows that are multiplied without tensor cores: every thread keeps 16 sums of each
    least: int = 16  # rows on tensor cores: the next smaller instructions take no less time
    most: int = 32  # rows a program: with more, registers are spilled for float32 on Ampere
    warps: int = 8  # likewise: a thread has 16 entries of a tile
    programs: int = 1024  # enough to fill any GPU several times over, when the work is to be split
    entries: int = 1024  # of the output a program, when adding up


TUNING = Tuning()
TILE_ = tl.constexpr(TILE)
GROUP_ = tl.constexpr(GROUP)
GROUPS = tl.constexpr(TILE // GROUP)


@triton.jit
def bytes_of(bitmap, start, values, tile):
    """Bits of a tile, [GROUPS * TILE], its values, and where among them those of every 8 begin (step 1)."""
    bits = tl.load(bitmap + tile * (GROUPS * TILE_) + tl.arange(0, GROUPS * TILE_)).to(tl.int32)
    pairs = bits - ((bits >> 1) & 0x55)  # how many are set: of every 2, 4, 8
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    count = (fours & 0xF) + (fours >> 4)
    return bits, values + tl.load(start + tile), tl.cumsum(count, 0) - count


@triton.jit
def take(values, bits, at, COLUMN: tl.constexpr):
    """Entries of one column of every group, [GROUPS * TILE], and where those of the next begin."""
    bit = (bits >> COLUMN) & 1
    return tl.load(values + at, mask=bit != 0, other=0.0), at + bit


@triton.jit
def expanded(bitmap, start, values, tile):
    """A tile of the weight, [TILE, TILE] (step 2)."""
    bits, values, at = bytes_of(bitmap, start, values, tile)
    w0, at = take(values, bits, at, 0)
    w1, at = take(values, bits, at, 1)
    w2, at = take(values, bits, at, 2)
    w3, at = take(values, bits, at, 3)
    w4, at = take(values, bits, at, 4)
    w5, at = take(values, bits, at, 5)
    w6, at = take(values, bits, at, 6)
    w7, at = take(values, bits, at, 7)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    columns = tl.reshape(tl.join(even, odd), [GROUPS, TILE_, GROUP_])  # digits of c, the highest first
    return tl.reshape(tl.permute(columns, [1, 0, 2]), [TILE_, TILE_])


@triton.jit
def store(total, bias, output, rows, outputs, splits, row, out):
    """Sums [outputs, rows] of one program of a split."""
    if bias is not None and splits == 1:
        total += tl.load(bias + out, mask=out < outputs, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(2) * rows + row)[None, :] * outputs + out[:, None]
    inside = (out < outputs)[:, None] & (row < rows)[None, :]
    tl.store(output + at, total.to(output.dtype.element_ty), mask=inside)


@triton.jit
def multiply(
    input,  # [rows, inputs]
    bitmap, start, values,
    bias,  # [outputs] or None
    output,  # [splits, rows, outputs]
    rows, inputs, outputs, splits,
    ROWS: tl.constexpr,  # of the input a program
):  # fmt: skip
    """Step 2 on tensor cores."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile_row, tile_columns, lane = tl.program_id(1), tl.cdiv(inputs, TILE_), tl.arange(0, TILE_)
    total = tl.zeros([TILE_, ROWS], tl.float32)
    for tile_column in range(tl.program_id(2), tile_columns, splits):
        weight = expanded(bitmap, start, values, tile_row.to(tl.int64) * tile_columns + tile_column)
        column = tile_column * TILE_ + lane
        inside = (row < rows)[:, None] & (column < inputs)[None, :]
        x = tl.load(input + row[:, None] * inputs + column[None, :], mask=inside, other=0.0)
        total = tl.dot(weight, tl.trans(x), total, input_precision="tf32x3")
    store(total, bias, output, rows, outputs, splits, row, tile_row * TILE_ + lane)


@triton.jit
def multiply_few(
    input, bitmap, start, values, bias, output,
    rows, inputs, outputs, splits,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Step 2 without tensor cores: the same, but entries are multiplied where they were expanded."""
    row = tl.arange(0, ROWS)
    tile_row, tile_columns = tl.program_id(1), tl.cdiv(inputs, TILE_)
    total = tl.zeros([GROUPS, TILE_, ROWS], tl.float32)
    for tile_column in range(tl.program_id(2), tile_columns, splits):
        tile = tile_row.to(tl.int64) * tile_columns + tile_column
        bits, entries, at = bytes_of(bitmap, start, values, tile)
        first = tile_column * TILE_ + tl.arange(0, GROUPS) * GROUP_
        for c in tl.static_range(GROUP_):
            weight, at = take(entries, bits, at, c)
            column = (first + c)[:, None, None]
            inside = (column < inputs) & (row < rows)[None, None, :]
            x = tl.load(input + row[None, None, :] * inputs + column, mask=inside, other=0.0)
            weight = tl.reshape(weight, [GROUPS, TILE_, 1])
            total += weight.to(tl.float32) * x.to(tl.float32)
    out = tile_row * TILE_ + tl.arange(0, TILE_)
    store(tl.sum(total, 0), bias, output, rows, outputs, splits, row, out)


@triton.jit
def add_up(parts, bias, output, entries, outputs, splits, BLOCK: tl.constexpr):
    """output = sum of parts [splits, entries] + bias (step 3)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    total = tl.zeros([BLOCK], tl.float32)
    part = parts + at
    for _ in range(splits):
        total += tl.load(part, mask=inside, other=0.0)
        part += entries
    if bias is not None:
        total += tl.load(bias + at % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + at, total.to(output.dtype.element_ty), mask=inside)


def check_dtype(op: str, input: Tensor) -> None:
    if input.dtype not in DTYPES:
        raise TypeError(f"{op}: input must be float32, bfloat16 or float16, got {input.dtype}")


def splits_of(programs: int, most: int) -> int:
    """Into how many parts the sums are to be split so that there are programs enough."""
    return max(1, min(TUNING.programs // programs, most))


def add_parts(parts: Tensor, bias: Tensor | None, output: Tensor) -> None:
    """Step 3: parts [splits, ...] into the output [..., outputs]."""
    entries, outputs = output.numel(), output.shape[-1]
    grid = (triton.cdiv(entries, TUNING.entries),)
    launch_kernel(
        add_up, grid,
        parts=parts, bias=bias, output=output, entries=entries, outputs=outputs, splits=parts.shape[0],
        BLOCK=TUNING.entries, enable_fp_fusion=True,
    )  # fmt: skip


def packed_linear(
    input: Tensor, bitmap: Tensor, start: Tensor, values: Tensor, bias: Tensor | None, shape: Sequence[int]
) -> Tensor:
    """drive::packed_linear for tensors on one GPU; for tensors on the CPU in Triton's interpreter."""
    packed.check(input, bitmap, start, values, bias, shape)
    check_dtype("drive::packed_linear", input)
    outputs, inputs = shape
    output = input.new_empty([*input.shape[:-1], outputs])
    if output.numel() == 0:
        return output
    rows = output.numel() // outputs
    x = input.reshape(rows, inputs).contiguous()
    few = rows <= TUNING.few
    size = triton.next_power_of_2(rows) if few else max(triton.next_power_of_2(rows), TUNING.least)
    size = min(size, TUNING.most)
    tiles = (triton.cdiv(rows, size), triton.cdiv(outputs, TILE))
    splits = splits_of(tiles[0] * tiles[1], triton.cdiv(inputs, TILE))
    parts = output if splits == 1 else x.new_empty(splits, rows, outputs, dtype=torch.float32)
    kernel, grid = multiply_few if few else multiply, (*tiles, splits)
    with torch.cuda.device_of(input):
        launch_kernel(
            kernel, grid,
            input=x, bitmap=bitmap, start=start, values=values, bias=bias, output=parts,
            rows=rows, inputs=inputs, outputs=outputs, splits=splits, ROWS=size,
            num_warps=TUNING.warps, enable_fp_fusion=True,
        )  # fmt: skip
        if splits > 1:
            add_parts(parts, bias, output)
    return output
