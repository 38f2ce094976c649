"""drive::shard_* and steps over several ranks on a CUDA device: the CPU's bits, and few waits of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_shard_ops
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_distributed import dtensor_cases, missed_brackets, row_cases
from torch import Tensor
from torch.utils._pytree import tree_map_only
from ugly import Step, laid_out, moved, steps, valued
from worlds import returned, run

from drive import fused_drive_prune
from drive.reference import drive_prune

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
    test_shard_ops.check_ops(OPS, step, data)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps(), st.integers(0, 5000))
def test_parity_of_samples(step: Step, count: int):
    test_shard_ops.check_sample(OPS, step, count)


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
        some = test_shard_ops.operands(step)
        ranked = test_shard_ops.keys(some)
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
            test_shard_ops.check_apply(OPS, step, bracket, [threshold] * len(ends), ends)


def test_parity_on_many_tensors():
    test_shard_ops.check_many_tensors(OPS)


def test_no_room():
    test_shard_ops.check_no_room(OPS)


@pytest.mark.parametrize("dtype", test_shard_ops.CHECKSUM_DTYPES)
def test_parity_of_checksums(dtype: torch.dtype):
    test_shard_ops.check_checksum(OPS, dtype)


@pytest.mark.parametrize("size", (1, 2, 3))
def test_ranks_that_share_a_device(size: int):
    """Over gloo, which lets them."""
    returned(run(size, row_cases, range(20), DEVICE))
    returned(run(size, dtensor_cases, range(20), DEVICE))


def test_missed_brackets():
    returned(run(2, missed_brackets, range(10), DEVICE))


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process, over NCCL."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("values", ("normal", "equal"))
@pytest.mark.parametrize("check_finite", (True, False))
def test_waits_for_all_reduces_only(check_finite: bool, values: str, monkeypatch: pytest.MonkeyPatch):
    """The host never waits inside PyTorch's own calls; it does once for each all-reduce, to read it."""
    generator = torch.Generator().manual_seed(2)
    shapes = ([700, 300, 3, 3], [40_003], [7])
    weights, grads = ([valued(s, torch.float32, values, generator) for s in shapes] for _ in "wg")
    expected = [w.clone() for w in weights]
    oracle = drive_prune(expected, grads, sparsity=0.9)
    slopes = [g.to(DEVICE) for g in grads]

    def step() -> list[Tensor]:
        pruned = [w.to(DEVICE) for w in weights]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = fused_drive_prune(
                pruned, slopes, sparsity=0.9, process_group=dist.group.WORLD, check_finite=check_finite
            )
            assert result.ok and result.kept == oracle.kept
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return pruned

    step()  # loads kernels, meets NCCL
    waits, reduces = [], []
    wait, reduce = torch.cuda.Event.synchronize, dist.all_reduce
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (waits.append(event), wait(event))[1])
    monkeypatch.setattr(dist, "all_reduce", lambda *a, **k: (reduces.append(a), reduce(*a, **k))[1])
    pruned = step()
    assert len(waits) == len(reduces) > 4
    for ours, theirs in zip(pruned, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)
