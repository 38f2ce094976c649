"""The sparse ops against dense PyTorch and their references: what all have in common, products, blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_on
from sparse_cases import (
    CONVS,
    TOLERANCE,
    Conv,
    assert_conv_right,
    assert_ends_of_rows,
    assert_linear_right,
    assert_norm_right,
    leaves,
)
from torch import Tensor
from torch.nn import functional as F

import drive_kernels
from drive_kernels.sparse import blocked, linear
from drive_kernels.sparse import conv as convolution
from drive_kernels.sparse.pattern import gather_reference, index_of, pattern_of, scatter_reference

ops = torch.ops.drive


def test_compiled_kernels_are_there():
    assert drive_kernels.build_error is None
    for name in ("sparse_conv2d", "sparse_linear", "to_blocks", "blocked_norm", "sparse_gather"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"drive::{name}", "CPU"), name


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_threads(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_conv_right(Conv(20, 6, 7, 9, 9), torch.float32, 0.4, blocks=False)
        assert_linear_right(20, 40, 50, torch.float32, 0.3)
    finally:
        torch.set_num_threads(before)


def check_variant() -> None:
    """Run in a process with another instruction set."""
    for conv in CONVS:
        for dtype in TOLERANCE:
            for blocks in (False, True):
                assert_conv_right(conv, dtype, 0.3, blocks)
    assert_ends_of_rows(32)
    for dtype in TOLERANCE:
        assert_linear_right(300, 70, 33, dtype, 0.3)
        assert_norm_right(17, dtype, residual=True, relu=True)


@pytest.mark.parametrize("capability", ("default", "avx2", "avx512"))
def test_variants(capability: str, tmp_path: Path):
    run_on(capability, tmp_path, check_variant)


@pytest.mark.parametrize("density", (0.0, 0.2, 1.0))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    (
        (32, 64, 48),
        (1, 7, 5),
        (2, 150, 20),
        (17, 33, 70),
        (300, 128, 100),
        (16, 16, 16),
        (0, 4, 3),
        (64, 100, 1),
    ),
)
def test_linear(rows: int, inputs: int, outputs: int, dtype: torch.dtype, density: float):
    assert_linear_right(rows, inputs, outputs, dtype, density)


def test_linear_of_more_dimensions():
    mask = torch.rand(5, 7) < 0.5
    weight = torch.randn(5, 7).masked_fill_(~mask, 0)
    for x in (torch.randn(7), torch.randn(2, 3, 7), torch.randn(7, 4, 2).permute(1, 2, 0)):
        found = ops.sparse_linear(x, weight[mask], pattern_of(mask), None, [5, 7])
        torch.testing.assert_close(found, F.linear(x, weight), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch", (3, 16, 17, 32))
def test_norm(batch: int, dtype: torch.dtype, residual: bool, relu: bool):
    assert_norm_right(batch, dtype, residual, relu)


@pytest.mark.parametrize("batch", (0, 1, 16, 19, 48))
def test_blocks_and_back(batch: int):
    for height, width in ((1, 1), (4, 4), (5, 7), (32, 32)):
        x = torch.randn(batch, 3, height, width)
        in_blocks = ops.to_blocks(x)
        assert torch.equal(in_blocks, blocked.to_blocks_reference(x))
        assert torch.equal(ops.from_blocks(in_blocks, batch), x)


def test_gather_and_scatter():
    mask = torch.rand(40, 3000) < 0.01
    weight, index = torch.randn(40, 3000), index_of(mask)
    assert torch.equal(ops.sparse_gather(weight, index), weight[mask])
    assert torch.equal(ops.sparse_scatter(weight[mask], index, [40, 3000]), weight * mask)


def samples() -> list[tuple[object, tuple[object, ...]]]:
    conv = Conv(5, 4, 6, 6, 5, stride=(2, 1), groups=2)
    x, weight, bias, mask = conv.inputs(torch.float64, 0.5)
    pattern, index = pattern_of(mask, 2), index_of(mask)
    x, values, bias, weight = leaves(x, weight.flatten()[index], bias, weight)
    in_blocks = ops.to_blocks(x).detach().requires_grad_()
    output = ops.sparse_conv2d(in_blocks, values, pattern, bias, *conv.options).detach()
    flat = torch.rand(6, 9) < 0.5
    row = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    entries = torch.randn(int(flat.sum()), dtype=torch.float64, requires_grad=True)
    ones = torch.ones(4, dtype=torch.float64, requires_grad=True)
    return [
        (ops.sparse_conv2d, (x, values, pattern, bias, *conv.options)),
        (ops.sparse_conv2d, (in_blocks, values, pattern, None, *conv.options, output.requires_grad_(), True)),
        (ops.sparse_conv2d_backward, (output.detach(), in_blocks.detach(), values.detach(), pattern,
                                      *conv.options, [True, True, True])),
        (ops.sparse_linear, (row, entries, pattern_of(flat), bias, [6, 9])),
        (ops.sparse_linear_backward, (torch.randn(3, 6, dtype=torch.float64), row.detach(), entries.detach(),
                                      pattern_of(flat), [6, 9], [True, False, True])),
        (ops.sparse_gather, (weight, index)),
        (ops.sparse_scatter, (values.detach(), index, conv.shape)),
        (ops.to_blocks, (x,)),
        (ops.from_blocks, (in_blocks, 5)),
        (ops.blocked_norm, (in_blocks, 5, ones, ones.detach().clone().requires_grad_(), 1e-5, None, True)),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(len(samples())))
def test_opcheck(index: int):
    op, arguments = samples()[index]
    torch.library.opcheck(op, arguments)


def test_gradcheck():
    conv = Conv(3, 2, 3, 4, 5, stride=(2, 1))
    x, weight, bias, mask = conv.inputs(torch.float64, 0.5)
    pattern, index = pattern_of(mask), index_of(mask)

    def convolve(x: Tensor, dense: Tensor, bias: Tensor) -> Tensor:
        return ops.sparse_conv2d(x, ops.sparse_gather(dense, index), pattern, bias, *conv.options)

    # gather's gradient is 0 where the mask is False, and the function does not depend on those entries
    assert torch.autograd.gradcheck(convolve, leaves(x, weight, bias))
    flat = torch.rand(4, 6) < 0.5
    assert torch.autograd.gradcheck(
        lambda x, v: ops.sparse_linear(x, v, pattern_of(flat), None, [4, 6]),
        leaves(torch.randn(3, 6, dtype=torch.float64), torch.randn(int(flat.sum()), dtype=torch.float64)),
    )


@pytest.mark.parametrize("index", range(len(samples())))
def test_references_agree(index: int):
    """The reference in PyTorch, which serves without the compiled part, is the same function."""
    op, arguments = samples()[index]
    name = op._qualified_op_name.removeprefix("drive::")
    references = {
        "sparse_conv2d": convolution.conv2d_reference,
        "sparse_conv2d_backward": convolution.conv2d_backward_reference,
        "sparse_linear": linear.linear_reference,
        "sparse_linear_backward": linear.linear_backward_reference,
        "sparse_gather": gather_reference,
        "sparse_scatter": scatter_reference,
        "to_blocks": blocked.to_blocks_reference,
        "from_blocks": blocked.from_blocks_reference,
        "blocked_norm": blocked.norm_reference,
    }
    torch.testing.assert_close(op(*arguments), references[name](*arguments), **TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bits_are_computed_in_float32(dtype: torch.dtype):
    conv = Conv(17, 6, 8, 9, 7)
    cases = []
    x, weight, bias, mask = conv.inputs(torch.float32, 0.3)
    cases.append((ops.sparse_conv2d, x, weight, bias, pattern_of(mask), conv.options))
    x, weight = torch.randn(5, 40), torch.randn(30, 40)
    cases.append((ops.sparse_linear, x, weight, torch.randn(30), None, ([30, 40],)))
    for op, x, weight, bias, pattern, options in cases:
        mask = weight != 0
        pattern, index = pattern or pattern_of(mask), index_of(mask)
        narrow = leaves(x.to(dtype), weight.to(dtype), bias.to(dtype))
        wide = leaves(*(t.detach().float() for t in narrow))
        found, expected = (
            op(a, ops.sparse_gather(w, index), pattern, b, *options) for a, w, b in (narrow, wide)
        )
        grad = torch.randn_like(found)
        found.backward(grad)
        expected.backward(grad.float())
        assert torch.equal(found, expected.to(dtype))
        for mine, other in zip(narrow, wide, strict=True):
            assert torch.equal(mine.grad, other.grad.to(dtype))


def test_inputs_and_values_must_be_of_one_type():
    x, mask = torch.randn(3, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match="values must be BFloat16, as input is, got Float"):
        ops.sparse_linear(x, torch.ones(8), pattern_of(mask), None, [2, 4])
