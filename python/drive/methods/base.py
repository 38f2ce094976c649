"""What a method is: a name, how often it prunes, and the gradients that its score is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from drive.capture import GraphedGradients
from drive.gradients import Batch, LossFn, LossGradients


@dataclass(frozen=True)
class Problem:
    """What a method may look at: the model with its prunable weights, fresh batches, the loss.

    `gradients_of(batch)` is dL/dtheta on a batch, computed eagerly or by a CUDA graph.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    batches: Iterator[Batch]
    loss_fn: LossFn
    gradients_of: LossGradients | GraphedGradients

    def loss_gradients(self, *, reuse: bool = False) -> dict[str, Tensor]:
        """dL/dtheta of the prunable weights on one fresh batch; `.grad` is not touched.

        Args:
            reuse: the next call may overwrite the tensors, which saves copying them.

        Raises:
            ValueError: a prunable weight has no part in the loss.
        """
        found = self.gradients_of(next(self.batches))
        if reuse or not self.gradients_of.overwrites:
            return found
        return {name: grad.clone() for name, grad in found.items()}


class Method(ABC):
    """Base of all methods: entries are kept by the largest |theta * gradient|.

    A method says how many iterations it takes and on what schedule unless the caller does, and
    what stands in the gradient's place at each.
    """

    name: ClassVar[str]
    iterations: int = 1
    schedule: str = "one_shot"

    @abstractmethod
    def gradients(self, problem: Problem) -> dict[str, Tensor]:
        """One tensor per prunable weight (its shape and dtype, any strides), for one iteration."""
