"""drive::packed_linear - a Linear that reads its weight packed: a bitmap, and the non-zeros only.

For batches so small that reading the weight is what takes the time: 1/8 + density * itemsize bytes an entry,
against itemsize for the dense weight. The multiplication itself is dense ("load sparse, compute dense":
Flash-LLM, arXiv 2309.10285; SpInfer, EuroSys 2025). Inference only: it has no gradient.

The weight is cut into tiles of 64 x 64, filled up with zeros at its ends, and these into groups of 8 columns.

    bitmap  [tile rows, tile columns, 8 groups, 64 rows] uint8: bit c of a byte is column c of the group
    start   [tiles + 1] int64: where the values of each tile begin
    values  [non-zeros]: in the order of the bitmap
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from drive_kernels.library import library, serve

TILE = 64  # rows and columns: one of Hopper's matrix instructions multiplies 64 rows
GROUP = 8  # columns of a byte of the bitmap

library.define(
    "packed_linear("
    "Tensor input, "  # [..., I], float32, bfloat16 or float16 (the reference takes any floating point)
    "Tensor bitmap, Tensor start, Tensor values, "  # of `pack`; values of the input's dtype
    "Tensor? bias, "  # [O]
    "int[] shape"  # of the weight: [O, I]
    ") -> Tensor"
)


def pack(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """bitmap, start and values of a weight [O, I], zero where the mask is False."""
    if mask.dtype != torch.bool:
        raise TypeError(f"pack: mask must be bool, got {mask.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"pack: weight must have shape [outputs, inputs], got {list(weight.shape)}")
    if mask.shape != weight.shape:
        raise ValueError(f"pack: mask must have shape {list(weight.shape)}, got {list(mask.shape)}")
    where = _groups(mask)
    counts = where.flatten(2).sum(2).flatten()
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return (where * _digits(mask.device)).sum(-1, dtype=torch.uint8), start, _groups(weight)[where]


def _groups(matrix: Tensor) -> Tensor:
    """[tile rows, tile columns, 8 groups, 64 rows, 8 columns]"""
    rows, columns = matrix.shape
    whole = F.pad(matrix, (0, -columns % TILE, 0, -rows % TILE))
    groups: Tensor = whole.unflatten(1, (-1, TILE // GROUP, GROUP)).unflatten(0, (-1, TILE))
    return groups.permute(0, 2, 3, 1, 4)


def _digits(device: torch.device) -> Tensor:
    return 2 ** torch.arange(GROUP, dtype=torch.uint8, device=device)


def dense_weight(bitmap: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight that was packed."""
    where = (bitmap.unsqueeze(-1) & _digits(bitmap.device)).bool()
    groups = values.new_zeros(where.shape)
    groups[where] = values
    whole = groups.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)
    return whole[: shape[0], : shape[1]]


def check(
    input: Tensor, bitmap: Tensor, start: Tensor, values: Tensor, bias: Tensor | None, shape: Sequence[int]
) -> None:
    """Raise unless the arguments fit together: kernels see addresses only."""
    op = "drive::packed_linear"
    if len(shape) != 2:
        raise ValueError(f"{op}: shape must be [outputs, inputs], got {list(shape)}")
    outputs, inputs = shape
    tiles = [-(-outputs // TILE), -(-inputs // TILE)]
    if input.dim() == 0 or input.shape[-1] != inputs:
        raise ValueError(f"{op}: input must have shape [..., {inputs}], got {list(input.shape)}")
    for name, tensor, dtype, size in (
        ("bitmap", bitmap, torch.uint8, [*tiles, TILE // GROUP, TILE]),
        ("start", start, torch.int64, [tiles[0] * tiles[1] + 1]),
        ("values", values, input.dtype, [values.numel()]),
        ("bias", bias, input.dtype, [outputs]),
    ):
        if tensor is None:
            continue
        if list(tensor.shape) != size:
            raise ValueError(f"{op}: {name} must have shape {size}, got {list(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{op}: {name} must be on {input.device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {list(tensor.stride())}")


def reference(
    input: Tensor, bitmap: Tensor, start: Tensor, values: Tensor, bias: Tensor | None, shape: Sequence[int]
) -> Tensor:
    """What drive::packed_linear means, in plain PyTorch."""
    check(input, bitmap, start, values, bias, shape)
    return F.linear(input, dense_weight(bitmap, values, shape), bias)


def _fake(
    input: Tensor, bitmap: Tensor, start: Tensor, values: Tensor, bias: Tensor | None, shape: Sequence[int]
) -> Tensor:
    return input.new_empty([*input.shape[:-1], shape[0]])


serve("packed_linear", _fake, reference)
