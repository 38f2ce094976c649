"""One training loop on lightning's Fabric, by a recipe, with exact resumption after every epoch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drive.experiments.data.batches import Batches
from drive.experiments.data.dataset import seed_of
from drive.experiments.runs.inputs import InputError
from drive.experiments.runs.stored import AGAIN, load_tensors, reading, save_tensors
from drive.masks import Masks

from .compute import Compute
from .history import Epoch, Log, LogFiles
from .recipe import Recipe
from .stage import Stage


class Diverged(InputError):
    """The loss is not finite."""


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
class _Work:
    """What a process needs in order to train a model: the arguments of `train`."""

    batches: Batches
    recipe: Recipe
    epochs: range
    compute: Compute
    masks: Masks | None
    checkpoint: Checkpoint | None
    log: Log | None
    stage: Stage


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
    stage: Stage | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[Epoch]:
    """Train in place on the batches of `epochs`, and return what each of them did.

    The learning rate, the batches and what dropout draws depend on the number of the epoch, so that networks
    that join later, `range(5, 20)` say, see what the others see in these epochs, and nothing that ran before
    matters.

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
        stage: what is minimised, and how. Default: the cross-entropy. Others run in one process.
        on_step: called after every batch, also once for each that the checkpoint saves; with several devices
            for all of them at the end.

    Raises:
        Diverged: the loss is not finite.
        InputError: a checkpoint that cannot be read; a batch that the devices cannot
            share.
        Paused: the checkpoint's deadline is over before the last epoch.
    """
    compute = compute or Compute()
    work = _Work(batches, recipe, epochs, compute, masks, checkpoint, log, stage or Stage())
    fabric = compute.fabric()
    if compute.devices == 1:
        return _train(fabric, model, work, on_step)
    if stage is not None:
        raise InputError(f"--devices must be 1 for this training, got {compute.devices}")
    if batches.size % compute.devices or len(batches.data.train_y) < batches.size:
        raise InputError(
            f"--devices must share batches of {batches.size} out of {len(batches.data.train_y)} images "
            f"evenly, got {compute.devices}"
        )
    # shared by the processes; not the model's own, which are not to change if the training fails
    state = model.state_dict().items()
    trained = {name: tensor.to("cpu", copy=True).share_memory_() for name, tensor in state}
    part = partial(_train_a_part, model=copy.deepcopy(model).cpu(), work=work, trained=trained)
    before = set(active_children())
    try:
        history: list[Epoch] | Exception = fabric.launch(part)
    except BaseException:  # an interruption: they would go on, and Python would wait for them
        for child in set(active_children()) - before:
            child.terminate()
        raise
    if isinstance(history, Exception):
        raise history
    model.load_state_dict(trained)
    for _ in range(len(history) * len(batches)):
        on_step()
    return history


def _train_a_part(
    fabric: Any, model: nn.Module, work: _Work, trained: dict[str, Tensor]
) -> list[Epoch] | Exception:
    """What each of several processes does; `trained` gets the weights.

    Returns:
        What `train` is to return, or to raise.
    """
    device = str(fabric.device)
    work = replace(
        work,
        batches=work.batches.part(fabric.global_rank, fabric.world_size, device),
        compute=replace(work.compute, device=device, devices=1),
        masks=work.masks.to(device) if work.masks else None,
    )
    model = work.compute.place(copy.deepcopy(model))  # the original's memory is shared
    found: list[Epoch] | Exception
    try:
        found = _train(fabric, model, work)
    except (InputError, Paused) as error:
        found = error.with_traceback(None)  # whose frames hold the group of processes
    else:
        if fabric.is_global_zero:
            for name, tensor in model.state_dict().items():
                trained[name].copy_(tensor)
    # Gloo's threads free a collective's tensors a little after it is done, which aborts the process if Python
    # ends meanwhile: wait for these threads
    torch.distributed.destroy_process_group()
    return found


def _train(
    fabric: Any, model: nn.Module, work: _Work, on_step: Callable[[], None] = lambda: None
) -> list[Epoch]:
    batches, checkpoint, log, stage = work.batches, work.checkpoint, work.log, work.stage
    optimizers = stage.optimizers(model, work.recipe)
    history: list[Epoch] = []
    if checkpoint and checkpoint.path.exists():
        history = _restore(checkpoint.path, model, optimizers)
        for _ in range(len(history) * len(batches)):
            on_step()
    left = work.epochs[len(history) :]
    if not left:
        return history
    images = batches.data.train_x
    example = torch.zeros(batches.size, *images.shape[1:], device=images.device)
    running, *stepping = fabric.setup(work.compute.for_training(model, work.masks, example), *optimizers)
    saved = time.monotonic()
    with ExitStack() as stack:
        if work.masks:
            stack.enter_context(work.masks.attach(model, optimizers[0]))
        files = None
        if log and fabric.is_global_zero:
            files = stack.enter_context(closing(LogFiles(log, history)))
        for epoch in left:
            torch.manual_seed(seed_of(batches.seed, "train", epoch, fabric.global_rank))
            began = time.monotonic()
            stage.at((epoch - work.epochs.start) / len(work.epochs))
            loss = _one_epoch(fabric, running, stepping, batches, work.recipe, epoch, stage, on_step)
            seconds, accuracy, last = time.monotonic() - began, None, epoch == left[-1]
            if log and files and (last or (epoch + 1) % log.test_every == 0):
                accuracy = evaluate(model, batches, work.compute) / len(batches.data.test_y)
            rate = float(optimizers[0].param_groups[0]["lr"])
            history.append(Epoch(epoch + 1, loss, rate, accuracy, seconds, stage.layers() if log else {}))
            if files:
                files.write(history)
            if checkpoint:
                now = time.monotonic()
                over = fabric.broadcast(now >= checkpoint.deadline)  # all processes stop, or none
                if fabric.is_global_zero and (last or over or now - saved >= checkpoint.every):
                    _save(checkpoint, model, optimizers, history)
                    saved = now
                if over and not last:
                    raise Paused
    return history


def _one_epoch(
    fabric: Any,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batches: Batches,
    recipe: Recipe,
    epoch: int,
    stage: Stage,
    on_step: Callable[[], None],
) -> float:
    """Mean loss of the epoch."""
    model.train()
    total = torch.zeros((), device=batches.data.train_x.device)
    for step, (images, labels) in enumerate(batches.epoch(epoch)):
        for group in optimizers[0].param_groups:
            group["lr"] = recipe.lr_at(epoch + step / len(batches))
        loss = stage.loss(model(images), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        fabric.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        total += loss.detach()
        on_step()
    mean = float(fabric.all_reduce(total, reduce_op="mean")) / len(batches)
    if not math.isfinite(mean):
        raise Diverged(
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
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    history: list[Epoch],
) -> None:
    state = {
        "network": checkpoint.network,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "history": [tuple(epoch) for epoch in history],
    }
    save_tensors(checkpoint.path, state)


def _restore(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[Epoch]:
    """Load a training in progress; its epochs."""
    state = load_tensors(path)
    with reading(path, "a checkpoint of this training", AGAIN):
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return [Epoch(*epoch) for epoch in state["history"]]
