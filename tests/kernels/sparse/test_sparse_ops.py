"""The sparse ops and the blocked layout against dense PyTorch: outputs and gradients, whatever the shape."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import drive_kernels
from drive_kernels.sparse import blocked, linear
from drive_kernels.sparse import conv as convolution
from drive_kernels.sparse.pattern import gather_reference, index_of, pattern_of, scatter_reference

ops = torch.ops.drive
# sums of at most some thousand products, in another order
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 2e-4}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}


@dataclass(frozen=True)
class Conv:
    batch: int
    channels: int
    outputs: int
    height: int
    width: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def shape(self) -> list[int]:
        return [self.outputs, self.channels // self.groups, *self.kernel]

    @property
    def options(self) -> tuple[object, ...]:
        return self.shape, self.stride, self.padding, self.dilation, self.groups

    def inputs(
        self, dtype: torch.dtype, density: float, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """input, dense weight, bias, mask"""
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(self.shape, generator=generator) < density
        weight = torch.randn(self.shape, generator=generator, dtype=dtype).masked_fill_(~mask, 0)
        size = self.batch, self.channels, self.height, self.width
        bias = torch.randn(self.outputs, generator=generator, dtype=dtype)
        return torch.randn(size, generator=generator, dtype=dtype), weight, bias, mask


CONVS = (
    Conv(32, 4, 6, 32, 32),
    Conv(17, 4, 6, 8, 8, stride=(2, 2), groups=2),
    Conv(5, 3, 5, 7, 11, kernel=(1, 1), padding=(0, 0)),
    Conv(16, 4, 4, 4, 4),
    Conv(33, 4, 4, 9, 20, kernel=(5, 3), stride=(2, 3), padding=(2, 1), dilation=(1, 2), groups=2),
    Conv(16, 8, 8, 6, 6, kernel=(1, 1), stride=(2, 2), padding=(0, 0), groups=8),
    Conv(3, 2, 2, 1, 1),
    Conv(16, 2, 3, 2, 2),
    Conv(2, 2, 3, 40, 50, kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    Conv(1, 4, 4, 5, 5, kernel=(2, 2), stride=(3, 3), padding=(0, 0), dilation=(2, 2)),
    Conv(4, 4, 4, 12, 12, padding=(4, 4)),
    Conv(4, 4, 4, 12, 12, kernel=(1, 1), padding=(2, 2)),
    Conv(18, 3, 4, 13, 17, stride=(1, 2), padding=(0, 2)),
    # rows that no entry of the kernel meets
    Conv(18, 4, 3, 9, 10, kernel=(1, 3), stride=(2, 1), padding=(0, 1)),
    Conv(2, 4, 3, 9, 16, kernel=(1, 3), stride=(2, 1), padding=(1, 1)),
    Conv(1, 4, 3, 12, 12, kernel=(2, 3), stride=(3, 1), padding=(0, 1)),
    Conv(3, 4, 3, 10, 16, kernel=(1, 1), stride=(3, 1), padding=(0, 0)),
    Conv(0, 3, 4, 8, 8),
    # rows of 16 n pixels, which are lanes as they are
    Conv(3, 4, 6, 20, 16),
    Conv(2, 4, 6, 11, 48, kernel=(5, 3), padding=(1, 2), dilation=(2, 2), groups=2),
    Conv(1, 6, 4, 7, 32, kernel=(1, 1), padding=(0, 0)),
    Conv(1, 3, 4, 3, 256, kernel=(2, 1), padding=(3, 0)),
    # taps that look as far as where rows are clipped, and farther; the longest such rows, there and back
    Conv(2, 3, 4, 6, 32, kernel=(1, 15), padding=(0, 7)),
    Conv(2, 3, 4, 5, 32, kernel=(3, 3), padding=(1, 8), dilation=(1, 8)),
    Conv(1, 3, 4, 5, 128),
    Conv(1, 3, 4, 5, 144),
    # gradients in several calls: of two channels each at a density of 0.3, of one at 1.0
    Conv(17, 12, 32, 5, 16),
)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def assert_conv_right(conv: Conv, dtype: torch.dtype, density: float, blocks: bool) -> None:
    x, weight, bias, mask = conv.inputs(dtype, density)
    theirs = leaves(x, weight, bias)
    expected = F.conv2d(*theirs, *conv.options[1:])
    grad = torch.randn_like(expected)
    expected.backward(grad)

    index = index_of(mask)
    ours = leaves(x, weight.flatten()[index], bias)
    pattern = pattern_of(mask, conv.groups)
    given = ops.to_blocks(ours[0]) if blocks else ours[0]
    found = ops.sparse_conv2d(given, ours[1], pattern, ours[2], *conv.options)
    found = ops.from_blocks(found, conv.batch) if blocks else found
    found.backward(grad)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, **tolerance)
    # sums over the batch and the plane, up to 32768 terms of size 1: a partial sum grows with their root, and
    # so does each rounding error, whose own sum therefore grows as the number of terms does
    terms = grad.numel() // conv.outputs
    wide = {
        "rtol": tolerance["rtol"],
        "atol": 5 * tolerance["atol"] + terms * torch.finfo(dtype).eps,
    }
    torch.testing.assert_close(ours[1].grad, theirs[1].grad.flatten()[index], **wide)
    torch.testing.assert_close(ours[2].grad, theirs[2].grad, **wide)


def test_compiled_kernels_are_there():
    assert drive_kernels.build_error is None
    for name in ("sparse_conv2d", "sparse_linear", "to_blocks", "blocked_norm", "sparse_gather"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"drive::{name}", "CPU"), name


@pytest.mark.parametrize("blocks", (False, True))
@pytest.mark.parametrize("density", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_conv2d(conv: Conv, dtype: torch.dtype, density: float, blocks: bool):
    assert_conv_right(conv, dtype, density, blocks)


def test_conv2d_of_many_channels_works_in_pieces():
    """The input does not fit the cache: pieces of a few rows, some of them shorter."""
    assert_conv_right(Conv(18, 700, 5, 19, 21), torch.float32, 0.05, blocks=True)
    assert_conv_right(Conv(18, 5, 700, 19, 21, stride=(2, 2)), torch.float32, 0.05, blocks=False)
    assert_conv_right(Conv(2, 900, 5, 40, 32), torch.float32, 0.05, blocks=False)
    assert_conv_right(Conv(2, 5, 900, 40, 32), torch.float32, 0.05, blocks=False)
    assert_conv_right(Conv(2, 1500, 5, 40, 31), torch.float32, 0.05, blocks=False)
    assert_conv_right(Conv(2, 5, 1500, 40, 31, kernel=(5, 5)), torch.float32, 0.05, blocks=False)
    assert_conv_right(Conv(1, 900, 5, 61, 63, stride=(2, 2)), torch.float32, 0.05, blocks=False)


@pytest.mark.parametrize("size", ((16, 7, 7), (1, 7, 7), (1, 7, 16)), ids=("images", "padded", "rows"))
@pytest.mark.parametrize("stride", ((1, 1), (2, 1)))
def test_what_is_not_finite_stays_where_it_belongs(size: tuple[int, int, int], stride: tuple[int, int]):
    """Lanes that go on beyond a row or a plane compute nothing that counts."""
    batch, height, width = size
    conv = Conv(batch, 4, 3, height, width, stride=stride)
    x, weight, _, mask = conv.inputs(torch.float32, 1.0)
    pattern = pattern_of(mask)
    for spoilt, of in ((2, "input"), (1, "grad")):
        x_, values = leaves(x, weight.flatten())
        with torch.no_grad():
            x_[:, spoilt if of == "input" else []] = torch.nan
        found = ops.sparse_conv2d(x_, values, pattern, None, *conv.options)
        grad = torch.ones_like(found)
        grad[:, spoilt if of == "grad" else []] = torch.nan
        found.backward(grad)
        expected = torch.zeros(conv.shape, dtype=torch.bool)
        expected[(slice(None), spoilt) if of == "input" else spoilt] = True
        assert torch.equal(values.grad.isnan().view(conv.shape), expected)
        assert found.isnan().all() if of == "input" else found.isfinite().all()
        assert x_.grad.isfinite().all() if of == "input" else x_.grad.isnan().all()


@pytest.mark.parametrize("width", (7, 16, 32, 144))
def test_rows_see_nothing_beyond_their_ends(width: int):
    """What is not finite at one row's end stays away from the next one's beginning, and the other way."""
    conv = Conv(2, 2, 3, 5, width)
    x, weight, _, mask = conv.inputs(torch.float32, 1.0)
    pattern = pattern_of(mask)
    for column in (0, -1):
        for spoilt in (torch.nan, torch.inf):
            x_ = x.clone()
            x_[..., column] = spoilt
            found = ops.sparse_conv2d(x_, weight.flatten(), pattern, None, *conv.options)
            expected = F.conv2d(x_.double(), weight.double(), padding=1)
            assert torch.equal(found.isfinite(), expected.isfinite())
            grad = torch.randn_like(found)
            grad[..., column] = spoilt
            needed = [True, True, False]
            back, *_ = ops.sparse_conv2d_backward(grad, x, weight.flatten(), pattern, *conv.options, needed)
            expected = F.conv_transpose2d(grad.double(), weight.double(), padding=1)
            assert torch.equal(back.isfinite(), expected.isfinite())


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
    test_rows_see_nothing_beyond_their_ends(32)
    for dtype in TOLERANCE:
        assert_linear_right(300, 70, 33, dtype, 0.3)
        assert_norm_right(17, dtype, residual=True, relu=True)


def run_variant(capability: str, module: str, folder: Path) -> None:
    """`check_variant` of a module of tests, with another instruction set."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", f"import {module}; {module}.check_variant()"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": paths},
        cwd=folder,
        check=True,
    )


