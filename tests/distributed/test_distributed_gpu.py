"""Steps over several ranks on a CUDA device: the CPU's bits, and few waits of the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from rank_cases import dtensor_cases, missed_brackets, row_cases
from torch import Tensor
from ugly import valued
from worlds import returned, run

from drive import fused_drive_prune
from drive.reference import drive_prune

DEVICE = "cuda"
pytestmark = pytest.mark.gpu


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
