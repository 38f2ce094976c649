"""A cell: one network to train, named by all that its result depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from drive.experiments.data.batches import Batches
from drive.experiments.data.dataset import Dataset
from drive.experiments.training.compute import Compute
from drive.experiments.training.networks import Network
from drive.experiments.training.recipe import Recipe

from .goal import Goal
from .variants import Variant


@dataclass(frozen=True)
class Cell:
    """One network on one data set, pruned in one way to one goal, from one seed.

    Attributes:
        scale: fraction of the published epochs and training images that `recipe` and `variant` stand for; the
            images are cut to it here.
        limit: training images, before `scale`. None: all.
    """

    data: str
    model: str
    variant: Variant
    goal: Goal
    seed: int
    recipe: Recipe
    compute: Compute
    scale: float = 1.0
    limit: int | None = None

    @property
    def name(self) -> str:
        """A folder's name; what it does not say is in the digest, so that different cells never meet."""
        readable = [self.data, self.model, self.variant.name.replace(" ", "-")]
        goal = [self.goal.name] if self.goal.gone else []
        return "-".join([*readable, *goal, f"seed{self.seed}", self._digest()])

    @property
    def title(self) -> str:
        """For people."""
        to = f" to {self.goal.title}" if self.goal.gone else ""
        return f"{self.model} on {self.data}, {self.variant.name}{to}, seed {self.seed}"

    def images(self, data: Dataset) -> Dataset:
        """The training images that this cell takes, and all test images."""
        data = data.limited(self.limit)
        return data if self.scale == 1 else data.limited(max(1, round(len(data.train_y) * self.scale)))

    def batches(self, images: Dataset) -> Batches:
        recipe = self.recipe
        return Batches(images, recipe.batch_size, self.seed, recipe.padding, recipe.flip)

    def network(self, images: Dataset) -> Network:
        return Network(self.model, images.classes, images.channels, images.side)

    def as_dict(self) -> dict[str, Any]:
        """All that the result depends on, as plain values."""
        found = {
            **asdict(self), **self.goal.as_dict(), "variant": self.variant.as_dict(),
            "recipe": self.recipe.as_dict(), "compute": self.compute.as_dict(),
        }  # fmt: skip
        del found["goal"]
        return found

    def _digest(self) -> str:
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
