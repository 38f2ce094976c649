"""`drive prune`, `drive compare`: pruning methods against each other and the dense network, resumable.

Per seed, one initialisation and one order of batches serve all. When a method prunes (its `stage`):

    warm-up         dense, epochs 0..W-1, whose weights are saved and serve the dense network too; pruned;
                    then epochs W..E-1
    initialisation  pruned, then epochs 0..E-1
    training        gradual, rigl: after each of the first 3/4 E epochs; then the others with the masks held
                    imp: levels of E epochs each from the same initialisation; then epochs 0..E-1
                    early_crop: epochs until its rule says so, E at most; pruned; then epochs 0..E-1

Each (seed, method, sparsity) is a cell. Its result depends on nothing but the configuration: a cell
that a kill interrupted is run again, finished ones are read back from their files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress, TaskID
from torch import nn

from . import methods
from .data import Batches, Dataset, seed_of
from .inputs import InputError
from .masks import Masks
from .models import Network
from .paths import collapse
from .prune import prune
from .runs import read_json, save_tensors, write_json
from .train import Checkpoint, Recipe, evaluate, train

SAVE_EVERY = 60.0  # seconds between two savings of a training in progress


@dataclass(frozen=True)
class Config:
    """All that the results depend on: the options of `drive prune` and `drive compare`."""

    data: str
    data_dir: str | None
    limit_train: int | None
    model: str
    methods: list[str]
    sparsities: list[float]
    seeds: int
    epochs: int
    warmup_epochs: int
    iterations: int
    batch_size: int
    lr: float
    sparse_ops: bool
    device: str
    threads: int

    @classmethod
    def read(cls, options: dict[str, Any]) -> Config:
        """From a run's stored options."""
        if set(options) != {field.name for field in fields(cls)}:
            raise InputError("--out must hold a run of this version of drive, got other options in it")
        return cls(**options)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Cell(NamedTuple):
    """One network to train."""

    seed: int
    method: str
    sparsity: float

    @property
    def name(self) -> str:
        return f"seed{self.seed}-{self.method}-{self.sparsity}"


