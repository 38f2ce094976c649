"""One plain training loop, by a recipe, with exact resumption after every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .compute import Compute
from .data import Batches, seed_of
from .history import Epoch, write_log
from .inputs import InputError
from .masks import Masks
from .recipe import Recipe
from .runs import load_tensors, save_tensors


class Paused(Exception):
    """A deadline has passed; the training is saved and can go on from there."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a training in progress is kept."""

    path: Path
    network: dict[str, Any]  # what the model is, saved along
    every: float = 0.0  # seconds that pass at least between two savings; 0: after every epoch
    deadline: float = math.inf  # of time.monotonic(): pause at the first end of an epoch after it


@dataclass(frozen=True)
class Log:
    """A CSV file of a training, up to date after every epoch."""

    path: Path
    before: tuple[Epoch, ...] = ()  # epochs that the network was trained before: its warm-up
    test_every: int = 5  # epochs; the last one is always tested. Five cost little: a test is forward only


def train(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    epochs: range,
    compute: Compute | None = None,
    masks: Masks | None = None,
    checkpoint: Checkpoint | None = None,
    log: Log | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[Epoch]:
    """Train in place on the batches of `epochs`, and return what each of them did.

    The learning rate and the batches depend on the number of the epoch, so that networks that join
    later, `range(5, 20)` say, see what the others see in these epochs. Torch's RNG is seeded from
    the batches' seed first: nothing that ran before matters.

    Args:
        model: on the device of the batches.
        batches: training data, with their seed.
        recipe: optimizer and learning rate.
        epochs: those to run, out of `range(recipe.epochs)`.
        compute: how the device computes. Default: dense float32.
        masks: weights that stay exactly zero.
        checkpoint: if its file exists, go on from there (to the bit, on the same machine); keep it
            up to date, whole at any moment.
        log: where to write the epochs down; without one the network is not tested.
        on_step: called after every batch, also once for each that the checkpoint saves.

    Raises:
        InputError: the loss is not finite; a checkpoint that cannot be read.
        Paused: the checkpoint's deadline is over before the last epoch.
    """
    torch.manual_seed(seed_of(batches.seed, "train", epochs.start))
    compute = compute or Compute()
    optimizer = recipe.make_optimizer(model.parameters())
    history: list[Epoch] = []
    if checkpoint and checkpoint.path.exists():
        history = _restore(checkpoint.path, model, optimizer)
        for _ in range(len(history) * len(batches)):
            on_step()
    saved = time.monotonic()
    images = batches.data.train_x
    running = compute.for_training(
        model, masks, torch.zeros(batches.size, *images.shape[1:], device=images.device)
    )
    with masks.attach(model, optimizer) if masks else nullcontext():
        for epoch in epochs[len(history) :]:
            began = time.monotonic()
            loss = _one_epoch(running, batches, recipe, optimizer, compute, epoch, on_step)
            seconds, accuracy, last = time.monotonic() - began, None, epoch == epochs[-1]
            if log and (last or (epoch + 1) % log.test_every == 0):
                accuracy = evaluate(model, batches, compute) / len(batches.data.test_y)
            lr = float(optimizer.param_groups[0]["lr"])
            history.append(Epoch(epoch + 1, loss, lr, accuracy, seconds))
            if log:
                write_log(log.path, [*log.before, *history])
            if checkpoint:
                now = time.monotonic()
                if last or now - saved >= checkpoint.every or now >= checkpoint.deadline:
                    _save(checkpoint, model, optimizer, history)
                    saved = now
                if now >= checkpoint.deadline and not last:
                    raise Paused
    return history


def _one_epoch(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    compute: Compute,
    epoch: int,
    on_step: Callable[[], None],
) -> float:
    """Mean loss of the epoch."""
    model.train()
    total = torch.zeros((), device=batches.data.train_x.device)
    for step, (images, labels) in enumerate(batches.epoch(epoch)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(epoch + step / len(batches))
        with compute.autocast():
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
def evaluate(model: nn.Module, batches: Batches, compute: Compute | None = None) -> int:
    """Number of test images that are classified correctly (top 1); the model's mode is as before."""
    mode = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=batches.data.test_x.device)
    with (compute or Compute()).autocast():
        for images, labels in batches.test():
            correct += (model(images).argmax(1) == labels).sum()
    model.train(mode)  # what is pruned after its warm-up is scored in the mode that it was trained in
    return int(correct)


def _save(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[Epoch]
) -> None:
    state = {
        "network": checkpoint.network,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": [tuple(epoch) for epoch in history],
        "rng": torch.get_rng_state(),  # dropout draws from it; batches have generators of their own
    }
    device = next(model.parameters()).device
    if device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(device)
    save_tensors(checkpoint.path, state)


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Epoch]:
    """Load a training in progress; its epochs."""
    state = load_tensors(path)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        device = next(model.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        return [Epoch(*epoch) for epoch in state["history"]]
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"checkpoint must be one of this training, got {path}") from error
