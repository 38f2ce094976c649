"""The trainings of the pipeline: before pruning, with a mask that is learned or not, and after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drive.experiments.training.recipe import Recipe
from drive.experiments.training.stage import Stage
from drive.pipeline import LearnedMask, Softened
from drive.targets.targets import prunable


class Before(Stage):
    """Dense training; beside it, the rank of what each layer has learned, which ZerO claims to keep low."""

    def __init__(self, model: nn.Module):
        """
        Args:
            model: as it is initialised.
        """
        self._weights = prunable(model)
        self._start = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def layers(self) -> dict[str, dict[str, float]]:
        learned = {name: weight.detach() - self._start[name] for name, weight in self._weights.items()}
        return {name: {"rank": stable_rank(change)} for name, change in learned.items()}


class Learning(Before):
    """Training with a mask, whose logits have an optimizer of their own."""

    def __init__(self, learned: LearnedMask, lr: float):
        super().__init__(learned)
        self._learned, self._lr = learned, lr

    def optimizers(self, model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
        learned = self._learned
        return [recipe.make_optimizer(learned.weights()), torch.optim.Adam(learned.logits(), lr=self._lr)]

    def at(self, progress: float) -> None:
        self._learned.at(progress)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return super().loss(outputs, labels) + self._learned.penalty()

    def layers(self) -> dict[str, dict[str, float]]:
        ranks = super().layers()
        return {
            state.name: {"density": state.density, "penalty": state.penalty, **ranks[state.name]}
            for state in self._learned.layer_states()
        }


class After(Stage):
    """Training that is smoothed at first, of labels, activations and skips."""

    def __init__(self, softened: Softened):
        self._softened = softened

    def at(self, progress: float) -> None:
        self._softened.at(progress)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        smoothing = self._softened.label_smoothing(outputs.shape[1])
        return F.cross_entropy(outputs, labels, label_smoothing=smoothing)


def stable_rank(weight: Tensor) -> float:
    """Sum of the squared singular values over the largest one's, of a weight [outputs, ...]; 0 of zeros.

    At most the rank, and unlike it not as large as can be for all that has been trained.
    """
    squares = torch.linalg.svdvals(weight.flatten(1).float()).square()
    return float(squares.sum() / squares.max()) if squares.any() else 0.0
