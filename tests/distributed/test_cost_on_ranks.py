"""Steps to a budget of costs over tensors that are spread over ranks: one process's masks, few messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import cost_case, dtensor_cases, missed_brackets, row_cases
from torch import Tensor
from worlds import Traffic, returned, run

from drive import PruneResult, fused_drive_prune

WORLDS = (1, 2, 3)


@pytest.mark.parametrize("size", WORLDS)
def test_dtensors(size: int):
    returned(run(size, dtensor_cases, range(60), "cpu", cost_case))


@pytest.mark.parametrize("size", WORLDS)
def test_rows_of_plain_tensors(size: int):
    returned(run(size, row_cases, range(60), "cpu", cost_case))


def test_missed_brackets():
    returned(run(2, missed_brackets, range(20), "cpu", cost_case))


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def own_rows(whole: list[Tensor]) -> list[Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    return [tensor.tensor_split(size)[rank].clone() for tensor in whole]


def step(weights: list[Tensor], grads: list[Tensor], **arguments: Any) -> PruneResult:
    return fused_drive_prune(own_rows(weights), own_rows(grads), process_group=dist.group.WORLD, **arguments)


def sums_beyond_float64() -> None:
    """All entries cost 2^54: odd sums there are no float64 numbers."""
    weights, grads = tensors((2800, 3000)), tensors((2800, 3000))
    costs, max_cost = {"0": 2**31 - 1}, 4_000_001 * (2**31 - 1)
    for budget, kept in ((max_cost, 4_000_001), (max_cost - 1, 4_000_000)):
        found = step(weights, grads, costs=costs, max_cost=budget)
        oracle = fused_drive_prune([w.clone() for w in weights], grads, costs=costs, max_cost=budget)
        assert found.kept == oracle.kept == kept
        assert torch.equal(found.masks["0"], own_rows([oracle.masks["0"]])[0])
        assert found.threshold == pytest.approx(oracle.threshold, rel=1e-12)


def test_sums_beyond_float64():
    returned(run(2, sums_beyond_float64))


def traffic() -> None:
    weights, grads = tensors((3000, 80), (70, 40)), tensors((3000, 80), (70, 40))
    with Traffic() as counted:
        plain = step(weights, grads, sparsity=0.9)
    with Traffic() as ones:
        of_1 = step(weights, grads, costs={"0": 1, "1": 1}, max_cost=plain.kept)
    assert ones.sent == counted.sent
    assert all(torch.equal(of_1.masks[name], mask) for name, mask in plain.masks.items())
    with Traffic() as costly:
        step(weights, grads, costs={"0": 900, "1": 7}, max_cost=20_000_000, alpha=1)
    assert costly.sent == counted.sent


def test_traffic():
    returned(run(3, traffic))


def few_costly_entries() -> None:
    """Most of the cost is that of a few entries, which the sample has to look at several times."""
    weights, grads = tensors((50, 10), (900, 100)), tensors((50, 10), (900, 100))
    goal: dict[str, Any] = {"costs": {"0": 2000, "1": 3}, "max_cost": 600_000, "alpha": 0.5}
    found = step(weights, grads, **goal)
    oracle = fused_drive_prune([w.clone() for w in weights], grads, **goal)
    expected = own_rows(list(oracle.masks.values()))
    assert all(map(torch.equal, found.masks.values(), expected))


def test_few_costly_entries():
    returned(run(2, few_costly_entries))


def faults() -> None:
    rank = dist.get_rank()
    weights, grads = tensors((6, 3), (4,)), tensors((6, 3), (4,))
    for given, message in (
        (
            {"max_cost": 9 + (rank == 1)},
            "max_cost must be the same on all ranks, got 9 on rank 0 and 10 on rank 1",
        ),
        (
            {"alpha": 0.5 * (rank == 1)},
            "alpha must be the same on all ranks, got 0.0 on rank 0 and 0.5 on rank 1",
        ),
        (
            {"costs": {"0": 2, "1": 3 + rank}},
            r"costs\['1'\] must be the same on all ranks, got 3 on rank 0 and 4",
        ),
        ({"costs": {"0": 2}}, "costs has no entry for 1"),
        (
            {"costs": {"0": 2**31 - 1, "1": 2}, "min_keep": 1},
            "min_keep=1 asks for survivors that cost 2147483649",
        ),
    ):
        arguments = {"costs": {"0": 2, "1": 3}, "max_cost": 9, **given}
        with pytest.raises(ValueError, match=f"^fused_drive_prune: {message}"):
            step(weights, grads, **arguments)
    goal: dict[str, Any] = {"sparsity": 0.5} if rank else {"costs": {"0": 2, "1": 3}, "max_cost": 9}
    message = "sparsity must be the same on all ranks, got None on rank 0 and 0.5 on rank 1"
    with pytest.raises(ValueError, match=message):
        step(weights, grads, **goal)


def test_faults():
    returned(run(2, faults))
