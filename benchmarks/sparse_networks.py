"""The networks and masks that bench_sparse.py times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import drive
from drive.models import Network

TOKENS, WIDTH, HEADS = 128, 768, 12


class Block(nn.Module):
    """A transformer's block, whose four projections are what is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096))


# how to build it, and the shape of one input
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: Network("resnet18", 10, 3, 32).build(), (3, 32, 32)),
    "vgg16_bn": (lambda: Network("vgg16_bn", 10, 3, 32).build(), (3, 32, 32)),
    "mlp": (_mlp, (4096,)),
    "transformer block": (Block, (TOKENS, WIDTH)),
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
