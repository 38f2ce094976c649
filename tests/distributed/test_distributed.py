"""Steps over tensors that are spread over ranks: one process's masks, few kilobytes, one error for all."""

from __future__ import annotations

import ctypes
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import dtensor_cases, missed_brackets, row_cases
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from worlds import Traffic, returned, run

from drive import Masks, fused_drive_prune

WORLDS = (1, 2, 3, 4)


@pytest.mark.parametrize("size", WORLDS)
def test_dtensors(size: int):
    returned(run(size, dtensor_cases, range(40)))


@pytest.mark.parametrize("size", WORLDS)
def test_rows_of_plain_tensors(size: int):
    returned(run(size, row_cases, range(40)))


def rank_tensors(rows: int = 40) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and gradients of this rank alone."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    weights = [torch.randn(rows, 20, generator=generator), torch.randn(3, generator=generator)]
    return weights, [torch.randn(w.shape, generator=generator) for w in weights]


def no_harm(
    error: type[Exception], message: str, weights: list[Tensor], *args: Any, **arguments: Any
) -> None:
    """The step raises this error, and its tensors and masks are as they were."""
    arguments = {"sparsity": 0.5, "process_group": dist.group.WORLD, **arguments}
    before = [w.clone() for w in weights]
    masks = arguments.get("masks")
    old = None if masks is None else {name: mask.clone() for name, mask in masks.items()}
    with pytest.raises(error, match=message):
        fused_drive_prune(weights, *args, **arguments)
    for weight, was in zip(weights, before, strict=True):
        assert torch.equal(weight.view(torch.int32), was.view(torch.int32))
    if masks is not None and old is not None:
        assert all(torch.equal(masks[name], old[name]) for name in masks)


def faults() -> None:
    rank = dist.get_rank()
    weights, grads = rank_tensors()
    if rank == 1:
        grads[0][3, 4] = torch.nan
        grads[0][5, 6] = torch.inf
    message = "^fused_drive_prune: non-finite score in 0 \\(2 of 2400 entries, the first on rank 1\\)$"
    no_harm(ValueError, message, weights, grads)
    no_harm(ValueError, message, weights, grads, masks=Masks.dense(weights))
    result = fused_drive_prune(
        weights, grads, sparsity=0.5, process_group=dist.group.WORLD, check_finite=False
    )
    assert not result.ok and result.pruned == 0 and all(m.all() for m in result.masks.values())

    weights, grads = rank_tensors()
    message = "sparsity must be the same on all ranks, got 0.5 on rank 0 and 0.75 on rank 2"
    no_harm(ValueError, message, weights, grads, sparsity=0.75 if rank == 2 else 0.5)
    message = "min_keep must be the same on all ranks, got 0 on rank 0 and 1 on rank 1"
    no_harm(ValueError, message, weights, grads, min_keep=int(rank == 1))
    old = Masks.dense(weights) if rank == 1 else None
    no_harm(ValueError, "masks must be the same on all ranks", weights, grads, masks=old)
    fewer = slice(0, 1 if rank == 2 else 2)
    no_harm(ValueError, "names must be the same on all ranks", weights[fewer], grads[fewer])
    other = [w.double() if rank == 2 else w for w in weights]
    no_harm(
        ValueError,
        "0 must be the same .* torch.float64",
        other,
        [g.to(w.dtype) for g, w in zip(grads, other, strict=True)],
    )

    mine = "grads must hold|grads has no entry for 1"
    theirs = "fused_drive_prune: rank 1 raised ValueError: fused_drive_prune: grads"
    if rank == 1:
        no_harm(ValueError, mine, weights, grads[:1])
    else:
        no_harm(RuntimeError, theirs, weights, grads)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    copies = [DTensor.from_local(w, mesh, [Replicate()]) for w in (torch.ones(5, 3), torch.ones(4))]
    slopes = [torch.ones(5, 3), torch.ones(4)]
    slopes[1][2] += 1e-6 * (rank == 2)
    slopes = [DTensor.from_local(g, mesh, [Replicate()]) for g in slopes]
    message = "1.grad must be the same on all ranks that hold a copy, got different ones on ranks 0 and 2"
    with pytest.raises(ValueError, match=message):
        fused_drive_prune(copies, slopes, sparsity=0.5)
    assert all(bool(copy.to_local().all()) for copy in copies)
    partial = [DTensor.from_local(torch.ones(4), mesh, [torch.distributed.tensor.Partial()])]
    with pytest.raises(ValueError, match="0 must have placements Shard and Replicate, got P"):
        fused_drive_prune(partial, partial, sparsity=0.5)
    message = r"grads\[0\] must be a DTensor placed \(.*\) on .*, as its weight is, got a plain tensor"
    with pytest.raises(ValueError, match=message):
        fused_drive_prune(copies, [torch.ones(5, 3), copies[1]], sparsity=0.5)


