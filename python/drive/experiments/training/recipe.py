"""How a network is trained - epochs, batches, optimizer, learning rate, augmentation - as data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Constant:
    """The same learning rate throughout."""

    def factor(self, epoch: float, epochs: int) -> float:
        """What the recipe's learning rate is multiplied by, `epoch` epochs into the training."""
        return 1.0


@dataclass(frozen=True)
class OneCycle:
    """A linear rise from a tenth over the first part of the epochs, then a cosine fall to zero."""

    rise: float = 0.2

    def factor(self, epoch: float, epochs: int) -> float:
        progress = epoch / epochs
        if progress < self.rise:
            return 0.1 + 0.9 * progress / self.rise
        return 0.5 * (1 + math.cos(math.pi * (progress - self.rise) / (1 - self.rise)))


@dataclass(frozen=True)
class Cosine:
    """A cosine fall to zero over all epochs, step by step."""

    def factor(self, epoch: float, epochs: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


@dataclass(frozen=True)
class Steps:
    """Drops at given epochs, of a training of `epochs` epochs; a shorter one has them as much earlier."""

    drops: tuple[tuple[int, float], ...]  # epoch, and the factor by which the rate drops there
    epochs: int

    def factor(self, epoch: float, epochs: int) -> float:
        return math.prod(drop for at, drop in self.drops if epoch >= at * epochs / self.epochs)


Schedule = Constant | OneCycle | Cosine | Steps


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the same for every method.

    Attributes:
        lr: learning rate, at the schedule's factor 1.
        optimizer: "sgd" or "adam" (its betas are torch's).
        momentum: of SGD.
        weight_decay: added to the gradient as weight_decay * theta, by both.
        padding: pixels around an image before its random crop, where the data are to be augmented.
        flip: mirror every other image, likewise.
    """

    epochs: int
    lr: float
    batch_size: int = 128
    optimizer: str = "sgd"
    schedule: Schedule = OneCycle()
    momentum: float = 0.9
    weight_decay: float = 5e-4
    padding: int = 4
    flip: bool = True

    def lr_at(self, epoch: float) -> float:
        """Learning rate at 0 <= epoch < epochs; 2.5 is the middle of the third."""
        return self.lr * self.schedule.factor(epoch, self.epochs)

    def scaled(self, scale: float) -> Recipe:
        """The same training in a fraction of the epochs, one at least."""
        return replace(self, epochs=max(1, round(self.epochs * scale)))

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        assert self.optimizer == "sgd", self.optimizer
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "schedule": {"name": type(self.schedule).__name__, **asdict(self.schedule)}}
