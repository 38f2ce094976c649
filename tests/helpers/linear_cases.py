"""Inputs of packed_linear and block_linear, and what comes out of them in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drive_kernels.linear import block, packed

# Rounding of the output; of sums of at most some hundred products in float32, in another order.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Errors are compared with the largest entry: sums may cancel."""
    assert found.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    error = (found.cpu().double() - expected).abs()
    assert not error.numel() or float(error.max()) <= TOLERANCE[found.dtype] * scale


@dataclass(frozen=True)
class PackedCase:
    rows: int
    outputs: int
    inputs: int
    density: float
    dtype: torch.dtype = torch.float32
    biased: bool = True
    device: str = "cpu"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """input, weight, mask, bias"""
        generator = torch.Generator().manual_seed(0)
        shape = self.outputs, self.inputs
        mask = torch.rand(shape, generator=generator) < self.density
        weight, input, bias = (
            torch.randn(size, generator=generator).to(self.dtype)
            for size in (shape, (self.rows, self.inputs), (self.outputs,))
        )
        return input, weight, mask, bias if self.biased else None

    def arguments(self) -> list[Any]:
        input, weight, mask, bias = (t if t is None else t.to(self.device) for t in self.tensors())
        return [input, *packed.pack(weight, mask), bias, [self.outputs, self.inputs]]

    def expected(self) -> Tensor:
        input, weight, mask, bias = self.tensors()
        output = input.double() @ (weight.double() * mask).t()
        return output if bias is None else output + bias.double()


@dataclass(frozen=True)
class BlockCase:
    rows: int
    outputs: int
    inputs: int
    block: int
    density: float
    dtype: torch.dtype = torch.float32
    biased: bool = True
    device: str = "cpu"

    def mask(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        alive = torch.rand(self.outputs // self.block, self.inputs // self.block, generator=generator)
        return (alive < self.density).repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """input, weight, bias, gradient of the output"""
        generator = torch.Generator().manual_seed(0)
        sizes = (
            (self.rows, self.inputs), (self.outputs, self.inputs), (self.outputs,), (self.rows, self.outputs)
        )  # fmt: skip
        input, weight, bias, grad = (torch.randn(s, generator=generator).to(self.dtype) for s in sizes)
        return input, weight, bias if self.biased else None, grad

    def arguments(self) -> list[Any]:
        input, weight, bias, _ = (t if t is None else t.to(self.device) for t in self.tensors())
        return [input, weight, block.pattern_of(self.mask().to(self.device), self.block), bias, self.block]

    def backward_arguments(self) -> list[Any]:
        input, weight, pattern, _, size = self.arguments()
        return [self.tensors()[3].to(self.device), input, weight, pattern, size, [True, True, True]]

    def expected(self) -> Tensor:
        input, weight, bias, _ = self.tensors()
        output = input.double() @ (weight.double() * self.mask()).t()
        return output if bias is None else output + bias.double()

    def expected_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        input, weight, _, grad = (t if t is None else t.double() for t in self.tensors())
        return grad @ (weight * self.mask()), (grad.t() @ input) * self.mask(), grad.sum(0)


# Every way through the kernels: few rows and many, a tile and more, ends of tiles, nothing and everything.
PACKED = (
    PackedCase(1, 64, 64, 0.5),
    PackedCase(1, 130, 200, 0.1, torch.bfloat16),
    PackedCase(2, 65, 63, 0.5, torch.float16),
    PackedCase(3, 100, 7, 0.5, biased=False),
    PackedCase(4, 1, 129, 1.0),
    PackedCase(5, 70, 130, 0.5),
    PackedCase(16, 64, 128, 0.02, torch.bfloat16),
    PackedCase(33, 63, 65, 0.9, torch.float16, biased=False),
    PackedCase(70, 65, 64, 1.0),
    PackedCase(2, 66, 70, 0.0),
    PackedCase(20, 66, 70, 0.0),
    PackedCase(0, 70, 66, 0.5),
    PackedCase(3, 5, 0, 0.5),
    PackedCase(3, 0, 5, 0.5),
)
BLOCKS = (
    BlockCase(1, 64, 96, 16, 0.5),
    BlockCase(3, 96, 64, 32, 0.5, torch.bfloat16),
    BlockCase(17, 128, 64, 64, 0.7, torch.float16),
    BlockCase(130, 64, 64, 32, 0.5, biased=False),
    BlockCase(70, 64, 128, 16, 1.0, torch.bfloat16),
    BlockCase(5, 64, 32, 16, 0.0),
    BlockCase(0, 64, 32, 32, 0.5),
)
