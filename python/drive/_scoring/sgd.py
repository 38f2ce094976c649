"""How a method that prunes while training trains, unless the caller says how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import chain, cycle, islice, repeat

import torch
from torch import nn

from drive.distributed.wrappers import inner
from drive.masks import Masks

from .feed import Passes, mover
from .loss import Batch, Loss

# model, the masks to hold (None: still dense), number of the round since the weights were fresh
Train = Callable[[nn.Module, Masks | None, int], object]


def sgd_round(
    passes: Passes, loss: Loss, steps: int | None = None, lr: float = 0.01, momentum: float = 0.9
) -> Train:
    """A round of training by SGD, whose momentum starts anew.

    Args:
        steps: of the optimizer, each on the batch after the last round's, started again when short; None: one
            pass over the batches.
    """
    stream = chain.from_iterable(repeat(passes))

    def train(model: nn.Module, masks: Masks | None, number: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
        move = mover(next(model.parameters()).device)
        model.train()
        learned = inner(model, "drive", "LearnedMask")  # adds a term to the loss
        with torch.enable_grad(), masks.attach(model, optimizer) if masks else nullcontext():
            for batch in passes if steps is None else islice(stream, steps):
                optimizer.zero_grad()
                total = loss(model, move(batch))
                if learned is not None:
                    total = total + learned.penalty()  # type: ignore[operator]
                total.backward()  # type: ignore[no-untyped-call, unused-ignore]
                optimizer.step()
        optimizer.zero_grad()

    return train


def check_round(batches: Iterable[Batch], trains: bool, train: Train | None, steps: int | None) -> None:
    """Raise ValueError unless these arguments of `drive.prune` go together.

    Args:
        trains: does the method?
    """
    if steps is not None and not trains:
        raise ValueError(f"prune: round_steps must be None for a method that does not train, got {steps}")
    if steps is not None and train is not None:
        raise ValueError(f"prune: round_steps must be None where train says what a round is, got {steps}")
    if trains and train is None and steps is None and _never_ends(batches):
        raise ValueError(
            f"prune: round_steps must be given for batches without an end, got None and {batches!r:.40}: a "
            "round is one pass over them else"
        )


def _never_ends(batches: Iterable[Batch]) -> bool:
    """Is that certain? A generator does not tell."""
    if not isinstance(batches, repeat):
        return isinstance(batches, cycle)
    try:
        batches.__length_hint__()
    except TypeError:
        return True
    return False
