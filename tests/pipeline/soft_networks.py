"""Small networks to be softened, and what of them is compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

INF, NAN = float("inf"), float("nan")


class Block(nn.Module):
    """One ReLU, which writes into its input, at two places; attributes that a forward pass sets."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.norm(self.short(x)))


def convolutional(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        Block(3, 4, 1), Block(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    first = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU()
    return nn.Sequential(*first, nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4))


def inputs(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((8, 5) if isinstance(model[0], nn.Linear) else (8, 3, 6, 6), generator=generator)


LABELS = torch.arange(8) % 4
networks = pytest.mark.parametrize("network", (convolutional, mlp))


def step(softened: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, smoothing: float = 0.0) -> Tensor:
    optimizer.zero_grad()
    output = softened(x)
    F.cross_entropy(output, LABELS, label_smoothing=smoothing).backward()
    optimizer.step()
    return output.detach()


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, NaN and the sign of zero included."""
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


def looks(model: nn.Module) -> list[Any]:
    """All that a module is made of, but for the values of its tensors."""
    return [
        (name, type(module), set(module.__dict__), dict(module._forward_hooks), list(module._buffers),
         module._non_persistent_buffers_set, list(module._forward_pre_hooks), module.training)
        for name, module in model.named_modules()
    ]  # fmt: skip