@pytest.mark.parametrize("capability", ("default", "avx2", "avx512"))
def test_variants(capability: str, tmp_path: Path):
    run_variant(capability, "test_sparse_ops", tmp_path)


def strided(t: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    return torch.stack([t, t], -1)[..., 0]


@pytest.mark.parametrize("layout", ("channels_last", "transposed", "every other"))
def test_strided_input_and_gradient(layout: str):
    conv = Conv(17, 6, 5, 7, 9)
    x, weight, bias, mask = conv.inputs(torch.float64, 0.4)
    pattern, index = pattern_of(mask), index_of(mask)
    expected = F.conv2d(x, weight, bias, 1, 1)
    given, values, offset = leaves(x, weight.flatten()[index], bias)
    found = ops.sparse_conv2d(strided(given, layout), values, pattern, offset, *conv.options)
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float64])
    grad = torch.randn_like(expected)
    (plain,) = torch.autograd.grad(found, values, grad, retain_graph=True)
    (other,) = torch.autograd.grad(found, values, strided(grad, layout))
    torch.testing.assert_close(other, plain, **TOLERANCE[torch.float64])


def test_residual_and_relu():
    conv = Conv(17, 4, 6, 8, 8)
    x, weight, bias, mask = conv.inputs(torch.float64, 0.4)
    residual = torch.randn(17, 6, 8, 8, dtype=torch.float64)
    theirs = leaves(x, weight, bias, residual)
    expected = (F.conv2d(*theirs[:3], 1, 1) + theirs[3]).relu()
    index = index_of(mask)
    ours = leaves(x, weight.flatten()[index], bias, residual)
    found = ops.from_blocks(
        ops.sparse_conv2d(
            ops.to_blocks(ours[0]), ours[1], pattern_of(mask), ours[2], *conv.options,
            ops.to_blocks(ours[3]), True,
        ),
        17,
    )  # fmt: skip
    grad = torch.randn_like(expected)
    expected.backward(grad)
    found.backward(grad)
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float64])
    for mine, other in zip((ours[0], ours[2], ours[3]), (theirs[0], theirs[2], theirs[3]), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, **TOLERANCE[torch.float64])
    torch.testing.assert_close(ours[1].grad, theirs[1].grad.flatten()[index], **TOLERANCE[torch.float64])


