"""packed_linear and block_linear against plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cases import BLOCKS, PACKED, BlockCase, PackedCase, assert_close

from drive.layers import Weight
from drive.targets.structures import structure
from drive_kernels.linear import block, packed

ops = torch.ops.drive
FLOAT64 = torch.float64


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_linear(case: PackedCase):
    assert_close(ops.packed_linear(*case.arguments()), case.expected())


@pytest.mark.parametrize("shape", ((64, 64), (65, 130), (1, 1), (0, 3), (3, 0)))
@pytest.mark.parametrize("density", (0.0, 0.4, 1.0))
def test_packing_loses_nothing(shape: tuple[int, int], density: float):
    weight, mask = torch.randn(shape), torch.rand(shape) < density
    bitmap, start, values = packed.pack(weight, mask)
    assert torch.equal(packed.dense_weight(bitmap, values, shape), weight.masked_fill(~mask, 0))
    assert values.numel() == start[-1] == mask.sum()
    assert bitmap.numel() * 8 == -(-shape[0] // 64) * -(-shape[1] // 64) * 64 * 64


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_block_linear(case: BlockCase):
    assert_close(ops.block_linear(*case.arguments()), case.expected())
    for mine, theirs in zip(
        ops.block_linear_backward(*case.backward_arguments()), case.expected_gradients(), strict=True
    ):
        assert_close(mine, theirs)


@pytest.mark.parametrize("size", block.BLOCKS)
def test_pattern_of_blocks(size: int):
    case = BlockCase(1, 192, 128, size, 0.5)
    pattern = block.pattern_of(case.mask(), size)
    row_start, column, row, column_start, row_of = pattern
    assert torch.equal(block.mask_of(pattern, size), case.mask())
    assert row.equal(torch.repeat_interleave(torch.arange(192 // size), row_start.diff()))
    columns = torch.repeat_interleave(torch.arange(128 // size), column_start.diff())
    pairs = set(zip(row.tolist(), column.tolist(), strict=True))
    assert pairs == set(zip(row_of.tolist(), columns.tolist(), strict=True))


def test_block_of():
    units = torch.tensor([[True, False], [False, True]])
    for size in block.BLOCKS:
        mask = structure(f"{size}x{size}").expand(units, Weight())
        assert block.block_of(mask) == size
    mask[0, 0] = False
    assert block.block_of(mask) is None
    assert block.block_of(torch.ones(48, 96, dtype=torch.bool)) == 16
    assert block.block_of(torch.ones(40, 96, dtype=torch.bool)) is None


def test_opcheck():
    for case in (PackedCase(3, 70, 66, 0.5), PackedCase(0, 5, 7, 0.5, biased=False)):
        torch.library.opcheck(ops.packed_linear.default, case.arguments())
    for case in (
        BlockCase(3, 32, 64, 16, 0.5, FLOAT64),
        BlockCase(0, 32, 64, 32, 0.5, FLOAT64, biased=False),
    ):
        input, weight, pattern, bias, size = case.arguments()
        leaves = [t if t is None else t.requires_grad_() for t in (input, weight, bias)]
        torch.library.opcheck(ops.block_linear.default, (*leaves[:2], pattern, leaves[2], size))
        torch.library.opcheck(ops.block_linear_backward.default, case.backward_arguments())


def test_gradcheck():
    input, weight, pattern, bias, size = BlockCase(3, 32, 48, 16, 0.5, FLOAT64).arguments()
    leaves = [t.requires_grad_() for t in (input.unsqueeze(0), weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: ops.block_linear(x, w, pattern, b, size), leaves, fast_mode=True
    )


PACKED_CASE, BLOCK_CASE = PackedCase(3, 70, 66, 0.5), BlockCase(3, 32, 64, 16, 0.5)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    (
        (0, torch.ones(3, 65), r"input must have shape \[..., 66\], got \[3, 65\]"),
        (1, torch.ones(2, 2, 8, 64), "bitmap must be torch.uint8, got torch.float32"),
        (1, torch.ones(1, 2, 8, 64), r"bitmap must have shape \[2, 2, 8, 64\], got \[1, 2, 8, 64\]"),
        (2, torch.ones(4).long(), r"start must have shape \[5\], got \[4\]"),
        (3, torch.ones(9).half(), "values must be torch.float32, got torch.float16"),
        (3, torch.ones(9, device="meta"), "values must be on cpu, got meta"),
        (4, torch.ones(7), r"bias must have shape \[70\], got \[7\]"),
        (4, torch.ones(140)[::2], r"bias must be contiguous, got strides \[2\]"),
        (5, [70], r"shape must be \[outputs, inputs\], got \[70\]"),
    ),
)
def test_packed_linear_refuses(index: int, value: Any, message: str):
    arguments = PACKED_CASE.arguments()
    arguments[index] = value
    with pytest.raises((TypeError, ValueError), match=f"drive::packed_linear: {message}"):
        packed.reference(*arguments)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    (
        (0, torch.ones(3, 65), r"input must have shape \[..., 64\], got \[3, 65\]"),
        (1, torch.ones(33, 64), r"weight must have a shape of whole blocks of 16, got \[33, 64\]"),
        (1, torch.ones(32, 64).half(), "weight must be torch.float32, got torch.float16"),
        (2, [torch.ones(1)], "pattern must be the five tensors of pattern_of, got 1"),
        (2, [torch.ones(2)] * 5, r"pattern\[0\] must have shape \[3\], got \[2\]"),
        (3, torch.ones(7), r"bias must have shape \[32\], got \[7\]"),
        (4, 8, "block must be 16, 32 or 64, got 8"),
    ),
)
def test_block_linear_refuses(index: int, value: Any, message: str):
    arguments = BLOCK_CASE.arguments()
    arguments[index] = value
    with pytest.raises((TypeError, ValueError), match=f"drive::block_linear: {message}"):
        block.reference(*arguments)


def test_packing_refuses():
    mask = torch.ones(32, 64, dtype=torch.bool)
    mask[0, 0] = False
    for call, message in (
        (lambda: packed.pack(torch.ones(3, 4), torch.ones(3, 4)), "mask must be bool, got torch.float32"),
        (lambda: packed.pack(torch.ones(3, 4), torch.ones(4, 3).bool()), r"mask must have shape \[3, 4\]"),
        (
            lambda: packed.pack(torch.ones(3), torch.ones(3).bool()),
            r"weight must have shape \[outputs, inputs\]",
        ),
        (lambda: block.pattern_of(torch.ones(3, 4), 16), "mask must be bool, got torch.float32"),
        (lambda: block.pattern_of(torch.ones(3, 4).bool(), 16), r"whole blocks of 16, got \[3, 4\]"),
        (lambda: block.pattern_of(mask, 16), "mask must be of whole blocks of 16, got some in part"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
