"""Tensors that are spread over ranks by chance, and pruned as one process would: what each rank does."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from ugly import LAYOUTS, VALUES, laid_out, valued

from drive import Masks, PruneResult, fused_drive_prune
from drive.distributed import step as distributed
from drive.reference import drive_prune

Case = Callable[[int], tuple[dict[str, list[Tensor]], dict[str, Any]]]


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


def cost_case(seed: int) -> tuple[dict[str, list[Tensor]], dict[str, Any]]:
    """The same, to a budget."""
    tensors, arguments = case(seed)
    draw, sizes = random.Random(-seed), [w.numel() for w in tensors["weights"]]
    most = draw.choice((1, 4, 1000, 2**30))
    costs = [draw.choice((1, most, draw.randint(1, most))) for _ in sizes]
    total = sum(size * cost for size, cost in zip(sizes, costs, strict=True))
    max_cost = draw.choice((0, most // 2, total // 10, int(total * draw.random()), total, 2 * total))
    guarded = sum(min(arguments["min_keep"], size) * c for size, c in zip(sizes, costs, strict=True))
    return tensors, {
        "costs": {str(i): cost for i, cost in enumerate(costs)},
        "max_cost": max_cost,
        "alpha": draw.choice((0, 0.5, 1, 1.5)),
        "min_keep": arguments["min_keep"] if guarded <= max_cost else 0,
    }


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


def dtensor_cases(seeds: range, device: str = "cpu", case: Case = case) -> None:
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


def row_cases(seeds: range, device: str = "cpu", case: Case = case) -> None:
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


def missed_brackets(seeds: range, device: str = "cpu", case: Case = case) -> None:
    """Where the sample misleads, or there is no room for what is inside: the same by whole passes."""
    for sigmas, share in ((-3, 16), (5, 1 << 40)):
        distributed._SIGMAS, distributed._ENTRIES_PER_LISTED, distributed._MIN_SAMPLE = sigmas, share, 64
        row_cases(seeds, device, case)
