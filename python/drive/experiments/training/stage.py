"""A stage of training: what is minimised, by which optimizers, and what changes on the way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recipe import Recipe


class Stage:
    """Plain training: the cross-entropy, by the recipe's optimizer. Others derive from it."""

    def optimizers(self, model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
        """Fresh ones; the recipe's learning rates are those of the first."""
        return [recipe.make_optimizer(model.parameters())]

    def at(self, progress: float) -> None:
        """Called before every epoch: how far the training is, from 0."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """What is minimised, a scalar; outputs [B, classes], labels [B] int64."""
        return F.cross_entropy(outputs, labels)

    def layers(self) -> dict[str, dict[str, float]]:
        """Numbers of each layer after an epoch, by name: what log and TensorBoard show of it."""
        return {}
