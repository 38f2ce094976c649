"""Steps over tensors that are spread over ranks: one process's masks, few kilobytes, one error for all."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from ugly import LAYOUTS, VALUES, laid_out, valued
from worlds import Traffic, returned, run

from drive import Masks, PruneResult, fused_drive_prune
from drive.reference import drive_prune

WORLDS = (1, 2, 3, 4)
Placed = Callable[[Tensor], Tensor]


def case(seed: int) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
    """Tensors of odd shapes and values (weights, gradients, mask gradients, masks), and arguments."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    wide = draw.random() < 0.2
    dtypes = [torch.float32, torch.bfloat16, torch.float16, *([torch.float64] if wide else [])]
    tensors: dict[str, list[Tensor]] = {"weights": [], "grads": [], "mask_grads": [], "masks": []}
    for _ in range(draw.randint(1, 4)):
        shape = draw.choice(([64, 48], [2, 300], [7, 5, 3, 3], [1], [1001], [0, 4], [130, 150], [9, 20_011]))
        dtype, values, layout = draw.choice(dtypes), draw.choice(VALUES), draw.choice(LAYOUTS)
        for name in ("weights", "grads", "mask_grads"):
            tensors[name].append(laid_out(valued(shape, dtype, values, generator), layout))
        tensors["masks"].append(torch.rand(shape, generator=generator) < draw.choice((0, 0.3, 1)))
    if draw.random() < 0.8:
        tensors["mask_grads"] = []
    if draw.random() < 0.6:
        tensors["masks"] = []
    arguments = {"sparsity": draw.choice((0, 0.1, 0.5, 0.9, 0.99)), "min_keep": draw.choice((0, 0, 1, 20))}
    total = sum(w.numel() for w in tensors["weights"])
    guarded = sum(min(arguments["min_keep"], w.numel()) for w in tensors["weights"])
    if guarded > total - round(arguments["sparsity"] * total):
        arguments["min_keep"] = 0
    return tensors, arguments


def placements(dims: int, ndim: int, draw: random.Random) -> list[Any]:
    """For a mesh of so many dimensions, and a tensor."""
    kinds = [Replicate(), *(Shard(d) for d in range(ndim))]
    return [draw.choice(kinds) for _ in range(dims)]


def expected(tensors: dict[str, list[Tensor]], arguments: dict[str, Any]) -> tuple[PruneResult, list[Tensor]]:
    """By the oracle, in this process alone."""
    weights = [w.clone() for w in tensors["weights"]]
    masks = Masks({str(i): m.clone() for i, m in enumerate(tensors["masks"])}) if tensors["masks"] else None
    grads, mask_grads = tensors["grads"], tensors["mask_grads"] or None
    return drive_prune(weights, grads, mask_grads, masks=masks, **arguments), weights


def check_result(found: PruneResult, oracle: PruneResult) -> None:
    assert found.per_tensor == oracle.per_tensor
    assert (found.kept, found.pruned, found.total) == (oracle.kept, oracle.pruned, oracle.total)
    assert found.score_sum == pytest.approx(oracle.score_sum, rel=1e-12)
    assert found.threshold == pytest.approx(oracle.threshold, rel=1e-12)


def dtensor_cases(seeds: range, device: str = "cpu") -> None:
    """Every tensor placed by chance, on a mesh of one or two dimensions."""
    size = dist.get_world_size()
    meshes = [init_device_mesh(device, (size,))]
    if size == 4:
        meshes.append(init_device_mesh(device, (2, 2)))
    for seed in seeds:
        tensors, arguments = case(seed)
        draw = random.Random(seed)
        mesh = draw.choice(meshes)
        chosen = [placements(mesh.ndim, w.dim(), draw) for w in tensors["weights"]]

        def placed(some: list[Tensor], mesh=mesh, chosen=chosen) -> list[DTensor]:
            return [
                distribute_tensor(t.clone().to(device), mesh, p, src_data_rank=None)
                for t, p in zip(some, chosen, strict=False)
            ]

        oracle, pruned = expected(tensors, arguments)
        weights, grads, mask_grads, old = map(placed, tensors.values())
        masks = Masks({str(i): m for i, m in enumerate(old)}) if old else None
        found = fused_drive_prune(weights, grads, mask_grads or None, masks=masks, **arguments)
        for i, name in enumerate(oracle.masks):
            mask = found.masks[name]
            assert isinstance(mask, DTensor) and mask.placements == weights[i].placements
            assert not old or mask is old[i], "updated in place"
            assert torch.equal(mask.full_tensor().cpu(), oracle.masks[name]), (seed, name, chosen)
            assert torch.equal(weights[i].full_tensor().cpu(), pruned[i]), (seed, name, chosen)
        check_result(found, oracle)


@pytest.mark.parametrize("size", WORLDS)
def test_dtensors(size: int):
    returned(run(size, dtensor_cases, range(40)))


def row_cases(seeds: range, device: str = "cpu") -> None:
    """Plain tensors, each rank's rows by chance: none for some."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for seed in seeds:
        tensors, arguments = case(seed)
        draw = random.Random(seed)
        cuts = []
        for weight in tensors["weights"]:
            inner = sorted(draw.randint(0, weight.shape[0]) for _ in range(size - 1))
            ends = [0, *inner, weight.shape[0]]
            cuts.append(slice(ends[rank], ends[rank + 1]))
        oracle, pruned = expected(tensors, arguments)
        here = {
            name: [t[cut].clone().to(device) for t, cut in zip(some, cuts, strict=False)]
            for name, some in tensors.items()
        }
        masks = Masks({str(i): m for i, m in enumerate(here["masks"])}) if here["masks"] else None
        found = fused_drive_prune(
            here["weights"], here["grads"], here["mask_grads"] or None, masks=masks,
            process_group=dist.group.WORLD, **arguments,
        )  # fmt: skip
        for i, name in enumerate(oracle.masks):
            assert torch.equal(found.masks[name].cpu(), oracle.masks[name][cuts[i]]), (seed, name)
            assert torch.equal(here["weights"][i].cpu(), pruned[i][cuts[i]]), (seed, name)
        check_result(found, oracle)


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


def missed_brackets(seeds: range, device: str = "cpu") -> None:
    """Where the sample misleads, or there is no room for what is inside: the same by whole passes."""
    from drive.distributed import step as distributed

    for sigmas, share in ((-3, 16), (5, 1 << 40)):
        distributed._SIGMAS, distributed._ENTRIES_PER_LISTED, distributed._MIN_SAMPLE = sigmas, share, 64
        row_cases(seeds, device)


def test_missed_brackets():
    returned(run(2, missed_brackets, range(20)))