def assert_linear_right(rows: int, inputs: int, outputs: int, dtype: torch.dtype, density: float) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(outputs, inputs, generator=generator) < density
    weight = torch.randn(outputs, inputs, generator=generator, dtype=dtype).masked_fill_(~mask, 0)
    x = torch.randn(rows, inputs, generator=generator, dtype=dtype)
    bias = torch.randn(outputs, generator=generator, dtype=dtype)
    theirs = leaves(x, weight, bias)
    expected = F.linear(*theirs)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    index = index_of(mask)
    ours = leaves(x, weight.flatten()[index], bias)
    found = ops.sparse_linear(ours[0], ours[1], pattern_of(mask), ours[2], [outputs, inputs])
    found.backward(grad)
    for mine, other in (
        (found, expected), (ours[0].grad, theirs[0].grad), (ours[1].grad, theirs[1].grad.flatten()[index]),
        (ours[2].grad, theirs[2].grad),
    ):  # fmt: skip
        torch.testing.assert_close(mine, other, **TOLERANCE[dtype])


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


def assert_norm_right(batch: int, dtype: torch.dtype, residual: bool, relu: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x, extra, grad = (torch.randn(batch, 3, 7, 5, generator=generator, dtype=dtype) for _ in range(3))
    x = x * 2 + 3
    gain, offset = (
        torch.randn(3, generator=generator, dtype=dtype),
        torch.randn(3, generator=generator, dtype=dtype),
    )
    theirs, ours = leaves(x, gain, offset, extra), leaves(x, gain, offset, extra)
    expected = F.batch_norm(theirs[0], None, None, theirs[1], theirs[2], True)
    expected = expected + theirs[3] if residual else expected
    expected = expected.relu() if relu else expected
    expected.backward(grad)
    in_blocks, mean, var = ops.blocked_norm(
        ops.to_blocks(ours[0]),
        batch,
        ours[1],
        ours[2],
        1e-5,
        ops.to_blocks(ours[3]) if residual else None,
        relu,
    )
    assert not in_blocks.permute(0, 4, 1, 2, 3).flatten(0, 1)[batch:].any(), "lanes beyond the batch are 0"
    found = ops.from_blocks(in_blocks, batch)
    found.backward(grad)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    for mine, other in zip(ours[: 3 + residual], theirs, strict=False):
        torch.testing.assert_close(mine.grad, other.grad, **TOLERANCE[dtype])
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), **TOLERANCE[dtype])
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0), **TOLERANCE[dtype])


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