def test_faults():
    returned(run(3, faults))


def part_of_the_ranks() -> None:
    """A group of two of three ranks; a tensor without dimensions is one row."""
    group = dist.new_group([0, 2])
    rank = dist.get_rank()
    if rank == 1:
        return
    weights, grads = [torch.tensor(1.0 + rank), torch.arange(4.0) + rank], [torch.tensor(1.0), torch.ones(4)]
    result = fused_drive_prune(weights, grads, sparsity=0.5, process_group=group)
    assert result.total == 10 and result.kept == 5
    assert bool(weights[0]) == (rank == 2) and weights[1].count_nonzero() == (1 if rank == 0 else 3)


def test_part_of_the_ranks():
    returned(run(3, part_of_the_ranks))


def small_differences() -> None:
    """Copies that differ by one unit in the last place, up on one rank and down on another."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    bits = torch.ones(100).view(torch.int32)
    bits[7] += (0, 1, -1)[dist.get_rank()]
    copies = [DTensor.from_local(bits.view(torch.float32), mesh, [Replicate()])]
    slopes = [DTensor.from_local(torch.ones(100), mesh, [Replicate()])]
    with pytest.raises(ValueError, match="0 must be the same on all ranks .* on ranks 0 and 1$"):
        fused_drive_prune(copies, slopes, sparsity=0.5)


def test_small_differences():
    returned(run(3, small_differences))


def leaving(how: str) -> str:
    weights, grads = rank_tensors()
    impatient = dist.new_group(timeout=timedelta(seconds=3))
    dist.barrier()
    if dist.get_rank() == 1:
        if how == "dies":
            os._exit(1)
        dist.barrier()  # until the others have waited in vain
        return ""
    with pytest.raises(RuntimeError) as caught:
        fused_drive_prune(weights, grads, sparsity=0.5, process_group=impatient)
    if how != "dies":
        dist.barrier()
    return str(caught.value)


@pytest.mark.parametrize("how", ("dies", "does not come"))
def test_a_rank_that(how: str):
    results = run(3, leaving, how)
    for rank in (0, 2):
        expected = f"fused_drive_prune: rank {rank} of 3 waited for the others to check their arguments: "
        assert str(results[rank]).startswith(expected), results[rank]


def traffic(rows: int) -> tuple[int, int]:
    """Bytes that this rank gives to a step over plain rows, and to one over DTensors."""
    weights, grads = rank_tensors(rows)
    with Traffic() as plain:
        fused_drive_prune(weights, grads, sparsity=0.9, process_group=dist.group.WORLD)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shards, slopes = ([DTensor.from_local(t, mesh, [Shard(0)]) for t in some] for some in rank_tensors(rows))
    with Traffic() as sharded:
        fused_drive_prune(shards, slopes, sparsity=0.9)
    for found in (plain, sharded):
        assert {name for name, _ in found.sent} == {"allreduce_"}, "nothing is gathered"
    return plain.bytes, sharded.bytes


def test_traffic():
    """Some ten rounds of at most 2^12 counts, of 8 bytes."""
    for rows in (1_000, 100_000):  # 80 K, 8 M entries
        assert max(map(max, returned(run(4, traffic, rows)))) < 160 * 1024


def memory(entries: int) -> float:
    """Most bytes an entry that a step takes beyond its tensors."""
    weights, grads = [torch.randn(entries)], [torch.randn(entries)]
    fused_drive_prune([torch.ones(9)], [torch.ones(9)], sparsity=0.5, process_group=dist.group.WORLD)
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory is used again unnoticed
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    fused_drive_prune(weights, grads, sparsity=0.9, process_group=dist.group.WORLD)
    return (resident("VmHWM") - before) / entries


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux's /proc")
def test_memory():
    """The mask, and a quarter of a byte for the listed scores; 4 MB are the process's own."""
    entries = 20_000_000
    assert max(returned(run(2, memory, entries))) < 1.3 + 4e6 / entries


def test_missed_brackets():
    returned(run(2, missed_brackets, range(20)))
