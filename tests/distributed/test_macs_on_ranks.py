"""drive.prune to a share of the multiply-adds, of models on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from worlds import returned, run

import drive

COSTS = {"0.weight": 64, "3.weight": 1, "5.weight": 1}
loss_fn = nn.functional.cross_entropy


def network() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Flatten(), nn.Linear(6 * 64, 12), nn.Tanh(), nn.Linear(12, 3)
    return nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Tanh(), *inner)  # three matrices in one weight


def batches(size: int = 10) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, size, 10, generator=generator), torch.arange(8) % 3) for _ in range(4)]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loops(method: str) -> None:
    """All ranks have the same batches: averages over two of them are exact."""
    options: dict[str, Any] = {
        "macs": 0.2,
        "iterations": 3,
        "min_keep": 5,
        "progress": False,
        "method": method,
    }
    alone = network()
    expected = drive.prune(alone, batches(), loss_fn, **options)
    models = [DistributedDataParallel(network()), fully_shard(network())]
    for model in models[: 1 if drive.methods.get(method).spread == "copies" else 2]:
        masks = drive.prune(model, batches(), loss_fn, **options)
        for name, mask in masks.items():
            assert torch.equal(full(mask), expected[name]), name
            inner = model.module if isinstance(model, DistributedDataParallel) else model
            assert torch.equal(full(inner.get_parameter(name).detach()), alone.get_parameter(name)), name


@pytest.mark.parametrize("method", ("drive", "magnitude", "synflow"))
def test_loops(method: str):
    returned(run(2, loops, method))


def tensor_parallel() -> None:
    """Layers see whole activations, or parts of their features: an entry's cost is the same."""
    model = parallelize_module(
        network(), init_device_mesh("cpu", (2,)), {"3": ColwiseParallel(), "5": RowwiseParallel()}
    )
    masks = drive.prune(model, batches(), loss_fn, macs=0.2, iterations=3, progress=False)
    dense = sum(COSTS[name] * mask.numel() for name, mask in masks.items())
    left = sum(COSTS[name] * int(full(mask).sum()) for name, mask in masks.items())
    assert 0.2 * dense - 64 < left <= 0.2 * dense


def test_tensor_parallel():
    returned(run(2, tensor_parallel))


def other_counts() -> None:
    """Ranks whose batches are of different images: an entry costs the mean."""
    model = fully_shard(nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    found: list[drive.PruneResult] = []
    sides = batches(10 + 2 * dist.get_rank())  # 64 and 80 positions
    drive.prune(model, sides, loss_fn, macs=0.2, iterations=1, on_step=found.append, progress=False)
    assert "of 9,720" in found[0].summary()


def test_other_counts():
    returned(run(2, other_counts))
