"""Layers of each kind for GPUs, with masks that suit them, and what they are to give."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drive.layers import Weight
from drive.sparse import BlockLinear, SemiStructuredLinear, gpu
from drive.targets.structures import structure

KINDS = tuple(gpu.KINDS.values())


def mask_for(kind: type[nn.Module], rows: int = 64, columns: int = 128) -> Tensor:
    torch.manual_seed(0)
    if kind is BlockLinear:
        return structure("32x32").expand(torch.rand(rows // 32, columns // 32) < 0.5, Weight())
    if kind is SemiStructuredLinear:
        return torch.tensor([True, False, False, True]).repeat(rows, columns // 4)
    return torch.rand(rows, columns) < 0.5


def layer_of(kind: type[nn.Module]) -> tuple[nn.Linear, Tensor, Tensor]:
    """A layer whose pruned weights are not 0, its mask, an input."""
    torch.manual_seed(1)
    layer = nn.Linear(128, 64)
    dtype = torch.bfloat16 if kind is SemiStructuredLinear else torch.float32
    return layer.to(dtype), mask_for(kind), torch.randn(2, 3, 128).to(dtype)


def masked(layer: nn.Linear, mask: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight * mask, layer.bias)
