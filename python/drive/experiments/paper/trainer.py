"""One cell from its initialisation to its result, in a folder that a kill at any moment does not spoil.

Per seed, one initialisation and one order of batches serve all. When a method prunes (its `stage`):

    warm-up         dense, epochs 0..W-1, whose weights are saved and serve all that share them, the dense
                    network too; pruned; then epochs W..E-1
    initialisation  pruned, then epochs 0..E-1 (W..E-1, after a warm-up that was asked for)
    training        gradual, rigl: after each of the first epochs; then the others with the masks held
                    imp: levels of training, each from the same initialisation; then epochs 0..E-1
                    early_crop: epochs until its rule says so, E at most; pruned; then epochs 0..E-1
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import nn

from drive import methods
from drive.collapse import collapse
from drive.experiments.data.batches import Batches
from drive.experiments.data.dataset import Dataset, seed_of
from drive.experiments.runs.folder import load_tensors, save_tensors
from drive.experiments.runs.progress import task
from drive.experiments.training.history import Epoch, Log
from drive.experiments.training.loop import Paused, evaluate, train
from drive.masks import Masks
from drive.prune import prune

from . import work
from .cell import Cell
from .goal import Goal
from .variants import dense
from .work import CellWork, Result


@dataclass
class Pruned:
    """A network that is ready for its training, or on the way there."""

    masks: Masks | None = None
    levels: int = 0  # of IMP that are done
    prune_seconds: float = 0.0  # of scoring and selecting
    round_seconds: float = 0.0  # of training in the course of it


class CellRun(CellWork[Cell]):
    """The work on one cell of the paper's experiments."""

    def __init__(self, cell: Cell, root: Path, data: Dataset, progress: Progress, **options: Any):
        super().__init__(cell, root, data, progress, **options)
        self.batches: Batches = cell.batches(self.images)

    def train(self, model: nn.Module) -> tuple[Result, Masks | None]:
        cell, folder = self.cell, self.folder
        warmup = self._warm_up(model)
        pruned = self._pruned(model)
        masks = pruned.masks
        # how many of the layers lead nowhere is a matter of the masks alone
        cut_off = collapse(model, masks, self.images.train_x[:1].float()) if masks else None
        epochs = range(cell.variant.first_epoch, cell.recipe.epochs)
        with task(self.progress, f"{cell.title}: training", len(epochs) * len(self.batches)) as advance:
            history = train(
                model, self.batches, cell.recipe, epochs=epochs, compute=cell.compute, masks=masks,
                checkpoint=self.checkpoint(folder), on_step=advance,
                log=Log(folder, tuple(warmup), tensorboard=self.tensorboard),
            )  # fmt: skip
        tested = len(self.images.test_y)
        # a training tests its last epoch
        accuracy = history[-1].accuracy if history else evaluate(model, self.batches, cell.compute) / tested
        assert accuracy is not None
        return {
            "method": cell.variant.name,
            **cell.goal.as_dict(),
            "scale": cell.scale,
            "epochs": cell.recipe.epochs,
            "correct": round(accuracy * tested),
            "final_loss": history[-1].loss if history else None,
            "empty": cut_off.empty if cut_off else [],
            "disconnected": cut_off.disconnected if cut_off else [],
            "warmup_seconds": _seconds(warmup),
            "prune_seconds": pruned.prune_seconds,
            "round_seconds": pruned.round_seconds,
            "train_seconds": _seconds(history),
        }, masks

    def _warm_up(self, model: nn.Module) -> list[Epoch]:
        """The first dense epochs, in a folder of their own."""
        cell, epochs = self.cell, self.cell.variant.warmup
        if not epochs:
            return []
        title = f"{cell.model} on {cell.data}, seed {cell.seed}: dense warm-up"
        with (
            self.shared(replace(cell, variant=dense(epochs, "warmup"), goal=Goal(0.0))) as folder,
            task(self.progress, title, epochs * len(self.batches)) as advance,
        ):
            return train(
                model, self.batches, cell.recipe, epochs=range(epochs), compute=cell.compute,
                checkpoint=self.checkpoint(folder), on_step=advance,
                log=Log(folder, tensorboard=self.tensorboard),
            )  # fmt: skip

    def _pruned(self, model: nn.Module) -> Pruned:
        """Prune in place, or take over what was pruned before."""
        path, found = self.folder / "pruned.pt", Pruned()
        if self.cell.variant.method == "dense":
            return found
        if path.exists():
            state = load_tensors(path)
            model.load_state_dict(state.pop("model"))
            masks = Masks(state.pop("masks")).to(self.cell.compute.device)
            found = Pruned(masks, **state)
        began = time.monotonic()
        for pruned in self._levels(model, found):
            found = pruned
            # what takes no time is done again rather than kept
            if time.monotonic() - began >= work.SAVE_EVERY or time.monotonic() >= self.deadline:
                assert found.masks is not None
                state = {**vars(found), "model": model.state_dict(), "masks": found.masks.state_dict()}
                save_tensors(path, state)
                began = time.monotonic()
                if began >= self.deadline:
                    raise Paused
        return found

    def _levels(self, model: nn.Module, found: Pruned) -> Iterator[Pruned]:
        """Prune step by step, from what is found; only IMP, which trains for long, has several."""
        cell, variant, method = self.cell, self.cell.variant, self.cell.variant.make()
        iterations = variant.iterations or method.iterations_to(cell.goal.gone)
        recipe, length, targets = cell.recipe, 1, [cell.goal]
        if isinstance(method, methods.Imp):
            # level by level the same as in one call: each ends in the initialisation with its masks
            recipe, length = replace(cell.recipe, epochs=variant.rounds), variant.rounds
            targets, iterations = cell.goal.steps(iterations), 1
        trained: list[Epoch] = []

        def train_round(model: nn.Module, masks: Masks | None, number: int) -> None:
            span = range(number * length, (number + 1) * length)
            trained.extend(train(model, self.batches, recipe, epochs=span, compute=cell.compute, masks=masks))

        model.train(not variant.eval_mode)
        bars = len(targets) * iterations * method.accumulate
        with task(self.progress, f"{cell.title}: pruning", bars) as advance:
            for _ in range(found.levels):
                advance()
            for target in targets[found.levels :]:
                trained.clear()
                began = time.monotonic()
                masks = prune(
                    model, self.batches.endless("prune", on_batch=advance), F.cross_entropy, method=method,
                    **target.as_dict(), iterations=iterations, masks=found.masks, train=train_round,
                    seed=seed_of(cell.seed, "prune"), autocast=cell.compute.autocast_dtype, progress=False,
                    on_ties="index",  # that a network has collapsed is a result, too
                )  # fmt: skip
                if torch.device(cell.compute.device).type == "cuda":
                    torch.cuda.synchronize(cell.compute.device)
                seconds, rounds = time.monotonic() - began, _seconds(trained)
                found = Pruned(
                    masks,
                    found.levels + 1,
                    found.prune_seconds + seconds - rounds,
                    found.round_seconds + rounds,
                )
                if isinstance(method, methods.Imp):
                    advance()
                yield found


def _seconds(epochs: list[Epoch]) -> float:
    return sum((epoch.seconds for epoch in epochs), 0.0)
