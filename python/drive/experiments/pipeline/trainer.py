"""One network through all stages, in a folder that a kill at any moment does not spoil.

The first training, and what is learned in it, serve all cells that differ later only: the first of them to
come trains it, in a folder of its own. Pruning takes no time and is done again after a kill; both trainings
go on from their last epoch that is saved, to the bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from drive.collapse import collapse
from drive.experiments.data.batches import Batches
from drive.experiments.data.dataset import seed_of
from drive.experiments.paper.cell import Cell
from drive.experiments.paper.trainer import CellRun
from drive.experiments.paper.work import CellWork, Trained
from drive.experiments.runs.progress import task
from drive.experiments.training.history import Epoch, Log
from drive.experiments.training.loop import evaluate, train
from drive.masks import Masks
from drive.pipeline import LearnedMask, Softened, check_gradients, hadamard_init_
from drive.prune import prune

from .cell import PipelineCell
from .stages import After, Before, Learning


class PipelineRun(CellWork[PipelineCell]):
    """The work on one cell."""

    def train(self, model: nn.Module) -> Trained:
        cell = self.cell
        if cell.stages.init:
            hadamard_init_(model)
            check_gradients(model, next(cell.batches(self.images, "before").epoch(0)), F.cross_entropy)
        wrapped = self._wrapped(model)
        first = self._first_training(wrapped)
        masks = prune(
            wrapped, [], method="learned-mask" if cell.stages.mask else "magnitude", sparsity=cell.sparsity,
            progress=False, on_ties="index",  # that a network has collapsed is a result, too
        )  # fmt: skip
        if isinstance(wrapped, LearnedMask):
            wrapped.finish()
        batches = cell.batches(self.images, "after")
        pruned = evaluate(model, batches, cell.compute)
        cut_off = collapse(model, masks, self.images.train_x[:1].float())
        second = self._second_training(model, masks, batches)
        return Trained({
            "method": cell.stages.name, "options": cell.options.name, "sparsity": cell.sparsity,
            "epochs": 2 * cell.recipe.epochs, "correct": evaluate(model, batches, cell.compute),
            "correct_before": round((first[-1].accuracy or 0.0) * len(self.images.test_y)),
            "correct_pruned": pruned, "empty": cut_off.empty, "disconnected": cut_off.disconnected,
            "layers": [[epoch.epoch, epoch.layers] for epoch in first],
            "first_seconds": sum(epoch.seconds for epoch in first),
            "second_seconds": sum(epoch.seconds for epoch in second),
        }, masks)  # fmt: skip

    def _wrapped(self, model: nn.Module) -> nn.Module:
        options = self.cell.options
        if not self.cell.stages.mask:
            return model
        return LearnedMask(
            model, options.forward, options.straight_through, density=options.density,  # type: ignore[arg-type]
            undecided=options.undecided, delay=options.delay, ramp=options.ramp,
        )  # fmt: skip

    def _first_training(self, model: nn.Module) -> list[Epoch]:
        """Before pruning."""
        cell, batches = self.cell, self.cell.batches(self.images, "before")
        stage = Learning(model, cell.options.lr) if isinstance(model, LearnedMask) else Before(model)
        epochs = cell.recipe.epochs
        with (
            self.shared(cell.before) as folder,
            task(self.progress, f"{cell.title}: before pruning", epochs * len(batches)) as advance,
        ):
            return train(
                model, batches, cell.recipe, epochs=range(epochs), compute=cell.compute,
                checkpoint=self.checkpoint(folder), on_step=advance, stage=stage,
                log=Log(folder, tensorboard=self.tensorboard),
            )  # fmt: skip

    def _second_training(self, model: nn.Module, masks: Masks, batches: Batches) -> list[Epoch]:
        """After pruning, in place; what is soft at first is gone afterwards."""
        cell, stages = self.cell, self.cell.stages
        soft = stages.smooth or stages.skips
        softened = None
        if soft:
            torch.manual_seed(seed_of(cell.seed, "skips"))
            smoothing = 0.1 if stages.smooth else 0.0
            softened = Softened(model, smoothing=smoothing, activations=stages.smooth, skips=stages.skips)
        epochs = cell.recipe.epochs
        with task(self.progress, f"{cell.title}: after pruning", epochs * len(batches)) as advance:
            history = train(
                softened or model, batches, cell.recipe, epochs=range(epochs), compute=cell.compute,
                masks=masks, checkpoint=self.checkpoint(self.folder), on_step=advance,
                stage=After(softened) if softened else None,
                log=Log(self.folder, tensorboard=self.tensorboard),
            )  # fmt: skip
        if softened:
            softened.at(1.0)
            softened.finish()
        return history


def work(cell: Cell | PipelineCell, *arguments: object, **options: object) -> CellRun | PipelineRun:
    """The work on a cell of either kind."""
    run = PipelineRun if isinstance(cell, PipelineCell) else CellRun
    return run(cell, *arguments, **options)  # type: ignore[arg-type]