class Experiment:
    """A run in a folder: `cells/` for what is finished, then checkpoint and masks of one network.

    `checkpoint.pt` and `masks.safetensors` are of the first seed's network at the highest sparsity,
    pruned by DRIVE (or the first method, if DRIVE is not among them).
    """

    def __init__(self, config: Config, data: Dataset, folder: Path):
        self.config = config
        self.data = data.to(config.device)
        self.folder = folder
        self.cells_folder = folder / "cells"
        self.network = Network(config.model, data.classes, data.channels, data.side)
        self.recipe = Recipe(config.epochs, config.lr)
        kept = "drive" if "drive" in config.methods else config.methods[0]
        self.exported = Cell(0, kept, max(config.sparsities))
        self.network.build()  # one that does not fit the images says so now

    def cells(self) -> list[Cell]:
        """All networks of the run, in the order in which they are trained."""
        config = self.config
        return [
            cell
            for seed in range(config.seeds)
            for cell in (
                Cell(seed, "dense", 0.0),
                *(Cell(seed, m, s) for m in config.methods for s in config.sparsities),
            )
        ]

    def run(self, progress: Progress) -> list[dict[str, Any]]:
        """Train every network that is not finished yet; the results of all, in the order of `cells`.

        Raises:
            InputError: the data are not those that the run was started with; training diverges.
        """
        self.cells_folder.mkdir(exist_ok=True)
        for partial in self.cells_folder.glob(".*.partial"):  # of a killed process
            partial.unlink()
        self._check_data()
        cells = self.cells()
        overall = progress.add_task("all networks", total=len(cells))
        results = []
        for cell in cells:
            path = self.cells_folder / f"{cell.name}.json"
            if not path.exists():
                write_json(path, self._run(cell, progress))
            results.append(read_json(path))
            progress.advance(overall)
        return results

    def _check_data(self) -> None:
        path, here = self.cells_folder / "data.json", self.data.fingerprint()
        if not path.exists():
            write_json(path, {"fingerprint": here})
        elif read_json(path)["fingerprint"] != here:
            raise InputError(
                f"--data must be what {self.folder} was started with, got other images or labels"
            )

    def _run(self, cell: Cell, progress: Progress) -> dict[str, Any]:
        batches = Batches(self.data, self.config.batch_size, cell.seed)
        began = time.monotonic()
        model, start = self._start(cell, batches, progress)
        warmup_seconds = time.monotonic() - began
        masks, prune_seconds, round_seconds = None, 0.0, 0.0
        if cell.method != "dense":
            masks, start, prune_seconds, round_seconds = self._prune(cell, model, start, batches, progress)
            cut_off = collapse(model, masks, batches.data.train_x[:1].float())

        partial = Checkpoint(self.cells_folder / f"{cell.name}.pt", self.network.as_dict(), SAVE_EVERY)
        epochs = range(start, self.config.epochs)
        with _task(progress, f"{_title(cell)}: training", len(epochs) * len(batches)) as bar:
            began = time.monotonic()
            losses = train(
                model, batches, self.recipe, epochs=epochs, masks=masks, checkpoint=partial,
                sparse_ops=self.config.sparse_ops, on_step=lambda: progress.advance(bar.id),
            )  # fmt: skip
            train_seconds = time.monotonic() - began
        correct = evaluate(model, batches)
        if masks is not None:
            masks.save(self.cells_folder / f"{cell.name}.safetensors")
        if cell == self.exported and masks is not None:
            masks.save(self.folder / "masks.safetensors")
            save_tensors(
                self.folder / "checkpoint.pt",
                {"network": self.network.as_dict(), "model": model.state_dict()},
            )
        partial.path.unlink(missing_ok=True)
        return {
            "seed": cell.seed,
            "method": cell.method,
            "sparsity": cell.sparsity,
            "correct": correct,
            "tested": len(self.data.test_y),
            "final_loss": losses[-1],
            "kept": {name: int(mask.sum()) for name, mask in (masks or {}).items()},
            "empty": cut_off.empty if masks else [],
            "disconnected": cut_off.disconnected if masks else [],
            "warmup_seconds": warmup_seconds,  # next to nothing where another cell has warmed up before
            "prune_seconds": prune_seconds,
            "train_seconds": train_seconds + round_seconds,
        }

    def _start(self, cell: Cell, batches: Batches, progress: Progress) -> tuple[nn.Module, int]:
        """The network that a cell starts from, and the epoch at which it does."""
        torch.manual_seed(seed_of(cell.seed, "initialisation"))
        model = self.network.build().to(self.config.device)
        if cell.method != "dense" and methods.get(cell.method).stage != "warm-up":
            return model, 0
        warmup = self.config.warmup_epochs
        path = self.cells_folder / f"seed{cell.seed}-warmup.pt"
        with _task(progress, f"seed {cell.seed}: dense warm-up", warmup * len(batches)) as bar:
            checkpoint = Checkpoint(path, self.network.as_dict(), SAVE_EVERY)
            train(
                model, batches, self.recipe, epochs=range(warmup), checkpoint=checkpoint,
                on_step=lambda: progress.advance(bar.id),
            )  # fmt: skip
        return model, warmup

    def _prune(
        self, cell: Cell, model: nn.Module, start: int, batches: Batches, progress: Progress
    ) -> tuple[Masks, int, float, float]:
        """Prune in place: masks, the epoch to go on from, seconds of pruning, seconds of training in it."""
        method, epochs = methods.get(cell.method), self.config.epochs
        iterations = self.config.iterations if method.iterations > 1 else None
        rounds = Rounds(
            lambda model, span, masks: train(
                model, batches, self.recipe, epochs=span, masks=masks, sparse_ops=self.config.sparse_ops
            )
        )
        if isinstance(method, methods.GradualMagnitude | methods.RigL):
            start = max(1, epochs * 3 // 4)
            iterations = start + isinstance(method, methods.RigL)  # whose first one comes before any training
        elif isinstance(method, methods.Imp):
            rounds.epochs = epochs
        elif isinstance(method, methods.Crop):
            iterations = None
            if isinstance(method, methods.EarlyCrop):
                method = methods.EarlyCrop(latest=epochs)
        with _task(
            progress, f"{_title(cell)}: pruning", iterations or method.iterations_to(cell.sparsity)
        ) as bar:
            began = time.monotonic()
            masks = prune(
                model, batches.endless("prune", on_batch=lambda: progress.advance(bar.id)),
                F.cross_entropy, method=method, sparsity=cell.sparsity, iterations=iterations,
                train=rounds, seed=seed_of(cell.seed, "prune"), progress=False,
            )  # fmt: skip
            if self.config.device != "cpu":
                torch.cuda.synchronize()
            return masks, start, time.monotonic() - began - rounds.seconds, rounds.seconds


class Rounds:
    """The `train` of `drive.prune`: a round is an epoch, the seconds are added up."""

    def __init__(self, run: Callable[[nn.Module, range, Masks | None], object]):
        self.run, self.epochs, self.seconds = run, 1, 0.0

    def __call__(self, model: nn.Module, masks: Masks | None, number: int) -> None:
        began = time.monotonic()
        self.run(model, range(number * self.epochs, (number + 1) * self.epochs), masks)
        self.seconds += time.monotonic() - began


def _title(cell: Cell) -> str:
    return f"seed {cell.seed}: {cell.method}" + (f" {cell.sparsity:.1%}" if cell.sparsity else "")


class _task:
    """A bar that disappears when its work is done."""

    def __init__(self, progress: Progress, title: str, total: int):
        self.progress = progress
        self.id: TaskID = progress.add_task(title, total=total)

    def __enter__(self) -> _task:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.remove_task(self.id)
