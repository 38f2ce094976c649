"""What a method is: a name, how often it prunes, and what it ranks entries by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from drive.capture import GraphedGradients
from drive.gradients import Batch, LossFn, LossGradients
from drive.masks import Masks
from drive.schedules import Schedule


@dataclass(frozen=True)
class Problem:
    """What a method may look at: the model with its prunable weights, fresh batches, the loss.

    `gradients_of(batch)` is dL/dtheta on a batch, computed eagerly or by a CUDA graph. `masks` are those
    of the iterations before; None at the first one, if the caller gave none.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    batches: Iterator[Batch]
    loss_fn: LossFn
    gradients_of: LossGradients | GraphedGradients
    masks: Masks | None = None

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


@dataclass(frozen=True)
class Ranking:
    """What the entries are ranked by, the largest survive: one tensor per weight, of its shape.

    gradients: |theta * gradient|; with mask_gradients |theta * mask_gradient * gradient|, in float64. Of the
        weights' dtype, any strides. These scores are never in memory.
    scores: |score|, or with signed=True the score itself (in float32). Any floating dtype.
    None of them: |theta|.
    """

    gradients: Mapping[str, Tensor] | None = None
    mask_gradients: Mapping[str, Tensor] | None = None
    scores: Mapping[str, Tensor] | None = None
    signed: bool = False


class Method(ABC):
    """Base of all methods.

    A method says how many iterations it takes and on what schedule unless the caller does, and what
    the entries are ranked by at each.
    """

    name: ClassVar[str]
    iterations: int = 1
    schedule: str | Schedule = "one_shot"

    @abstractmethod
    def rank(self, problem: Problem) -> Ranking:
        """What to rank by in one iteration."""
