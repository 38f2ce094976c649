"""How a method that prunes while training trains, unless the caller says how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import nn

from drive.distributed.wrappers import inner
from drive.masks import Masks

from .feed import mover
from .loss import Batch, Loss

# model, the masks to hold (None: still dense), number of the round since the weights were fresh
Train = Callable[[nn.Module, Masks | None, int], object]


def sgd_epoch(batches: Iterable[Batch], loss: Loss, lr: float = 0.01, momentum: float = 0.9) -> Train:
    """A round of training: one pass over the batches by SGD, whose momentum starts anew."""

    def train(model: nn.Module, masks: Masks | None, number: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
        move = mover(next(model.parameters()).device)
        model.train()
        learned = inner(model, "drive", "LearnedMask")  # adds a term to the loss
        with torch.enable_grad(), masks.attach(model, optimizer) if masks else nullcontext():
            for batch in batches:
                optimizer.zero_grad()
                total = loss(model, move(batch))
                if learned is not None:
                    total = total + learned.penalty()  # type: ignore[operator]
                total.backward()  # type: ignore[no-untyped-call, unused-ignore]
                optimizer.step()
        optimizer.zero_grad()

    return train
