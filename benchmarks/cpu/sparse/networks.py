"""The networks and masks that measure.py times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import drive
from benchmarks.transformer import Block
from drive.experiments.training.networks import Network

TOKENS, WIDTH, HEADS = 128, 768, 12


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096))


# how to build it, and the shape of one input
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: Network("resnet18", 10, 3, 32).build(), (3, 32, 32)),
    "vgg16_bn": (lambda: Network("vgg16_bn", 10, 3, 32).build(), (3, 32, 32)),
    "mlp": (_mlp, (4096,)),
    "transformer block": (partial(Block, WIDTH, HEADS), (TOKENS, WIDTH)),
}


def uniform_masks(model: nn.Module, sparsity: float) -> drive.Masks:
    """Random ones over the convolutions, or over all Linear where there are none."""
    of = nn.Conv2d if any(isinstance(m, nn.Conv2d) for m in model.modules()) else nn.Linear
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, of)}
    return drive.Masks({n: torch.rand(m.weight.shape) >= sparsity for n, m in layers.items()}).apply_(model)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """Photographs of digits, [N, 3, 32, 32], with their labels."""
    found = load_digits()
    images = F.interpolate(torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, size=32)
    return images.expand(-1, 3, -1, -1).contiguous(), torch.tensor(found.target)


def _batches() -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = _digits()
    yield from zip(images.split(64), labels.split(64), strict=True)


def drive_masks(model: nn.Module, sparsity: float) -> drive.Masks:
    """What DRIVE keeps of an untrained network, by images of digits: its layers differ in density."""
    if sparsity == 0:
        return uniform_masks(model, 0.0)
    masks: drive.Masks = drive.prune(
        model, list(_batches()), F.cross_entropy, sparsity=sparsity, iterations=20, progress=False
    )
    return masks
