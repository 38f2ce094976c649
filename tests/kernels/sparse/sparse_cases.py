"""Inputs of the sparse ops, and whether outputs and gradients are those of dense PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from drive_kernels.sparse.pattern import index_of, pattern_of

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


def assert_ends_of_rows(width: int) -> None:
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
