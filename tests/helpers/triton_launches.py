"""Launches of the Triton kernels, every kind of them: what the launchers make of tensors of usual sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from unittest import mock

import torch
from ahead_of_time import Launch, recorded
from linear_cases import BlockCase, PackedCase
from masked_cases import Case
from ugly import Step, laid_out, sample_inputs, to_cost

from drive_kernels.linear import block, block_triton, masked_triton, packed_triton
from drive_kernels.prune.triton import launch


@cache
def prune() -> frozenset[Launch]:
    """All that the launcher makes of any arguments."""
    more = []  # dense, in row-major order and not
    for dtype in (torch.float32, torch.float64):
        for layout in ("contiguous", "channels_last"):
            w, g, m = (
                laid_out(torch.ones(40, 30, 3, 3, dtype=t), layout) for t in (dtype, dtype, torch.bool)
            )
            more.append(Step([w], [g], [], [m], True, 1, 0))
    with recorded() as found:
        for step in (*sample_inputs(), *more):
            for fresh in (False, True):
                for min_keep in (0, 1):
                    same = replace(step, fresh=fresh, min_keep=min_keep).clone()
                    launch.prune_(*same.args())
                    launch.prune_to_cost_(*to_cost(same, [2] * len(same.weights), 0.5, 0.5).args())
    return frozenset(found)


LINEAR = Case((4096, 512), (1024, 512))
CONVS = (
    Case((32, 64, 16, 16), (128, 64, 3, 3), padding=(1, 1), layout="channels_last"),
    Case((4, 256, 15, 15), (192, 128, 3, 3), (2, 2), (1, 1), groups=2),
)


def forward_and_backward(case: Case, dtype: torch.dtype, learned: bool) -> None:
    tensors = case.tensors(dtype, learned)
    output = getattr(masked_triton, case.name)(*tensors, *case.options)
    backward = getattr(masked_triton, f"{case.name}_backward")
    backward(output, *tensors[:3], *case.options, [True, True, learned, True])


@cache
def masked() -> frozenset[Launch]:
    """All dtypes and masks for one layer, and every other way through the launchers."""
    with recorded() as found:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for learned in (False, True):
                forward_and_backward(CONVS[0], dtype, learned)
        for dtype in (torch.float32, torch.bfloat16):
            forward_and_backward(LINEAR, dtype, True)
            forward_and_backward(CONVS[1], dtype, False)
        large = masked_triton.TUNING._replace(least_pixels=1 << 30, narrow=0)
        with mock.patch.object(masked_triton, "TUNING", large):  # no pieces, offsets in int64
            forward_and_backward(CONVS[0], torch.bfloat16, True)
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        forward_and_backward(LINEAR, torch.float32, False)
        matmul.fp32_precision = before
        forward_and_backward(Case((1, 512), (1024, 512)), torch.bfloat16, False)
    return frozenset(found)


@cache
def linear() -> frozenset[Launch]:
    """Few rows and many, all sizes of blocks, with splits and without, with a bias and without."""
    with recorded() as found:
        for dtype in (torch.float32, torch.bfloat16):  # float16 is as bfloat16
            for rows, outputs, inputs in ((1, 512, 512), (4, 70, 66), (16, 70, 66), (4096, 512, 512)):
                case = PackedCase(rows, outputs, inputs, 0.1, dtype, biased=rows < 16)
                packed_triton.packed_linear(*case.arguments())
            for rows in (16, 4096):
                for size in block.BLOCKS:
                    blocked = BlockCase(rows, 256, 512, size, 0.5, dtype, biased=False)
                    block_triton.block_linear(*blocked.arguments())
                    block_triton.block_linear_backward(*blocked.backward_arguments())
    return frozenset(found)
