"""`drive sparse-bench`: a saved sparse network on the sparse ops against the dense ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from drive import sparse
from drive.experiments.runs.stored import load_tensors, reading
from drive.experiments.training.networks import Network
from drive.masks import Masks

MODES = ("inference", "training")


class Saved:
    """A network and its masks, from the files that `drive prune` and `drive train` leave."""

    def __init__(self, checkpoint: Path, masks: Path | None):
        """Load both.

        Args:
            checkpoint: its entry "network" says what to build, "model" holds the weights.
            masks: of that network; without one, weights that are exactly 0 count as pruned.

        Raises:
            InputError: a file that cannot be read, or is of something else.
        """
        state = load_tensors(checkpoint, "--checkpoint")
        with reading(checkpoint, "one of `drive prune` or `drive train`", argument="--checkpoint"):
            self.network = Network(**state["network"])
            self.model: nn.Module = self.network.build()
            self.model.load_state_dict(state["model"])
        if masks is None:
            self.masks = self._of_zeros()
            return
        with reading(masks, f"a masks file of {self.network.name}", argument="--masks"):
            self.masks = Masks.load(masks).apply_(self.model)

    def _of_zeros(self) -> Masks:
        layers = (nn.Conv2d, nn.Linear)
        return Masks({
            f"{name}.weight": layer.weight != 0
            for name, layer in self.model.named_modules()
            if isinstance(layer, layers)
        })  # fmt: skip

    def convert(self, mode: str, batch_size: int) -> sparse.Report:
        """Measure one of MODES with batches of this size."""
        self.model.train(mode == "training")
        side = self.network.side
        images = torch.randn(batch_size, self.network.channels, side, side)
        return sparse.report(sparse.convert(self.model, self.masks, images))