def good() -> dict[str, object]:
    x, weight, bias, mask = Conv(2, 4, 6, 5, 5).inputs(torch.float32, 0.5)
    return {
        "input": x, "values": weight[mask], "pattern": pattern_of(mask), "bias": bias,
        "shape": [6, 4, 3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    (
        ({"input": torch.ones(2, 3, 5, 5)}, ValueError, "input must have 4 channels, got 3"),
        (
            {"input": torch.ones(2, 4, 5)},
            ValueError,
            r"input must be \[N, C, H, W\] or blocked .*, got \[2, 4, 5\]",
        ),
        ({"input": torch.ones(2, 4, 5, 5).int()}, TypeError, "input must be floating-point, got Int"),
        ({"values": torch.ones(3)}, ValueError, r"pattern\[1\] must be contiguous with 3 entries"),
        ({"values": torch.ones(3).double()}, TypeError, "values must be Float, as input is, got Double"),
        ({"pattern": []}, ValueError, "pattern must be 5 tensors, got 0"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \[6\], got \[5\]"),
        ({"stride": [0, 1]}, ValueError, "must be > 0"),
        ({"groups": 4}, ValueError, "groups must divide 6 output channels, got 4"),
        ({"padding": [0, 0], "dilation": [3, 3]}, ValueError, "no smaller than the kernel"),
    ),
)
def test_conv2d_refuses(changed: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        ops.sparse_conv2d(*{**good(), **changed}.values())


def test_compiles_into_one_graph():
    arguments = good()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor, values: Tensor) -> Tensor:
        given = {**arguments, "input": ops.to_blocks(x), "values": values}
        return ops.from_blocks(ops.sparse_conv2d(*given.values()), x.shape[0]).relu()

    x, values = leaves(arguments["input"], arguments["values"])
    found = run(x, values)
    found.sum().backward()
    expected = ops.sparse_conv2d(*arguments.values()).relu()
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float32])
    assert values.grad.abs().sum() > 0


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
