"""Inputs of the masked ops, and whether what comes out of them is right, by float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from ugly import laid_out, moved

# One rounding of a float32 sum, whose order is free.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-6, "atol": 1e-5},
    torch.float16: {"rtol": 2**-11, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-5},
}


@dataclass(frozen=True)
class Case:
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    layout: str = "contiguous"
    density: float = 0.5

    @property
    def name(self) -> str:
        return "masked_conv2d" if len(self.weight) == 4 else "masked_linear"

    @property
    def options(self) -> tuple[Any, ...]:
        given = self.stride, self.padding, self.dilation, self.groups
        return given if len(self.weight) == 4 else ()

    def tensors(self, dtype: torch.dtype, learned: bool, device: str = "cpu") -> list[Tensor]:
        """input, weight, mask, bias"""
        generator = torch.Generator().manual_seed(0)
        input, weight, mask = (
            torch.randn(shape, generator=generator) for shape in (self.input, self.weight, self.weight)
        )
        mask = mask.to(dtype) if learned else torch.rand(mask.shape, generator=generator) < self.density
        bias = torch.randn(2 * self.weight[0], generator=generator)
        found = [laid_out(t, self.layout) for t in (input.to(dtype), weight.to(dtype), mask)]
        return [moved(t, device) for t in (*found, bias.to(dtype)[::2])]


CASES = (
    Case((33, 40), (20, 40)),
    Case((1, 7), (5, 7)),
    Case((2, 3, 70), (65, 70), layout="sliced"),
    Case((17,), (3, 17)),
    Case((0, 4), (3, 4)),
    Case((5, 18), (33, 18), density=0.0),
    Case((2, 6, 5, 4), (8, 3, 3, 2), (2, 1), (1, 2), (1, 2), groups=2),
    Case((3, 5, 4, 4), (4, 5, 3, 3), padding=(1, 1), layout="channels_last"),
    Case((2, 17, 5, 5), (18, 17, 1, 1), stride=(2, 2)),
    Case((2, 3, 4, 5), (6, 1, 2, 2), padding=(1, 1), groups=3),
    Case((1, 2, 9, 9), (3, 2, 2, 3), (3, 2), (4, 0), (2, 3), layout="sliced"),
    Case((2, 3, 6, 5), (4, 3, 2, 2), layout="transposed"),
    Case((0, 3, 5, 5), (4, 3, 3, 3)),
    Case((2, 3, 5, 5), (4, 3, 3, 3), density=0.0),
)


def assert_right(
    where: Any,
    case: Case,
    dtype: torch.dtype,
    learned: bool,
    device: str = "cpu",
    tolerances: dict[torch.dtype, dict[str, float]] = TOLERANCE,
) -> None:
    """The op and its backward, found there by their names."""
    tensors = case.tensors(dtype, learned, device)
    input, weight, mask, bias = (t.cpu() for t in tensors)
    product = weight * mask if learned else weight.masked_fill(~mask, 0)
    leaves = [t.double().requires_grad_() for t in (input, product, bias)]
    output = (F.conv2d if case.options else F.linear)(*leaves, *case.options)
    generator = torch.Generator().manual_seed(1)
    grad = laid_out(torch.randn(output.shape, generator=generator).to(dtype), case.layout)
    to_input, to_product, to_bias = torch.autograd.grad(output, leaves, grad.double())
    gradients = to_input, to_product * mask, to_product * weight.double(), to_bias

    tolerance = tolerances[dtype]
    found = getattr(where, case.name)(*tensors, *case.options)
    assert found.dtype == dtype
    torch.testing.assert_close(found.cpu().double(), output.detach(), **tolerance)
    backward = getattr(where, f"{case.name}_backward")
    for needed in (
        [True, True, learned, True],
        [False, learned, False, False],
        [False, False, learned, False],
    ):
        found = backward(moved(grad, device), *tensors[:3], *case.options, needed)
        for is_needed, mine, right, like in zip(needed, found, gradients, tensors, strict=True):
            if not is_needed:
                assert mine.shape == (0,)
                continue
            assert mine.dtype == like.dtype
            torch.testing.assert_close(mine.cpu().double(), right, **tolerance)
