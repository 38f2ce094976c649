"""`drive train`: one network, dense or sparse, in a run folder."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import nn

from drive import methods
from drive.experiments.data.batches import Batches
from drive.experiments.data.dataset import Dataset, seed_of
from drive.experiments.runs.folder import Options
from drive.experiments.runs.stored import AGAIN, load_tensors, reading, write_json
from drive.masks import Masks
from drive.prune import prune
from drive.structured.shrink import shrink
from drive.targets.structures import CHANNELS

from .compute import Compute
from .history import Log
from .loop import Checkpoint, evaluate, train
from .macs import macs_left
from .networks import Network
from .recipe import Recipe


class Training:
    """A run in a folder: `checkpoint.pt`, whole after every epoch, and at the end `report.json`."""

    def __init__(self, options: Options, data: Dataset, folder: Path):
        """Build the network, load weights and masks.

        Args:
            options: of `drive train`; init and masks are paths or None, sparsity and macs shares or None.
            data: the images.
            folder: of the run.

        Raises:
            InputError: images that do not fit the model; initial weights or masks of another one; devices
                that are not here.
        """
        self.options, self.folder, self.device = options, folder, options["device"]
        self.compute = Compute(**{field.name: options[field.name] for field in fields(Compute)})
        self.data = data.to(self.device)
        self.network = Network(options["model"], data.classes, data.channels, data.side)
        torch.manual_seed(seed_of(options["seed"], "initialisation"))
        self.model = self.network.build()
        self._load_weights()
        self.masks = self._load_masks()
        self.compute.place(self.model)

    def run(self, progress: Progress) -> dict[str, Any]:
        """Prune, if it is to be; train, or go on from the checkpoint.

        Returns:
            The report: the options, the loss of every epoch, test accuracy, sparsity, and what is left of the
            multiply-adds.

        Raises:
            InputError: training diverges.
        """
        batches = Batches(self.data, self.options["batch_size"], self.options["seed"])
        epochs = self.options["epochs"]
        recipe = Recipe(epochs, self.options["lr"], self.options["batch_size"])
        if self.options["sparsity"] is not None or self.options["macs"] is not None:
            self.masks = self._prune(batches, recipe)
        shrunk = None
        if self.options["structure"] == CHANNELS and self.masks is not None:
            shrunk = shrink(self.model, self.masks, self.data.train_x[:1].float())
        model, held = (self.model, self.masks) if shrunk is None else (shrunk.model, None)
        bar = progress.add_task(f"training {self.network.name}", total=epochs * len(batches))
        history = train(
            model, batches, recipe, epochs=range(epochs), masks=held, compute=self.compute,
            checkpoint=Checkpoint(self.folder / "checkpoint.pt", self.network.as_dict()),
            log=Log(self.folder, tensorboard=self.options["tensorboard"]),
            on_step=lambda: progress.advance(bar),
        )  # fmt: skip
        report = {
            "config": self.options,
            "losses": [epoch.loss for epoch in history],
            "accuracy": evaluate(model, batches, self.compute) / len(self.data.test_y),
            "sparsity": self.masks.sparsity() if self.masks else 0.0,
            "macs_left": macs_left(self.model, self.masks, self.data.train_x),
        }
        if shrunk is not None:
            shrunk.save(self.folder / "small.safetensors")
            report["sparsity"] = 1 - shrunk.after.parameters / shrunk.before.parameters
            report["macs_left"] = shrunk.after.multiply_adds / shrunk.before.multiply_adds
        write_json(self.folder / "report.json", report)
        return report

    def _prune(self, batches: Batches, recipe: Recipe) -> Masks:
        """By a method, or as the run has been pruned before."""
        path = self.folder / "masks.safetensors"
        if path.exists():
            with reading(path, f"masks of {self.network.name}", AGAIN):
                return Masks.load(path).apply_(self.model).to(self.device)

        def train_round(model: nn.Module, masks: Masks | None, number: int) -> None:
            train(model, batches, recipe, epochs=range(number, number + 1), compute=self.compute, masks=masks)

        method = methods.get(self.options["method"])
        if isinstance(method, methods.EarlyCrop):
            method.latest = recipe.epochs
        masks = prune(
            self.model, batches.endless("prune", on_batch=lambda: None), F.cross_entropy, method=method,
            sparsity=self.options["sparsity"], macs=self.options["macs"], alpha=self.options["alpha"],
            structure=self.options["structure"], train=train_round,
            seed=seed_of(self.options["seed"], "prune"), autocast=self.compute.autocast_dtype,
        )  # fmt: skip
        masks.save(path)
        return masks

    def _load_weights(self) -> None:
        path = self.options["init"]
        if path is None:
            return
        state = load_tensors(Path(path), "--init")["model"]
        with reading(Path(path), f"the weights of {self.network}", argument="--init"):
            self.model.load_state_dict(state)

    def _load_masks(self) -> Masks | None:
        path = self.options["masks"]
        if path is None:
            return None
        with reading(Path(path), f"a masks file of {self.network.name}", argument="--masks"):
            return Masks.load(path).apply_(self.model).to(self.device)
