"""The Triton kernels of packed_linear and block_linear in the interpreter, on CPU tensors, against float64:
test_gpu_linear_triton.py runs these tests in a process of their own."""

from __future__ import annotations

from typing import Any

import linear_cases
import numpy as np
import pytest
import torch
import triton.language as tl
from linear_cases import BLOCKS, PACKED, BlockCase, PackedCase, assert_close
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from drive_kernels.linear import block_triton, packed_triton


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies bfloat16 matrices as if their bits were numbers, and rounds towards zero."""
    dot = InterpreterBuilder.create_dot

    def of_float32(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (
                TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for x in (a, b)
            )
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", of_float32)
    monkeypatch.setitem(linear_cases.TOLERANCE, torch.bfloat16, 2**-7)


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_linear(case: PackedCase):
    assert_close(packed_triton.packed_linear(*case.arguments()), case.expected())


@pytest.mark.parametrize("programs", (1, 1 << 20))
def test_packed_linear_split_or_not(programs: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed_triton, "TUNING", packed_triton.TUNING._replace(programs=programs))
    for rows in (2, 40):
        case = PackedCase(rows, 70, 200, 0.5)
        assert_close(packed_triton.packed_linear(*case.arguments()), case.expected())


def test_packed_linear_sums_in_one_order():
    case = PackedCase(3, 64, 300, 0.5)
    first, second = (packed_triton.packed_linear(*case.arguments()) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_block_linear(case: BlockCase):
    assert_close(block_triton.block_linear(*case.arguments()), case.expected())
    found = block_triton.block_linear_backward(*case.backward_arguments())
    for mine, theirs in zip(found, case.expected_gradients(), strict=True):
        assert_close(mine, theirs)


def test_block_linear_gives_what_is_needed():
    case = BlockCase(3, 64, 32, 16, 0.5)
    for needed in ([True, False, False], [False, True, False], [False, False, True]):
        found = block_triton.block_linear_backward(*case.backward_arguments()[:-1], needed)
        assert [bool(g.numel()) for g in found] == needed


def test_block_linear_of_a_transposed_weight():
    case = BlockCase(5, 64, 32, 16, 0.5)
    input, weight, *rest = case.arguments()
    assert_close(block_triton.block_linear(input, weight.t().contiguous().t(), *rest), case.expected())


def test_kernels_take_no_float64():
    arguments = PackedCase(2, 8, 8, 0.5, torch.float64).arguments()
    with pytest.raises(TypeError, match="packed_linear: input must be float32.* got torch.float64"):
        packed_triton.packed_linear(*arguments)
    arguments = BlockCase(2, 16, 16, 16, 0.5, torch.float64).arguments()
    with pytest.raises(TypeError, match="block_linear: input must be float32.* got torch.float64"):
        block_triton.block_linear(*arguments)
