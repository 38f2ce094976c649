"""A cell of `drive pipeline`: one network through all stages, named by all that its result depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from drive.experiments.data.batches import Batches
from drive.experiments.data.dataset import Dataset, seed_of
from drive.experiments.training.compute import Compute
from drive.experiments.training.networks import Network
from drive.experiments.training.recipe import Recipe

from .rows import MaskOptions, Stages


@dataclass(frozen=True)
class PipelineCell:
    """One network, trained before pruning and after it by `recipe` each."""

    data: str
    model: str
    stages: Stages
    options: MaskOptions
    sparsity: float
    seed: int
    recipe: Recipe
    compute: Compute
    limit: int | None = None

    @property
    def name(self) -> str:
        """A folder's name."""
        kept = [f"{1 - self.sparsity:.4g}"] if self.sparsity else ["before"]
        stages = self.stages.name.replace("+", "-")
        return "-".join(
            [self.data, self.model, "pipeline", stages, *kept, f"seed{self.seed}", self._digest()]
        )

    @property
    def title(self) -> str:
        """For people."""
        return (
            f"{self.model} on {self.data}, stages {self.stages.name}, "
            f"{100 * (1 - self.sparsity):.3g} % kept, "
            f"seed {self.seed}"
        )

    @property
    def before(self) -> PipelineCell:
        """What all cells share that differ after the first training only; it is no cell of its own."""
        return replace(self, stages=Stages(self.stages.init, self.stages.mask), sparsity=0.0)

    def images(self, data: Dataset) -> Dataset:
        return data.limited(self.limit)

    def network(self, images: Dataset) -> Network:
        return Network(self.model, images.classes, images.channels, images.side)

    def batches(self, images: Dataset, part: str) -> Batches:
        """Of the training "before" pruning or "after" it."""
        recipe, seed = self.recipe, seed_of(self.seed, part)
        return Batches(images, recipe.batch_size, seed, recipe.padding, recipe.flip)

    def as_dict(self) -> dict[str, Any]:
        """All that the result depends on, as plain values; of the mask nothing where there is none."""
        return {
            **asdict(self), "recipe": self.recipe.as_dict(), "compute": self.compute.as_dict(),
            "options": asdict(self.options) if self.stages.mask else None,
        }  # fmt: skip

    def _digest(self) -> str:
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
