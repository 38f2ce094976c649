"""One cell from its initialisation to its result, in a folder that a kill at any moment does not spoil.

Per seed, one initialisation and one order of batches serve all. When a method prunes (its `stage`):

    warm-up         dense, epochs 0..W-1, whose weights are saved and serve all that share them, the dense
                    network too; pruned; then epochs W..E-1
    initialisation  pruned, then epochs 0..E-1 (W..E-1, after a warm-up that was asked for)
    training        gradual, rigl: after each of the first epochs; then the others with the masks held
                    imp: levels of training, each from the same initialisation; then epochs 0..E-1
                    early_crop: epochs until its rule says so, E at most; pruned; then epochs 0..E-1

What is pruned by channels is shrunk before the last training, which has a new optimizer in any case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from drive import methods
from drive.collapse import collapse
from drive.experiments.data.batches import Batches
from drive.experiments.data.dataset import Dataset, seed_of
from drive.experiments.runs.progress import task
from drive.experiments.runs.stored import AGAIN, load_tensors, reading, save_tensors
from drive.experiments.training.footprint import measured
from drive.experiments.training.history import Epoch, Log
from drive.experiments.training.loop import Paused, evaluate, train
from drive.experiments.training.macs import macs_left
from drive.masks import Masks
from drive.methods.base import Method
from drive.prune import prune
from drive.structured.shrink import Shrunk, shrink
from drive.targets.structures import CHANNELS
from drive.targets.targets import prunable

from . import work
from .cell import Cell
from .goal import Goal
from .variants import dense
from .work import CellWork, Result, Trained


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

    def train(self, model: nn.Module) -> Trained:
        cell, folder = self.cell, self.folder
        warmup = self._warm_up(model)
        entries = sum(w.numel() for w in prunable(model).values())
        shrunk, thinned = self._thinned(model)
        if shrunk is not None:
            model = shrunk.model
        pruned = self._pruned(model, entries)
        masks = pruned.masks
        # how many of the layers lead nowhere is a matter of the masks alone
        cut_off = collapse(model, masks, self.images.train_x[:1].float()) if masks else None
        held = masks
        if cell.variant.structure == CHANNELS and masks is not None:
            shrunk, held = shrink(model, masks, self._example), None
            model = shrunk.model
        epochs = range(cell.variant.first_epoch, cell.recipe.epochs)
        with task(self.progress, f"{cell.title}: training", len(epochs) * len(self.batches)) as advance:
            history = train(
                model, self.batches, cell.recipe, epochs=epochs, compute=cell.compute, masks=held,
                checkpoint=self.checkpoint(folder), on_step=advance,
                log=Log(folder, tuple(warmup), tensorboard=self.tensorboard),
            )  # fmt: skip
        tested = len(self.images.test_y)
        # a training tests its last epoch
        accuracy = history[-1].accuracy if history else evaluate(model, self.batches, cell.compute) / tested
        assert accuracy is not None
        result = {
            "method": cell.variant.name,
            **cell.goal.as_dict(),
            "scale": cell.scale,
            "epochs": cell.recipe.epochs,
            "correct": round(accuracy * tested),
            "final_loss": history[-1].loss if history else None,
            "empty": cut_off.empty if cut_off else [],
            "disconnected": cut_off.disconnected if cut_off else [],
            "warmup_seconds": _seconds(warmup),
            "prune_seconds": thinned.prune_seconds + pruned.prune_seconds,
            "round_seconds": thinned.round_seconds + pruned.round_seconds,
            "train_seconds": _seconds(history),
        }
        if cell.variant.smaller:
            result |= self._smaller(model, shrunk, held)
        return Trained(result, masks, shrunk)

    @property
    def _example(self) -> Tensor:
        return self.images.train_x[:1].float()

    def _smaller(self, model: nn.Module, shrunk: Shrunk | None, masks: Masks | None) -> Result:
        """What a network costs that was shrunk, or the dense one beside it.

        Args:
            masks: of entries of the shrunk one.
        """
        inputs, labels = next(self.batches.epoch(0))
        footprint = measured(model, inputs, labels, self.cell.recipe)
        if shrunk is None:
            return {"footprint": footprint.as_dict()}
        before, after = shrunk.before, shrunk.after
        return {
            "footprint": footprint.as_dict(),
            "nodes_left": after.nodes / before.nodes,
            "parameters_left": after.parameters / before.parameters,
            "macs_left": after.multiply_adds / before.multiply_adds * macs_left(model, masks, self._example),
        }

    def _thinned(self, model: nn.Module) -> tuple[Shrunk | None, Pruned]:
        """Without the channels that go first, if some do."""
        cell, path = self.cell, self.folder / "thinned.pt"
        if not cell.variant.prior or cell.variant.method == "dense":
            return None, Pruned()
        if path.exists():
            found = self._restored(path, model)
        else:
            found = self._prune(model, cell.variant.make(), Goal(cell.variant.prior), CHANNELS)
            assert found.masks is not None
            self._save(path, model, found)
        assert found.masks is not None
        return shrink(model, found.masks, self._example), found

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

    def _pruned(self, model: nn.Module, entries: int) -> Pruned:
        """Prune in place, or take over what was pruned before."""
        path, found = self.folder / "pruned.pt", Pruned()
        if self.cell.variant.method == "dense":
            return found
        if path.exists():
            found = self._restored(path, model)
        began = time.monotonic()
        for pruned in self._levels(model, found, entries):
            found = pruned
            # what takes no time is done again rather than kept
            if time.monotonic() - began >= work.SAVE_EVERY or time.monotonic() >= self.deadline:
                self._save(path, model, found)
                began = time.monotonic()
                if began >= self.deadline:
                    raise Paused
        return found

    def _save(self, path: Path, model: nn.Module, pruned: Pruned) -> None:
        assert pruned.masks is not None
        masks = pruned.masks.state_dict()
        save_tensors(path, {**vars(pruned), "model": model.state_dict(), "masks": masks})

    def _restored(self, path: Path, model: nn.Module) -> Pruned:
        state = load_tensors(path)
        with reading(path, "of this network", AGAIN):
            model.load_state_dict(state.pop("model"))
            masks = Masks(state.pop("masks")).to(self.cell.compute.device)
            return Pruned(masks, **state)

    def _levels(self, model: nn.Module, found: Pruned, entries: int) -> Iterator[Pruned]:
        """Prune step by step, from what is found; only IMP, which trains for long, has several.

        Args:
            entries: prunable ones of the network before it was thinned.
        """
        cell, variant, method = self.cell, self.cell.variant, self.cell.variant.make()
        goal = cell.goal
        if variant.prior:
            left = (1 - goal.gone) * entries / sum(w.numel() for w in prunable(model).values())
            goal = Goal(max(0.0, 1 - left))
            method = methods.Crop() if variant.method == "early_crop" else method  # it has settled before
        by_outputs = variant.structure == CHANNELS
        iterations = variant.iterations or method.iterations_to(goal.gone, by_outputs)
        targets, length = [goal], 1
        if isinstance(method, methods.Imp):
            # level by level the same as in one call: each ends in the initialisation with its masks
            length, targets, iterations = variant.rounds, goal.steps(iterations), 1
        bars = len(targets) * iterations * method.accumulate
        with task(self.progress, f"{cell.title}: pruning", bars) as advance:
            for _ in range(found.levels):
                advance()
            for target in targets[found.levels :]:
                part = self._prune(
                    model, method, target, variant.structure, iterations, found.masks, length, advance
                )
                found = Pruned(
                    part.masks,
                    found.levels + 1,
                    found.prune_seconds + part.prune_seconds,
                    found.round_seconds + part.round_seconds,
                )
                if isinstance(method, methods.Imp):
                    advance()
                yield found

    def _prune(
        self,
        model: nn.Module,
        method: Method,
        goal: Goal,
        structure: str,
        iterations: int | None = None,
        masks: Masks | None = None,
        length: int = 1,
        advance: Callable[[], None] = lambda: None,
    ) -> Pruned:
        """In one call.

        Args:
            length: epochs of a round of training, a schedule of its own if there are several.
        """
        cell, trained = self.cell, list[Epoch]()
        recipe = cell.recipe if length == 1 else replace(cell.recipe, epochs=length)

        def train_round(model: nn.Module, masks: Masks | None, number: int) -> None:
            span = range(number * length, (number + 1) * length)
            trained.extend(train(model, self.batches, recipe, epochs=span, compute=cell.compute, masks=masks))

        model.train(not cell.variant.eval_mode)
        began = time.monotonic()
        found = prune(
            model, self.batches.endless("prune", on_batch=advance), F.cross_entropy, method=method,
            **goal.as_dict(), structure=structure, iterations=iterations, masks=masks, train=train_round,
            seed=seed_of(cell.seed, "prune"), autocast=cell.compute.autocast_dtype, progress=False,
            on_ties="index",  # that a network has collapsed is a result, too
        )  # fmt: skip
        if torch.device(cell.compute.device).type == "cuda":
            torch.cuda.synchronize(cell.compute.device)
        rounds = _seconds(trained)
        return Pruned(found, 1, time.monotonic() - began - rounds, rounds)


def _seconds(epochs: list[Epoch]) -> float:
    return sum((epoch.seconds for epoch in epochs), 0.0)
