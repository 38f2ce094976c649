"""One plain training loop: SGD, a one-cycle learning rate, exact resumption after every epoch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .data import Batches, seed_of
from .inputs import InputError
from .masks import Masks
from .runs import load_tensors, save_tensors
from .sparse import convert

RAMP = 0.2  # fraction of all steps in which the learning rate rises


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the same for every method."""

    epochs: int
    lr: float  # at its peak
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def lr_at(self, progress: float) -> float:
        """Learning rate at a fraction 0 <= progress < 1 of all epochs: a linear rise, a cosine fall."""
        if progress < RAMP:
            return self.lr * (0.1 + 0.9 * progress / RAMP)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (progress - RAMP) / (1 - RAMP)))


@dataclass(frozen=True)
class Checkpoint:
    """Where a training in progress is kept."""

    path: Path
    network: dict[str, Any]  # what the model is, saved along
    every: float = 0.0  # seconds that pass at least between two savings; 0: after every epoch


def deterministic(threads: int) -> None:
    """Make results a function of the seeds alone, on this machine with this number of threads."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS picks per call
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def train(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    epochs: range,
    masks: Masks | None = None,
    sparse_ops: bool = False,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train in place on the batches of `epochs`, and return the mean loss of each.

    The learning rate and the batches depend on the number of the epoch, so that networks that join
    later, `range(5, 20)` say, see what the others see in these epochs. Torch's RNG is seeded from
    the batches' seed first: nothing that ran before matters.

    Args:
        model: on the device of the batches.
        batches: training data, with their seed.
        recipe: optimizer and learning rate.
        epochs: those to run, out of `range(recipe.epochs)`.
        masks: weights that stay exactly zero.
        sparse_ops: compute with the other weights only, where a cost model says that it pays; by a cost
            model, not by measuring, so that two runs do the same arithmetic.
        checkpoint: if its file exists, go on from there (to the bit, on the same machine); keep it
            up to date, whole at any moment.
        on_step: called after every batch, also once for each that the checkpoint saves.

    Raises:
        InputError: the loss is not finite; a checkpoint that cannot be read.
    """
    torch.manual_seed(seed_of(batches.seed, "train", epochs.start))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    losses: list[float] = []
    if checkpoint and checkpoint.path.exists():
        losses = _restore(checkpoint.path, model, optimizer)
        for _ in range(len(losses) * len(batches)):
            on_step()
    saved = time.monotonic()
    running = _sparse(model, masks, batches) if masks and sparse_ops else model
    with masks.attach(model, optimizer) if masks else nullcontext():
        for epoch in epochs[len(losses) :]:
            losses.append(_one_epoch(running, batches, recipe, optimizer, epoch, on_step))
            if checkpoint and (epoch == epochs[-1] or time.monotonic() - saved >= checkpoint.every):
                _save(checkpoint, model, optimizer, losses)
                saved = time.monotonic()
    return losses


def _sparse(model: nn.Module, masks: Masks, batches: Batches) -> nn.Module:
    """The same parameters in a model that computes with the surviving ones."""
    images = batches.data.train_x
    model.train()
    return convert(model, masks, torch.zeros(batches.size, *images.shape[1:]), deterministic=True)


def _one_epoch(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    on_step: Callable[[], None],
) -> float:
    """Mean loss of the epoch."""
    model.train()
    total = torch.zeros((), device=batches.data.train_x.device)
    for step, (images, labels) in enumerate(batches.epoch(epoch)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at((epoch + step / len(batches)) / recipe.epochs)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()
        total += loss.detach()
        on_step()
    mean = float(total) / len(batches)
    if not math.isfinite(mean):
        raise InputError(
            f"--lr must be small enough to train, got {recipe.lr} (loss {mean} in epoch {epoch + 1})"
        )
    return mean


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> int:
    """Number of test images that are classified correctly (top 1)."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=batches.data.test_x.device)
    for images, labels in batches.test():
        correct += (model(images).argmax(1) == labels).sum()
    return int(correct)


def _save(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    state = {
        "network": checkpoint.network,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "rng": torch.get_rng_state(),  # dropout draws from it; batches have generators of their own
    }
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    save_tensors(checkpoint.path, state)


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Load a training in progress; the losses of its epochs."""
    state = load_tensors(path)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
        return list(state["losses"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"checkpoint must be one of this training, got {path}") from error
