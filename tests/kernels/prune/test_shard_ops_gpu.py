"""drive::shard_* on a CUDA device: the CPU's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from shard_checks import (
    CHECKSUM_DTYPES,
    check_apply,
    check_checksum,
    check_many_tensors,
    check_no_room,
    check_ops,
    check_sample,
    keys,
    operands,
)
from torch import Tensor
from torch.utils._pytree import tree_map_only
from ugly import Step, laid_out, moved, steps, valued

DEVICE = "cuda"
pytestmark = pytest.mark.gpu


class OnDevice:
    """torch.ops.drive with arguments and results on the CPU, and its work on the device."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.drive, name)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"drive::{name}", "CUDA"), "not compiled"

        def call(*arguments: Any) -> Any:
            there = tree_map_only(Tensor, lambda tensor: moved(tensor, DEVICE), arguments)
            results = op(*there)
            if name == "shard_apply_":
                for index in (0, 3):  # weights and masks
                    for here, changed in zip(arguments[index], there[index], strict=True):
                        here.copy_(changed)
            return tree_map_only(Tensor, Tensor.cpu, results)

        return call


OPS = OnDevice()


@settings(
    max_examples=200, deadline=None, derandomize=True, phases=[Phase.generate], print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(steps(), st.data())
def test_parity_on_200_random_steps(step: Step, data: st.DataObject):
    check_ops(OPS, step, data)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps(), st.integers(0, 5000))
def test_parity_of_samples(step: Step, count: int):
    check_sample(OPS, step, count)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("values", ("normal", "ties", "equal", "half zero"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_parity_on_many_chunks(dtype: torch.dtype, values: str, layout: str):
    """Over 2^20 entries in some hundred tensors, with ties that end in the middle of one."""
    generator = torch.Generator().manual_seed(1)
    shapes = ([300, 256, 3, 3], [100_003], [7], *([[64]] * 100), [160, 256, 3, 3])
    weights, grads = ([laid_out(valued(s, dtype, values, generator), layout) for s in shapes] for _ in "wg")
    masks = [torch.rand(s, generator=generator) < 0.9 for s in shapes]
    sizes = torch.tensor([w.numel() for w in weights])
    for fresh in (True, False):
        step = Step(weights, grads, [], masks, fresh, 0, 0)
        some = operands(step)
        ranked = keys(some)
        middle = len(ranked) * 9 // 10
        low, threshold, high = (int(ranked[middle + d]) for d in (-30_000, 0, 30_000))
        low, high = min(low, threshold - 1), max(high, threshold + 1)
        counts, total, _ = OPS.shard_survey(*some, low, high, len(ranked))
        expected = torch.ops.drive.shard_survey(*some, low, high, len(ranked))
        assert torch.equal(counts, expected[0])
        torch.testing.assert_close(total, expected[1], rtol=1e-12, atol=0)
        begins = sizes.cumsum(0) - sizes
        ends = (500_000 - begins).clamp(min=0).minimum(sizes).tolist()
        for bracket in (None, (low, high)):
            check_apply(OPS, step, bracket, [threshold] * len(ends), ends)


def test_parity_on_many_tensors():
    check_many_tensors(OPS)


def test_no_room():
    check_no_room(OPS)


@pytest.mark.parametrize("dtype", CHECKSUM_DTYPES)
def test_parity_of_checksums(dtype: torch.dtype):
    check_checksum(OPS, dtype)
