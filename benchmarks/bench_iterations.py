"""DRIVE's iterations: as drive.prune runs them, with the pruner in PyTorch, and with none at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import cycle

import pytest
import torch
from torch import Tensor, nn

import drive
from benchmarks.sizes import BATCH, Size
from drive import Masks, schedules
from drive.reference import drive_prune

INPUTS, CLASSES, SPARSITY = 1024, 10, 0.98
LOSS = nn.functional.cross_entropy

Batches = list[tuple[Tensor, Tensor]]
Loop = Callable[[nn.Module, Batches, int], Masks | None]


def gradients_alone(model: nn.Module, batches: Batches, iterations: int) -> None:
    for _, (inputs, targets) in zip(range(iterations), cycle(batches), strict=False):
        model.zero_grad()
        LOSS(model(inputs), targets).backward()


def ours(model: nn.Module, batches: Batches, iterations: int) -> Masks:
    return drive.prune(model, batches, LOSS, sparsity=SPARSITY, iterations=iterations, progress=False)


def in_pytorch(model: nn.Module, batches: Batches, iterations: int) -> Masks | None:
    masks = None
    steps = schedules.plan("exponential", SPARSITY, iterations)
    for sparsity, batch in zip(steps, cycle(batches), strict=False):
        gradients_alone(model, [batch], 1)
        masks = drive_prune(model, sparsity=sparsity, masks=masks).masks
    return masks


# and how often it is timed
LOOPS: dict[str, tuple[Loop, int]] = {
    "no pruning": (gradients_alone, 2),
    "drive.prune": (ours, 2),
    "drive.reference": (in_pytorch, 1),
}


class Work:
    """An MLP before it is pruned, and batches."""

    def __init__(self, size: Size, device: str):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(INPUTS, size.hidden), nn.ReLU(), nn.Linear(size.hidden, size.hidden), nn.ReLU(),
            nn.Linear(size.hidden, CLASSES),
        ).to(device)  # fmt: skip
        self.batches = [
            (torch.randn(BATCH, INPUTS, device=device), torch.randint(CLASSES, (BATCH,), device=device))
            for _ in range(8)
        ]

    def prepare(self, loop: Loop, iterations: int) -> Callable[[], Masks | None]:
        return partial(loop, copy.deepcopy(self.model), self.batches, iterations)


@pytest.fixture(scope="module")
def work(size: Size, device: str) -> Work:
    made = Work(size, device)
    found, expected = (made.prepare(loop, 3)() for loop in (ours, in_pytorch))
    assert all(torch.equal(mask, expected[name]) for name, mask in found.items())
    return made


@pytest.mark.parametrize("loop", LOOPS)
def test_iterations(timed, size: Size, work: Work, loop: str):
    run, rounds = LOOPS[loop]
    entries = sum(mask.numel() for mask in Masks.dense(work.model).values())
    group = f"{size.iterations} iterations to 98 % on an MLP of {entries:,} weights, batches of {BATCH}"
    timed(group, lambda: work.prepare(run, size.iterations), rounds, entries=entries)
