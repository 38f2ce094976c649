"""What Masks.attach, holding pruned weights at zero, adds to an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.sizes import Size
from drive import Masks, fused_drive_prune
from drive.experiments.bench.workload import Inputs

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD with momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "AdamW": torch.optim.AdamW,
}


class Work:
    """Weights, gradients, and the masks of a step to 90 %."""

    def __init__(self, size: Size, device: str):
        inputs = Inputs(size.shapes, torch.float32, device)
        self.model = nn.ParameterList(map(nn.Parameter, inputs.weights))
        self.weights = dict(self.model.named_parameters())
        self.grads, self.entries = inputs.grads, inputs.entries
        self.masks: Masks = fused_drive_prune(self.weights, self.grads, sparsity=0.9).masks

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        torch.autograd.backward([*self.weights.values()], self.grads)  # as a loss's backward accumulates them
        optimizer.step()

    def pruned(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """What is to be zero."""
        states = (optimizer.state[weight].values() for weight in self.weights.values())
        of = zip(self.weights.values(), self.masks.values(), states, strict=True)
        return [
            tensor[~mask]
            for weight, mask, state in of
            for tensor in (weight, weight.grad, *state)
            if tensor.shape == mask.shape
        ]


@pytest.fixture(scope="module")
def work(size: Size, device: str) -> Work:
    return Work(size, device)


@pytest.mark.parametrize("held", (False, True), ids=("weights free", "masks held"))
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_step(timed, work: Work, kind: str, held: bool):
    optimizer = OPTIMIZERS[kind](work.weights.values())
    with work.masks.attach(work.model, optimizer) if held else nullcontext():
        work.step(optimizer)
        assert any(map(torch.any, work.pruned(optimizer))) != held
        group = f"Gradients and a step of {kind}, {work.entries:,} weights, 90 % pruned"
        timed(group, lambda: partial(work.step, optimizer), rounds=20, entries=work.entries)
