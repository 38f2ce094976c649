"""What a pruning step adds to one step of a decoder's training, the one that it takes its gradients from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.sizes import Size
from benchmarks.transformer import Decoder
from drive import Masks, PruneResult, fused_drive_prune
from drive.reference import drive_prune

Prune = Callable[..., PruneResult]

PRUNERS: dict[str, Prune | None] = {
    "no pruning": None, "fused_drive_prune": fused_drive_prune, "drive.reference": drive_prune,
}  # fmt: skip


def in_block(name: str, module: nn.Module | None, tensor: Tensor) -> bool:
    """Every Linear but the head, as is usual for language models."""
    return isinstance(module, nn.Linear) and name.startswith("blocks") and name.endswith("weight")


class Training:
    """A decoder, AdamW, and a batch of random bytes."""

    def __init__(self, size: Size, device: str):
        torch.manual_seed(0)
        self.model = Decoder(size.width, size.heads, size.blocks, size.tokens).to(device)
        self.start = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.text = torch.randint(256, (size.sequences, size.tokens + 1), device=device)

    @torch.no_grad()
    def restore(self) -> None:
        """The weights: a step that finds nine of ten at zero would rank zeros."""
        for parameter, start in zip(self.model.parameters(), self.start, strict=True):
            parameter.copy_(start)

    def step(self, prune: Prune | None) -> PruneResult | None:
        self.optimizer.zero_grad()
        logits = self.model(self.text[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), self.text[:, 1:].flatten()).backward()
        result = prune and self.prune(prune)
        self.optimizer.step()
        return result

    def prune(self, prune: Prune) -> PruneResult:
        return prune(self.model, sparsity=0.9, include=in_block)

    def prepare(self, prune: Prune | None) -> Callable[[], PruneResult | None]:
        self.restore()
        return partial(self.step, prune)

    def masks(self, prune: Prune) -> Masks:
        """By the gradients that are there."""
        self.restore()
        return self.prune(prune).masks


@pytest.fixture(scope="module")
def training(size: Size, device: str) -> Training:
    made = Training(size, device)
    made.step(None)
    found, expected = made.masks(fused_drive_prune), made.masks(drive_prune)
    assert all(torch.equal(mask, expected[name]) for name, mask in found.items())
    return made


@pytest.mark.parametrize("pruner", PRUNERS)
def test_training_step(timed, size: Size, training: Training, pruner: str):
    entries = 12 * size.width**2 * size.blocks
    tokens = size.sequences * size.tokens
    group = f"A training step of a decoder of {entries:,} weights, {tokens:,} tokens, pruned to 90 % in it"
    timed(group, partial(training.prepare, PRUNERS[pruner]), rounds=6, entries=entries)
